package attach

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach/uring"
)

// Control commands. The kernel carries them out on a worker thread of the submitter's;
// some of its releases never finish one now and then. So every command has a ring, a
// thread and memory of its own, and a limit: what does not come back in time is cancelled,
// and what cannot be cancelled either is left behind with all that is its own.

const (
	ublkControlPath = "/dev/ublk-control"

	// ublkQuick is how long a command may take that waits for nobody.
	ublkQuick = 20 * time.Second
	// ublkCancelPatience is how long one may take to be cancelled.
	ublkCancelPatience = 3 * time.Second
	ublkPollInterval   = 50 * time.Millisecond
	// ublkServerWatch is how often it is looked whether a server is still there that is about
	// to ask for requests.
	ublkServerWatch = 250 * time.Millisecond
)

// ublkSerial has quick commands carried out one after the other: the driver does that
// anyway with most, and fewer at a time have been seen to hang. Commands that may wait for
// a server are not among them, or one stalled store would hold up all devices.
var ublkSerial = make(chan struct{}, 1)

// ublkCall is one command: its number and arguments.
type ublkCall struct {
	name   string
	number uint32
	dev    uint32
	data   uint64
	// payload is what the command's buffer holds before, and reply gets what it holds
	// after; either may be nil. Both are of a fixed size.
	payload, reply any
	// waits says that the command may wait for a server, or the device's users.
	waits bool
	// submitted, if not nil, is closed once the kernel has the command.
	submitted chan struct{}
}

// ublkErrno is the error number that a command ended with.
type ublkErrno struct {
	name  string
	dev   uint32
	errno unix.Errno
}

func (e *ublkErrno) Error() string {
	return fmt.Sprintf("ublk: %s of device %d: %v", e.name, e.dev, e.errno)
}
func (e *ublkErrno) Unwrap() error { return e.errno }

// do has the kernel carry out the command. The error wraps the kernel's error number, or
// block.ErrBusy if the kernel has not finished the command in time.
func (c ublkCall) do(ctx context.Context) error {
	if !c.waits {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, ublkQuick)
		defer cancel()
		select {
		case ublkSerial <- struct{}{}:
			defer func() { <-ublkSerial }()
		case <-ctx.Done():
			return fmt.Errorf("ublk: %s of device %d: another command does not finish: %w", c.name, c.dev, errors.Join(block.ErrBusy, ctx.Err()))
		}
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("ublk: %s of device %d: %w", c.name, c.dev, err)
	}
	type outcome struct {
		reply []byte
		err   error
	}
	done := make(chan outcome, 1)
	go func() {
		reply, err := c.carryOut(ctx)
		done <- outcome{reply, err}
	}()
	var o outcome
	select {
	case o = <-done:
	case <-ctx.Done():
		select {
		case o = <-done: // cancelled, or finished at the last moment
		case <-time.After(ublkCancelPatience):
			return fmt.Errorf("ublk: %s of device %d does not finish, nor can it be cancelled: %w", c.name, c.dev, errors.Join(block.ErrBusy, ctx.Err()))
		}
	}
	if o.err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("%w (%w)", o.err, ctx.Err())
		}
		return o.err
	}
	if c.reply == nil {
		return nil
	}
	return binary.Read(bytes.NewReader(o.reply), order, c.reply)
}

// around has the kernel begin with the command, which waits for a server, then calls f, which
// brings the server, and returns when the command has ended, or the server has.
//
// Once a server has asked for all requests, nothing may come between that and the command's
// effect. A server that died in between would be taken for a living one: kernels before
// 6.16 note the death of the device's server only while it has one.
func (c ublkCall) around(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.waits, c.submitted = true, make(chan struct{})
	var outcome error
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		outcome = c.do(ctx)
	}()
	select {
	case <-c.submitted:
	case <-ended:
		return outcome
	}
	if err := f(ctx); err != nil {
		cancel()
		<-ended // cancelled, most likely; err says why
		return err
	}
	watch := time.NewTicker(ublkServerWatch)
	defer watch.Stop()
	for {
		select {
		case <-ended:
			return outcome
		case <-watch.C:
		}
		if ublkHasServer(int(c.dev)) {
			continue
		}
		cancel()
		if <-ended; outcome == nil {
			return nil
		}
		return fmt.Errorf("%s of device %d: the server has ended, or has given the device back, before it asked for all requests: %w", c.name, c.dev, block.ErrClosed)
	}
}

