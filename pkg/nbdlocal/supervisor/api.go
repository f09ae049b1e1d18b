package supervisor

import (
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// AttachRequest asks for a block device.
type AttachRequest struct {
	// ID names the attachment: a volume's handle, or an image's path. A second
	// request with the same ID returns the existing attachment, or block.ErrExists
	// if its other fields differ.
	ID string `json:"id"`
	// Server is the arguments with which the supervisor's own binary is run to
	// serve the volume; "--control PATH" is appended. Opaque to the supervisor.
	Server []string `json:"server"`
	// Transport forces one by name; "" takes the first that works here.
	Transport string `json:"transport,omitempty"`
	// ReadOnly makes the device read-only whatever the server's device can do.
	ReadOnly bool `json:"readOnly,omitempty"`
}

// Attachment is one attached volume.
type Attachment struct {
	AttachRequest
	Phase     Phase     `json:"phase"`
	Device    string    `json:"device"` // path of the block device
	SizeBytes int64     `json:"sizeBytes"`
	PID       int       `json:"pid"` // of the server; 0 if none runs
	Since     time.Time `json:"since"`
	Restarts  int       `json:"restarts"` // of the server
	// Problem says why the volume is not being served now; "" if it is.
	Problem string `json:"problem,omitempty"`
}

// Phase is where an attachment is in its life.
type Phase string

const (
	Attaching  Phase = "attaching"
	Serving    Phase = "serving"
	Recovering Phase = "recovering" // the server died; requests wait
	Detaching  Phase = "detaching"
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
	Protocol int        `json:"protocol"`
	PID      int        `json:"pid"`
	Info     block.Info `json:"info"`
	// Lost says why the server stopped serving for good (fenced), "" otherwise.
	Lost string `json:"lost,omitempty"`
}
