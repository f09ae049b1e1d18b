package engine

import (
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Hold gives the top layer every granule of a guest range that it lacks, as it is read
// now, zeroes included: what parents hold in the range no longer shows afterwards, and
// they can be exchanged. What is read stays the same, at any moment.
func (d *Disk) Hold(off, n int64) error {
	return d.eachRun(off, n, func(off, n int64) (int64, error) {
		run, err := d.lookupTop(off, n)
		if err != nil || run.State != Absent {
			return run.Len, err
		}
		return d.pullSome(off, run.Len, noneRemoved)
	})
}

// noneRemoved has pullSome take zeroes up, too: nothing is known about what is going to be
// below.
const noneRemoved = -1

// Empty lets go of everything the top layer holds: the disk reads as its parents do then.
// It is durable after a flush; when it fails, any part is gone.
func (d *Disk) Empty() error {
	return d.eachRun(0, d.size.Load(), func(off, n int64) (int64, error) {
		run, err := d.lookupTop(off, n)
		switch {
		case err != nil || run.State == Absent:
			return run.Len, err
		case run.Flat:
			return 0, fmt.Errorf("empty %s: %w: its bytes always have a place", d.top().Name, block.ErrUnsupported)
		}
		_, end := d.granules(off, run.Len)
		end = min(end, d.size.Load())
		return min(n, end-off), d.remap(off, end-off, Absent)
	})
}
