package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// dirFile is an open file of a Dir. ReadAt and WriteAt are plain pread and pwrite: they
// allocate nothing and share no state but the descriptor.
type dirFile struct {
	f        *os.File
	raw      syscall.RawConn
	name     string
	readOnly bool

	lockMu sync.Mutex
	locked lockBytes // the bytes this file holds
}

func newDirFile(f *os.File, name string, mode Mode) (File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &dirFile{f: f, raw: raw, name: name, readOnly: mode == ReadOnly}, nil
}

func (f *dirFile) Name() string { return f.name }

func (f *dirFile) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, badRange("read", f.f.Name(), off, int64(len(p)))
	}
	return f.f.ReadAt(p, off)
}

func (f *dirFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.checkChange("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	return f.f.WriteAt(p, off)
}

func (f *dirFile) Size() (int64, error) {
	info, err := f.f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (f *dirFile) AllocatedBytes() (int64, error) {
	var st unix.Stat_t
	if err := f.call("stat", func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return 0, err
	}
	const unit = 512 // of st_blocks, whatever the file system's block size
	return st.Blocks * unit, nil
}

func (f *dirFile) Truncate(size int64) error {
	if err := f.checkChange("truncate", size, 0); err != nil {
		return err
	}
	return f.f.Truncate(size)
}

func (f *dirFile) Sync() error {
	return f.call("fdatasync", unix.Fdatasync)
}

func (f *dirFile) Allocate(off, n int64) error {
	if err := f.checkChange("allocate", off, n); err != nil || n == 0 {
		return err
	}
	return f.call("allocate", func(fd int) error { return unix.Fallocate(fd, 0, off, n) })
}

func (f *dirFile) PunchHole(off, n int64) error {
	if err := f.checkChange("punch hole", off, n); err != nil || n == 0 {
		return err
	}
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	return f.call("punch hole", func(fd int) error { return unix.Fallocate(fd, mode, off, n) })
}

// NextData asks the file system by SEEK_DATA and SEEK_HOLE. They move the descriptor's
// position, which nothing here uses.
func (f *dirFile) NextData(off int64) (start, end int64, err error) {
	if off < 0 {
		return 0, 0, badRange("seek data", f.f.Name(), off, 0)
	}
	for {
		start, err = f.f.Seek(off, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO):
			return 0, 0, io.EOF
		case errors.Is(err, unix.EINVAL), errors.Is(err, errors.ErrUnsupported):
			return f.allData(off)
		case err != nil:
			return 0, 0, err
		}
		end, err = f.f.Seek(start, unix.SEEK_HOLE)
		if err == nil && end > start {
			return start, end, nil
		}
		if err != nil && !errors.Is(err, unix.ENXIO) {
			return 0, 0, err
		}
		// The data went away between the two calls: look again.
	}
}

// allData is NextData where the file system cannot tell.
func (f *dirFile) allData(off int64) (start, end int64, err error) {
	size, err := f.Size()
	if err != nil {
		return 0, 0, err
	}
	if off >= size {
		return 0, 0, io.EOF
	}
	return off, size, nil
}

// Close gives the lock up itself: a child process just being started may hold a copy of
// the descriptor, and with it the lock, for a moment longer.
func (f *dirFile) Close() error {
	_ = f.Unlock() // the kernel does what is left
	return f.f.Close()
}

// call runs a system call on the descriptor, which stays open during it.
func (f *dirFile) call(op string, sys func(fd int) error) error {
	var err error
	if f.raw.Control(func(fd uintptr) { err = retryEINTR(func() error { return sys(int(fd)) }) }) != nil {
		err = fs.ErrClosed
	}
	if err != nil {
		return &fs.PathError{Op: op, Path: f.f.Name(), Err: err}
	}
	return nil
}

// checkChange refuses a change that the file was not opened for or that has no meaning.
func (f *dirFile) checkChange(op string, off, n int64) error {
	if f.readOnly {
		return &fs.PathError{Op: op, Path: f.f.Name(), Err: block.ErrReadOnly}
	}
	if badOffset(off, n) {
		return badRange(op, f.f.Name(), off, n)
	}
	return nil
}

// badOffset reports whether [off, off+n) is not a range of file offsets.
func badOffset(off, n int64) bool {
	return off < 0 || n < 0 || off+n < 0
}

func badRange(op, path string, off, n int64) error {
	return fmt.Errorf("%s %s: %d bytes at %d: %w: want neither negative", op, path, n, off, fs.ErrInvalid)
}
