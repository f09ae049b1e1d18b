package engine

import (
	"errors"
	"fmt"
)

// WriteAt implements block.Device.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	n, err := d.writeAt(p, off)
	for tries := 0; err != nil && d.madeSpace(err, tries); tries++ {
		var more int
		more, err = d.writeAt(p[n:], off+int64(n))
		n += more
	}
	if err == nil {
		err = d.relieve()
	}
	return n, err
}

// maxSpaceTries bounds how often a request makes space that others then take.
const maxSpaceTries = 4

// madeSpace reports whether a request that found the image full may find space now: what
// requests before it have freed, be it in a flush that is running, is free after a flush.
// The caller holds nothing.
func (d *Disk) madeSpace(err error, tries int) bool {
	return tries < maxSpaceTries && errors.Is(err, errFormatFull) && d.Flush() == nil
}

func (d *Disk) writeAt(p []byte, off int64) (int, error) {
	d.gate.RLock()
	defer d.gate.RUnlock()
	if err := d.checkWrite(off, int64(len(p))); err != nil || len(p) == 0 {
		return 0, err
	}
	if err := d.begin(); err != nil {
		return 0, err
	}
	d.stats.write(len(p))
	done := 0
	for done < len(p) {
		n, err := d.writeSome(bytesFrom(p[done:]), off+int64(done))
		done += int(n)
		if err != nil {
			return done, err
		}
	}
	return done, d.noted()
}

// noted returns once what the caller changed in tables is in the journal. When the
// journal cannot take it, the change is made durable in the image instead.
func (d *Disk) noted() error {
	if err := d.journal.sync(); err != nil {
		d.pressure.Store(true)
	}
	return nil
}

// relieve commits when uncommitted changes take much memory or the journal failed. The
// caller holds nothing.
func (d *Disk) relieve() error {
	if !d.pressure.Load() {
		return nil
	}
	return d.Flush()
}

// content is what is written: bytes, or that many zeroes.
type content struct {
	p     []byte
	n     int64
	solid bool // zeroes are written even where they would not have to be
}

func bytesFrom(p []byte) content { return content{p: p, n: int64(len(p))} }
func zeroes(n int64) content     { return content{n: n} }

func (c content) first(n int64) content {
	c.n = n
	if c.p != nil {
		c.p = c.p[:n]
	}
	return c
}

// writeSome writes leading bytes of what at off and returns how many.
func (d *Disk) writeSome(what content, off int64) (int64, error) {
	run, start, end, err := d.lookupGranules(off, what.n)
	if err != nil {
		return 0, err
	}
	if run.inPlace() {
		return d.overwrite(what.first(run.Len), off, run)
	}
	return d.place(what.first(run.Len), off, start, end)
}

// lookupGranules asks the top layer alone, and says what granules the run lies in unless it
// can be overwritten.
func (d *Disk) lookupGranules(off, n int64) (run Run, start, end int64, err error) {
	d.mapping.RLock()
	defer d.mapping.RUnlock()
	if run, err = d.runOfTop(off, n); err != nil || run.inPlace() {
		return run, 0, 0, err
	}
	start, end = d.granulesOf(off, run.Len)
	return run, start, end, nil
}

// lookupTop asks the top layer alone.
func (d *Disk) lookupTop(off, n int64) (Run, error) {
	d.mapping.RLock()
	defer d.mapping.RUnlock()
	return d.runOfTop(off, n)
}

// runOfTop is lookupTop with the mapping lock held.
func (d *Disk) runOfTop(off, n int64) (Run, error) {
	l := d.top()
	run, err := l.Codec.Lookup(off, n)
	if err != nil {
		return run, fmt.Errorf("%s: %s: find guest offset %d: %w", l.Format, l.Name, off, err)
	}
	run.Len = min(run.Len, n)
	return run, nil
}

// inPlace reports whether the run's bytes can be overwritten where they are.
func (r Run) inPlace() bool { return r.State == Data && !r.Shared }

// overwrite writes bytes that have a place.
func (d *Disk) overwrite(what content, off int64, run Run) (int64, error) {
	if d.top().geometry.Cipher != nil {
		return what.n, d.overwriteCiphered(what, off, run)
	}
	return what.n, d.writeFile(run.File, what, run.FileOff)
}

// overwriteCiphered writes whole sectors, those at the edges with their old rest. They
// are claimed: two writes to parts of one sector must not both start from the old one.
func (d *Disk) overwriteCiphered(what content, off int64, run Run) error {
	start, end := off/cipherSector*cipherSector, alignUp(off+what.n, cipherSector)
	held := d.claims.acquire(start, end)
	defer d.claims.release(held)
	return d.writeCiphered(what, off, run.File, run.FileOff)
}

