package nbdlocal

import (
	"fmt"
	"math/bits"

	"golang.org/x/sys/unix"
)

// Sizes of a connection's buffers. Small requests have buffers of their own, one a
// slot; larger ones share granules.
const (
	slotCount    = 128      // the kernel's queue depth per connection
	smallBytes   = 16 << 10 // a slot's own buffer
	receiveBytes = 64 << 10 // takes fifteen 4 KiB writes, or two thousand reads
	granuleBytes = 64 << 10 // unit of what larger requests are given
	fixedBytes   = receiveBytes + slotCount*smallBytes
)

// arena is the memory of one connection's buffers: one mapping, so that the garbage
// collector neither scans nor counts it, and so that it can be given back to the
// kernel when the connection is idle. It is not safe for concurrent use.
type arena struct {
	mem      []byte
	granules []uint64 // bit set = in use
	count    int      // granules there are
	used     int      // granules in use
}

// newArena maps an arena of sizeBytes, rounded down to whole granules. Pages cost
// nothing until they are touched.
func newArena(sizeBytes int64) (*arena, error) {
	count := int((sizeBytes - fixedBytes) / granuleBytes)
	size := fixedBytes + count*granuleBytes
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of buffers: %w", size, err)
	}
	return &arena{mem: mem, granules: make([]uint64, (count+63)/64), count: count}, nil
}

// receiveBuffer is where bytes arrive.
func (a *arena) receiveBuffer() []byte { return a.mem[:receiveBytes:receiveBytes] }

// small is the buffer of slot i.
func (a *arena) small(i int) []byte {
	start := receiveBytes + i*smallBytes
	return a.mem[start : start+smallBytes : start+smallBytes]
}

// take returns n contiguous bytes and the number of their first granule, from as low
// an address as possible so that few pages stay warm; nil if there aren't any.
func (a *arena) take(n int) ([]byte, int) {
	want := (n + granuleBytes - 1) / granuleBytes
	first := 0
	for first+want <= a.count {
		busy := a.lastInUse(first, want)
		if busy < 0 {
			a.mark(first, want, true)
			start := fixedBytes + first*granuleBytes
			return a.mem[start : start+n : start+want*granuleBytes], first
		}
		first = busy + 1
	}
	return nil, -1
}

// give takes back what take returned for n bytes.
func (a *arena) give(first, n int) {
	a.mark(first, (n+granuleBytes-1)/granuleBytes, false)
}

// lastInUse returns the last granule in use of [first, first+n), -1 if none is.
func (a *arena) lastInUse(first, n int) int {
	for end := first + n; end > first; {
		word := (end - 1) / 64
		start := max(word*64, first)
		mask := a.granules[word] & (^uint64(0) << (start % 64))
		if shift := end - word*64; shift < 64 {
			mask &= 1<<shift - 1
		}
		if mask != 0 {
			return word*64 + bits.Len64(mask) - 1
		}
		end = start
	}
	return -1
}

func (a *arena) mark(first, n int, inUse bool) {
	for i := first; i < first+n; i++ {
		bit := uint64(1) << (i % 64)
		if inUse == (a.granules[i/64]&bit != 0) {
			panic("nbdlocal: buffer taken or given twice")
		}
		a.granules[i/64] ^= bit
	}
	if inUse {
		a.used += n
	} else {
		a.used -= n
	}
}

// trim gives the pages back to the kernel. Nothing of the arena may be in use.
func (a *arena) trim() {
	_ = unix.Madvise(a.mem, unix.MADV_DONTNEED) // advice: without it the pages merely stay
}

// free unmaps the arena.
func (a *arena) free() {
	_ = unix.Munmap(a.mem) // fails only for a mapping that isn't one
	a.mem = nil
}
