package vfs

import (
	"errors"
	"io/fs"
	"sync/atomic"
)

// OpKind says what an operation is.
type OpKind int

// The operations of FS, then those of File.
const (
	OpOpen OpKind = iota
	OpCreate
	OpRemove
	OpRename
	OpMkdir
	OpReadDir
	OpStat
	OpSyncDir
	OpUsage
	OpCloseFS

	OpRead
	OpWrite
	OpSize
	OpAllocatedBytes
	OpTruncate
	OpSync
	OpAllocate
	OpPunchHole
	OpNextData
	OpLock
	OpUnlock
	OpClose
)

var opNames = [...]string{
	OpOpen: "open", OpCreate: "create", OpRemove: "remove", OpRename: "rename", OpMkdir: "mkdir",
	OpReadDir: "readdir", OpStat: "stat", OpSyncDir: "syncdir", OpUsage: "usage", OpCloseFS: "closefs",
	OpRead: "read", OpWrite: "write", OpSize: "size", OpAllocatedBytes: "allocatedbytes",
	OpTruncate: "truncate", OpSync: "sync", OpAllocate: "allocate", OpPunchHole: "punchhole",
	OpNextData: "nextdata", OpLock: "lock", OpUnlock: "unlock", OpClose: "close",
}

// String returns the operation's name in lower case.
func (k OpKind) String() string {
	if k < 0 || int(k) >= len(opNames) {
		return "invalid"
	}
	return opNames[k]
}

// Changes reports whether the operation changes what is in the file system, or what of
// it is durable: after any other one a crash leaves what it would have left before.
func (k OpKind) Changes() bool {
	switch k {
	case OpCreate, OpRemove, OpRename, OpMkdir, OpSyncDir,
		OpWrite, OpTruncate, OpSync, OpAllocate, OpPunchHole:
		return true
	}
	return false
}

// Op is an operation about to be done.
type Op struct {
	Kind OpKind
	// Name is the file's or directory's; for OpRename the old one. NewName is set for
	// OpRename only.
	Name, NewName string
	// Off and Len are the range of OpRead, OpWrite, OpAllocate and OpPunchHole. Off is
	// also where OpNextData starts, and the new length for OpTruncate.
	Off, Len int64
	// N numbers the operations of one Inject from 0, in the order in which they start.
	N uint64
}

// Hook is told of every operation before it is done. An error makes the operation fail
// with it instead. It may be called concurrently.
type Hook func(Op) error

// Inject returns base with hook called before every operation on it and on the files
// opened through it. An operation that the hook fails is not done, with two exceptions:
// closing releases the file or tree even so, as the kernel does, and a write that fails
// with ShortWrite is done in part.
func Inject(base FS, hook Hook) FS {
	return &injected{base: base, hook: hook}
}

// FailNth fails operation n, counted from 0 among those it is asked about, with err.
func FailNth(n uint64, err error) Hook {
	var seen atomic.Uint64
	return func(Op) error {
		if seen.Add(1)-1 == n {
			return err
		}
		return nil
	}
}

// FailFrom fails operation n, counted like FailNth's, and all after it with err: a store
// that went away.
func FailFrom(n uint64, err error) Hook {
	var seen atomic.Uint64
	return func(Op) error {
		if seen.Add(1)-1 >= n {
			return err
		}
		return nil
	}
}

// CrashPoint calls f before operation n, counted like FailNth's, and fails nothing. f
// may call Mem.Crash.
func CrashPoint(n uint64, f func()) Hook {
	var seen atomic.Uint64
	return func(Op) error {
		if seen.Add(1)-1 == n {
			f()
		}
		return nil
	}
}

// Count adds one to n for every operation.
func Count(n *atomic.Int64) Hook {
	return func(Op) error {
		n.Add(1)
		return nil
	}
}

// If asks hook only about operations for which match is true. So
//
//	If(func(op Op) bool { return op.Kind == OpWrite }, FailNth(3, syscall.EIO))
//
// fails the fourth write.
func If(match func(Op) bool, hook Hook) Hook {
	return func(op Op) error {
		if !match(op) {
			return nil
		}
		return hook(op)
	}
}

// OfKind is a condition for If: operations of the given kinds.
func OfKind(kinds ...OpKind) func(Op) bool {
	return func(op Op) bool {
		for _, k := range kinds {
			if op.Kind == k {
				return true
			}
		}
		return false
	}
}

// Changing is a condition for If: operations after which a crash can leave something
// else than before.
func Changing(op Op) bool { return op.Kind.Changes() }

// All asks hooks in turn, until one gives an error.
func All(hooks ...Hook) Hook {
	return func(op Op) error {
		for _, hook := range hooks {
			if err := hook(op); err != nil {
				return err
			}
		}
		return nil
	}
}

// ShortWrite returns an error for a hook to fail a write with: the write's first sectors
// sectors, up to the boundary of 512 bytes in the file, are written all the same, but at
// least one byte is not. Other operations just fail with err.
func ShortWrite(sectors int, err error) error {
	return &shortWrite{sectors, err}
}

type shortWrite struct {
	sectors int
	err     error
}

func (e *shortWrite) Error() string { return e.err.Error() }
func (e *shortWrite) Unwrap() error { return e.err }