// writeCiphered writes whole sectors, those at the edges with their old rest, piece by piece.
func (d *Disk) writeCiphered(what content, off int64, file int, fileOff int64) error {
	l := d.top()
	all := cipherBuffers.Get().(*[cipherBytes]byte)
	defer cipherBuffers.Put(all)
	for what.n > 0 {
		head := off % cipherSector
		n := min(what.n, cipherBytes-head)
		buf := all[:alignUp(head+n, cipherSector)]
		if head != 0 || int64(len(buf)) != n {
			if err := readFile(l.Files[file], buf, fileOff-head); err != nil {
				return err
			}
			l.geometry.Cipher.Decrypt(buf, off-head)
		}
		if what.p != nil {
			copy(buf[head:], what.p[:n])
			what.p = what.p[n:]
		} else {
			clear(buf[head : head+n])
		}
		l.geometry.Cipher.Encrypt(buf, off-head)
		if err := d.writeFile(file, bytesFrom(buf), fileOff-head); err != nil {
			return err
		}
		what.n -= n
		off, fileOff = off+n, fileOff+n
	}
	return nil
}

// writeFile writes to a file of the top layer and notes that it has to be synced. The
// note comes after the write: a flush that clears it in between syncs too much, never
// too little.
func (d *Disk) writeFile(file int, what content, off int64) error {
	f := d.top().Files[file]
	defer d.top().unsynced[file].Store(true)
	for what.n > 0 {
		p := what.p
		if p == nil {
			p = zeroBytes[:min(what.n, int64(len(zeroBytes)))]
		}
		n, err := f.WriteAt(p, off)
		if err != nil {
			return fmt.Errorf("write %d bytes at %#x of %s: %w", len(p), off, f.Name(), err)
		}
		off += int64(n)
		if what.n -= int64(n); what.p != nil {
			what.p = what.p[n:]
		}
	}
	return nil
}

var zeroBytes [256 << 10]byte

// place writes bytes that have no plain place, in the granules [start, end): it reserves
// space for them, fills it, and changes the mapping.
func (d *Disk) place(what content, off, start, end int64) (int64, error) {
	held := d.claims.acquire(start, end)
	defer d.claims.release(held)
	r, err := d.reserveAround(held, off, what.n)
	if err != nil || r.run.Len == 0 {
		return 0, err
	}
	what = what.first(r.run.Len)
	if r.run.inPlace() {
		return d.overwrite(what, off, r.run)
	}
	if err := d.fill(r, what, off); err != nil {
		d.giveBack(r.place)
		return 0, err
	}
	if err := d.set(r.start, r.end-r.start, Data, r.place); err != nil {
		d.giveBack(r.place)
		return 0, err
	}
	return what.n, nil
}

// reservation is what a write finds once it has claimed its granules.
type reservation struct {
	run        Run   // where its bytes are; only so many can be written
	start, end int64 // the granules that place is for, unless the run can be overwritten
	place      Place
	blank      bool // the granules are known to read as zeroes until now
}

// reserveAround reserves space for the granules around n bytes at off. A run of length 0
// says that the world has changed, and that granules have to be claimed anew. It is all done
// at once: each time that the lock is taken, another thread may have to wait.
func (d *Disk) reserveAround(held claim, off, n int64) (r reservation, err error) {
	d.mapping.Lock()
	defer d.mapping.Unlock()
	if r.run, err = d.runOfTop(off, n); err != nil {
		return r, err
	}
	if r.run.inPlace() { // another request has placed them meanwhile
		if d.top().geometry.Cipher != nil {
			r.run.Len = 0 // overwriting claims its sectors itself
		}
		return r, nil
	}
	if r.start, r.end = d.granulesOf(off, r.run.Len); !held.covers(r.start, r.end) {
		r.run.Len = 0 // another request has changed what a granule is here
		return r, nil
	}
	if r.place, err = d.allocate(r.start, r.end); err != nil {
		return r, err
	}
	r.end = r.start + r.place.Len
	r.run.Len = min(r.run.Len, r.end-off)
	r.blank = d.isBlank(r.start, r.end)
	return r, nil
}

// isBlank reports whether granules are known to read as zeroes, without asking parents. The
// mapping lock is held.
func (d *Disk) isBlank(start, end int64) bool {
	end = min(end, d.size.Load())
	run, err := d.top().Codec.Lookup(start, end-start)
	zero := run.State == Zero || run.State == Absent && len(d.layers) == 1
	return err == nil && zero && run.Len >= end-start
}

// granules returns the range of whole granules around n bytes at off.
func (d *Disk) granules(off, n int64) (start, end int64) {
	d.mapping.RLock()
	defer d.mapping.RUnlock()
	return d.granulesOf(off, n)
}

