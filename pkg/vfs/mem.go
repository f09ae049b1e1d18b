package vfs

import (
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// memTotalBytes is the capacity that a Mem without a limit reports.
const memTotalBytes = 1 << 50

// Mem is a file system in memory that can lose power. Files are sparse: only pages of
// 4096 bytes that were written take memory, so files of many TiB are cheap. It is for
// tests; one lock serialises changes.
//
// A Mem knows two states of every file and directory, the live one that all operations
// see and the synced one, and what lies between. [Mem.Crash] makes a Mem of what power
// loss might leave. Exactly:
//
// # Contents
//
// Every 512-byte sector of a file is, independently of all others, as synced or as any
// write, punch or truncation since left it. (The newest 4 states of a sector can
// return.) The length is the synced one, or any the file had since (the newest 16), or,
// where the file grew, a multiple of 512 between two of them. Bytes past the chosen length are gone; bytes within it
// that no chosen state holds are zeroes.
//
// What was written and then cut off by Truncate, both since the last sync, never
// returns, not even when the file grew again: the choice there is between the synced
// bytes and zeroes. Real file systems may have written such bytes in time; to see that,
// crash before the Truncate.
//
// Space that Allocate reserved may be lost, space that PunchHole or Truncate gave back
// may be taken again, so a Mem can come back from a crash with less free space, even
// with more used than its capacity.
//
// # Names
//
// Creating, removing and renaming change directories. Each such change since SyncDir of
// its directory is, independently, kept or lost, but is lost when one that it builds on
// is: a file whose creation is lost is not renamed later, a directory that still has
// something in it is not removed, and nothing is moved into a directory that is lost. A
// rename is one change to two directories, kept or lost as a whole; SyncDir of either
// makes it durable, with the changes it builds on. SyncDir says nothing about the
// directory's own name: it may vanish with all that is in it, as a file may whose
// contents were synced and whose directory was not.
type Mem struct {
	mu        sync.RWMutex
	root      *memNode
	capacity  int64 // bytes, -1 for no limit
	usedPages int64
	changes   []nameChange // not synced yet, oldest first
}

var _ FS = (*Mem)(nil)

// memNode is a file or a directory.
type memNode struct {
	// For a directory: what is in it, and what is certain to be in it after a crash.
	entries, synced map[string]*memNode
	parent          *memNode // the directory it is in, or was in last; nil for the root

	data    *memData // for a file, nil for a directory
	modTime time.Time
	linked  bool                  // it has a name
	opens   int                   // open files
	locks   map[*memFile]LockKind // who holds what
}

// NewMem returns an empty file system without a capacity limit.
func NewMem() *Mem {
	root := newMemDir()
	root.linked = true
	return &Mem{root: root, capacity: -1}
}

func newMemDir() *memNode {
	return &memNode{entries: make(map[string]*memNode), synced: make(map[string]*memNode), modTime: time.Now()}
}

func newMemFile() *memNode {
	return &memNode{data: new(memData), modTime: time.Now()}
}

// SetCapacity limits the space files may take to bytes, rounded down to pages of 4096;
// negative lifts the limit. What is beyond it already stays. Names take no space.
func (m *Mem) SetCapacity(bytes int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.capacity = max(bytes, -1)
}

// Clone returns the file system as another process finds it after this one was killed:
// everything is there, no lock is held, and nothing has become durable. The two change
// independently from then on.
func (m *Mem) Clone() *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := &Mem{capacity: m.capacity}
	copied := make(map[*memNode]*memNode)
	c.root = cloneNode(m.root, copied)
	for _, ch := range m.changes {
		c.changes = append(c.changes, ch.mapNodes(func(n *memNode) *memNode { return cloneNode(n, copied) }))
	}
	c.countUsed(c.root)
	return c
}

// cloneNode returns the copy of n, made on first sight.
func cloneNode(n *memNode, copied map[*memNode]*memNode) *memNode {
	if n == nil || copied[n] != nil {
		return copied[n]
	}
	c := &memNode{modTime: n.modTime, linked: n.linked}
	copied[n] = c
	c.parent = cloneNode(n.parent, copied)
	if n.data != nil {
		c.data = n.data.clone()
		return c
	}
	cloneEntries := func(from map[string]*memNode) map[string]*memNode {
		to := make(map[string]*memNode, len(from))
		for name, child := range from {
			to[name] = cloneNode(child, copied)
		}
		return to
	}
	c.entries, c.synced = cloneEntries(n.entries), cloneEntries(n.synced)
	return c
}

// fate is how much of the unsynced state a crash keeps.
type fate struct {
	kind   fateKind
	chance float64 // of each change, for keepSome
}

type fateKind int

const (
	keepNone fateKind = iota
	keepAll
	keepSome
)

