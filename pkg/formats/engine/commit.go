package engine

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
)

// Commit is what a Codec gets to make changes durable with: a copy of the table sectors
// changed until now, and ordered access to the files. It is used by one goroutine and
// only during the call it was passed to.
type Commit struct {
	layer    *Layer
	sectors  []Sector
	pages    []*page
	unsynced map[int]bool
	lost     error // see Lose
}

// Sector is a changed table sector.
type Sector struct {
	Stage Stage
	File  int
	Off   int64
	Data  []byte // 512 bytes; less at the very end of a file whose length is odd
}

// bareCommit is for ordered writes beside the tables.
func bareCommit(l *Layer) *Commit { return &Commit{layer: l, unsynced: map[int]bool{}} }

// newCommit takes over the layer's dirty sectors. The caller holds the mapping lock
// exclusively.
func newCommit(l *Layer) *Commit {
	c := bareCommit(l)
	for key, p := range l.Tables.dirty {
		c.take(key, p)
	}
	clear(l.Tables.dirty)
	slices.SortFunc(c.sectors, func(a, b Sector) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Off, b.Off))
	})
	return c
}

func (c *Commit) take(key pageKey, p *page) {
	copied := p.data
	for s := range sectorsPerPage {
		if p.dirty&(1<<s) == 0 {
			continue
		}
		start := s * sectorBytes
		end := min(start+sectorBytes, p.valid)
		c.sectors = append(c.sectors, Sector{
			Stage: p.stage[s], File: key.file, Off: key.off + int64(start), Data: copied[start:end:end],
		})
	}
	p.dirty = 0
	p.committing++
	c.pages = append(c.pages, p)
}

// release lets the committed pages be evicted. The caller holds the mapping lock
// exclusively.
func (c *Commit) release() {
	for _, p := range c.pages {
		p.committing--
	}
	c.pages = nil
}

// Sectors returns the changed sectors of all stages, by file and offset. They stay the
// Commit's.
func (c *Commit) Sectors() []Sector { return c.sectors }

// WriteTables writes the changed sectors of a stage in place. It does not sync.
func (c *Commit) WriteTables(stage Stage) error {
	var run []Sector
	for _, s := range c.sectors {
		if s.Stage != stage {
			continue
		}
		if len(run) > 0 && !follows(run, s) {
			if err := c.writeRun(run); err != nil {
				return err
			}
			run = run[:0]
		}
		run = append(run, s)
	}
	return c.writeRun(run)
}

// follows reports whether s is to be written together with a run of adjacent sectors.
func follows(run []Sector, s Sector) bool {
	const most = 1 << 20 / sectorBytes
	last := run[len(run)-1]
	return s.File == last.File && s.Off == last.Off+int64(len(last.Data)) && len(run) < most
}

func (c *Commit) writeRun(run []Sector) error {
	if len(run) == 0 {
		return nil
	}
	if len(run) == 1 {
		return c.WriteAt(run[0].File, run[0].Data, run[0].Off)
	}
	data := make([]byte, 0, len(run)*sectorBytes)
	for _, s := range run {
		data = append(data, s.Data...)
	}
	return c.WriteAt(run[0].File, data, run[0].Off)
}

// WriteAt writes to a file at once, past the tables' cache: for headers and logs, and for
// new tables that nothing refers to yet.
func (c *Commit) WriteAt(file int, p []byte, off int64) error {
	f := c.layer.Files[file]
	c.unsynced[file] = true
	if _, err := f.WriteAt(p, off); err != nil {
		return fmt.Errorf("write %d bytes at %#x of %s: %w", len(p), off, f.Name(), err)
	}
	return nil
}

// Truncate sets a file's length.
func (c *Commit) Truncate(file int, size int64) error {
	f := c.layer.Files[file]
	c.unsynced[file] = true
	if err := f.Truncate(size); err != nil {
		return fmt.Errorf("set the length of %s to %d bytes: %w", f.Name(), size, err)
	}
	return nil
}

// CommitTables makes the changes of tables durable that c does not hold, through the
// Codec's own Commit: for methods that run alone and change tables through Tables, such
// as Resize, and for changes that Free made after the last commit. When it fails, they
// wait for the next commit as before.
func (c *Commit) CommitTables() error {
	rest := newCommit(c.layer)
	defer rest.release()
	if len(rest.sectors) == 0 {
		return nil
	}
	if err := errors.Join(c.Sync(), c.layer.Codec.Commit(rest), rest.Sync()); err != nil {
		rest.putBack()
		return err
	}
	return nil
}

// putBack marks the sectors as changed once more.
func (c *Commit) putBack() {
	for _, s := range c.sectors {
		key := pageKey{s.File, s.Off &^ (pageBytes - 1)}
		p := c.layer.Tables.cached(key)
		i := (s.Off - key.off) / sectorBytes
		p.dirty |= 1 << i
		p.stage[i] = s.Stage
		c.layer.Tables.dirty[key] = p
	}
}

// Lose says that the image cannot be used on: it may hold by now what a change that failed
// intended, or lack what it should hold. All requests fail from then on, and the image is
// left for whoever opens it next. It returns err, which says why.
func (c *Commit) Lose(err error) error {
	c.lost = err
	return err
}

// Lost says whether Lose was called.
func (c *Commit) Lost() bool { return c.lost != nil }

// Sync makes what was written through c durable before anything later. When it fails, c is
// lost: the kernel may have dropped anything.
func (c *Commit) Sync() error {
	for file := range c.unsynced {
		f := c.layer.Files[file]
		if err := f.Sync(); err != nil {
			return c.Lose(fmt.Errorf("sync %s: %w", f.Name(), err))
		}
		delete(c.unsynced, file)
	}
	return nil
}
