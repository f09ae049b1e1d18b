package vfs

import (
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
)

// FS is a tree of files. All methods are safe for concurrent use.
type FS interface {
	// Open opens an existing regular file. A directory, device, socket or fifo is
	// refused with fs.ErrInvalid without blocking.
	Open(name string, mode Mode) (File, error)
	// Create makes a new empty file and opens it for reading and writing;
	// fs.ErrExist if the name is taken, by whatever.
	Create(name string) (File, error)
	// Remove removes a file or an empty directory.
	Remove(name string) error
	// Rename moves a file or directory, atomically replacing a file at newName.
	Rename(oldName, newName string) error
	// Mkdir makes one directory; fs.ErrExist if the name is taken.
	Mkdir(name string) error
	// ReadDir lists a directory, sorted by name.
	ReadDir(name string) ([]fs.DirEntry, error)
	// Stat describes a file or directory, following links within the root.
	Stat(name string) (fs.FileInfo, error)
	// SyncDir makes the names in a directory durable: creations, removals and
	// renames in it that had returned.
	SyncDir(name string) error
	// Usage returns the capacity of the file system that holds the root.
	Usage() (Usage, error)
	// Close releases the tree. Open files stay open.
	Close() error
}

// Usage is a file system's capacity in bytes.
type Usage struct {
	TotalBytes int64
	FreeBytes  int64 // available to this process
}

// Mode says what a file is opened for.
type Mode int

const (
	ReadOnly Mode = iota
	ReadWrite
)

// File is an open file. Reads and writes are safe for concurrent use and do not wait
// for one another.
type File interface {
	// ReadAt and WriteAt follow the io interfaces; a write past the end extends
	// the file, and the gap reads as zeroes.
	io.ReaderAt
	io.WriterAt

	// Name returns the name the file was opened by.
	Name() string
	// Size returns the file's length in bytes.
	Size() (int64, error)
	// AllocatedBytes returns the space the file occupies.
	AllocatedBytes() (int64, error)
	// Truncate sets the file's length; bytes added read as zeroes and take no space.
	Truncate(size int64) error
	// Sync makes the contents and the length durable (fdatasync).
	Sync() error
	// Allocate reserves space for [off, off+n) so that later writes there need no
	// more, extends the file to off+n if it is shorter, and changes no contents.
	Allocate(off, n int64) error
	// PunchHole makes [off, off+n) read as zeroes and gives its space back. The
	// length is kept.
	PunchHole(off, n int64) error
	// NextData returns the first range [start, end) at or after off that may hold
	// other bytes than zeroes; io.EOF when there is none. A file system that
	// cannot tell says everything is data.
	NextData(off int64) (start, end int64, err error)

	// Lock takes the file for reading or writing in the byte ranges that QEMU
	// uses, so that QEMU and we exclude each other: one writer and no readers, or
	// any number of readers. It does not wait: a conflict is block.ErrLocked. A
	// second call changes the kind. The lock belongs to this open file, not to
	// the process.
	Lock(kind LockKind) error
	// Unlock gives the lock up; Close does too.
	Unlock() error

	// Close releases the file. It makes nothing durable.
	Close() error
}

// LockKind is what a file is locked for.
type LockKind int

const (
	// LockRead admits other readers and excludes writers.
	LockRead LockKind = iota
	// LockWrite excludes readers and writers.
	LockWrite
)

// CheckName returns nil for a name FS accepts, and an error that wraps fs.ErrInvalid
// otherwise.
func CheckName(name string) error {
	if !fs.ValidPath(name) || strings.ContainsRune(name, 0) {
		return fmt.Errorf("name %q: %w: want a clean relative path without \"..\"", name, fs.ErrInvalid)
	}
	return nil
}

// Resolve returns the name that a link found in the file base points to. Links are
// untrusted: an absolute path, a URI or other "scheme:" prefix, or a path that
// leaves the root is refused with an error that wraps fs.ErrInvalid. Links with
// backslashes are taken as they are: they name no directory here.
func Resolve(base, link string) (string, error) {
	bad := func(why string) (string, error) {
		return "", fmt.Errorf("link %q in %s: %w: %s", link, base, fs.ErrInvalid, why)
	}
	switch {
	case link == "":
		return bad("it is empty")
	case strings.HasPrefix(link, "/"):
		return bad("absolute paths are refused; want a path relative to the image, inside its store")
	case hasScheme(link):
		return bad("only plain file names are accepted")
	}
	name := path.Join(path.Dir(base), link)
	if err := CheckName(name); err != nil || name == "." {
		return bad("it leaves the store")
	}
	return name, nil
}

// hasScheme reports whether s starts like "json:", "nbd:" or "C:": a colon before
// any slash, as QEMU's protocols are written.
func hasScheme(s string) bool {
	i := strings.IndexAny(s, ":/")
	return i >= 0 && s[i] == ':'
}

// RelativeLink returns the link to put into the file base so that Resolve(base, link)
// is target. Both must be names that CheckName accepts.
func RelativeLink(base, target string) string {
	dir := strings.Split(path.Dir(base), "/")
	if path.Dir(base) == "." {
		dir = nil
	}
	to := strings.Split(target, "/")
	common := 0
	for common < len(dir) && common < len(to)-1 && dir[common] == to[common] {
		common++
	}
	link := strings.Repeat("../", len(dir)-common) + strings.Join(to[common:], "/")
	if hasScheme(link) {
		link = "./" + link // a plain name, here and for QEMU
	}
	return link
}