// pickFate returns a fate; the extremes are frequent, since they find the most.
func pickFate(r *rand.Rand) fate {
	switch r.IntN(4) {
	case 0:
		return fate{kind: keepNone}
	case 1:
		return fate{kind: keepAll}
	}
	return fate{kind: keepSome, chance: r.Float64()}
}

// keeps reports whether the next change is kept.
func (f fate) keeps(r *rand.Rand) bool {
	return f.kind == keepAll || f.kind == keepSome && r.Float64() < f.chance
}

// newest returns which of n states, oldest first, is kept, given that one is.
func (f fate) newest(r *rand.Rand, n int) int {
	if f.kind == keepAll || r.IntN(2) == 0 {
		return n - 1
	}
	return r.IntN(n)
}

// Crash returns what loss of power at this moment may leave, chosen by r; see [Mem] for
// what is possible. The same r on the same history gives the same result. In the result
// everything is durable, nothing open and nothing locked. m itself is as before, and the
// two change independently.
func (m *Mem) Crash(r *rand.Rand) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	// One crash in four treats everything alike; in the others each file and the
	// names have a fate of their own.
	next := func() fate { return pickFate(r) }
	if r.IntN(4) == 0 {
		common := pickFate(r)
		next = func() fate { return common }
	}
	tree := m.namesAfterCrash(r, next())
	left := &Mem{capacity: m.capacity}
	left.root = crashNode(m.root, tree, r, next)
	left.countUsed(left.root)
	return left
}

// crashNode builds what is left of n and, by tree, of what is in it.
func crashNode(n *memNode, tree *nameTree, r *rand.Rand, next func() fate) *memNode {
	if n.data != nil {
		return &memNode{modTime: n.modTime, linked: true, data: n.data.afterCrash(r, next())}
	}
	left := newMemDir()
	left.modTime, left.linked = n.modTime, true
	entries := tree.entries(n)
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		child := crashNode(entries[name], tree, r, next)
		child.parent = left
		left.entries[name] = child
	}
	left.synced = maps.Clone(left.entries)
	return left
}

// countUsed adds the space of all that is under n to usedPages.
func (m *Mem) countUsed(n *memNode) {
	if n.data != nil {
		m.usedPages += n.data.live.allocated.count
	}
	for _, child := range n.entries {
		m.countUsed(child)
	}
}

// Open opens an existing file, see [FS].
func (m *Mem) Open(name string, mode Mode) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find("open", name)
	if err != nil {
		return nil, err
	}
	if n.data == nil {
		return nil, fmt.Errorf("open %s: %w: it is a directory, want a regular file", name, fs.ErrInvalid)
	}
	return m.newOpenFile(n, name, mode), nil
}

func (m *Mem) newOpenFile(n *memNode, name string, mode Mode) *memFile {
	n.opens++
	return &memFile{m: m, node: n, name: name, readOnly: mode == ReadOnly}
}

// Create makes a new empty file, see [FS].
func (m *Mem) Create(name string) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := newMemFile()
	if err := m.link("create", name, n); err != nil {
		return nil, err
	}
	return m.newOpenFile(n, name, ReadWrite), nil
}

// Mkdir makes one directory, see [FS].
func (m *Mem) Mkdir(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.link("mkdir", name, newMemDir())
}

// link gives a new node its name.
func (m *Mem) link(op, name string, n *memNode) error {
	to, err := m.findPlace(op, name)
	if err != nil {
		return err
	}
	if to.dir == nil || to.node() != nil {
		return &fs.PathError{Op: op, Path: name, Err: syscall.EEXIST}
	}
	n.linked = true
	m.change(nameChange{node: n, to: to})
	return nil
}

// Remove removes a file or an empty directory, see [FS].
func (m *Mem) Remove(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := checkNotRoot("remove", name); err != nil {
		return err
	}
	n, err := m.find("remove", name)
	if err != nil {
		return err
	}
	if len(n.entries) > 0 {
		return &fs.PathError{Op: "remove", Path: name, Err: syscall.ENOTEMPTY}
	}
	from, err := m.findPlace("remove", name)
	if err != nil {
		return err
	}
	m.change(nameChange{node: n, from: from})
	m.unlink(n)
	return nil
}

// Rename moves a file or directory, see [FS].
func (m *Mem) Rename(oldName, newName string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, name := range []string{oldName, newName} {
		if err := checkNotRoot("rename", name); err != nil {
			return err
		}
	}
	n, err := m.find("rename", oldName)
	if err != nil {
		return err
	}
	from, err := m.findPlace("rename", oldName)
	if err != nil {
		return err
	}
	to, err := m.findPlace("rename", newName)
	if err != nil {
		return err
	}
	replaced := to.node()
	if err := checkRename(n, replaced, oldName, newName); err != nil || replaced == n {
		return err
	}
	m.change(nameChange{node: n, from: from, to: to})
	if replaced != nil {
		m.unlink(replaced)
	}
	return nil
}