// carryOut returns once the kernel is done with the command, however long that takes, and
// returns what its buffer holds then. When ctx ends it has the command cancelled.
func (c ublkCall) carryOut(ctx context.Context) ([]byte, error) {
	runtime.LockOSThread() // the thread's end would end the command
	defer runtime.UnlockOSThread()
	control, err := unix.Open(ublkControlPath, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("ublk: open %s: %w", ublkControlPath, err)
	}
	defer unix.Close(control)
	ring, err := uring.New(uring.Config{Entries: 4, Wide: true})
	if err != nil {
		return nil, fmt.Errorf("ublk: %w", err)
	}
	defer func() { _ = ring.Close() }()
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("ublk: map a command's buffer: %w", err)
	}
	defer func() { _ = unix.Munmap(page) }()
	used, err := c.fill(page)
	if err != nil {
		return nil, err
	}
	const theCommand, theCancel = 1, 2
	header := (*ublkControl)(ring.Next().Command(control, c.number, theCommand))
	*header = ublkControl{Dev: c.dev, Queue: ublkNoQueue, Data: c.data}
	if used > 0 {
		header.Len, header.Addr = uint16(used), uint64(uintptr(unsafe.Pointer(&page[0])))
	}
	if err := ring.Enter(0, 0); err != nil {
		return nil, fmt.Errorf("ublk: %s of device %d: %w", c.name, c.dev, err)
	}
	if c.submitted != nil {
		close(c.submitted)
	}
	for cancelled := false; ; {
		if err := ring.Enter(1, ublkPollInterval); err != nil {
			return nil, fmt.Errorf("ublk: %s of device %d: %w", c.name, c.dev, err)
		}
		for done, ok := ring.Take(); ok; done, ok = ring.Take() {
			switch {
			case done.UserData != theCommand: // what became of the cancellation, the command tells
			case done.Res < 0:
				return nil, &ublkErrno{c.name, c.dev, unix.Errno(-done.Res)}
			default:
				return bytes.Clone(page[:used]), nil
			}
		}
		if ctx.Err() != nil && !cancelled {
			ring.Next().Cancel(theCommand, theCancel)
			cancelled = true
		}
	}
}

// fill puts the payload, or room for the reply, into the buffer and returns its length.
func (c ublkCall) fill(buf []byte) (int, error) {
	what := c.payload
	if what == nil {
		what = c.reply
	}
	if what == nil {
		return 0, nil
	}
	n, err := binary.Encode(buf, order, what)
	if err != nil {
		return 0, fmt.Errorf("ublk: encode %s: %w", c.name, err)
	}
	return n, nil
}

// ublkInfo returns what the driver knows of a device; block.ErrNotFound if there is none.
func ublkInfo(ctx context.Context, index int) (info ublkDevInfo, err error) {
	err = ublkCall{name: "GET_DEV_INFO", number: ublkGetDevInfo, dev: uint32(index), reply: &info}.do(ctx)
	if errors.Is(err, unix.ENODEV) {
		err = fmt.Errorf("ublk: no device %d: %w", index, block.ErrNotFound)
	}
	return info, err
}

// ublkFeatures returns what the driver can do.
func ublkFeatures(ctx context.Context) (features uint64, err error) {
	err = ublkCall{name: "GET_FEATURES", number: ublkGetFeatures, reply: &features}.do(ctx)
	return features, err
}
