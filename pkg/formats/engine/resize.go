package engine

import (
	"errors"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Resize grows the disk; what is new reads as zeroes. A smaller size than the present
// one is refused (see Shrink). It is durable when Resize returns; requests wait meanwhile.
func (d *Disk) Resize(sizeBytes int64) error {
	return d.resize(sizeBytes, func(now int64) error {
		if sizeBytes < now {
			return fmt.Errorf("%w: it would lose its end, and can only grow", block.ErrUnsupported)
		}
		return d.parentEndsBefore(now)
	})
}

// Shrink cuts the disk: what lies past sizeBytes is lost, also if Shrink fails midway. It
// is durable when Shrink returns; requests wait meanwhile, those past the new end fail
// from then on. A larger size than the present one is block.ErrInvalid.
func (d *Disk) Shrink(sizeBytes int64) error {
	return d.resize(sizeBytes, func(now int64) error {
		if sizeBytes > now || sizeBytes <= 0 {
			return fmt.Errorf("%w: want a smaller size", block.ErrInvalid)
		}
		if err := d.parentEndsBefore(sizeBytes); err != nil {
			return err
		}
		return d.cutTail(sizeBytes)
	})
}

// parentEndsBefore returns an error if the parent has anything past a size: it would show
// through where the disk is to read as zeroes, when its end has been cut or it grows.
func (d *Disk) parentEndsBefore(sizeBytes int64) error {
	if len(d.layers) < 2 || d.layers[1].geometry.SizeBytes <= sizeBytes {
		return nil
	}
	parent := d.layers[1]
	return fmt.Errorf("%w: the parent %s has %d bytes, whose end would show through: rebase it to none first",
		block.ErrUnsupported, parent.Name, parent.geometry.SizeBytes)
}

// resize changes the size after prepare, which is called with nobody using the disk and
// everything committed.
func (d *Disk) resize(sizeBytes int64, prepare func(now int64) error) error {
	if err := d.Flush(); err != nil {
		return err
	}
	d.committing.Lock()
	defer d.committing.Unlock()
	d.gate.Lock()
	defer d.gate.Unlock()
	top, now := d.top(), d.size.Load()
	if sizeBytes == now {
		return nil
	}
	err := errors.Join(d.writable(), d.poisoned())
	if err == nil {
		err = errors.Join(d.begin(), d.commit(gateHeld))
	}
	if err == nil {
		err = prepare(now)
	}
	if err == nil {
		err = d.setSize(sizeBytes)
	}
	if err != nil {
		return fmt.Errorf("resize %s from %d to %d bytes: %w", top.Name, now, sizeBytes, err)
	}
	return nil
}

// setSize has the codec change the size; gate is held exclusively.
func (d *Disk) setSize(sizeBytes int64) error {
	d.mapping.Lock()
	defer d.mapping.Unlock()
	top := d.top()
	c := bareCommit(top)
	defer d.noteLost(c)
	err := top.Codec.Resize(c, sizeBytes)
	if err == nil {
		err = c.Sync()
	}
	top.Tables.letGo()
	top.geometry = top.Codec.Geometry()
	d.size.Store(top.geometry.SizeBytes)
	d.chainChanged()
	d.journal.start(top.journalIdentity())
	return err
}

// cutTail takes away what the top layer holds past a size, durably: whole granules are
// unmapped, and the rest of the last one that stays is zeroed, so that growing again
// shows zeroes. Flat images are cut by their codec. gate is held exclusively.
func (d *Disk) cutTail(size int64) error {
	for off := size; off < d.size.Load(); {
		run, err := d.lookupTop(off, d.size.Load()-off)
		if err != nil {
			return err
		}
		n := run.Len
		switch start, end := d.granules(off, 1); {
		case run.Flat:
		case start < size && run.State != Absent:
			n = min(end, d.size.Load()) - off
			err = d.zeroRange(off, n)
		case start == off && run.State != Absent:
			if n = d.wholeGranules(off, n); n == 0 { // a part of one, which goes as a whole
				n = min(end, d.size.Load()) - off
			}
			err = d.remap(off, n, Absent)
		}
		if err != nil {
			return err
		}
		off += n
	}
	return d.commit(gateHeld)
}

// zeroRange zeroes guest bytes within one granule.
func (d *Disk) zeroRange(off, n int64) error {
	for n > 0 {
		done, err := d.zeroSome(off, n, 0)
		if err != nil {
			return err
		}
		off, n = off+done, n-done
	}
	return nil
}
