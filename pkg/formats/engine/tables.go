package engine

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Stage orders table writes within a commit: a Codec's Commit writes one stage, syncs
// where its format needs that, and writes the next.
type Stage uint8

const (
	sectorBytes    = 512
	pageBytes      = 4096
	sectorsPerPage = pageBytes / sectorBytes
	tableShards    = 16

	defaultTableCacheBytes = 32 << 20
)

// Tables is a codec's view of the table sectors in its files: reads come from a bounded
// cache, writes stay in memory, are noted in the redo journal, and reach the files in a
// Commit. Only sectors that hold tables go through it, and every table sector does.
//
// View and Read are safe for concurrent use with each other; Write is called alone, as
// the methods of Codec that change tables are.
type Tables struct {
	files    []vfs.File
	shards   [tableShards]tableShard
	maxPages int // clean pages kept, over all shards

	held     map[pageKey]*page    // prepared for the Writes of the present change
	dirty    map[pageKey]*page    // changed since the last commit; never evicted
	record   func(redoRecord)     // the journal, nil without
	reserve  []bool               // per file: Allocate works
	reserved map[pageKey]struct{} // pages whose space is known to be allocated
}

type tableShard struct {
	mu    sync.RWMutex
	pages map[pageKey]*page

	hits, misses atomic.Int64 // of lookups
}

type pageKey struct {
	file int
	off  int64 // of the page
}

type page struct {
	data  [pageBytes]byte
	valid int // bytes that the file had when the page was read; the rest is zero
	dirty uint8
	stage [sectorsPerPage]Stage
	// committing counts commits that hold a copy of this page's sectors not yet in
	// the file: it must not be evicted, or an old version would be read back.
	committing int
}

func newTables(files []vfs.File) *Tables {
	t := &Tables{
		files: files, maxPages: defaultTableCacheBytes / pageBytes,
		held: map[pageKey]*page{}, dirty: map[pageKey]*page{}, reserve: make([]bool, len(files)), reserved: map[pageKey]struct{}{},
	}
	for i := range t.shards {
		t.shards[i].pages = map[pageKey]*page{}
	}
	for i := range t.reserve {
		t.reserve[i] = true
	}
	return t
}

// setLimit bounds the memory of clean pages.
func (t *Tables) setLimit(bytes int64) { t.maxPages = int(max(bytes/pageBytes, 2*tableShards)) }

// View returns the table bytes from off to the end of their cached page: at least one,
// at most 4096. They must not be changed, and not be used after the Codec method that
// asked for them returns. Bytes past the end of the file read as zeroes.
func (t *Tables) View(file int, off int64) ([]byte, error) {
	key := pageKey{file, off &^ (pageBytes - 1)}
	p, err := t.page(key)
	if err != nil {
		return nil, err
	}
	return p.data[off-key.off:], nil
}

