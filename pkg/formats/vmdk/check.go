package vmdk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

const (
	// maxProblems bounds how many problems are described; all are counted.
	maxProblems = 100
	// maxUnits bounds the bitmap of a check: a bit for each unit of the file.
	maxUnits = 64 << 20 * 8
)

// Check examines the tables of all sparse extents, and how long flat files are. A repair
// takes each entry that is bad from the other copy, makes stale copies equal, gives a grain
// that shares another's space a copy of its own, and cuts off what nothing refers to at a
// file's end.
func (m *image) Check(ctx context.Context, c *engine.Commit, progress func(done, total int64)) (engine.CheckResult, error) {
	result := engine.CheckResult{}
	var tables, done int64
	for i := range m.extents {
		if s := m.extents[i].sparse; s != nil {
			tables += 2 * int64(len(s.gd)) // there are two passes
		}
	}
	step := func() {
		if done++; progress != nil && (done%64 == 0 || done == tables) {
			progress(done, tables)
		}
	}
	for i := range m.extents {
		e := &m.extents[i]
		if e.zero {
			continue
		}
		if e.se != nil {
			if err := e.se.check(&result, c, ctx.Err); err != nil {
				return result, fmt.Errorf("vmdk: check %s: %w", m.layer.Name, err)
			}
			continue
		}
		if e.sparse == nil {
			if err := m.checkFlat(e, &result); err != nil {
				return result, fmt.Errorf("vmdk: check %s: %w", m.layer.Name, err)
			}
			continue
		}
		k := checker{ctx: ctx, sparse: e.sparse, commit: c, result: &result, step: step}
		if err := k.run(); err != nil {
			return result, fmt.Errorf("vmdk: check %s: %w", m.layer.Name, err)
		}
	}
	if c == nil {
		return result, nil
	}
	m.layer.Tables.Forget()
	if err := c.Sync(); err != nil {
		return result, fmt.Errorf("vmdk: check %s: %w", m.layer.Name, err)
	}
	return result, nil
}

func (m *image) checkFlat(e *extent, result *engine.CheckResult) error {
	f := m.layer.Files[e.file]
	size, err := f.Size()
	if err != nil {
		return fmt.Errorf("size of %s: %w", f.Name(), err)
	}
	end := e.flatOff + e.guestEnd - e.guestOff
	if size < end {
		report(result, engine.Problem{Corrupt: true, Text: fmt.Sprintf("%s has %d bytes, want %d", f.Name(), size, end)})
	}
	result.ImageEndOffset = max(result.ImageEndOffset, end)
	return nil
}

// report counts a problem and, if there are not too many yet, describes it.
func report(result *engine.CheckResult, p engine.Problem) {
	switch {
	case p.Fixed:
		result.FixedProblems++
	case p.Corrupt:
		result.Corruptions++
	}
	if len(result.Problems) < maxProblems {
		result.Problems = append(result.Problems, p)
	}
}

// checker checks one sparse extent in two passes over its tables: the first finds how fine
// the bitmap of the file must be, the second fills it.
type checker struct {
	ctx    context.Context
	sparse *sparse
	commit *engine.Commit // nil: look only
	result *engine.CheckResult
	step   func()

	unitShift uint     // log2 of the bytes that a bit of used stands for
	used      []uint64 // bitmap of the file's units
	previous  uint32   // the last grain's sector, to count fragments
	end       int64    // of the last grain in the file
	separated int64    // bytes copied for grains that shared theirs
	table     []byte   // scratch: a grain table
	redundant []byte   // scratch: its redundant copy
}

func (k *checker) run() error {
	if err := k.scan(); err != nil {
		return err
	}
	if err := k.checkFreeSector(); err != nil {
		return err
	}
	if k.sparse.header.compressed() {
		return k.checkCompressedLeaks()
	}
	return k.checkLeaks()
}

// scan goes through all tables: used is complete afterwards.
func (k *checker) scan() error {
	s := k.sparse
	k.table, k.redundant = make([]byte, s.tableBytes()), make([]byte, s.tableBytes())
	k.result.TotalClusters += s.grains()
	if err := k.checkDirectories(); err != nil {
		return err
	}
	if err := k.chooseUnit(); err != nil {
		return err
	}
	k.fill(sectorSpan{0, s.dataStart})
	for _, m := range s.meta {
		k.fill(m)
	}
	for ti := range s.gd {
		if err := k.checkTable(int64(ti)); err != nil {
			return err
		}
		k.step()
	}
	return nil
}