func checkRename(n, replaced *memNode, oldName, newName string) error {
	var errno syscall.Errno
	switch {
	case replaced != nil && replaced.data == nil:
		errno = syscall.EEXIST
	case n.data == nil && strings.HasPrefix(newName, oldName+"/"):
		errno = syscall.EINVAL
	case n.data == nil && replaced != nil:
		errno = syscall.ENOTDIR
	default:
		return nil
	}
	return fmt.Errorf("rename %s to %s: %w", oldName, newName, errno)
}

// unlink notes that n has lost its name.
func (m *Mem) unlink(n *memNode) {
	n.linked = false
	m.releaseUnused(n)
}

// releaseUnused gives back the space of a file that has neither a name nor a user. Its
// contents are kept: a crash may bring the name back.
func (m *Mem) releaseUnused(n *memNode) {
	if n.data != nil && !n.linked && n.opens == 0 {
		m.usedPages -= n.data.live.allocated.count
	}
}

// ReadDir lists a directory, see [FS].
func (m *Mem) ReadDir(name string) ([]fs.DirEntry, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	dir, err := m.findDir("readdir", name)
	if err != nil {
		return nil, err
	}
	list := make([]fs.DirEntry, 0, len(dir.entries))
	for _, entry := range slices.Sorted(maps.Keys(dir.entries)) {
		list = append(list, fs.FileInfoToDirEntry(dir.entries[entry].info(entry)))
	}
	return list, nil
}

// Stat describes a file or directory, see [FS].
func (m *Mem) Stat(name string) (fs.FileInfo, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n, err := m.find("stat", name)
	if err != nil {
		return nil, err
	}
	return n.info(path.Base(name)), nil
}

// SyncDir makes the names in a directory durable, see [FS].
func (m *Mem) SyncDir(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	dir, err := m.findDir("sync directory", name)
	if err != nil {
		return err
	}
	m.syncNames(dir)
	return nil
}

// Usage returns the capacity, see [FS]. Without a limit it is 1 PiB.
func (m *Mem) Usage() (Usage, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	total := m.capacity
	if total < 0 {
		total = memTotalBytes
	}
	return Usage{TotalBytes: total, FreeBytes: max(total-m.usedPages*pageBytes, 0)}, nil
}

// Close does nothing: a Mem can be used again, as a directory can be opened again.
func (m *Mem) Close() error { return nil }

// find returns the node of a name.
func (m *Mem) find(op, name string) (*memNode, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	n := m.root
	for _, part := range strings.Split(name, "/") {
		if name == "." {
			break
		}
		if n.data != nil {
			return nil, &fs.PathError{Op: op, Path: name, Err: syscall.ENOTDIR}
		}
		if n = n.entries[part]; n == nil {
			return nil, &fs.PathError{Op: op, Path: name, Err: syscall.ENOENT}
		}
	}
	return n, nil
}

// findDir returns the node of a directory.
func (m *Mem) findDir(op, name string) (*memNode, error) {
	n, err := m.find(op, name)
	if err != nil {
		return nil, err
	}
	if n.data != nil {
		return nil, &fs.PathError{Op: op, Path: name, Err: syscall.ENOTDIR}
	}
	return n, nil
}

// findPlace returns where a name is or would be; the zero place for the root.
func (m *Mem) findPlace(op, name string) (place, error) {
	if err := CheckName(name); err != nil || name == "." {
		return place{}, err
	}
	dir, err := m.findDir(op, path.Dir(name))
	return place{dir, path.Base(name)}, err
}

// lockFor takes a lock for f, if no other open file's contradicts it.
func (n *memNode) lockFor(f *memFile, kind LockKind) error {
	if kind != LockRead && kind != LockWrite {
		return fmt.Errorf("lock %s: kind %d: %w", f.name, kind, fs.ErrInvalid)
	}
	for other, held := range n.locks {
		if other != f && (kind == LockWrite || held == LockWrite) {
			return fmt.Errorf("lock %s for %s: %w: it is held for %s", f.name, kind, block.ErrLocked, held)
		}
	}
	if n.locks == nil {
		n.locks = make(map[*memFile]LockKind)
	}
	n.locks[f] = kind
	return nil
}

// memInfo is a snapshot of a node.
type memInfo struct {
	name    string
	size    int64
	mode    fs.FileMode
	modTime time.Time
}

func (n *memNode) info(name string) fs.FileInfo {
	if n.data == nil {
		return memInfo{name: name, mode: fs.ModeDir | newDirMode, modTime: n.modTime}
	}
	return memInfo{name: name, size: n.data.live.size, mode: newFileMode, modTime: n.modTime}
}

func (i memInfo) Name() string       { return i.name }
func (i memInfo) Size() int64        { return i.size }
func (i memInfo) Mode() fs.FileMode  { return i.mode }
func (i memInfo) ModTime() time.Time { return i.modTime }
func (i memInfo) IsDir() bool        { return i.mode.IsDir() }
func (i memInfo) Sys() any           { return nil }
