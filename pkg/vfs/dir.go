package vfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Modes of what a Dir makes, before the umask: disks are private to who serves them,
// but anybody who may read the store sees what is there.
const (
	newFileMode = 0o600
	newDirMode  = 0o755
)

// leaseWait bounds how long Open waits for another holder of the file, such as a file
// server on this machine, to give back a lease or a delegation.
const leaseWait = 5 * time.Second

// Dir is the tree of files under a directory of the host. Whatever is put into that
// directory, no name leads out of it.
type Dir struct {
	root *os.Root
	path string // absolute
}

var _ FS = (*Dir)(nil)

// OpenDir opens the directory at path. Links in path itself are followed.
func OpenDir(path string) (*Dir, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("open directory %s: %w", path, err)
	}
	root, err := os.OpenRoot(abs)
	if err != nil {
		return nil, err
	}
	return &Dir{root: root, path: abs}, nil
}

// Path returns the absolute host path of a name, for messages and for telling other
// programs. Opening it bypasses the Dir's protection against links.
func (d *Dir) Path(name string) string {
	return filepath.Join(d.path, name)
}

// Open opens an existing regular file, see [FS].
func (d *Dir) Open(name string, mode Mode) (File, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	// Opening a device can already have an effect, so look first. Somebody may swap
	// the file in between: O_NONBLOCK keeps a fifo from blocking us, and the second
	// look refuses it.
	info, err := d.root.Stat(name)
	if err != nil {
		return nil, d.fail("open", name, err)
	}
	if !info.Mode().IsRegular() {
		return nil, d.notRegular(name, info)
	}
	flags := os.O_RDONLY
	if mode == ReadWrite {
		flags = os.O_RDWR
	}
	f, err := d.openPastLeases(name, flags|unix.O_NONBLOCK)
	if err != nil {
		return nil, d.fail("open", name, err)
	}
	info, err = f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = d.notRegular(name, info)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return newDirFile(f, name, mode)
}

func (d *Dir) notRegular(name string, info fs.FileInfo) error {
	kind := "a special file"
	if info.IsDir() {
		kind = "a directory"
	}
	return fmt.Errorf("open %s: %w: it is %s, want a regular file", d.Path(name), fs.ErrInvalid, kind)
}

// openPastLeases opens a file without blocking, but waits for a lease on it to be broken:
// that is the one case in which the kernel refuses a regular file for O_NONBLOCK.
func (d *Dir) openPastLeases(name string, flags int) (*os.File, error) {
	const step = 10 * time.Millisecond
	for waited := time.Duration(0); ; waited += step {
		f, err := d.root.OpenFile(name, flags, 0)
		if !errors.Is(err, unix.EWOULDBLOCK) || waited >= leaseWait {
			return f, err
		}
		time.Sleep(step)
	}
}

// Create makes a new empty file, see [FS].
func (d *Dir) Create(name string) (File, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	if name == "." {
		return nil, d.fail("create", name, syscall.EEXIST)
	}
	f, err := d.root.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NONBLOCK, newFileMode)
	if err != nil {
		return nil, d.fail("create", name, err)
	}
	return newDirFile(f, name, ReadWrite)
}

// Remove removes a file or an empty directory, see [FS].
func (d *Dir) Remove(name string) error {
	if err := checkNotRoot("remove", name); err != nil {
		return err
	}
	return d.fail("remove", name, d.root.Remove(name))
}

// Rename moves a file or directory, see [FS].
func (d *Dir) Rename(oldName, newName string) error {
	if err := errors.Join(checkNotRoot("rename", oldName), checkNotRoot("rename", newName)); err != nil {
		return err
	}
	if err := d.root.Rename(oldName, newName); err != nil {
		return &os.LinkError{Op: "rename", Old: d.Path(oldName), New: d.Path(newName), Err: cause(err)}
	}
	return nil
}

// Mkdir makes one directory, see [FS].
func (d *Dir) Mkdir(name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	return d.fail("mkdir", name, d.root.Mkdir(name, newDirMode))
}

// ReadDir lists a directory, see [FS]. Links are listed as links.
func (d *Dir) ReadDir(name string) ([]fs.DirEntry, error) {
	f, err := d.openDirectory("readdir", name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	entries, err := f.ReadDir(-1)
	if err != nil {
		return nil, d.fail("readdir", name, err)
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return entries, nil
}

// Stat describes a file or directory, see [FS].
func (d *Dir) Stat(name string) (fs.FileInfo, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	info, err := d.root.Stat(name)
	if err != nil {
		return nil, d.fail("stat", name, err)
	}
	return info, nil
}

// SyncDir makes the names in a directory durable, see [FS]. A file system that cannot
// sync directories gives errors.ErrUnsupported.
func (d *Dir) SyncDir(name string) error {
	f, err := d.openDirectory("sync directory", name)
	if err != nil {
		return err
	}
	defer f.Close()
	err = f.Sync()
	if errors.Is(err, unix.EINVAL) { // what fsync says where it does not apply
		err = errors.ErrUnsupported
	}
	return d.fail("sync directory", name, err)
}

// Usage returns the capacity of the host's file system, see [FS].
func (d *Dir) Usage() (Usage, error) {
	f, err := d.openDirectory("statfs", ".")
	if err != nil {
		return Usage{}, err
	}
	defer f.Close()
	var st unix.Statfs_t
	err = retryEINTR(func() error { return unix.Fstatfs(int(f.Fd()), &st) })
	if err != nil {
		return Usage{}, d.fail("statfs", ".", err)
	}
	unit := st.Frsize
	if unit == 0 {
		unit = st.Bsize
	}
	return Usage{TotalBytes: int64(st.Blocks) * unit, FreeBytes: int64(st.Bavail) * unit}, nil
}

// Close releases the directory. Open files stay open.
func (d *Dir) Close() error {
	return d.root.Close()
}

// openDirectory opens a directory for reading; another kind of file fails with ENOTDIR.
func (d *Dir) openDirectory(op, name string) (*os.File, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	f, err := d.root.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, d.fail(op, name, err)
	}
	return f, nil
}

// fail adds the operation and the host path to err; nil stays nil.
func (d *Dir) fail(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: d.Path(name), Err: cause(err)}
}

// cause returns what lies under os's own wrapping, which names paths relative to the
// root. What is neither an error number nor a sentinel of fs is os.Root's refusal to
// follow a link out of the root.
func cause(err error) error {
	var pathErr *fs.PathError
	var linkErr *os.LinkError
	switch {
	case errors.As(err, &pathErr):
		err = pathErr.Err
	case errors.As(err, &linkErr):
		err = linkErr.Err
	}
	var errno syscall.Errno
	if errors.As(err, &errno) || errors.Is(err, fs.ErrClosed) || errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return fmt.Errorf("%w: %w", fs.ErrInvalid, err)
}

// checkNotRoot is CheckName for operations that the root itself cannot undergo.
func checkNotRoot(op, name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	if name == "." {
		return fmt.Errorf("%s the root: %w", op, fs.ErrInvalid)
	}
	return nil
}

// retryEINTR calls f until a signal no longer interrupts it.
func retryEINTR(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}