// checkDirectories reports what judgeTables has found, and tables that one directory names
// and the other does not. A table that is lost, but not its copy, is made anew from it: no
// entry says where the old one was.
func (k *checker) checkDirectories() error {
	s := k.sparse
	for ti := range s.gd {
		if s.rgd == nil {
			if s.gd[ti] == badTable {
				k.reportTable("", ti, false)
			}
			continue
		}
		gt, rgt := s.gd[ti], s.rgd[ti]
		if gt != badTable && rgt != badTable && (gt == 0) == (rgt == 0) {
			continue
		}
		fixed := k.repairs() && (isTable(gt) || isTable(rgt))
		if gt == badTable {
			k.reportTable("", ti, fixed)
		}
		if rgt == badTable {
			k.reportTable("redundant ", ti, fixed)
		}
		if gt == 0 || rgt == 0 {
			missing, err := k.checkMissing(int64(ti), fixed)
			if err != nil {
				return err
			}
			fixed = fixed && missing
		}
		if !fixed {
			continue
		}
		if err := k.replaceTable(int64(ti)); err != nil {
			return err
		}
	}
	return nil
}

// isTable reports whether a directory entry names a table that can be read.
func isTable(gt uint32) bool { return gt != 0 && gt != badTable }

// checkMissing reports a table that one directory has and the other has not, and returns
// whether it is worth making: a crash while it was made, before anything in it was
// flushed, leaves the same as the loss of an entry.
func (k *checker) checkMissing(ti int64, fixed bool) (bool, error) {
	s := k.sparse
	there, which := s.gd[ti], "redundant "
	if !isTable(there) {
		there, which = s.rgd[ti], ""
	}
	if !isTable(there) {
		return false, nil
	}
	if err := s.tables.Read(s.file, int64(there)*sectorBytes, k.table); err != nil {
		return false, err
	}
	if isZero(k.table) {
		return false, nil
	}
	report(k.result, engine.Problem{
		Fixed: fixed,
		Text:  fmt.Sprintf("%sgrain directory entry %d of %s is 0, but its copy names a table with grains", which, ti, s.f.Name()),
	})
	return true, nil
}

// repairs reports whether the extent is to be repaired, and can be.
func (k *checker) repairs() bool { return k.commit != nil && k.sparse.space != nil }

func (k *checker) reportTable(which string, ti int, fixed bool) {
	report(k.result, engine.Problem{
		Corrupt: which == "", Fixed: fixed,
		Text: fmt.Sprintf("%sgrain directory entry %d of %s: its table lies outside the file or overlaps something else",
			which, ti, k.sparse.f.Name()),
	})
}

// replaceTable makes the bad or missing one of a table and its copy anew from the good one: first the
// table, then the entry that names it.
func (k *checker) replaceTable(ti int64) error {
	s := k.sparse
	good, bad, dirSector := s.gd[ti], &s.rgd[ti], s.header.rgdOffset
	if !isTable(good) {
		good, bad, dirSector = s.rgd[ti], &s.gd[ti], s.header.gdOffset
	}
	if err := s.tables.Read(s.file, int64(good)*sectorBytes, k.table); err != nil {
		return err
	}
	off, err := s.tableSpace()
	if err != nil {
		return err
	}
	if err := k.commit.WriteAt(s.file, k.table, off); err != nil {
		return err
	}
	if err := k.commit.Sync(); err != nil {
		return err
	}
	entry := binary.LittleEndian.AppendUint32(nil, uint32(off/sectorBytes))
	if err := k.commit.WriteAt(s.file, entry, int64(dirSector)*sectorBytes+ti*gteBytes); err != nil {
		return err
	}
	*bad = uint32(off / sectorBytes)
	return nil
}

