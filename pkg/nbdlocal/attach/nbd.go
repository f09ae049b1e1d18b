package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// NBDOptions are NewNBD's knobs; zero values are the defaults.
type NBDOptions struct {
	// Connections per device, fixed for its life; default 1.
	//
	// With one, the kernel never resends a request for being slow, and after a
	// crash of the server resends what was in flight within about 3 seconds. With
	// more, devices on fast storage do more small requests a second, but the kernel
	// gives up on a connection whose server takes longer than 30 seconds for a
	// request and sends that again on another; and it is only then, up to 30
	// seconds later, that it resends what a crash left unanswered.
	Connections int
}

const (
	// Indices from nbdFirstIndex on are ours by convention: tools of old use the
	// first few, and opening an unconfigured device makes it unusable for us. The
	// driver's minor numbers end before nbdEndIndex even with 32 partitions each.
	nbdFirstIndex = 1024
	nbdEndIndex   = 32768

	// nbdDeadSeconds is how long requests wait for a server that is gone before
	// they fail. Zero would be at once.
	nbdDeadSeconds = 24 * 60 * 60

	// What the kernel does about a request that was in flight when its connection
	// broke, it does when the request's timer fires, which runs from the request's
	// start: that is the pause after a crash, and replacing the socket does not
	// shorten it. With one connection and TIMEOUT=0 a timer that fires for a
	// request that is merely slow is rewound (and "possible stuck request" logged);
	// only one whose socket has been replaced is resent. So the timer may be short:
	// the queue's io_timeout, which is counted in milliseconds, sets it, and the
	// kernel rounds up to whole seconds. Shorter would fill the log when storage
	// stalls: a line per request in flight each time.
	nbdTimerMillis = 2000

	// With several connections every timer that fires takes the connection for dead
	// and resends, so it must be longer than storage may take.
	nbdManyTimeoutSeconds = 30

	// nbdMaxRequestKiB and nbdMaxDiscardBytes bound what one request makes a server
	// do. The driver's own limits are 32 MiB and 4 GiB.
	nbdMaxRequestKiB   = 1024
	nbdMaxDiscardBytes = 1 << 30

	// What the kernel sends, data to be written above all, it puts into memory that it
	// keeps for when there is no other, because writing may be how it gets some. When
	// that is gone, sending fails (ENOBUFS), and the driver hangs up: so a socket must
	// hold much less than a small machine keeps (vm.min_free_kbytes, about 2 MiB of
	// 256), also when many devices are written. The kernel doubles what is set.
	nbdKernelBufferBytes = 128 << 10
	// A server's answers are made of ordinary memory: a queue's worth.
	nbdServerBufferBytes = 4 << 20

	nbdReconnectLimit = 30 * time.Second
)

// nbdTransport makes devices of the kernel's nbd driver.
//
// It keeps no descriptors: the kernel has one end of each socket pair, the server the
// other, and when the server dies new pairs replace them. A device is recognised by
// its backend identifier, which is the ID, and which the kernel checks too.
type nbdTransport struct {
	connections int
	choosing    sync.Mutex // an index
}

// NewNBD returns the nbd transport. It needs root, the module nbd, Linux 5.14, and
// the host's network namespace: the driver's netlink family is in no other.
func NewNBD(opts NBDOptions) Transport {
	return &nbdTransport{connections: max(1, opts.Connections)}
}

func (*nbdTransport) Name() string { return "nbd" }

func (*nbdTransport) Probe(ctx context.Context) error {
	err := nbdReachable()
	if errors.Is(err, errNoNBD) {
		// No devices made in advance, and no partitions looked for in guests' disks.
		_ = exec.CommandContext(ctx, "modprobe", "nbd", "nbds_max=0", "max_part=0").Run() // the next look tells
		err = nbdReachable()
	}
	switch {
	case !errors.Is(err, errNoNBD):
		return err
	case exists("/sys/module/nbd"):
		return fmt.Errorf("kernel module nbd is loaded but can't be reached: run this in the host's network namespace: %w", block.ErrUnsupported)
	}
	return fmt.Errorf("kernel module nbd is not available: install the kernel's extra modules (Ubuntu: linux-modules-extra-%s) and modprobe nbd, or set transport fuse: %w", kernelRelease(), block.ErrUnsupported)
}

