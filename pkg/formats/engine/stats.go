package engine

import "sync/atomic"

// Stats counts what a Disk did since it was opened.
type Stats struct {
	Reads, ReadBytes   int64
	Writes, WriteBytes int64
	Allocations        int64 // granule runs that got space
	Flushes, Commits   int64
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
	return Stats{
		Reads: c.reads.Load(), ReadBytes: c.readBytes.Load(),
		Writes: c.writes.Load(), WriteBytes: c.writeBytes.Load(),
		Allocations: c.allocations.Load(), Flushes: c.flushes.Load(), Commits: c.commits.Load(),
	}
}
