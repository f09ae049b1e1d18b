package engine

import (
	"errors"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// WriteZeroes implements block.Device.
func (d *Disk) WriteZeroes(off, n int64, flags block.ZeroFlags) error {
	return d.eachRun(off, n, func(off, n int64) (int64, error) {
		return d.zeroSome(off, n, flags)
	})
}

// Discard implements block.Device. Whole granules go; parts of granules stay.
func (d *Disk) Discard(off, n int64) error {
	return d.eachRun(off, n, d.discardSome)
}

// eachRun runs do over a range, piece by piece, as one guest request that changes the
// disk.
func (d *Disk) eachRun(off, n int64, do func(off, n int64) (int64, error)) error {
	done, err := d.eachRunGated(off, n, do)
	for tries := 0; err != nil && d.madeSpace(err, tries); tries++ {
		var more int64
		more, err = d.eachRunGated(off+done, n-done, do)
		done += more
	}
	if err != nil {
		return err
	}
	return d.relieve()
}

// eachRunGated returns how much of the range was done.
func (d *Disk) eachRunGated(off, n int64, do func(off, n int64) (int64, error)) (int64, error) {
	d.gate.RLock()
	defer d.gate.RUnlock()
	if err := d.checkWrite(off, n); err != nil || n == 0 {
		return 0, err
	}
	if err := d.begin(); err != nil {
		return 0, err
	}
	done := int64(0)
	for done < n {
		some, err := do(off+done, n-done)
		if errors.Is(err, errGranulesChanged) {
			continue
		}
		if err != nil {
			return done, err
		}
		done += some
	}
	return done, d.noted()
}

// zeroSome zeroes leading bytes of a range and returns how many.
func (d *Disk) zeroSome(off, n int64, flags block.ZeroFlags) (int64, error) {
	run, err := d.lookupTop(off, n)
	if err != nil {
		return 0, err
	}
	n = run.Len
	keep, fast := flags&block.ZeroKeepAllocated != 0, flags&block.ZeroFastOnly != 0
	if run.State == Zero && !keep {
		return n, nil
	}
	if run.State == Absent && !keep {
		below, isZero, err := d.parentsZero(off, n)
		if err != nil || isZero {
			return below, err
		}
		n = below
	}
	if !keep && !run.Flat {
		if done, err := d.unmapZero(off, n); done > 0 || err != nil {
			return done, err
		}
	}
	if run.inPlace() && !keep && d.top().geometry.Cipher == nil {
		if err := d.punch(run, n); !errors.Is(err, errors.ErrUnsupported) {
			return n, err
		}
	}
	if fast && (keep || run.State == Data) {
		return 0, fmt.Errorf("zero %d bytes at %d without writing them: %w", n, off, block.ErrUnsupported)
	}
	return d.writeSome(content{n: n, solid: keep}, off)
}

// unmapZero makes leading whole granules of a range zero by changing the mapping alone,
// where that can be done: 0 if not.
func (d *Disk) unmapZero(off, n int64) (int64, error) {
	n = d.wholeGranules(off, n)
	if n == 0 {
		return 0, nil
	}
	below, isZero, err := d.parentsZero(off, n)
	if err != nil {
		return 0, err
	}
	if isZero {
		if whole := d.wholeGranules(off, below); whole > 0 {
			return whole, d.remap(off, whole, Absent)
		}
	}
	if d.canZero(off, n) {
		return n, d.remap(off, n, Zero)
	}
	return 0, nil
}

// canZero reports whether whole granules can be Set to Zero.
func (d *Disk) canZero(off, n int64) bool {
	top := d.top()
	if !top.geometry.ZeroState {
		return false
	}
	z, some := top.Codec.(PartZeroer)
	if !some {
		return true
	}
	d.mapping.RLock()
	defer d.mapping.RUnlock()
	return z.CanZero(off, n)
}

// discardSome gives back leading whole granules of a range where nothing can show
// through, and returns how much of the range is dealt with.
func (d *Disk) discardSome(off, n int64) (int64, error) {
	run, err := d.lookupTop(off, n)
	if err != nil {
		return 0, err
	}
	n = run.Len
	switch {
	case run.State == Absent || run.State == Zero:
		return n, nil
	case run.Flat:
		return n, ignoreUnsupported(d.punch(run, n))
	}
	whole := d.wholeGranules(off, n)
	if whole == 0 {
		_, end := d.granules(off, 1)
		return min(n, end-off), nil
	}
	if done, err := d.unmapZero(off, whole); done > 0 || err != nil {
		return done, err
	}
	if run.inPlace() && d.top().geometry.Cipher == nil {
		return whole, ignoreUnsupported(d.punch(run, whole))
	}
	return whole, nil
}

func ignoreUnsupported(err error) error {
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return err
}

// wholeGranules returns how much of [off, off+n) is whole granules from off on. The last
// granule of the disk counts as whole when the range reaches the end of the disk.
func (d *Disk) wholeGranules(off, n int64) int64 {
	start, _ := d.granules(off, 1)
	if start != off || n == 0 {
		return 0
	}
	lastStart, lastEnd := d.granules(off+n-1, 1)
	if lastEnd == off+n || off+n == d.size.Load() {
		return n
	}
	return lastStart - off
}

// parentsZero says for how many bytes at off the parents hold one kind of content, and
// whether that is zeroes. Parents never change, so the answer stays true.
func (d *Disk) parentsZero(off, n int64) (int64, bool, error) {
	var total int64
	for total < n {
		_, run, err := d.resolve(1, off+total, n-total)
		if err != nil {
			return 0, false, err
		}
		if isZero := run.State == Absent || run.State == Zero; !isZero {
			if total > 0 {
				return total, true, nil
			}
			return run.Len, false, nil
		}
		total += run.Len
	}
	return total, true, nil
}

// remap sets whole granules [off, off+n) to Absent or Zero; the last one may reach past the
// end of the disk.
func (d *Disk) remap(off, n int64, to State) error {
	start, end := d.granules(off, n)
	held := d.claims.acquire(start, end)
	defer d.claims.release(held)
	nowStart, nowEnd := d.granules(off, n)
	if nowStart != off || nowEnd != end || end != off+n && off+n != d.size.Load() || to == Zero && !d.canZero(off, n) {
		return errGranulesChanged
	}
	return d.set(start, end-start, to, Place{})
}

// punch zeroes the first n bytes of a run in its file, giving space back.
func (d *Disk) punch(run Run, n int64) error {
	f := d.top().Files[run.File]
	defer d.top().unsynced[run.File].Store(true)
	if err := f.PunchHole(run.FileOff, n); err != nil {
		return fmt.Errorf("punch %d bytes at %#x of %s: %w", n, run.FileOff, f.Name(), err)
	}
	return nil
}
