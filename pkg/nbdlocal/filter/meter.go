package filter

import (
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Op is a kind of request.
type Op uint8

// Kinds of request that are counted. Map and Info touch no guest data and are not.
const (
	Read Op = iota
	Write
	Zero
	Discard
	Flush
	opCount
)

// Ops are all kinds, in the order in which figures list them.
var Ops = [...]Op{Read, Write, Zero, Discard, Flush}

// String returns the kind's name, as figures and metrics have it.
func (o Op) String() string {
	return [...]string{"read", "write", "zero", "discard", "flush"}[o]
}

// Meter is a device that counts what passes. It adds nothing to a request but the
// counting; see Figures for what it counts.
//
// Threads count in different places, which are added up when somebody looks: counters
// that several processors write to at once would cost more than all the rest. Where a
// thread counts follows from where its stack lies, which takes no system call and stays
// the same for the threads of a block server.
type Meter struct {
	block.Device
	stripes []stripe
	shift   uint // of a hash, to get a stripe's number
	errors  [opCount][len(errnoNames) + 1]atomic.Uint64
}

const (
	cacheLineBytes = 64
	maxStripes     = 16
	// slotsPerStripe is how many requests of one stripe can be seen in flight; a block
	// server has fewer threads. More of them are counted when they end.
	slotsPerStripe = 64
)

// stripe is where some of the threads count.
type stripe struct {
	ops [opCount]opCounters
	// slots hold when a request in flight began, and its kind; 0 is free.
	slots [slotsPerStripe]atomic.Int64
}

type opCounters struct {
	buckets [Buckets]atomic.Uint64
	bytes   atomic.Uint64
	nanos   atomic.Uint64
	_       [cacheLineBytes - (Buckets+2)*8%cacheLineBytes]byte
}

// NewMeter returns a device that counts what is asked of dev.
func NewMeter(dev block.Device) *Meter {
	m := &Meter{Device: dev, shift: 64}
	n := 1
	for n < min(runtime.NumCPU(), maxStripes) {
		n *= 2
		m.shift--
	}
	m.stripes = make([]stripe, n)
	return m
}

var epoch = time.Now()

// clock is a monotonic clock.
func clock() time.Duration { return time.Since(epoch) }

// kindBits is how many bits of a slot say the kind of request; the rest is the time.
const kindBits = 3

// stripe returns where the calling thread counts.
func (m *Meter) stripe() *stripe {
	const (
		smallestStackBits = 11
		golden            = 0x9e3779b97f4a7c15 // 2^64 divided by the golden ratio
	)
	var here byte
	h := uint64(uintptr(unsafe.Pointer(&here))>>smallestStackBits) * golden
	return &m.stripes[h>>m.shift]
}

// enter notes that a request begins. The slot is nil if none was free.
func (s *stripe) enter(op Op, now time.Duration) *atomic.Int64 {
	mark := int64(now+1)<<kindBits | int64(op)
	for i := range s.slots {
		if slot := &s.slots[i]; slot.Load() == 0 && slot.CompareAndSwap(0, mark) {
			return slot
		}
	}
	return nil
}

// leave notes that a request has ended.
func (m *Meter) leave(s *stripe, slot *atomic.Int64, op Op, began time.Duration, n int64, err error) {
	took := clock() - began
	if slot != nil {
		slot.Store(0)
	}
	c := &s.ops[op]
	c.buckets[bucketOf(took)].Add(1)
	c.nanos.Add(uint64(max(took, 0)))
	if err == nil {
		c.bytes.Add(uint64(n))
		return
	}
	m.errors[op][errnoIndex(err)].Add(1)
}

// ReadAt implements block.Device.
func (m *Meter) ReadAt(p []byte, off int64) (int, error) {
	s, began := m.stripe(), clock()
	slot := s.enter(Read, began)
	n, err := m.Device.ReadAt(p, off)
	m.leave(s, slot, Read, began, int64(n), err)
	return n, err
}

// WriteAt implements block.Device.
func (m *Meter) WriteAt(p []byte, off int64) (int, error) {
	s, began := m.stripe(), clock()
	slot := s.enter(Write, began)
	n, err := m.Device.WriteAt(p, off)
	m.leave(s, slot, Write, began, int64(n), err)
	return n, err
}

// WriteZeroes implements block.Device.
func (m *Meter) WriteZeroes(off, n int64, flags block.ZeroFlags) error {
	s, began := m.stripe(), clock()
	slot := s.enter(Zero, began)
	err := m.Device.WriteZeroes(off, n, flags)
	m.leave(s, slot, Zero, began, n, err)
	return err
}

// Discard implements block.Device.
func (m *Meter) Discard(off, n int64) error {
	s, began := m.stripe(), clock()
	slot := s.enter(Discard, began)
	err := m.Device.Discard(off, n)
	m.leave(s, slot, Discard, began, n, err)
	return err
}

// Flush implements block.Device.
func (m *Meter) Flush() error {
	s, began := m.stripe(), clock()
	slot := s.enter(Flush, began)
	err := m.Device.Flush()
	m.leave(s, slot, Flush, began, 0, err)
	return err
}

// errnoNames are the error numbers that block.Errno gives. Others are counted together.
var errnoNames = [...]struct {
	errno syscall.Errno
	name  string
}{
	{syscall.EIO, "EIO"},
	{syscall.ENOSPC, "ENOSPC"},
	{syscall.EPERM, "EPERM"},
	{syscall.EINVAL, "EINVAL"},
	{syscall.ENOTSUP, "ENOTSUP"},
	{syscall.ESHUTDOWN, "ESHUTDOWN"},
	{syscall.EBUSY, "EBUSY"},
	{syscall.ENOMEM, "ENOMEM"},
}

// otherErrno names the errors that errnoNames has no name for.
const otherErrno = "other"

func errnoIndex(err error) int {
	errno := block.Errno(err)
	for i := range errnoNames {
		if errnoNames[i].errno == errno {
			return i
		}
	}
	return len(errnoNames)
}

func errnoName(index int) string {
	if index < len(errnoNames) {
		return errnoNames[index].name
	}
	return otherErrno
}
