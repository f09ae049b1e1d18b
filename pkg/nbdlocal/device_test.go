package nbdlocal

import (
	"sync"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

const memPage = 64 << 10

// memDevice is a sparse device in memory. Its hooks let a test slow it, stop it or make
// it fail.
type memDevice struct {
	mu       sync.RWMutex
	size     int64
	pages    map[int64][]byte
	flushes  int
	readOnly bool

	// before is called before each operation, without the lock; its error is the
	// operation's.
	before func(op string, off, n int64) error
}

func newMemDevice(size int64) *memDevice {
	return &memDevice{size: size, pages: map[int64][]byte{}}
}

func (d *memDevice) hook(op string, off, n int64) error {
	if d.before == nil {
		return nil
	}
	return d.before(op, off, n)
}

func (d *memDevice) ReadAt(p []byte, off int64) (int, error) {
	if err := d.hook("read", off, int64(len(p))); err != nil {
		return 0, err
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	for done := 0; done < len(p); {
		at := off + int64(done)
		n := min(len(p)-done, int(memPage-at%memPage))
		if page := d.pages[at/memPage]; page != nil {
			copy(p[done:done+n], page[at%memPage:])
		} else {
			clear(p[done : done+n])
		}
		done += n
	}
	return len(p), nil
}

func (d *memDevice) WriteAt(p []byte, off int64) (int, error) {
	if err := d.hook("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for done := 0; done < len(p); {
		at := off + int64(done)
		page := d.pages[at/memPage]
		if page == nil {
			page = make([]byte, memPage)
			d.pages[at/memPage] = page
		}
		done += copy(page[at%memPage:], p[done:])
	}
	return len(p), nil
}

func (d *memDevice) WriteZeroes(off, n int64, flags block.ZeroFlags) error {
	if err := d.hook("zero", off, n); err != nil {
		return err
	}
	whole := off%memPage == 0 && n%memPage == 0
	if flags&block.ZeroFastOnly != 0 && !whole {
		return block.ErrUnsupported
	}
	d.zero(off, n, flags&block.ZeroKeepAllocated == 0)
	return nil
}

func (d *memDevice) Discard(off, n int64) error {
	if err := d.hook("discard", off, n); err != nil {
		return err
	}
	d.zero(off, n, true)
	return nil
}

func (d *memDevice) zero(off, n int64, release bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for end := off + n; off < end; {
		chunk := min(end-off, memPage-off%memPage)
		page := d.pages[off/memPage]
		switch {
		case chunk == memPage && release:
			delete(d.pages, off/memPage)
		case page != nil:
			clear(page[off%memPage : off%memPage+chunk])
		case !release:
			d.pages[off/memPage] = make([]byte, memPage)
		}
		off += chunk
	}
}

func (d *memDevice) Flush() error {
	if err := d.hook("flush", 0, 0); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.flushes++
	return nil
}

func (d *memDevice) Map(off, n int64) (block.Extent, error) {
	if err := d.hook("map", off, n); err != nil {
		return block.Extent{}, err
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	end := min(off+memPage-off%memPage, off+n)
	e := block.Extent{Off: off, Len: end - off, FileOff: -1}
	if d.pages[off/memPage] != nil {
		e.State = block.Data
	}
	return e, nil
}

func (d *memDevice) Info() block.Info {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return block.Info{SizeBytes: d.size, LogicalBlockBytes: 512, ClusterBytes: memPage, ReadOnly: d.readOnly, CanDiscard: true, CanZero: true}
}

func (d *memDevice) Close() error { return nil }

func (d *memDevice) flushCount() int {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.flushes
}

// allocated reports whether there is a page at off.
func (d *memDevice) allocated(off int64) bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.pages[off/memPage] != nil
}

func (d *memDevice) grow(size int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.size = size
}

// snapshot returns the contents of [off, off+n) past the hooks.
func (d *memDevice) snapshot(off int64, n int) []byte {
	quiet := memDevice{size: d.size, pages: d.pages}
	d.mu.RLock()
	defer d.mu.RUnlock()
	p := make([]byte, n)
	_, _ = quiet.ReadAt(p, off)
	return p
}

// gate holds operations back until it is opened.
type gate struct {
	open    func()
	opened  chan struct{}
	entered chan struct{} // one value for each operation held
}

// newGate returns a gate that opens at the latest when the test ends.
func newGate(tb testing.TB) *gate {
	g := &gate{opened: make(chan struct{}), entered: make(chan struct{}, 10000)}
	g.open = sync.OnceFunc(func() { close(g.opened) })
	tb.Cleanup(g.open)
	return g
}

func (g *gate) wait() {
	g.entered <- struct{}{}
	<-g.opened
}

// eventually waits until ok returns true.
func eventually(ok func() bool) bool {
	for range 3000 {
		if ok() {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return false
}
