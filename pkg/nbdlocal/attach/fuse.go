package attach

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// fuseTransport makes a loop device over the one file of a FUSE file system.
//
// What keeps a device alive, each thing by the one before it: the loop device holds
// the open file, that holds the file system (which has no mount point), and the file
// system the connection, as long as anybody holds a descriptor for it. The server
// holds one to serve requests, and the transport another: so when the server is
// killed, the connection waits, and the transport has the kernel resend what the old
// server had taken and not answered before it gives the descriptor to the next one.
// When both are gone the connection is dead, which only a holder outside can prevent.
//
// A device is recognised by the name of its file, which the loop device shows.
type fuseTransport struct {
	mu   sync.Mutex
	held map[string]*os.File // by ID: our /dev/fuse descriptors
}

// NewFUSE returns the fuse transport. It needs root, /dev/fuse, loop devices and
// Linux 6.9.
func NewFUSE() Transport {
	return &fuseTransport{held: map[string]*os.File{}}
}

func (*fuseTransport) Name() string { return "fuse" }

// Probe makes a connection and reads in the kernel's first request what it can do.
func (*fuseTransport) Probe(ctx context.Context) error {
	if err := checkAdmin(); err != nil {
		return err
	}
	for path, module := range map[string]string{"/dev/fuse": "fuse", "/dev/loop-control": "loop"} {
		if exists(path) {
			continue
		}
		_ = exec.CommandContext(ctx, "modprobe", module).Run() // the next look tells
		if !exists(path) {
			return fmt.Errorf("%s is missing: load the kernel module %q, and give this process the host's /dev: %w", path, module, block.ErrUnsupported)
		}
	}
	m, err := mountFUSE()
	if err != nil {
		return err
	}
	defer m.close()
	req := make([]byte, 2*4096) // the least the kernel accepts
	fd, err := dupDescriptor(m.dev)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	n, err := unix.Read(fd, req)
	if err != nil {
		return fmt.Errorf("fuse: read the kernel's first request: %w", err)
	}
	return checkFUSEInit(req[:n])
}

// checkFUSEInit says whether the kernel that sent this INIT has all we need.
func checkFUSEInit(req []byte) error {
	if len(req) < fuseInHeaderBytes+initInFlags2+4 || order.Uint32(req[inOpcode:]) != fuseInit {
		return fmt.Errorf("fuse: the kernel's first request is not INIT: %w", block.ErrUnsupported)
	}
	in := req[fuseInHeaderBytes:]
	major, minor := order.Uint32(in[initInMajor:]), order.Uint32(in[initInMinor:])
	if major != fuseMajor || minor < fuseMinor || order.Uint32(in[initInFlags2:])&initFlags2HasResend == 0 {
		return fmt.Errorf("this kernel's FUSE (protocol %d.%d) can't resend requests after a server's crash: Linux 6.9 (protocol 7.40) or newer is needed: %w", major, minor, block.ErrUnsupported)
	}
	return nil
}

// fuseFileName is the name of the device's file: the ID for people, a hash of it for
// certainty.
func fuseFileName(id string) string {
	const most = 120 // of the 255 bytes a name may have
	readable := url.PathEscape(id)
	hash := sha256.Sum256([]byte(id))
	return fmt.Sprintf("%s.imgdisk-%x", readable[:min(len(readable), most)], hash[:12])
}

// fuseLoop returns the loop device of the ID.
func fuseLoop(id string) (index int, ok bool) { return findLoop("/" + fuseFileName(id)) }

func (t *fuseTransport) Attach(ctx context.Context, spec Spec, hooks Hooks) (State, error) {
	if err := checkSpec(spec); err != nil {
		return State{}, err
	}
	if index, ok := fuseLoop(spec.ID); ok {
		return State{}, fmt.Errorf("attach %s: %w as %s", spec.ID, block.ErrExists, loopPath(index))
	}
	m, err := mountFUSE()
	if err != nil {
		return State{}, fmt.Errorf("attach %s: %w", spec.ID, err)
	}
	defer m.close()
	// What waits for the server below ends when the connection does, and that is
	// made to end with ctx.
	ended := context.AfterFunc(ctx, m.abort)
	st := State{Spec: spec, Transport: t.Name(), Connection: m.connection}
	err = t.attach(ctx, &st, m, hooks)
	if !ended() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		m.abort()
		if st.Device != "" {
			err = errors.Join(err, abandonLoop(st.Index))
		}
		return State{}, fmt.Errorf("attach %s: %w", spec.ID, err)
	}
	t.hold(spec.ID, m.dev)
	m.dev = nil
	return st, nil
}

