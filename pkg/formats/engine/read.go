package engine

import (
	"fmt"
	"io"
	"sync"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// ReadAt implements block.Device.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	d.gate.RLock()
	defer d.gate.RUnlock()
	if err := block.CheckRange(off, int64(len(p)), d.size.Load()); err != nil {
		return 0, err
	}
	d.stats.read(len(p))
	return d.readChain(0, p, off)
}

// readChain reads what the layers from first downwards hold.
func (d *Disk) readChain(first int, p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		at := off + int64(done)
		i, run, err := d.resolveLong(first, at, int64(len(p)-done))
		if err != nil {
			return done, err
		}
		part := p[done : done+int(run.Len)]
		if err := d.readRun(i, run, part, at); err != nil {
			return done, err
		}
		done += len(part)
	}
	return done, nil
}

// resolveLong is resolve for as long as it can be read at once: what is remembered about
// layers ends at fixed borders, which data does not.
func (d *Disk) resolveLong(first int, off, n int64) (int, Run, error) {
	i, run, err := d.resolve(first, off, n)
	if err != nil || d.answering == nil {
		return i, run, err
	}
	for run.Len < n {
		next, more, err := d.resolve(first, off+run.Len, n-run.Len)
		if err != nil || next != i || !run.continuedBy(more) {
			break // an error is met again by who reads there
		}
		run.Len += more.Len
	}
	return i, run, nil
}

// continuedBy reports whether next, which follows in the guest, follows in the file, too.
func (r Run) continuedBy(next Run) bool {
	switch {
	case r.State != next.State || r.File != next.File || r.Flat != next.Flat || r.Shared != next.Shared:
		return false
	case r.State == Data:
		return r.FileOff+r.Len == next.FileOff
	case r.State == Compressed:
		return r.GranuleOff == next.GranuleOff
	}
	return true
}

// resolve finds the layer that holds the guest bytes at off, from layer first
// downwards. An Absent run means that none does: the bytes are zero.
func (d *Disk) resolve(first int, off, n int64) (int, Run, error) {
	d.mapping.RLock()
	defer d.mapping.RUnlock()
	if d.answering != nil && n <= maxAnsweringRead {
		layer, end := d.answeringLayer(off)
		first, n = max(first, layer), min(n, end-off)
	}
	for i := first; i < len(d.layers); i++ {
		l := d.layers[i]
		if off >= l.geometry.SizeBytes {
			// A shorter parent ends here, and hides what is below it.
			return i, Run{State: Absent, Len: n}, nil
		}
		n = min(n, l.geometry.SizeBytes-off)
		run, err := l.Codec.Lookup(off, n)
		if err != nil {
			return i, Run{}, fmt.Errorf("%s: %s: find guest offset %d: %w", l.Format, l.Name, off, err)
		}
		run.Len = min(run.Len, n)
		if run.State != Absent {
			return i, run, nil
		}
		n = run.Len
	}
	return len(d.layers), Run{State: Absent, Len: n}, nil
}

// maxAnsweringRead is the most that is looked up in ranges of which the answering layer
// is remembered. Who asks for more, for a map of the disk, gets long answers instead.
const maxAnsweringRead = 8 << 20

// answeringLayer returns the first layer that holds anything in the range off lies in,
// and the range's end. The mapping lock is held.
func (d *Disk) answeringLayer(off int64) (layer int, end int64) {
	layer, end, ok := d.answering.first(off)
	if !ok {
		layer = d.findAnswering(end-answeringRange, end)
		d.answering.remember(off, layer)
	}
	return layer, end
}

// findAnswering returns the first layer that is not Absent in all of [from, to), which may
// reach past the end of the disk. A layer that fails or ends counts: who reads will see.
func (d *Disk) findAnswering(from, to int64) int {
	to = min(to, d.size.Load())
	for i, l := range d.layers {
		if l.geometry.SizeBytes < to {
			return i
		}
		for at := from; at < to; {
			run, err := l.Codec.Lookup(at, to-at)
			if err != nil || run.State != Absent || run.Len <= 0 {
				return i
			}
			at += run.Len
		}
	}
	return len(d.layers)
}

// readRun reads the bytes of a run of layer i.
func (d *Disk) readRun(i int, run Run, p []byte, off int64) error {
	switch run.State {
	case Data:
		l := d.layers[i]
		if l.geometry.Cipher != nil {
			return readCiphered(l, run, p, off)
		}
		return readFile(l.Files[run.File], p, run.FileOff)
	case Compressed:
		return d.readCompressed(i, run, p, off)
	}
	clear(p)
	return nil
}

// readFile fills p. Past the end of the file are zeroes: the last cluster of an image may
// be shorter than a cluster.
func readFile(f vfs.File, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == io.EOF {
		clear(p[n:])
		return nil
	}
	return fmt.Errorf("read %d bytes at %#x of %s: %w", len(p), off, f.Name(), err)
}

const cipherSector = 512

// cipherBytes is how much is encrypted or decrypted at once: what one buffer holds.
const cipherBytes = 64 << 10

var cipherBuffers = sync.Pool{New: func() any { return new([cipherBytes]byte) }}

