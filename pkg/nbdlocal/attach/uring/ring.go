package uring

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Config says what a ring is like.
type Config struct {
	// Entries is how many entries can be submitted at once: a power of 2, up to 4096.
	// Twice as many completions find room.
	Entries uint32
	// Wide makes entries of 128 bytes, which hold 80 bytes for a command instead of 16.
	Wide bool
	// OneThread promises that only the thread that makes the ring uses it. In return
	// completions come only while it waits (Linux 6.1), which is also when the kernel
	// copies a command's data.
	OneThread bool
	// Only, if not empty, lists the operations that the ring will ever carry out: it
	// fails others with EACCES.
	Only []Op
}

// Ring is an io_uring instance.
type Ring struct {
	fd      int
	entries uint32
	sqe     uintptr // bytes of an entry

	rings, sqes []byte // mappings

	sqHead, sqTail *uint32
	cqHead, cqTail *uint32
	cqMask         uint32
	cqEntries      unsafe.Pointer

	tail      uint32 // of what is filled; the kernel knows it up to *sqTail
	submitted uint32 // up to where the kernel has taken entries

	// argument is what a wait with a limit passes to the kernel, in a mapping.
	argument *waitArgument
	scratch  []byte
}

// waitArgument is struct io_uring_getevents_arg and the time it points at.
type waitArgument struct {
	signals      uint64
	signalsBytes uint32
	minWait      uint32
	timeout      uint64 // address of what follows
	seconds      int64
	nanoseconds  int64
}

const waitArgumentBytes = 24 // of the structure, without the time

// New makes a ring. The error holds the kernel's error number: ENOSYS and EPERM mean that
// this process may not use io_uring.
func New(cfg Config) (*Ring, error) {
	if cfg.Entries == 0 || cfg.Entries > maxEntries || cfg.Entries&(cfg.Entries-1) != 0 {
		return nil, fmt.Errorf("io_uring: %d entries: a power of 2 up to %d is accepted", cfg.Entries, maxEntries)
	}
	var p params
	r := &Ring{fd: -1, sqe: 64}
	if cfg.Wide {
		p.flags |= setupSQE128
		r.sqe = 128
	}
	if cfg.OneThread {
		p.flags |= setupSingleIssuer | setupDeferTaskrun
	}
	if len(cfg.Only) > 0 {
		p.flags |= setupDisabled
	}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(cfg.Entries), uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return nil, fmt.Errorf("io_uring: set up a ring of %d entries: %w", cfg.Entries, errno)
	}
	r.fd = int(fd)
	err := r.mapRings(&p)
	if err == nil && len(cfg.Only) > 0 {
		err = r.restrict(cfg.Only)
	}
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// mapRings maps what the kernel describes in p.
func (r *Ring) mapRings(p *params) error {
	if p.features&featureSingleMapping == 0 || p.features&featureWaitArgument == 0 {
		return fmt.Errorf("io_uring: features %#x: Linux 5.11 or newer is needed: %w", p.features, unix.ENOSYS)
	}
	ringBytes := max(uintptr(p.sq.array)+4*uintptr(p.sqEntries), uintptr(p.cq.cqes)+cqeBytes*uintptr(p.cqEntries))
	for _, m := range []struct {
		mem   *[]byte
		off   int64
		bytes uintptr
	}{{&r.rings, offRings, ringBytes}, {&r.sqes, offSQEs, r.sqe * uintptr(p.sqEntries)}} {
		mem, err := unix.Mmap(r.fd, m.off, int(m.bytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
		if err != nil {
			return fmt.Errorf("io_uring: map %d bytes of a ring: %w", m.bytes, err)
		}
		*m.mem = mem
	}
	scratch, err := unix.Mmap(-1, 0, int(unsafe.Sizeof(waitArgument{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("io_uring: map a ring's scratch: %w", err)
	}
	r.scratch = scratch
	r.argument = (*waitArgument)(unsafe.Pointer(&scratch[0]))
	r.argument.timeout = uint64(uintptr(unsafe.Pointer(&r.argument.seconds)))

	at := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.rings[off])) }
	r.sqHead, r.sqTail = at(p.sq.head), at(p.sq.tail)
	r.cqHead, r.cqTail = at(p.cq.head), at(p.cq.tail)
	r.cqMask = *at(p.cq.ringMask)
	r.cqEntries = unsafe.Pointer(&r.rings[p.cq.cqes])
	r.entries = p.sqEntries
	// The queue holds numbers of entries: always entry i at place i.
	for i := range p.sqEntries {
		*at(p.sq.array + 4*i) = i
	}
	return nil
}

// restrict limits a disabled ring for good, and enables it: from then on it belongs to
// this thread, if it was made for one.
func (r *Ring) restrict(only []Op) error {
	var list []restriction
	for _, op := range only {
		list = append(list, restriction{kind: restrictSQEOp, op: uint8(op)})
	}
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), registerRestrictions,
		uintptr(unsafe.Pointer(&list[0])), uintptr(len(list)), 0, 0)
	runtime.KeepAlive(list)
	if errno == 0 {
		_, _, errno = unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), registerEnableRings, 0, 0, 0, 0)
	}
	if errno != 0 {
		return fmt.Errorf("io_uring: restrict a ring to %d operations: %w", len(only), errno)
	}
	return nil
}