func (t *fuseTransport) attach(ctx context.Context, st *State, m *fuseMount, hooks Hooks) error {
	// Nothing but the loop device, which is found by its name, outlives this process.
	if err := hooks.Persist(*st); err != nil {
		return err
	}
	if err := hooks.Serve(ctx, t.Name(), []*os.File{m.dev}); err != nil {
		return err
	}
	index := 0
	err := apart(func() (err error) {
		index, err = m.makeLoop(st.Spec)
		return err
	}, m.root)
	if err != nil {
		return err
	}
	st.Index, st.Device = index, loopPath(index)
	if err := checkDeviceSize(loopName(index), st.SizeBytes); err != nil {
		return err
	}
	// Discards are not limited in the queue where the server cannot zero cheaply: loop
	// devices are used again, a limit of 0 stays, and the kernel lets nobody raise it.
	return hooks.Persist(*st)
}

// makeLoop makes the loop device over the file system's file.
func (m *fuseMount) makeLoop(spec Spec) (index int, err error) {
	file, err := m.open(fuseFileName(spec.ID), spec.ReadOnly)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	return configureLoop(file, spec)
}

// hold keeps dev as the ID's descriptor, for as long as the device lives.
func (t *fuseTransport) hold(id string, dev *os.File) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if old := t.held[id]; old != nil {
		old.Close()
	}
	t.held[id] = dev
}

func (t *fuseTransport) release(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if old := t.held[id]; old != nil {
		old.Close()
	}
	delete(t.held, id)
}

// connection returns the ID's descriptor if its device is still there.
func (t *fuseTransport) connection(st State) (*os.File, error) {
	t.mu.Lock()
	dev := t.held[st.ID]
	t.mu.Unlock()
	index, ok := fuseLoop(st.ID)
	switch {
	case !ok || index != st.Index || st.Device == "":
		return nil, fmt.Errorf("fuse: no loop device for %s: %w", st.ID, block.ErrNotFound)
	case dev == nil:
		return nil, fmt.Errorf("fuse: no descriptor for the connection of %s: %w", st.Device, block.ErrNotFound)
	case !fuseAlive(dev):
		return nil, fmt.Errorf("fuse: the connection of %s has ended: %w", st.Device, block.ErrNotFound)
	}
	return dev, nil
}

// Adopt removes the device, and returns ErrNotFound, if there is no descriptor: with
// the last one the connection died, and every request since has failed.
func (t *fuseTransport) Adopt(_ context.Context, st State, files []*os.File) error {
	index, ok := fuseLoop(st.ID)
	if !ok || index != st.Index || st.Device == "" {
		return fmt.Errorf("adopt %s: no loop device: %w", st.ID, block.ErrNotFound)
	}
	for _, f := range files {
		fd, err := dupDescriptor(f)
		if err != nil {
			return fmt.Errorf("adopt %s: %w", st.ID, err)
		}
		dev := os.NewFile(uintptr(fd), "/dev/fuse")
		if fuseAlive(dev) {
			t.hold(st.ID, dev)
			return nil
		}
		dev.Close()
	}
	err := abandonLoop(index)
	return fmt.Errorf("adopt %s: the connection of %s died with its last descriptor: %w", st.ID, st.Device, errors.Join(block.ErrNotFound, err))
}

