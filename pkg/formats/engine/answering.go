package engine

import "sync/atomic"

// answering remembers, for ranges of the guest, which layer is the first to hold
// anything there, so that a read through a long chain need not ask the layers above it
// each time. Parents never change; the top layer does, and Disk.set forgets then.
//
// It is a table with one place for each range, or for several that displace one another.
// Entries are made with the mapping lock held for reading, and forgotten with it held
// for writing.
type answering struct {
	slots []atomic.Uint64 // range number + 1, and in the low byte the layer
}

const (
	answeringRange    = 64 << 10 // the usual cluster
	answeringMaxSlots = 1 << 19  // 4 MiB, for 32 GiB of guest at a time
)

// newAnswering returns nil, which remembers nothing, for a chain that needs none.
func newAnswering(layers int, sizeBytes int64) *answering {
	if layers < 3 || layers > 255 {
		return nil // asking two layers costs no more than remembering which
	}
	return &answering{slots: make([]atomic.Uint64, min(alignUp(sizeBytes, answeringRange)/answeringRange+1, answeringMaxSlots))}
}

func (a *answering) slot(r int64) *atomic.Uint64 { return &a.slots[r%int64(len(a.slots))] }

// first returns the first layer that holds anything in the range off lies in, and the
// range's end; ok is false if that is not known.
func (a *answering) first(off int64) (layer int, end int64, ok bool) {
	r := off / answeringRange
	e := a.slot(r).Load()
	return int(e & 0xff), (r + 1) * answeringRange, int64(e>>8) == r+1
}

func (a *answering) remember(off int64, layer int) {
	r := off / answeringRange
	a.slot(r).Store(uint64(r+1)<<8 | uint64(layer))
}

// forget drops what is known about a range of guest bytes.
func (a *answering) forget(off, n int64) {
	if a == nil {
		return
	}
	for r := off / answeringRange; r*answeringRange < off+n; r++ {
		if s := a.slot(r); int64(s.Load()>>8) == r+1 {
			s.Store(0)
		}
	}
}
