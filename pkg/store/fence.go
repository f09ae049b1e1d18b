package store

import (
	"fmt"
	"sync/atomic"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// fence keeps a process from changing files once another owns them. It sits below the
// engine, so that it also stops a flush halfway.
type fence struct {
	cause atomic.Pointer[error]
}

// close lets nothing through any more; the first cause stays.
func (f *fence) close(cause error) {
	f.cause.CompareAndSwap(nil, &cause)
}

// check returns ErrFenced once the fence is closed.
func (f *fence) check() error {
	if cause := f.cause.Load(); cause != nil {
		return fmt.Errorf("%w: %w", block.ErrFenced, *cause)
	}
	return nil
}

// fencedFS is a file system whose files can be changed until the fence closes.
type fencedFS struct {
	vfs.FS
	fence *fence
}

func (f fencedFS) Open(name string, mode vfs.Mode) (vfs.File, error) {
	return f.wrap(f.FS.Open(name, mode))
}

func (f fencedFS) Create(name string) (vfs.File, error) {
	if err := f.fence.check(); err != nil {
		return nil, err
	}
	return f.wrap(f.FS.Create(name))
}

func (f fencedFS) wrap(file vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return fencedFile{file, f.fence}, nil
}

func (f fencedFS) Remove(name string) error {
	if err := f.fence.check(); err != nil {
		return err
	}
	return f.FS.Remove(name)
}

func (f fencedFS) Rename(oldName, newName string) error {
	if err := f.fence.check(); err != nil {
		return err
	}
	return f.FS.Rename(oldName, newName)
}

type fencedFile struct {
	vfs.File
	fence *fence
}

func (f fencedFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.fence.check(); err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, off)
}

func (f fencedFile) Truncate(size int64) error {
	if err := f.fence.check(); err != nil {
		return err
	}
	return f.File.Truncate(size)
}

func (f fencedFile) Allocate(off, n int64) error {
	if err := f.fence.check(); err != nil {
		return err
	}
	return f.File.Allocate(off, n)
}

func (f fencedFile) PunchHole(off, n int64) error {
	if err := f.fence.check(); err != nil {
		return err
	}
	return f.File.PunchHole(off, n)
}