// bytes returns how much of a write of n bytes at off is done.
func (e *shortWrite) bytes(off, n int64) int64 {
	end := (off/sectorBytes + int64(e.sectors)) * sectorBytes
	return max(min(end-off, n-1), 0)
}

type injected struct {
	base FS
	hook Hook
	ops  atomic.Uint64
}

// ask numbers the operation and asks the hook.
func (i *injected) ask(op Op) error {
	op.N = i.ops.Add(1) - 1
	return i.hook(op)
}

func (i *injected) open(op Op, open func() (File, error)) (File, error) {
	if err := i.ask(op); err != nil {
		return nil, err
	}
	f, err := open()
	if err != nil {
		return nil, err
	}
	return &injectedFile{fs: i, base: f}, nil
}

func (i *injected) Open(name string, mode Mode) (File, error) {
	return i.open(Op{Kind: OpOpen, Name: name}, func() (File, error) { return i.base.Open(name, mode) })
}

func (i *injected) Create(name string) (File, error) {
	return i.open(Op{Kind: OpCreate, Name: name}, func() (File, error) { return i.base.Create(name) })
}

func (i *injected) Remove(name string) error {
	if err := i.ask(Op{Kind: OpRemove, Name: name}); err != nil {
		return err
	}
	return i.base.Remove(name)
}

func (i *injected) Rename(oldName, newName string) error {
	if err := i.ask(Op{Kind: OpRename, Name: oldName, NewName: newName}); err != nil {
		return err
	}
	return i.base.Rename(oldName, newName)
}

func (i *injected) Mkdir(name string) error {
	if err := i.ask(Op{Kind: OpMkdir, Name: name}); err != nil {
		return err
	}
	return i.base.Mkdir(name)
}

func (i *injected) ReadDir(name string) ([]fs.DirEntry, error) {
	if err := i.ask(Op{Kind: OpReadDir, Name: name}); err != nil {
		return nil, err
	}
	return i.base.ReadDir(name)
}

func (i *injected) Stat(name string) (fs.FileInfo, error) {
	if err := i.ask(Op{Kind: OpStat, Name: name}); err != nil {
		return nil, err
	}
	return i.base.Stat(name)
}

func (i *injected) SyncDir(name string) error {
	if err := i.ask(Op{Kind: OpSyncDir, Name: name}); err != nil {
		return err
	}
	return i.base.SyncDir(name)
}

func (i *injected) Usage() (Usage, error) {
	if err := i.ask(Op{Kind: OpUsage, Name: "."}); err != nil {
		return Usage{}, err
	}
	return i.base.Usage()
}

func (i *injected) Close() error {
	err := i.ask(Op{Kind: OpCloseFS, Name: "."})
	return errors.Join(err, i.base.Close())
}

type injectedFile struct {
	fs   *injected
	base File
}

func (f *injectedFile) ask(kind OpKind, off, n int64) error {
	return f.fs.ask(Op{Kind: kind, Name: f.base.Name(), Off: off, Len: n})
}

func (f *injectedFile) Name() string { return f.base.Name() }

func (f *injectedFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.ask(OpRead, off, int64(len(p))); err != nil {
		return 0, err
	}
	return f.base.ReadAt(p, off)
}

func (f *injectedFile) WriteAt(p []byte, off int64) (int, error) {
	err := f.ask(OpWrite, off, int64(len(p)))
	var short *shortWrite
	if errors.As(err, &short) {
		n, baseErr := f.base.WriteAt(p[:short.bytes(off, int64(len(p)))], off)
		return n, errors.Join(err, baseErr)
	}
	if err != nil {
		return 0, err
	}
	return f.base.WriteAt(p, off)
}

func (f *injectedFile) Size() (int64, error) {
	if err := f.ask(OpSize, 0, 0); err != nil {
		return 0, err
	}
	return f.base.Size()
}

func (f *injectedFile) AllocatedBytes() (int64, error) {
	if err := f.ask(OpAllocatedBytes, 0, 0); err != nil {
		return 0, err
	}
	return f.base.AllocatedBytes()
}

func (f *injectedFile) Truncate(size int64) error {
	if err := f.ask(OpTruncate, size, 0); err != nil {
		return err
	}
	return f.base.Truncate(size)
}

func (f *injectedFile) Sync() error {
	if err := f.ask(OpSync, 0, 0); err != nil {
		return err
	}
	return f.base.Sync()
}

func (f *injectedFile) Allocate(off, n int64) error {
	if err := f.ask(OpAllocate, off, n); err != nil {
		return err
	}
	return f.base.Allocate(off, n)
}

func (f *injectedFile) PunchHole(off, n int64) error {
	if err := f.ask(OpPunchHole, off, n); err != nil {
		return err
	}
	return f.base.PunchHole(off, n)
}

func (f *injectedFile) NextData(off int64) (start, end int64, err error) {
	if err := f.ask(OpNextData, off, 0); err != nil {
		return 0, 0, err
	}
	return f.base.NextData(off)
}

func (f *injectedFile) Lock(kind LockKind) error {
	if err := f.ask(OpLock, 0, 0); err != nil {
		return err
	}
	return f.base.Lock(kind)
}

func (f *injectedFile) Unlock() error {
	if err := f.ask(OpUnlock, 0, 0); err != nil {
		return err
	}
	return f.base.Unlock()
}

func (f *injectedFile) Close() error {
	err := f.ask(OpClose, 0, 0)
	return errors.Join(err, f.base.Close())
}