func (t *fuseTransport) Recover(ctx context.Context, st State, hooks Hooks) error {
	dev, err := t.connection(st)
	if err != nil {
		return fmt.Errorf("recover %s: %w", st.ID, err)
	}
	// Before the new server takes requests: those that it had taken would come twice.
	if err := notifyFUSE(dev, notifyResend, nil); err != nil {
		return fmt.Errorf("recover %s: %w", st.ID, err)
	}
	if err := hooks.Serve(ctx, t.Name(), []*os.File{dev}); err != nil {
		return fmt.Errorf("recover %s: %w", st.ID, err)
	}
	return nil
}

// Resize only grows. The server's device must have grown already.
func (t *fuseTransport) Resize(ctx context.Context, st State, sizeBytes int64) (State, error) {
	if err := checkGrowth(st, sizeBytes); err != nil {
		return st, err
	}
	dev, err := t.connection(st)
	if err != nil {
		return st, fmt.Errorf("resize %s: %w", st.ID, err)
	}
	if err := growFile(dev, sizeBytes); err != nil {
		return st, fmt.Errorf("resize %s: %w", st.ID, err)
	}
	err = within(ctx, func() error { return apart(func() error { return growLoop(st.Index) }) })
	if err == nil {
		err = checkDeviceSize(loopName(st.Index), sizeBytes)
	}
	if err != nil {
		return st, fmt.Errorf("resize %s: %w", st.ID, err)
	}
	st.SizeBytes = sizeBytes
	return st, nil
}

// growFile makes the kernel believe that the file has a new, larger size: it says that
// the file's last byte is known, and is zero. Having the kernel ask for the size is
// no use: it discards an answer if a write has completed meanwhile, and while the
// device is busy one always has. The byte itself goes to a page cache that a file
// opened for direct I/O doesn't use.
func growFile(dev *os.File, sizeBytes int64) error {
	payload := make([]byte, storeBytes+1)
	order.PutUint64(payload[storeNode:], fuseFileNode)
	order.PutUint64(payload[storeOff:], uint64(sizeBytes-1))
	order.PutUint32(payload[storeSize:], 1)
	return notifyFUSE(dev, notifyStore, payload)
}

func (t *fuseTransport) Detach(ctx context.Context, st State) error {
	index, ok := fuseLoop(st.ID)
	if !ok {
		t.release(st.ID)
		return nil
	}
	err := within(ctx, func() error { return t.detach(ctx, index) })
	if err == nil {
		err = t.awaitGone(ctx, st.ID)
	}
	if err != nil {
		return fmt.Errorf("detach %s: %w", st.ID, err)
	}
	t.release(st.ID)
	return nil
}

// detach flushes and unbinds the loop device, if nobody else uses it.
func (t *fuseTransport) detach(ctx context.Context, index int) error {
	fd, err := openExclusive(ctx, loopName(index))
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := flushDevice(ctx, fd, loopPath(index)); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err // nobody waits for it any more: don't surprise them
	}
	err = poll(ctx, probeGrace, func() (bool, error) { return clearLoop(fd, index) })
	if errors.Is(err, errPollTimeout) {
		return busyError(loopName(index))
	}
	return err
}

// awaitGone waits until the loop device has let go of the file, and the file system
// of its connection.
func (t *fuseTransport) awaitGone(ctx context.Context, id string) error {
	t.mu.Lock()
	dev := t.held[id]
	t.mu.Unlock()
	err := poll(ctx, time.Minute, func() (bool, error) {
		_, bound := fuseLoop(id)
		return !bound && (dev == nil || !fuseAlive(dev)), nil
	})
	if errors.Is(err, errPollTimeout) {
		return fmt.Errorf("the kernel has not let go of the device after a minute: %w", block.ErrBusy)
	}
	return err
}

// Abort returns while somebody may still have the loop device open: it is unbound
// with the last close, and until then fails every request.
func (t *fuseTransport) Abort(_ context.Context, st State) error {
	defer t.release(st.ID)
	index, ok := fuseLoop(st.ID)
	if !ok {
		return nil
	}
	// While the loop device exists the connection's number is not another's.
	var errs []error
	if err := abortFUSE(st.Connection); err != nil && !errors.Is(err, block.ErrNotFound) {
		errs = append(errs, err)
	}
	errs = append(errs, abandonLoop(index))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("abort %s: %w", st.ID, err)
	}
	return nil
}