func kernelRelease() string {
	var u unix.Utsname
	_ = unix.Uname(&u)
	return unix.ByteSliceToString(u.Release[:])
}

func nbdName(index int) string { return fmt.Sprintf("nbd%d", index) }

// findNBD returns the device with this ID. One that is disconnected, but still open
// somewhere, is found too.
func findNBD(id string) (index int, ok bool) {
	paths, _ := filepath.Glob("/sys/block/nbd*/backend")
	for _, p := range paths {
		index, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(filepath.Dir(p)), "nbd"))
		if err != nil {
			continue
		}
		if b, err := os.ReadFile(p); err == nil && string(b) == id+"\n" {
			return index, true
		}
	}
	return 0, false
}

// find returns the state's device if it is there, else ErrNotFound.
func (*nbdTransport) find(st State) (index int, err error) {
	index, ok := findNBD(st.ID)
	if !ok || index != st.Index || st.Device == "" {
		return 0, fmt.Errorf("nbd: no device for it: %w", block.ErrNotFound)
	}
	return index, nil
}

func (t *nbdTransport) Attach(ctx context.Context, spec Spec, hooks Hooks) (State, error) {
	if err := checkSpec(spec); err != nil {
		return State{}, err
	}
	if index, ok := findNBD(spec.ID); ok {
		return State{}, fmt.Errorf("attach %s: %w as /dev/%s", spec.ID, block.ErrExists, nbdName(index))
	}
	pairs, err := newSocketPairs(t.connections)
	if err != nil {
		return State{}, fmt.Errorf("attach %s: %w", spec.ID, err)
	}
	defer closePairs(pairs)
	// The server first: whoever probes the new device must not have to wait.
	if err := hooks.Serve(ctx, t.Name(), serverEnds(pairs)); err != nil {
		return State{}, fmt.Errorf("attach %s: %w", spec.ID, err)
	}
	st := State{Spec: spec, Transport: t.Name(), Conns: t.connections}
	if err := t.connect(ctx, &st, pairs, hooks); err != nil {
		return State{}, fmt.Errorf("attach %s: %w", spec.ID, err)
	}
	complete := st
	// Setting a queue's limits waits for requests in flight: somebody may probe the device.
	err = within(ctx, func() error { return apart(func() error { return t.setUp(ctx, &complete) }) })
	if err == nil {
		st = complete
		err = hooks.Persist(st)
	}
	if err != nil {
		err = errors.Join(err, disconnectNBD(st.Index), t.awaitGone(ctx, st.Index))
		return State{}, fmt.Errorf("attach %s: %w", spec.ID, err)
	}
	return st, nil
}

// connect makes a device at the first index that is free.
func (t *nbdTransport) connect(ctx context.Context, st *State, pairs []socketPair, hooks Hooks) error {
	t.choosing.Lock()
	defer t.choosing.Unlock()
	tried := 0
	for index := nbdFirstIndex; index < nbdEndIndex; index++ {
		if exists("/sys/block/" + nbdName(index)) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		// Before the device exists: who finds this state after a crash recognises
		// the device by its ID, and that there is none by its absence.
		st.Index = index
		if err := hooks.Persist(*st); err != nil {
			return err
		}
		err := connectNBD(*st, pairs)
		// Another process was faster, or the kernel is not yet done with a device
		// that was there.
		taken := errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EINVAL)
		if tried++; !taken || tried == 16 {
			return err
		}
	}
	return fmt.Errorf("nbd: all indices from %d to %d are taken: %w", nbdFirstIndex, nbdEndIndex-1, block.ErrBusy)
}

