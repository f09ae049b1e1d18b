package vfs

import (
	"io"
	"io/fs"
	"syscall"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// memMaxFileBytes is the greatest length of a file in a Mem.
const memMaxFileBytes = 1 << 60

// memFile is an open file of a Mem. All its state is under the Mem's lock.
type memFile struct {
	m        *Mem
	node     *memNode
	name     string
	readOnly bool
	closed   bool
}

func (f *memFile) Name() string { return f.name }

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, badRange("read", f.name, off, int64(len(p)))
	}
	f.m.mu.RLock()
	defer f.m.mu.RUnlock()
	if f.closed {
		return 0, f.fail("read", fs.ErrClosed)
	}
	if len(p) == 0 {
		return 0, nil
	}
	n := int(max(min(int64(len(p)), f.node.data.live.size-off), 0))
	f.node.data.live.read(p[:n], off)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt writes as much as there is space for.
func (f *memFile) WriteAt(p []byte, off int64) (written int, err error) {
	err = f.change("write", off, int64(len(p)), func(d *memData) error {
		written = int(f.m.fitting(d, off, int64(len(p))))
		d.write(p[:written], off)
		if written < len(p) {
			return syscall.ENOSPC
		}
		return nil
	})
	return written, err
}

func (f *memFile) Size() (int64, error) {
	return f.look("stat", func(d *memData) int64 { return d.live.size })
}

func (f *memFile) AllocatedBytes() (int64, error) {
	return f.look("stat", func(d *memData) int64 { return d.live.allocated.count * pageBytes })
}

func (f *memFile) Truncate(size int64) error {
	return f.change("truncate", size, 0, func(d *memData) error {
		d.truncate(size)
		return nil
	})
}

func (f *memFile) Sync() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.closed {
		return f.fail("fdatasync", fs.ErrClosed)
	}
	f.node.data.sync()
	return nil
}

func (f *memFile) Allocate(off, n int64) error {
	return f.change("allocate", off, n, func(d *memData) error {
		if n == 0 {
			return nil
		}
		if f.m.fitting(d, off, n) < n {
			return syscall.ENOSPC
		}
		d.reserve(off/pageBytes, pagesFor(off+n))
		if off+n > d.live.size {
			d.resize(off + n)
		}
		return nil
	})
}

func (f *memFile) PunchHole(off, n int64) error {
	return f.change("punch hole", off, n, func(d *memData) error {
		d.zero(off, n)
		return nil
	})
}

func (f *memFile) NextData(off int64) (start, end int64, err error) {
	if off < 0 {
		return 0, 0, badRange("seek data", f.name, off, 0)
	}
	f.m.mu.Lock() // not RLock: the answer is indexed
	defer f.m.mu.Unlock()
	if f.closed {
		return 0, 0, f.fail("seek data", fs.ErrClosed)
	}
	return f.node.data.nextData(off)
}

func (f *memFile) Lock(kind LockKind) error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.closed {
		return f.fail("lock", fs.ErrClosed)
	}
	return f.node.lockFor(f, kind)
}

func (f *memFile) Unlock() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.closed {
		return f.fail("unlock", fs.ErrClosed)
	}
	delete(f.node.locks, f)
	return nil
}

func (f *memFile) Close() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.closed {
		return f.fail("close", fs.ErrClosed)
	}
	f.closed = true
	delete(f.node.locks, f)
	f.node.opens--
	f.m.releaseUnused(f.node)
	return nil
}

// look reads a number under the lock.
func (f *memFile) look(op string, get func(*memData) int64) (int64, error) {
	f.m.mu.RLock()
	defer f.m.mu.RUnlock()
	if f.closed {
		return 0, f.fail(op, fs.ErrClosed)
	}
	return get(f.node.data), nil
}

// change runs do under the lock and keeps count of the space it takes or gives back.
func (f *memFile) change(op string, off, n int64, do func(*memData) error) error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	switch {
	case f.closed:
		return f.fail(op, fs.ErrClosed)
	case f.readOnly:
		return f.fail(op, block.ErrReadOnly)
	case badOffset(off, n):
		return badRange(op, f.name, off, n)
	case off+n > memMaxFileBytes:
		return f.fail(op, syscall.EFBIG)
	}
	before := f.node.data.live.allocated.count
	err := do(f.node.data)
	f.m.usedPages += f.node.data.live.allocated.count - before
	f.node.modTime = time.Now()
	return f.fail(op, err)
}

func (f *memFile) fail(op string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: f.name, Err: err}
}

// fitting returns how many bytes of [off, off+n) there is space for, from its start.
func (m *Mem) fitting(d *memData, off, n int64) int64 {
	if m.capacity < 0 || n == 0 {
		return n
	}
	first, end := off/pageBytes, pagesFor(off+n)
	free := max(m.capacity/pageBytes-m.usedPages, 0)
	if end-first-d.live.allocated.countIn(first, end) <= free {
		return n
	}
	page := first
	for ; ; page++ {
		if !d.live.allocated.has(page) {
			if free == 0 {
				break
			}
			free--
		}
	}
	return max(page*pageBytes-off, 0)
}