// Read copies len(p) table bytes from off.
func (t *Tables) Read(file int, off int64, p []byte) error {
	for len(p) > 0 {
		b, err := t.View(file, off)
		if err != nil {
			return err
		}
		n := copy(p, b)
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// Write changes table bytes in memory; stage says when a commit writes the sectors they
// lie in. A sector belongs to the last stage written to it, so tables of different
// stages must not share sectors. When it fails, nothing has changed; it cannot fail
// within a range that was prepared during the same call of a Codec's method.
func (t *Tables) Write(stage Stage, file int, off int64, p []byte) error {
	if err := t.Prepare(file, off, int64(len(p))); err != nil {
		return err
	}
	if t.record != nil {
		t.record(redoRecord{stage: stage, file: file, off: off, data: p})
	}
	t.apply(stage, file, off, p)
	return nil
}

// Prepare loads the pages of a range and makes sure that the file system has space for
// them, so that neither a Write there nor a later commit can fail for want of it. A
// Codec that changes several ranges together prepares all of them first.
func (t *Tables) Prepare(file int, off, n int64) error {
	for at := off &^ (pageBytes - 1); at < off+n; at += pageBytes {
		key := pageKey{file, at}
		if t.held[key] != nil {
			continue
		}
		p, err := t.page(key)
		if err != nil {
			return err
		}
		if err := t.reservePage(key); err != nil {
			return err
		}
		t.held[key] = p
	}
	return nil
}

// WriteNew writes table bytes to the file at once, past the cache and the journal: those of
// a table that belongs to the space being allocated, to which nothing refers yet. It becomes
// durable with the data of that space. A table for each few writes would otherwise take a
// page of memory until the next commit, which would have to come early. It reports false,
// and has done nothing, if something of the same pages is in the cache: then it is Write
// that the bytes have to go through. For a Codec's Allocate only.
func (t *Tables) WriteNew(file int, off int64, p []byte) (bool, error) {
	for at := off &^ (pageBytes - 1); at < off+int64(len(p)); at += pageBytes {
		key := pageKey{file, at}
		if t.held[key] != nil || t.cached(key) != nil {
			return false, nil
		}
	}
	f := t.files[file]
	if _, err := f.WriteAt(p, off); err != nil {
		return false, fmt.Errorf("write a new table of %d bytes at %#x of %s: %w", len(p), off, f.Name(), err)
	}
	return true, nil
}

// letGo ends a change: prepared pages may be evicted again.
func (t *Tables) letGo() { clear(t.held) }

// reserveBytes is how much space is taken at once for tables: asking the file system for it
// takes longer than all else that a first write does with its tables.
const reserveBytes = 64 << 10

func (t *Tables) reservePage(key pageKey) error {
	if _, ok := t.reserved[key]; ok || !t.reserve[key.file] {
		return nil
	}
	f := t.files[key.file]
	size, err := f.Size()
	if err != nil {
		return fmt.Errorf("size of %s: %w", f.Name(), err)
	}
	off, n := key.off&^(reserveBytes-1), int64(reserveBytes)
	if off+n > size {
		off, n = key.off, min(pageBytes, size-key.off)
	}
	if n > 0 {
		err = f.Allocate(off, n)
	}
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		// NFS before 4.2 and SMB: a full store is then noticed by the commit.
		t.reserve[key.file] = false
	case err != nil:
		return fmt.Errorf("reserve table space at %#x of %s: %w", key.off, f.Name(), err)
	default:
		for ; n > 0; off, n = off+pageBytes, n-pageBytes {
			t.reserved[pageKey{key.file, off}] = struct{}{}
		}
	}
	return nil
}

// unreserve notes that a range of a file has lost its space.
func (t *Tables) unreserve(file int, off, n int64) {
	for at := off &^ (pageBytes - 1); at < off+n; at += pageBytes {
		delete(t.reserved, pageKey{file, at})
	}
}

// apply puts bytes into pages that are held.
func (t *Tables) apply(stage Stage, file int, off int64, p []byte) {
	for len(p) > 0 {
		key := pageKey{file, off &^ (pageBytes - 1)}
		pg := t.held[key]
		t.keep(key, pg)
		in := off - key.off
		n := copy(pg.data[in:], p)
		for s := in / sectorBytes; s <= (in+int64(n)-1)/sectorBytes; s++ {
			pg.dirty |= 1 << s
			pg.stage[s] = stage
		}
		pg.valid = max(pg.valid, int(in)+n)
		t.dirty[key] = pg
		p, off = p[n:], off+int64(n)
	}
}

// keep puts a held page, which may have been evicted meanwhile, back into the cache.
func (t *Tables) keep(key pageKey, p *page) {
	s := t.shard(key)
	s.mu.Lock()
	s.pages[key] = p
	s.mu.Unlock()
}

func (t *Tables) shard(key pageKey) *tableShard {
	h := uint64(key.off/pageBytes)*0x9e3779b97f4a7c15 + uint64(key.file)
	return &t.shards[h>>60%tableShards]
}

func (t *Tables) cached(key pageKey) *page {
	s := t.shard(key)
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.pages[key]
}

// page returns a page, from the cache or the file.
func (t *Tables) page(key pageKey) (*page, error) {
	s := t.shard(key)
	if p := t.cached(key); p != nil {
		s.hits.Add(1)
		return p, nil
	}
	s.misses.Add(1)
	p := &page{}
	f := t.files[key.file]
	n, err := f.ReadAt(p.data[:], key.off)
	if err != nil && err != io.EOF {
		return nil, fmt.Errorf("read table at %#x of %s: %w", key.off, f.Name(), err)
	}
	p.valid = n
	s.mu.Lock()
	defer s.mu.Unlock()
	if other := s.pages[key]; other != nil {
		return other, nil // read twice at once: both are the same
	}
	for range 2 { // the limit may have been lowered
		if len(s.pages) >= t.maxPages/tableShards {
			s.evict()
		}
	}
	s.pages[key] = p
	return p, nil
}

// evict drops some clean page: which one is left to the map's order, since tables are
// either few or read at random.
func (s *tableShard) evict() {
	for key, p := range s.pages {
		if p.dirty == 0 && p.committing == 0 {
			delete(s.pages, key)
			return
		}
	}
}

// lookups returns how many pages were found in the cache, and how many had to be read.
func (t *Tables) lookups() (hits, misses int64) {
	for i := range t.shards {
		hits += t.shards[i].hits.Load()
		misses += t.shards[i].misses.Load()
	}
	return hits, misses
}

// Forget drops all cached pages, so that later reads see the files. Nothing may be
// dirty. For a Codec's Grow and Check that changed tables through a Commit's WriteAt.
func (t *Tables) Forget() {
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		clear(s.pages)
		s.mu.Unlock()
	}
	clear(t.reserved)
}

// dirtyBytes returns how much memory holds uncommitted changes.
func (t *Tables) dirtyBytes() int64 { return int64(len(t.dirty)) * pageBytes }