func connectNBD(st State, pairs []socketPair) error {
	flags := uint64(nbdHasFlags | nbdSendFlush | nbdSendFUA)
	for flag, wanted := range map[uint64]bool{
		nbdReadOnly: st.ReadOnly, nbdSendTrim: st.CanDiscard, nbdSendZeroes: st.CanZero, nbdMultiConn: st.Conns > 1,
	} {
		if wanted {
			flags |= flag
		}
	}
	timeout := uint64(0)
	if st.Conns > 1 {
		timeout = nbdManyTimeoutSeconds
	}
	return nbdCommand(nbdConnect, func(a *netlink.AttributeEncoder) {
		a.Uint32(nbdIndex, uint32(st.Index))
		a.Uint64(nbdSizeBytes, uint64(st.SizeBytes))
		a.Uint64(nbdBlockSizeBytes, uint64(st.BlockBytes))
		a.Uint64(nbdTimeout, timeout)
		a.Uint64(nbdDeadConnTimeout, nbdDeadSeconds)
		a.Uint64(nbdServerFlags, flags)
		a.Uint64(nbdClientFlags, nbdDestroyOnce)
		a.String(nbdBackend, st.ID)
		putSockets(a, pairs)
	})
}

// setUp completes a connected device, and the state.
func (t *nbdTransport) setUp(ctx context.Context, st *State) error {
	name := nbdName(st.Index)
	if index, ok := findNBD(st.ID); !ok || index != st.Index {
		return fmt.Errorf("nbd: the kernel keeps no backend identifier: Linux 5.14 or newer is needed: %w", block.ErrUnsupported)
	}
	// A request of which a part was sent when a signal came goes back to the scheduler,
	// and before Linux 6.13 comes out of any but "none" with another tag than the one
	// that was sent: the answer would then fit no request, and the kernel hang up.
	limits := map[string]any{"scheduler": "none", "max_sectors_kb": nbdMaxRequestKiB, "rotational": 0}
	if st.Conns == 1 {
		limits["io_timeout"] = nbdTimerMillis
	}
	if st.CanDiscard {
		limits["discard_max_bytes"] = nbdMaxDiscardBytes
	}
	for attribute, value := range limits {
		if err := setQueue(name, attribute, value); err != nil {
			return err
		}
	}
	st.Device = "/dev/" + name
	err := poll(ctx, 10*time.Second, func() (bool, error) {
		return exists(st.Device), nil
	})
	if errors.Is(err, errPollTimeout) {
		return fmt.Errorf("%s does not appear: give this process the host's /dev: %w", st.Device, block.ErrUnsupported)
	}
	return err
}

// Adopt needs no descriptors.
func (t *nbdTransport) Adopt(_ context.Context, st State, _ []*os.File) error {
	if _, err := t.find(st); err != nil {
		return fmt.Errorf("adopt %s: %w", st.ID, err)
	}
	return nil
}

func (t *nbdTransport) Recover(ctx context.Context, st State, hooks Hooks) error {
	if _, err := t.find(st); err != nil {
		return fmt.Errorf("recover %s: %w", st.ID, err)
	}
	pairs, err := t.reconnect(ctx, st)
	defer closePairs(pairs)
	if err != nil {
		return fmt.Errorf("recover %s: %w", st.ID, err)
	}
	// If this fails the sockets close, and the device is as it was.
	if err := hooks.Serve(ctx, t.Name(), serverEnds(pairs)); err != nil {
		return fmt.Errorf("recover %s: %w", st.ID, err)
	}
	return nil
}

// HandOver keeps the connections: what the kernel has sent on them need not wait for its
// timer.
func (t *nbdTransport) HandOver(ctx context.Context, st State, files []*os.File, hooks Hooks) error {
	_, err := t.find(st)
	if err == nil {
		err = hooks.Serve(ctx, t.Name(), files)
	}
	if err != nil {
		return fmt.Errorf("hand %s over: %w", st.ID, err)
	}
	return nil
}