// granulesOf is granules with the mapping lock held.
func (d *Disk) granulesOf(off, n int64) (start, end int64) {
	start, end = d.top().Codec.Granule(off)
	if end < off+n {
		_, end = d.top().Codec.Granule(off + n - 1)
	}
	return start, end
}

func (d *Disk) reserve(start, end int64) (Place, error) {
	d.mapping.Lock()
	defer d.mapping.Unlock()
	return d.allocate(start, end)
}

// allocate is reserve with the mapping lock held.
func (d *Disk) allocate(start, end int64) (Place, error) {
	l := d.top()
	place, err := l.Codec.Allocate(start, end-start)
	l.Tables.letGo()
	if err != nil {
		return place, fmt.Errorf("%s: %s: allocate for guest offset %d: %w", l.Format, l.Name, start, err)
	}
	// The file may have become longer, which has to be durable before the mapping is,
	// also if nothing is written because the new space is zero as it should be.
	l.unsynced[place.File].Store(true)
	d.stats.allocations.Add(1)
	return place, nil
}

// giveBack returns reserved space that nothing refers to; it may hold anything by now.
func (d *Disk) giveBack(place Place) {
	d.mapping.Lock()
	defer d.mapping.Unlock()
	d.top().Codec.Free(place.Span, false)
	d.top().Tables.letGo()
}

// set changes the mapping of claimed granules.
func (d *Disk) set(start, n int64, to State, at Place) error {
	d.mapping.Lock()
	defer d.mapping.Unlock()
	l := d.top()
	unused, err := l.Codec.Set(start, n, to, at)
	l.Tables.letGo()
	if err != nil {
		return fmt.Errorf("%s: %s: map guest offset %d: %w", l.Format, l.Name, start, err)
	}
	d.unused = append(d.unused, unused...)
	d.inflated.dropRange(l, start, n)
	d.answering.forget(start, n)
	if l.Tables.dirtyBytes() > int64(l.Tables.maxPages)*pageBytes/2 || d.journal.large() {
		d.pressure.Store(true)
	}
	return nil
}

// fill writes what at off into the place reserved, and around it what the granules read as
// until now.
func (d *Disk) fill(r reservation, what content, off int64) error {
	after := off + what.n
	if r.blank && d.top().geometry.Cipher == nil {
		if err := d.fillWith(r.place, r.start, zeroes(off-r.start), r.start); err != nil {
			return err
		}
		if err := d.fillWith(r.place, r.start, zeroes(r.end-after), after); err != nil {
			return err
		}
		return d.fillWith(r.place, r.start, what, off)
	}
	if err := d.copyUp(r.place, r.start, r.start, off); err != nil {
		return err
	}
	if err := d.copyUp(r.place, r.start, after, r.end); err != nil {
		return err
	}
	return d.fillWith(r.place, r.start, what, off)
}

// fillWith writes guest bytes at off into a place whose granules start at start.
func (d *Disk) fillWith(place Place, start int64, what content, off int64) error {
	fileOff := place.Off + off - start
	cipher := d.top().geometry.Cipher
	switch {
	case cipher != nil:
		// Sectors at the edges that are only partly given were filled by copyUp just before.
		return d.writeCiphered(what, off, place.File, fileOff)
	case what.p == nil && place.Zeroed && !what.solid:
		return nil
	}
	return d.writeFile(place.File, what, fileOff)
}

// copyUp writes what guest bytes [from, to) read as until now into the place.
func (d *Disk) copyUp(place Place, start, from, to int64) error {
	if d.top().geometry.Cipher != nil {
		from, to = from/cipherSector*cipherSector, alignUp(to, cipherSector)
	}
	var buf []byte
	for from < to {
		n, isZero, err := d.oldContent(from, to)
		if err != nil {
			return err
		}
		what := zeroes(n)
		if !isZero {
			n = min(n, int64(len(zeroBytes)))
			if buf == nil {
				buf = make([]byte, min(to-from, int64(len(zeroBytes))))
			}
			what = bytesFrom(buf[:n])
			if _, err := d.readChain(0, what.p, from); err != nil {
				return err
			}
		}
		if err := d.fillWith(place, start, what, from); err != nil {
			return err
		}
		from += n
	}
	return nil
}

// oldContent says for how many bytes at from the old content is of one kind, and whether
// that is zeroes.
func (d *Disk) oldContent(from, to int64) (n int64, isZero bool, err error) {
	size := d.size.Load()
	if from >= size {
		return to - from, true, nil
	}
	_, run, err := d.resolve(0, from, min(to, size)-from)
	return run.Len, run.State == Absent || run.State == Zero, err
}