// readCiphered reads a range and decrypts it: whole sectors where they are to be, those at the
// edges beside it.
func readCiphered(l *Layer, run Run, p []byte, off int64) error {
	f, fileOff := l.Files[run.File], run.FileOff
	if head := off % cipherSector; head != 0 || len(p) < cipherSector {
		n, err := readSector(l, f, p, off, fileOff)
		if err != nil {
			return err
		}
		p, off, fileOff = p[n:], off+int64(n), fileOff+int64(n)
	}
	whole := len(p) / cipherSector * cipherSector
	if whole > 0 {
		if err := readFile(f, p[:whole], fileOff); err != nil {
			return err
		}
		l.geometry.Cipher.Decrypt(p[:whole], off)
	}
	if whole == len(p) {
		return nil
	}
	_, err := readSector(l, f, p[whole:], off+int64(whole), fileOff+int64(whole))
	return err
}

// readSector fills what of p lies in the sector around off, and returns how much.
func readSector(l *Layer, f vfs.File, p []byte, off, fileOff int64) (int, error) {
	head := off % cipherSector
	buf := cipherBuffers.Get().(*[cipherBytes]byte)
	defer cipherBuffers.Put(buf)
	sector := buf[:cipherSector]
	if err := readFile(f, sector, fileOff-head); err != nil {
		return 0, err
	}
	l.geometry.Cipher.Decrypt(sector, off-head)
	return copy(p, sector[head:]), nil
}

func (d *Disk) readCompressed(i int, run Run, p []byte, off int64) error {
	l := d.layers[i]
	if off == run.GranuleOff && int64(len(p)) == run.GranuleLen {
		// Whoever wants all of it will not come back: it need not be kept.
		if err := l.Codec.ReadCompressed(run, p); err != nil {
			return fmt.Errorf("%s: %s: inflate guest offset %d: %w", l.Format, l.Name, off, err)
		}
		return nil
	}
	granule, err := d.inflated.get(inflatedKey{l, run.GranuleOff}, func() ([]byte, error) {
		buf := make([]byte, run.GranuleLen)
		err := l.Codec.ReadCompressed(run, buf)
		return buf, err
	})
	if err != nil {
		return fmt.Errorf("%s: %s: inflate guest offset %d: %w", l.Format, l.Name, run.GranuleOff, err)
	}
	copy(p, granule[off-run.GranuleOff:])
	return nil
}

// Map implements block.Device.
func (d *Disk) Map(off, n int64) (block.Extent, error) {
	d.gate.RLock()
	defer d.gate.RUnlock()
	if err := block.CheckRange(off, n, d.size.Load()); err != nil {
		return block.Extent{}, err
	}
	if n == 0 {
		return block.Extent{Off: off, FileOff: -1}, nil
	}
	return d.extent(0, off, n)
}

// MapLayer describes what one layer alone holds, depth counted from the top: parents
// are not consulted. It is otherwise like Map.
func (d *Disk) MapLayer(depth int, off, n int64) (block.Extent, error) {
	d.gate.RLock()
	defer d.gate.RUnlock()
	if depth < 0 || depth >= len(d.layers) {
		return block.Extent{}, fmt.Errorf("layer %d of %d: %w", depth, len(d.layers), block.ErrInvalid)
	}
	l := d.layers[depth]
	if err := block.CheckRange(off, n, l.geometry.SizeBytes); err != nil || n == 0 {
		return block.Extent{Off: off, FileOff: -1}, err
	}
	d.mapping.RLock()
	run, err := l.Codec.Lookup(off, n)
	d.mapping.RUnlock()
	if err != nil {
		return block.Extent{}, fmt.Errorf("%s: %s: find guest offset %d: %w", l.Format, l.Name, off, err)
	}
	run.Len = min(run.Len, n)
	return d.describe(depth, run, off)
}

// extent merges adjacent runs that are the same to a reader.
func (d *Disk) extent(first int, off, n int64) (block.Extent, error) {
	var all block.Extent
	for n > 0 {
		i, run, err := d.resolve(first, off, n)
		if err != nil {
			return all, err
		}
		e, err := d.describe(i, run, off)
		if err != nil {
			return all, err
		}
		if all.Len == 0 {
			all = e
		} else if continues(all, e) {
			all.Len += e.Len
		} else {
			break
		}
		off, n = off+e.Len, n-e.Len
	}
	return all, nil
}

// continues reports whether b carries on where a ends, in the guest and in the file.
func continues(a, b block.Extent) bool {
	if a.State != b.State || a.Depth != b.Depth || a.Compressed != b.Compressed || a.File != b.File {
		return false
	}
	return a.FileOff < 0 && b.FileOff < 0 || a.FileOff >= 0 && a.FileOff+a.Len == b.FileOff
}

// describe turns a run of layer i into an extent. Holes in flat files count as zeroes:
// that is all that is known about a raw disk.
func (d *Disk) describe(i int, run Run, off int64) (block.Extent, error) {
	e := block.Extent{Off: off, Len: run.Len, State: run.State.blockState(), Depth: i, FileOff: -1}
	if i >= len(d.layers) || run.State == Absent || run.State == Zero {
		return e, nil
	}
	f := d.layers[i].Files[run.File]
	e.File = f.Name()
	if run.State == Compressed {
		e.Compressed = true
		return e, nil
	}
	if d.layers[i].geometry.Cipher != nil {
		return e, nil // what the file holds is not what is read
	}
	e.FileOff = run.FileOff
	if !run.Flat {
		return e, nil
	}
	start, end, err := f.NextData(run.FileOff)
	switch {
	case err == io.EOF || err == nil && start >= run.FileOff+run.Len:
		e.State = block.Zero
	case err != nil:
		return e, fmt.Errorf("find data at %#x of %s: %w", run.FileOff, f.Name(), err)
	case start > run.FileOff:
		e.State, e.Len = block.Zero, start-run.FileOff
	default:
		e.Len = min(e.Len, end-run.FileOff)
	}
	return e, nil
}