// reconnect gives the device as many new sockets as it has connections. The pairs are
// the caller's to close, also after an error.
func (t *nbdTransport) reconnect(ctx context.Context, st State) (taken []socketPair, err error) {
	err = poll(ctx, nbdReconnectLimit, func() (bool, error) {
		fresh, err := newSocketPairs(st.Conns - len(taken))
		if err != nil {
			return false, err
		}
		err = nbdCommand(nbdReconfigure, func(a *netlink.AttributeEncoder) {
			a.Uint32(nbdIndex, uint32(st.Index))
			a.String(nbdBackend, st.ID)
			putSockets(a, fresh)
		})
		// The kernel only replaces sockets that it has noticed to be dead. Those it
		// doesn't take it drops without a word, so that ours are their only ends.
		for _, p := range fresh {
			p.closeKernel()
			if err == nil && p.connected() {
				taken = append(taken, p)
			} else {
				p.close()
			}
		}
		return len(taken) == st.Conns, err
	})
	if errors.Is(err, errPollTimeout) {
		err = fmt.Errorf("%d of %d connections of %s have not ended: is its server still there?: %w", st.Conns-len(taken), st.Conns, st.Device, block.ErrBusy)
	}
	return taken, err
}

func (t *nbdTransport) Resize(ctx context.Context, st State, sizeBytes int64) (State, error) {
	if err := checkGrowth(st, sizeBytes); err != nil {
		return st, err
	}
	if _, err := t.find(st); err != nil {
		return st, fmt.Errorf("resize %s: %w", st.ID, err)
	}
	err := within(ctx, func() error {
		return nbdCommand(nbdReconfigure, func(a *netlink.AttributeEncoder) {
			a.Uint32(nbdIndex, uint32(st.Index))
			a.String(nbdBackend, st.ID)
			a.Uint64(nbdSizeBytes, uint64(sizeBytes))
		})
	})
	if err == nil {
		err = checkDeviceSize(nbdName(st.Index), sizeBytes)
	}
	if err != nil {
		return st, fmt.Errorf("resize %s: %w", st.ID, err)
	}
	st.SizeBytes = sizeBytes
	return st, nil
}

func (t *nbdTransport) Detach(ctx context.Context, st State) error {
	index, ok := findNBD(st.ID)
	if !ok {
		return nil
	}
	err := within(ctx, func() error { return t.detach(ctx, index) })
	if err == nil {
		err = t.awaitGone(ctx, index)
	}
	if err != nil {
		return fmt.Errorf("detach %s: %w", st.ID, err)
	}
	return nil
}

// detach flushes and disconnects the device, if nobody else uses it.
func (t *nbdTransport) detach(ctx context.Context, index int) error {
	name := nbdName(index)
	fd, err := openExclusive(ctx, name)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// Exclusively open says that it is not mounted. Who has merely opened it, the
	// kernel doesn't tell.
	err = poll(ctx, probeGrace, func() (bool, error) {
		return len(openersOf(name)) == 0 && len(stackedOn(name)) == 0, nil
	})
	if errors.Is(err, errPollTimeout) {
		return busyError(name)
	}
	if err != nil {
		return err
	}
	if err := flushDevice(ctx, fd, "/dev/"+name); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err // nobody waits for it any more: don't surprise them
	}
	return disconnectNBD(index)
}

// disconnectNBD ends a device. One that is gone meanwhile is success.
func disconnectNBD(index int) error {
	err := nbdCommand(nbdDisconnect, func(a *netlink.AttributeEncoder) { a.Uint32(nbdIndex, uint32(index)) })
	if !exists("/sys/block/" + nbdName(index)) {
		return nil
	}
	return err
}

// awaitGone waits until the kernel has removed the device: it is not while somebody
// has it open, and its index can't be used again before.
func (*nbdTransport) awaitGone(ctx context.Context, index int) error {
	name := nbdName(index)
	err := poll(ctx, lingerPatience, func() (bool, error) {
		return !exists("/sys/block/" + name), nil
	})
	if errors.Is(err, errPollTimeout) {
		return fmt.Errorf("%w: %v", ErrLingers, busyError(name))
	}
	return err
}

// Abort returns while somebody may still have the device open: it is removed with the
// last close, and until then fails every request. The server should be gone before:
// one that takes no requests can hold up the disconnect.
func (t *nbdTransport) Abort(ctx context.Context, st State) error {
	index, ok := findNBD(st.ID)
	if !ok {
		return nil
	}
	if err := within(ctx, func() error { return disconnectNBD(index) }); err != nil {
		return fmt.Errorf("abort %s: %w", st.ID, err)
	}
	return nil
}
