package engine

import (
	"errors"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Pull copies into the top layer what the parents down to depth last hold of a guest
// range and the top layer does not, and returns how many bytes it copied. What is read
// stays the same, at any moment; writes to the range meanwhile win. Zeroes count as held.
//
// It is how parents are made superfluous: after the whole disk was pulled and flushed,
// SetParent can let the top layer stand on what is below last. Ranges past the end of
// the disk are block.ErrOutOfRange.
func (d *Disk) Pull(off, n int64, last int) (copied int64, err error) {
	copied, err = d.pull(off, n, last)
	if err == nil {
		err = d.relieve()
	}
	return copied, err
}

func (d *Disk) pull(off, n int64, last int) (copied int64, err error) {
	d.gate.RLock()
	defer d.gate.RUnlock()
	if err := d.checkWrite(off, n); err != nil || n == 0 {
		return 0, err
	}
	if last < 1 || last >= len(d.layers) {
		return 0, fmt.Errorf("pull layers 1 to %d of %d: %w", last, len(d.layers), block.ErrInvalid)
	}
	for end := off + n; off < end; {
		i, run, err := d.resolve(0, off, end-off)
		if err != nil {
			return copied, err
		}
		done := run.Len
		if i >= 1 && i <= last {
			if done, err = d.pullSome(off, run.Len, last); err != nil {
				return copied, err
			}
			copied += done
		}
		off += done
	}
	return copied, d.noted()
}

// pullBytes is how much is pulled at once of granules that are smaller: sectors, as a rule.
const pullBytes = 64 << 10

// pullSome gives the top layer the granules around off, if it still lacks them, as parents
// hold them, and returns how much of the range that settles.
func (d *Disk) pullSome(off, n int64, last int) (int64, error) {
	if err := d.begin(); err != nil {
		return 0, err
	}
	start, end := d.granules(off, min(n, pullBytes))
	held := d.claims.acquire(start, end)
	defer d.claims.release(held)
	run, err := d.lookupTop(off, min(n, end-off))
	if err != nil || run.State != Absent {
		return run.Len, err
	}
	if start, end = d.granules(off, run.Len); !held.covers(start, end) {
		return 0, nil // it has become another granule: claim it anew
	}
	isZero, err := d.parentsReadZero(start, min(end, d.size.Load()))
	switch {
	case err != nil:
		return 0, err
	case isZero && last == len(d.layers)-1:
		return run.Len, nil // with no parents left, it reads the same
	case isZero && d.canZero(start, end-start):
		return run.Len, d.set(start, end-start, Zero, Place{})
	}
	placed, err := d.pullGranules(start, end)
	return min(run.Len, start+placed-off), err
}

// pullGranules copies claimed granules up, and returns how many bytes of them found a
// place.
func (d *Disk) pullGranules(start, end int64) (int64, error) {
	place, err := d.reserve(start, end)
	if err != nil {
		return 0, err
	}
	end = start + place.Len
	err = d.copyUp(place, start, start, end)
	if err == nil {
		err = d.set(start, end-start, Data, place)
	}
	if err != nil {
		d.giveBack(place)
	}
	return place.Len, err
}

// parentsReadZero reports whether [from, to) of the parents is known to be zero, holes in
// flat files included.
func (d *Disk) parentsReadZero(from, to int64) (bool, error) {
	for from < to {
		i, run, err := d.resolve(1, from, to-from)
		if err != nil {
			return false, err
		}
		e, err := d.describe(i, run, from)
		if err != nil || e.State == block.Data {
			return false, err
		}
		from += e.Len
	}
	return true, nil
}

// SetParent lets the top image stand on another parent, nil for none, durably: it changes
// what the image says, not what it holds. below are the layers of that parent's chain, the
// parent first, which the disk owns from then on; some may be among the present ones. The
// present layers that are not are returned, and are the caller's to close. When it fails,
// nothing has changed.
//
// The disk reads the same afterwards only if the caller made sure of it: see Pull.
func (d *Disk) SetParent(parent *Parent, below []*Layer) (removed []*Layer, err error) {
	if (parent == nil) != (len(below) == 0) || parent != nil && parent.Layer != below[0] {
		return nil, fmt.Errorf("set parent: %w: the layers below do not begin with it", block.ErrInvalid)
	}
	if err := d.Flush(); err != nil {
		return nil, err
	}
	d.committing.Lock()
	defer d.committing.Unlock()
	d.gate.Lock()
	defer d.gate.Unlock()
	if err := errors.Join(d.writable(), d.poisoned()); err != nil {
		return nil, err
	}
	if err := errors.Join(d.begin(), d.commit(gateHeld)); err != nil {
		return nil, err
	}
	if err := d.relink(parent); err != nil {
		return nil, err
	}
	return d.replaceParents(below), nil
}

func (d *Disk) relink(parent *Parent) error {
	d.mapping.Lock()
	defer d.mapping.Unlock()
	top := d.top()
	c := bareCommit(top)
	defer d.noteLost(c)
	err := top.Codec.SetParent(c, parent)
	if err == nil {
		err = c.Sync()
	}
	top.Tables.letGo()
	d.journal.start(top.journalIdentity())
	if err != nil {
		return fmt.Errorf("change the parent of %s: %w", top.Name, err)
	}
	return nil
}

// replaceParents puts layers below the top one, and returns those that are out. gate is
// held exclusively.
func (d *Disk) replaceParents(below []*Layer) (removed []*Layer) {
	kept := map[*Layer]bool{}
	for _, l := range below {
		kept[l] = true
	}
	for _, l := range d.layers[1:] {
		if !kept[l] {
			removed = append(removed, l)
		}
		delete(kept, l)
	}
	for l := range kept {
		l.prepare()
	}
	d.layers = append([]*Layer{d.top()}, below...)
	d.chainChanged()
	return removed
}