// chooseUnit makes the bitmap, with the greatest units in which no two grains share one
// without overlapping.
func (k *checker) chooseUnit() error {
	s := k.sparse
	k.unitShift = s.grainShift
	if s.header.compressed() {
		k.unitShift = uint(bits.TrailingZeros(sectorBytes))
	}
	for ti := range s.gd {
		ok, err := k.readTable(int64(ti))
		if err != nil {
			return err
		}
		for p := k.table; ok && len(p) > 0; p = p[gteBytes:] {
			entry := binary.LittleEndian.Uint32(p)
			if s.room(uint64(entry)) > 0 {
				k.unitShift = min(k.unitShift, uint(bits.TrailingZeros64(uint64(entry)*sectorBytes)))
			}
		}
		k.step()
	}
	units := (s.fileEnd-1)>>k.unitShift + 1
	if units > maxUnits {
		return unsupported("%s has %d bytes and grains at sectors that are no multiple of %d: finding overlaps would take %d MiB",
			s.f.Name(), s.fileEnd, s.header.grainSize, units>>23)
	}
	k.used = make([]uint64, (units+63)/64)
	return nil
}

// readTable reads a grain table; ok is false if there is none that can be read.
func (k *checker) readTable(ti int64) (ok bool, err error) {
	if err := k.ctx.Err(); err != nil {
		return false, err
	}
	gt, err := k.sparse.tableAt(ti)
	if err != nil || gt == 0 {
		return false, nil
	}
	return true, k.sparse.tables.Read(k.sparse.file, int64(gt)*sectorBytes, k.table)
}

// checkTable checks the entries of a table, against the file and against their copies.
func (k *checker) checkTable(ti int64) error {
	s := k.sparse
	ok, err := k.readTable(ti)
	if err != nil || !ok {
		return err
	}
	rgt := s.redundantAt(ti)
	if rgt != 0 {
		if err := s.tables.Read(s.file, int64(rgt)*sectorBytes, k.redundant); err != nil {
			return err
		}
	}
	first := ti << s.tableShift
	count := min(s.grainsPerTable(), s.grains()-first)
	primaryChanged, redundantChanged, stale := false, false, 0
	for i := range count {
		p, r := k.table[i*gteBytes:], k.redundant[i*gteBytes:]
		entry, copied := binary.LittleEndian.Uint32(p), binary.LittleEndian.Uint32(r)
		if why := k.take(first+i, entry); why != "" {
			fixed := false
			if k.repairs() && rgt != 0 && copied != entry && copied != gteAbsent && k.take(first+i, copied) == "" {
				binary.LittleEndian.PutUint32(p, copied)
				primaryChanged, fixed = true, true
			} else if own, err := k.separate(first+i, entry); err != nil {
				return err
			} else if own != gteAbsent {
				binary.LittleEndian.PutUint32(p, own)
				binary.LittleEndian.PutUint32(r, own)
				primaryChanged, fixed = true, true
				redundantChanged = rgt != 0
			}
			report(k.result, engine.Problem{Corrupt: true, Fixed: fixed, Text: fmt.Sprintf("grain %d of %s: %s", first+i, s.f.Name(), why)})
			continue
		}
		if rgt != 0 && copied != entry {
			binary.LittleEndian.PutUint32(r, entry)
			stale++
		}
	}
	if redundantChanged && stale == 0 {
		if err := k.commit.WriteAt(s.file, k.redundant, int64(rgt)*sectorBytes); err != nil {
			return err
		}
	}
	return k.repairTable(ti, rgt, primaryChanged, stale)
}

// maxSeparatedBytes bounds how much a repair copies.
const maxSeparatedBytes = 1 << 30

// separate gives a grain whose entry refers to another grain's space, or a part of it, a
// copy of its own, durably. It returns the entry for it; gteAbsent if nothing can be done.
func (k *checker) separate(grain int64, entry uint32) (uint32, error) {
	s := k.sparse
	if !k.repairs() || s.header.compressed() || k.separated >= maxSeparatedBytes {
		return gteAbsent, nil
	}
	run, err := s.runAt(grain, entry, s.guestOff+grain<<s.grainShift, s.grainBytes())
	if err != nil || run.State != engine.Data {
		return gteAbsent, nil
	}
	data := make([]byte, s.grainBytes())
	if _, err := s.f.ReadAt(data, run.FileOff); err != nil && !errors.Is(err, io.EOF) {
		return gteAbsent, fmt.Errorf("read grain %d: %w", grain, err)
	}
	place, err := s.space.Alloc(s.grainBytes(), s.grainBytes())
	if err != nil {
		return gteAbsent, err
	}
	if err := k.commit.WriteAt(s.file, data, place.Off); err != nil {
		return gteAbsent, err
	}
	if err := k.commit.Sync(); err != nil {
		return gteAbsent, err
	}
	k.separated += s.grainBytes()
	s.fileEnd = max(s.fileEnd, place.Off+place.Len)
	for int64(len(k.used))*64 < (s.fileEnd-1)>>k.unitShift+1 {
		k.used = append(k.used, 0)
	}
	k.mark(place.Off, place.Len)
	k.result.AllocatedCount++
	return uint32(place.Off / sectorBytes), nil
}

