package supervisor

import (
	"encoding/json"
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/filter"
)

// AttachRequest asks for a block device.
type AttachRequest struct {
	// ID names the attachment: a volume's handle, or an image's path; at most
	// 1024 bytes. A second request with the same ID returns the existing
	// attachment, or block.ErrExists if its other fields differ.
	ID string `json:"id"`
	// Server is the arguments with which the supervisor's own binary is run to
	// serve the volume; "--control PATH" is appended. Opaque to the supervisor.
	// Paths in it must be absolute: a server's working directory is "/".
	Server []string `json:"server"`
	// Transport forces one by name; "" takes the first that works here. In an
	// Attachment it is the one in use.
	Transport string `json:"transport,omitempty"`
	// ReadOnly makes the device read-only whatever the server's device can do.
	ReadOnly bool `json:"readOnly,omitempty"`
	// Limits count instead of what the volume itself says; nil: what it says counts. A
	// second request does not change them: see Client.SetLimits.
	Limits *filter.Limits `json:"limits,omitempty"`
}

// Attachment is one attached volume.
type Attachment struct {
	AttachRequest
	Phase     Phase  `json:"phase"`
	Device    string `json:"device"` // path of the block device; "" if there is none
	SizeBytes int64  `json:"sizeBytes"`
	PID       int    `json:"pid"` // of the server; 0 if none runs
	// Version is the server's program's; "" if none runs, or it does not say.
	Version  string    `json:"version,omitempty"`
	Since    time.Time `json:"since"`
	Restarts int       `json:"restarts"` // of the server, by this supervisor
	// Recoveries counts how often this supervisor gave the device to another server,
	// after the one before had ended.
	Recoveries int `json:"recoveries,omitempty"`
	// UpgradePauseMillis is for how long requests waited when the server was last
	// replaced by way of an upgrade; 0 if it was not, by this supervisor.
	UpgradePauseMillis int64 `json:"upgradePauseMillis,omitempty"`
	// Problem says why the volume is not being served now; "" if it is.
	Problem string `json:"problem,omitempty"`
}

// UpgradeRequest asks for a server to be replaced by one of another program.
type UpgradeRequest struct {
	// Binary is the program's absolute path; "" is the supervisor's own program, as
	// for servers that are started otherwise.
	Binary string `json:"binary,omitempty"`
}

// UpgradeResult is what became of one attachment when all were upgraded.
type UpgradeResult struct {
	ID   string `json:"id"`
	From string `json:"from"` // version of the server before
	To   string `json:"to"`   // and after
	// Replaced says that the server is another one; if it is not and there is no
	// Problem, it had been of that program before.
	Replaced    bool   `json:"replaced"`
	PauseMillis int64  `json:"pauseMillis,omitempty"`
	Problem     string `json:"problem,omitempty"` // why it was not replaced
}

// stopRequest is the body, which may be missing, of a request to stop.
type stopRequest struct {
	Keep bool `json:"keep"` // attachments live on, for the next supervisor
}

// Phase is where an attachment is in its life.
type Phase string

const (
	Attaching  Phase = "attaching"
	Serving    Phase = "serving"
	Recovering Phase = "recovering" // the server died; requests wait
	Detaching  Phase = "detaching"  // with a Problem: closing the image failed; detach again
	// Lost: the device is gone without a detach, because the kernel dropped it or
	// because another node owns the volume now; Problem says which. Nothing runs
	// for it any more. A detach closes the image where that is still due and
	// forgets the attachment; an attach with the same ID replaces it.
	Lost Phase = "lost"
)

// Status describes a supervisor.
type Status struct {
	Version     string            `json:"version"`
	PID         int               `json:"pid"`
	Attachments int               `json:"attachments"`
	Transports  []TransportStatus `json:"transports"` // in order of preference
}

// TransportStatus says whether a transport works on this node.
type TransportStatus struct {
	Name    string `json:"name"`
	Problem string `json:"problem,omitempty"` // "" = it works
}

// Hello is a server's description of itself and its device.
type Hello struct {
	Protocol int        `json:"protocol"` // ServerProtocol
	PID      int        `json:"pid"`
	Version  string     `json:"version,omitempty"` // of the program
	Info     block.Info `json:"info"`
}

// ServerProtocol is the version of the protocol between supervisor and servers. A
// supervisor adopts servers of earlier builds: hello, files and stop keep their
// meaning in every version.
const ServerProtocol = 1

// ServerStats is what a server counts.
type ServerStats struct {
	Since   time.Time       `json:"since"`            // when the server opened its device
	Serving map[string]int  `json:"serving"`          // descriptors by protocol
	Device  json.RawMessage `json:"device,omitempty"` // of Opened.Stats

	Requests filter.Figures `json:"requests"`        // what was asked of the device
	Limits   filter.Limits  `json:"limits"`          // as they count now
	Waits    filter.Waits   `json:"waits"`           // what the limits made of requests
	Image    *ImageStats    `json:"image,omitempty"` // nil: not known
}

const (
	maxIDBytes     = 1024
	maxServerBytes = 64 << 10
)

// validate checks what a client sent.
func (r AttachRequest) validate() error {
	if err := validateID(r.ID); err != nil {
		return err
	}
	total := 0
	for _, arg := range r.Server {
		total += len(arg)
	}
	if len(r.Server) == 0 || total > maxServerBytes {
		return fmt.Errorf("attach %s: server has %d arguments of %d bytes together, want 1 or more and at most %d bytes: %w",
			r.ID, len(r.Server), total, maxServerBytes, block.ErrInvalid)
	}
	if err := (LimitsRequest{r.Limits}).validate(); err != nil {
		return fmt.Errorf("attach %s: %w", r.ID, err)
	}
	return nil
}

func validateID(id string) error {
	// "." and ".." cannot be said in a URL's path.
	if id == "" || len(id) > maxIDBytes || id == "." || id == ".." || !utf8.ValidString(id) {
		return fmt.Errorf("attachment id %.80q: want 1 to %d bytes of UTF-8 other than %q and %q: %w",
			id, maxIDBytes, ".", "..", block.ErrInvalid)
	}
	return nil
}