// Close gives the ring up. What it was asked for and has not completed is cancelled in the
// background; memory that it was given must stay valid until that has happened.
func (r *Ring) Close() error {
	var errs []error
	for _, mem := range [][]byte{r.rings, r.sqes, r.scratch} {
		if mem != nil {
			errs = append(errs, unix.Munmap(mem))
		}
	}
	if r.fd >= 0 {
		errs = append(errs, unix.Close(r.fd))
	}
	*r = Ring{fd: -1}
	return errors.Join(errs...)
}

// Next returns the next entry to fill, zeroed, or nil if as many as there are await Enter.
// It is the caller's until then.
func (r *Ring) Next() *SQE {
	if r.tail-r.submitted == r.entries {
		return nil
	}
	i := uintptr(r.tail & (r.entries - 1))
	mem := r.sqes[i*r.sqe : (i+1)*r.sqe]
	clear(mem)
	r.tail++
	return (*SQE)(unsafe.Pointer(&mem[0]))
}

// Room is how many entries Next would return.
func (r *Ring) Room() int { return int(r.entries - (r.tail - r.submitted)) }

// Enter submits the entries that were filled, all of them, and waits until there are at
// least so many completions, or until the limit is over (0: none), which is no error.
// With wait 0 it only submits.
func (r *Ring) Enter(wait int, limit time.Duration) error {
	atomic.StoreUint32(r.sqTail, r.tail)
	var until time.Time
	if limit > 0 {
		until = time.Now().Add(limit)
	}
	for {
		if r.tail == r.submitted && r.Ready() >= wait {
			return nil
		}
		flags, arg, argBytes := uintptr(enterGetEvents), uintptr(0), uintptr(0)
		if limit > 0 {
			left := max(0, time.Until(until))
			r.argument.seconds, r.argument.nanoseconds = int64(left/time.Second), int64(left%time.Second)
			flags |= enterExtendedArgument
			arg, argBytes = uintptr(unsafe.Pointer(r.argument)), waitArgumentBytes
		}
		n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(r.tail-r.submitted), uintptr(wait), flags, arg, argBytes)
		if errno == 0 {
			r.submitted += uint32(n)
			continue
		}
		switch errno {
		case unix.EINTR:
		case unix.ETIME:
			r.submitted = atomic.LoadUint32(r.sqHead)
			if r.tail == r.submitted {
				return nil
			}
		case unix.EAGAIN, unix.EBUSY:
			// No memory for a request, or too many completions: those that are there
			// must be taken first.
			r.submitted = atomic.LoadUint32(r.sqHead)
			if r.Ready() > 0 {
				return nil
			}
			time.Sleep(time.Millisecond)
		default:
			return fmt.Errorf("io_uring: enter: %w", errno)
		}
	}
}

// Ready is how many completions can be taken.
func (r *Ring) Ready() int {
	return int(atomic.LoadUint32(r.cqTail) - *r.cqHead) // the head is ours
}

// Completion is what became of an entry.
type Completion struct {
	UserData uint64
	Res      int32 // a result, or a negative error number
	Flags    uint32
}

// Take takes the oldest completion.
func (r *Ring) Take() (c Completion, ok bool) {
	head := *r.cqHead
	if head == atomic.LoadUint32(r.cqTail) {
		return c, false
	}
	c = *(*Completion)(unsafe.Add(r.cqEntries, uintptr(head&r.cqMask)*cqeBytes))
	atomic.StoreUint32(r.cqHead, head+1)
	return c, true
}