// checkFreeSector reports a COWD header by which other writers would take grains in use
// for free.
func (k *checker) checkFreeSector() error {
	s := k.sparse
	if !s.header.cowd || k.end <= int64(s.header.freeSector)*sectorBytes {
		return nil
	}
	report(k.result, engine.Problem{
		Fixed: k.repairs(),
		Text:  fmt.Sprintf("freeSector of %s is %d, but grains are in use up to sector %d", s.f.Name(), s.header.freeSector, k.end/sectorBytes),
	})
	if !k.repairs() {
		return nil
	}
	return s.writeFreeSector(k.commit, s.freeSectorNow())
}

// checkCompressedLeaks counts what lies between the grains of a stream and is neither a
// marker nor padding.
func (k *checker) checkCompressedLeaks() error {
	s := k.sparse
	if s.header.flags&flagMarkers == 0 {
		return nil // nothing says how long grains are
	}
	var lost int64
	var failed error
	sector := make([]byte, sectorBytes)
	k.eachFree(func(from, to int64) {
		for off := from; off < to && failed == nil; off += sectorBytes {
			if off%(1<<20) == 0 {
				if failed = k.ctx.Err(); failed != nil {
					return
				}
			}
			n, err := s.f.ReadAt(sector, off)
			if err != nil && !errors.Is(err, io.EOF) {
				failed = fmt.Errorf("read %d bytes at %#x: %w", len(sector), off, err)
			}
			clear(sector[n:])
			if !isStructural(sector) {
				lost += sectorBytes
			}
		}
	})
	if failed != nil || lost == 0 {
		return failed
	}
	report(k.result, engine.Problem{Text: fmt.Sprintf("nothing refers to %d bytes of %s", lost, s.f.Name())})
	k.result.Leaks += (lost-1)>>s.grainShift + 1
	return nil
}

// isStructural reports whether a sector that no table refers to has its place in a stream:
// a marker, the header or footer, or padding.
func isStructural(p []byte) bool {
	if isHeader(p) {
		return true
	}
	for kind := uint32(markerEndOfStream); kind <= markerFooter; kind++ {
		if isMarker(p, kind) && isZero(p[markerHeaderBytes+gteBytes:]) {
			return true
		}
	}
	return false
}

func isZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// repairTable writes the changed copies of a table, and reports stale ones.
func (k *checker) repairTable(ti int64, rgt uint32, primaryChanged bool, stale int) error {
	s := k.sparse
	if stale > 0 {
		report(k.result, engine.Problem{
			Fixed: k.repairs(),
			Text:  fmt.Sprintf("the redundant copy of grain table %d of %s differs in %d entries", ti, s.f.Name(), stale),
		})
	}
	if !k.repairs() {
		return nil
	}
	if stale > 0 {
		if err := k.commit.WriteAt(s.file, k.redundant, int64(rgt)*sectorBytes); err != nil {
			return err
		}
	}
	if primaryChanged {
		return k.commit.WriteAt(s.file, k.table, int64(s.gd[ti])*sectorBytes)
	}
	return nil
}

