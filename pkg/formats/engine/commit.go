package engine

import (
	"cmp"
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
}

// Sector is a changed table sector.
type Sector struct {
	Stage Stage
	File  int
	Off   int64
	Data  []byte // 512 bytes; less at the very end of a file whose length is odd
}

// newCommit takes over the layer's dirty sectors. The caller holds the mapping lock
// exclusively.
func newCommit(l *Layer) *Commit {
	c := &Commit{layer: l, unsynced: map[int]bool{}}
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
	for i := 0; i < len(c.sectors); {
		s := c.sectors[i]
		i++
		if s.Stage != stage {
			continue
		}
		data := s.Data
		for i < len(c.sectors) && c.follows(s, len(data), c.sectors[i]) {
			data = append(data[:len(data):len(data)], c.sectors[i].Data...)
			i++
		}
		if err := c.WriteAt(s.File, data, s.Off); err != nil {
			return err
		}
	}
	return nil
}

// follows reports whether next continues the n bytes that start with first, in one write.
func (c *Commit) follows(first Sector, n int, next Sector) bool {
	return next.Stage == first.Stage && next.File == first.File && next.Off == first.Off+int64(n) && n < 1<<20
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

// Sync makes what was written through c durable before anything later.
func (c *Commit) Sync() error {
	for file := range c.unsynced {
		f := c.layer.Files[file]
		if err := f.Sync(); err != nil {
			return fmt.Errorf("sync %s: %w", f.Name(), err)
		}
		delete(c.unsynced, file)
	}
	return nil
}
