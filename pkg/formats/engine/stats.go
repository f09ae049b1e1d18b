package engine

import (
	"fmt"
	"sync/atomic"
)

// Stats counts what a Disk did since it was opened.
type Stats struct {
	Reads, ReadBytes   int64
	Writes, WriteBytes int64
	Allocations        int64 // granule runs that got space
	Flushes, Commits   int64
	// TableHits and TableMisses count lookups of table pages in the cache: of the layers
	// there are now, so that they fall when layers are merged away.
	TableHits, TableMisses int64
	Layers                 int // there are now
}

type counters struct {
	reads, readBytes, writes, writeBytes, allocations, flushes, commits atomic.Int64
}

func (c *counters) read(n int) {
	c.reads.Add(1)
	c.readBytes.Add(int64(n))
}

func (c *counters) write(n int) {
	c.writes.Add(1)
	c.writeBytes.Add(int64(n))
}

// Stats returns the counters.
func (d *Disk) Stats() Stats {
	c := &d.stats
	stats := Stats{
		Reads: c.reads.Load(), ReadBytes: c.readBytes.Load(),
		Writes: c.writes.Load(), WriteBytes: c.writeBytes.Load(),
		Allocations: c.allocations.Load(), Flushes: c.flushes.Load(), Commits: c.commits.Load(),
	}
	layers := d.Layers()
	stats.Layers = len(layers)
	for _, l := range layers {
		hits, misses := l.Tables.lookups()
		stats.TableHits += hits
		stats.TableMisses += misses
	}
	return stats
}

// AllocatedBytes returns the space that the files of all layers occupy, shared ones
// included. It asks the store, and may hang as long as that does.
func (d *Disk) AllocatedBytes() (int64, error) {
	var total int64
	for _, l := range d.Layers() {
		for _, f := range l.Files {
			n, err := f.AllocatedBytes()
			if err != nil {
				return 0, fmt.Errorf("space of %s: %w", f.Name(), err)
			}
			total += n
		}
	}
	return total, nil
}