// take checks an entry and notes the space it refers to as used. It returns what is wrong
// with it, and then notes nothing.
func (k *checker) take(grain int64, entry uint32) string {
	s := k.sparse
	if entry == gteAbsent || entry == gteZero && s.hasZeroGrains() {
		return ""
	}
	off := s.guestOff + grain<<s.grainShift
	run, err := s.runAt(grain, entry, off, 1)
	if err != nil {
		return fmt.Sprintf("its entry, sector %d, lies outside the file of %d bytes or in its metadata", entry, s.fileEnd)
	}
	length := min(s.grainBytes(), s.fileEnd-run.FileOff)
	if run.State == engine.Compressed {
		if length, err = s.storedLength(run); err != nil {
			return err.Error()
		}
		k.result.Compressed++
	}
	if !k.mark(run.FileOff, length) {
		return fmt.Sprintf("its entry, sector %d, overlaps another grain", entry)
	}
	k.result.AllocatedCount++
	if k.previous != 0 && run.State == engine.Data && entry != k.previous+uint32(s.header.grainSize) {
		k.result.Fragmented++
	}
	k.previous = entry
	k.end = max(k.end, run.FileOff+length)
	k.result.ImageEndOffset = max(k.result.ImageEndOffset, k.end)
	return ""
}

// storedLength returns how much of the file a compressed grain takes, as its marker says.
func (s *sparse) storedLength(run engine.Run) (int64, error) {
	if s.header.flags&flagMarkers == 0 {
		return 1, nil // nothing says
	}
	var marker [markerHeaderBytes]byte
	if err := readFull(s.f, marker[:], run.FileOff); err != nil {
		return 0, err
	}
	size, err := s.markedLength(marker[:], run)
	return markerHeaderBytes + size, err
}

// fill notes metadata as used; it may overlap other metadata.
func (k *checker) fill(m sectorSpan) {
	if m.end <= m.start {
		return
	}
	last := (int64(m.end)*sectorBytes - 1) >> k.unitShift
	for u := int64(m.start) * sectorBytes >> k.unitShift; u <= last && u < int64(len(k.used))*64; u++ {
		k.used[u/64] |= 1 << (u % 64)
	}
}

// mark notes a stretch of the file as used, unless some of it is already.
func (k *checker) mark(off, n int64) bool {
	first, end := off>>k.unitShift, (off+n-1)>>k.unitShift+1
	end = min(end, int64(len(k.used))*64)
	for u := first; u < end; u++ {
		if k.used[u/64]&(1<<(u%64)) != 0 {
			return false
		}
	}
	for u := first; u < end; u++ {
		k.used[u/64] |= 1 << (u % 64)
	}
	return true
}

// eachFree calls f with each stretch of the file that nothing refers to, in bytes.
func (k *checker) eachFree(f func(start, end int64)) {
	units := (k.sparse.fileEnd-1)>>k.unitShift + 1
	from := int64(-1)
	for u := int64(0); u < units; u++ {
		isFree := k.used[u/64]&(1<<(u%64)) == 0
		switch {
		case isFree && from < 0:
			from = u
		case !isFree && from >= 0:
			f(from<<k.unitShift, u<<k.unitShift)
			from = -1
		}
		if word := k.used[u/64]; u%64 == 0 && from < 0 && word == 1<<64-1 {
			u += 63
		}
	}
	if from >= 0 {
		f(from<<k.unitShift, units<<k.unitShift)
	}
}

// checkLeaks counts the space for whole grains that nothing refers to, and cuts off what of
// it ends the file.
func (k *checker) checkLeaks() error {
	s := k.sparse
	leaks, tail, end := int64(0), int64(0), s.fileEnd
	k.eachFree(func(from, to int64) {
		lost := min(to, s.fileEnd) - from
		leaks += lost >> s.grainShift
		if to >= s.fileEnd {
			end, tail = from, lost>>s.grainShift
		}
	})
	k.result.ImageEndOffset = max(k.result.ImageEndOffset, end)
	if leaks > 0 {
		report(k.result, engine.Problem{Text: fmt.Sprintf("nothing refers to %d grains of %s", leaks, s.f.Name())})
	}
	if !k.repairs() {
		k.result.Leaks += leaks
		return nil
	}
	k.result.FixedLeaks += tail
	k.result.Leaks += leaks - tail
	return k.cutOff(end, tail)
}

// cutOff shortens the file to end if grains are lost behind it; otherwise, by what may have
// been reserved for tables.
func (k *checker) cutOff(end, tail int64) error {
	s := k.sparse
	if tail == 0 {
		return s.space.Trim()
	}
	if err := k.commit.Truncate(s.file, end); err != nil {
		return err
	}
	s.fileEnd = end
	s.space = engine.NewSpace(s.f, s.file, end, s.grainBytes(), maxFileSectors*sectorBytes)
	return nil
}
