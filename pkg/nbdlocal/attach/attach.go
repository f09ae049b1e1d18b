// Package attach makes local block devices out of servers: it asks the kernel for a
// device whose requests arrive at file descriptors, and hands those to whoever
// serves them. It never sees an image.
//
//   - nbd: the kernel's nbd driver, configured by generic netlink; requests arrive in
//     NBD's transmission phase on socket pairs.
//   - ublk: the kernel's ublk driver, configured and served by io_uring; each queue of a
//     device has a thread of the server's. Errors arrive as what they are.
//   - fuse: a FUSE file system of one file, with a loop device in direct-I/O mode on
//     top, for kernels without either.
//
// A transport's descriptors outlive the process that serves them: when it dies,
// Recover hands new or kept descriptors to its successor, and the kernel resends what
// was unanswered. Applications see a pause, never an error.
//
// # Files, in the order in which to read them
//
//   - attach.go: [Transport], what callers see
//   - nbd.go: the nbd transport, and why it has the timeouts it has; nbdnetlink.go:
//     the kernel's interface; socketpair.go: connections
//   - ublk.go: the ublk transport; ublkprobe.go: which kernels are fit for it; ublkctl.go:
//     control commands and their limits; ublkproto.go: the kernel's interface; package
//     uring: io_uring
//   - ublkserve.go: [ServeUBLK], the server's side; ublkqueue.go: its threads and their
//     rings
//   - fuse.go: the fuse transport, and what keeps its devices alive; fusemount.go: a
//     file system mounted nowhere; loop.go: the device on it
//   - fuseserve.go: [ServeFUSE], the server's side; fusethread.go: its threads and
//     their memory; fuseproto.go: the wire format
//   - device.go, holders.go: block devices in general, and who uses one; flush.go: waiting
//     for one in another process
//
// Package attachtest is the suite that all transports pass; test/vm runs it on kernels
// that this machine doesn't have.
package attach

import (
	"context"
	"errors"
	"os"
	"time"
)

// Spec is the device to make.
type Spec struct {
	ID           string // unique on the node: the volume's handle; recorded in the kernel where it can be
	SizeBytes    int64  // a multiple of BlockBytes
	BlockBytes   int    // logical block size: 512 or 4096
	ClusterBytes int64  // granularity for discard; 0 if unknown
	ReadOnly     bool
	CanDiscard   bool
	CanZero      bool
}

// State is all it takes to recover, resize or detach a device, by this process or a
// later one. It is persisted as JSON before the kernel is asked for anything that
// would have to be undone.
type State struct {
	Spec
	Transport string `json:"transport"`       // Transport.Name
	Device    string `json:"device"`          // "/dev/nbd1024", "/dev/loop8"; "" while attaching
	Index     int    `json:"index,omitempty"` // nbd, ublk: the device's index; fuse: the loop device's
	Conns     int    `json:"conns,omitempty"` // nbd: connections, fixed for the device's life
	// Connection is fuse's number for the one-file file system, which has no mount
	// point: it is what Abort aborts.
	Connection uint32 `json:"connection,omitempty"`
}

// Hooks are what a transport needs of its caller.
type Hooks struct {
	// Serve hands the server's ends of the transport to the process that serves
	// the device and returns once it is serving them. The files stay the
	// transport's. Protocol is "nbd" (transmission phase, one stream socket per
	// connection), "ublk" (one descriptor of /dev/ublkcN; see ServeUBLK) or "fuse" (one
	// /dev/fuse descriptor; see ServeFUSE).
	Serve func(ctx context.Context, protocol string, files []*os.File) error
	// Persist makes the state durable for this boot.
	Persist func(State) error
}

// HandsOver is a Transport whose descriptors can go on with another server after the one
// that served them has ended in order: it has answered every request it took, and left
// the descriptors where a request begins. For others, Recover does.
type HandsOver interface {
	// HandOver is Recover with those descriptors, all of the device's. They stay the
	// caller's, who closes them afterwards.
	HandOver(ctx context.Context, st State, files []*os.File, hooks Hooks) error
}

// Reluctant is a Transport that works on nodes where another is better.
type Reluctant interface {
	// Reluctance returns nil where the transport may be chosen by itself, else one
	// sentence that says why it is used only where it is asked for by name. Probe has
	// returned nil before.
	Reluctance(ctx context.Context) error
}

// ErrLingers says that a device was flushed and disconnected, but that somebody opened it
// just before: it fails all their requests, needs no server any more, and goes when they
// close it.
var ErrLingers = errors.New("disconnected, and still open")

// lingerPatience is how long a detach waits for such a device.
const lingerPatience = 20 * time.Second

// Transport makes devices of one kind. Methods are safe for concurrent use for
// different IDs. They return block's sentinels; waiting stops when ctx ends.
type Transport interface {
	// Name is "nbd", "ublk" or "fuse".
	Name() string
	// Probe returns nil when the transport works on this node, else one sentence
	// that says what is missing and how to get it. It may load a kernel module.
	Probe(ctx context.Context) error
	// Attach makes the device. On an error nothing is left behind.
	Attach(ctx context.Context, spec Spec, hooks Hooks) (State, error)
	// Adopt takes over a device attached by an earlier process of ours, with the
	// descriptors its server holds (none if the server is gone too). The files stay
	// the caller's, who closes them at once: a socket that anybody keeps open hides
	// from the kernel that its server is gone. It returns block.ErrNotFound when
	// the kernel no longer has the device, or has another one's under its name.
	Adopt(ctx context.Context, st State, files []*os.File) error
	// Recover gives a device whose server died to a new one. In-flight requests
	// are answered by the new server. The caller has made sure that the old
	// server is gone, and keeps none of its descriptors.
	Recover(ctx context.Context, st State, hooks Hooks) error
	// Resize tells the kernel a new size, live.
	Resize(ctx context.Context, st State, sizeBytes int64) (State, error)
	// Detach removes the device: its caches are flushed, then the kernel's object
	// is gone. A device in use is block.ErrBusy, naming the holders it can find,
	// and stays as it is; ErrLingers says that it is gone but for its name.
	// A device that is gone already is success.
	Detach(ctx context.Context, st State) error
	// Abort removes the device whatever its users or server do; requests in
	// flight fail. A device that is gone already is success.
	Abort(ctx context.Context, st State) error
}
