package engine

import (
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Packed is a granule on its way into an image, compressed if that saves space.
type Packed struct {
	off    int64
	plain  []byte
	stored []byte // nil: it is written plain
}

// CompressedGranule returns the guest range around off that Pack takes; ok is false if
// the top image cannot hold compressed granules.
func (d *Disk) CompressedGranule(off int64) (start, end int64, ok bool) {
	d.gate.RLock()
	defer d.gate.RUnlock()
	if _, ok := d.top().Codec.(Compressor); !ok {
		return 0, 0, false
	}
	start, end = d.granules(off, 1)
	return start, end, true
}

// Sequential says that the top image can be written by WritePacked alone, each granule
// once and in ascending order.
func (d *Disk) Sequential() bool {
	d.gate.RLock()
	defer d.gate.RUnlock()
	return d.top().geometry.Sequential
}

// Pack compresses the granule at off, p, which ends where the granule or the disk does.
// It changes nothing and is safe for concurrent use; p belongs to what it returns until
// that is written.
func (d *Disk) Pack(p []byte, off int64) (Packed, error) {
	d.gate.RLock()
	defer d.gate.RUnlock()
	codec, ok := d.top().Codec.(Compressor)
	if !ok {
		return Packed{}, fmt.Errorf("compress for %s: %w: format %s, as the image is, holds no compressed data",
			d.top().Name, block.ErrUnsupported, d.top().Format)
	}
	start, end := d.granules(off, 1)
	if n := int64(len(p)); off != start || n != min(end, d.size.Load())-start {
		return Packed{}, fmt.Errorf("compress %d bytes at %d: %w: want the granule [%d, %d)", n, off, block.ErrInvalid, start, end)
	}
	whole := p
	if n := end - start; n > int64(len(p)) {
		whole = make([]byte, n)
		copy(whole, p)
	}
	stored, err := codec.Compress(off, whole)
	if err != nil {
		return Packed{}, fmt.Errorf("%s: compress for guest offset %d of %s: %w", d.top().Format, off, d.top().Name, err)
	}
	return Packed{off: off, plain: p, stored: stored}, nil
}

// WritePacked writes what Pack made, as WriteAt would. Granules may be written at the same
// time, unless the image is Sequential.
func (d *Disk) WritePacked(g Packed) error {
	if g.stored == nil {
		_, err := d.WriteAt(g.plain, g.off)
		return err
	}
	if err := d.writePacked(g); err != nil {
		return err
	}
	return d.relieve()
}

func (d *Disk) writePacked(g Packed) error {
	d.gate.RLock()
	defer d.gate.RUnlock()
	if err := d.checkWrite(g.off, int64(len(g.plain))); err != nil {
		return err
	}
	if err := d.begin(); err != nil {
		return err
	}
	d.stats.write(len(g.plain))
	start, end := d.granules(g.off, 1)
	held := d.claims.acquire(start, end)
	defer d.claims.release(held)
	place, err := d.reserveCompressed(start, int64(len(g.stored)))
	if err != nil {
		return err
	}
	err = d.writeFile(place.File, bytesFrom(g.stored), place.Off)
	if err == nil {
		err = d.set(start, end-start, Compressed, place)
	}
	if err != nil {
		d.giveBack(place)
		return err
	}
	return d.noted()
}

func (d *Disk) reserveCompressed(start, n int64) (Place, error) {
	d.mapping.Lock()
	defer d.mapping.Unlock()
	l := d.top()
	place, err := l.Codec.(Compressor).AllocateCompressed(start, n)
	l.Tables.letGo()
	if err != nil {
		return place, fmt.Errorf("%s: %s: allocate for guest offset %d: %w", l.Format, l.Name, start, err)
	}
	l.unsynced[place.File].Store(true)
	d.stats.allocations.Add(1)
	return place, nil
}
