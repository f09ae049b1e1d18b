package vmdk

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"slices"
	"sort"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const (
	gteAbsent = 0
	gteZero   = 1 // with flagZeroedGrain

	// badTable stands in a directory in memory for an entry that must not be followed.
	badTable = 1<<32 - 1

	// maxTablesPerLookup bounds how many grain tables one Lookup walks: the mapping
	// lock is held meanwhile.
	maxTablesPerLookup = 64

	// tablesBeforeHoles is how many of them are walked before the file is asked for holes,
	// which may cost a request to a server.
	tablesBeforeHoles = 8
)

// Stages of a commit: a table must not name a grain that another use may still be made of,
// nor a directory a table that is not there yet.
const (
	stageSpace engine.Stage = iota // of seSparse extents: free bitmap, back map, next table
	stageTables
	stageDirectories
	stages
)

// sparse is a hosted or COWD sparse extent: a grain directory names grain tables, whose entries
// name grains. Both exist twice if the extent is redundant.
type sparse struct {
	tables *engine.Tables
	f      vfs.File
	file   int // of f in Layer.Files
	header sparseHeader

	guestOff, guestEnd int64 // what the extent holds of the guest's bytes
	last               bool  // of the image's extents: its last granule may reach past the guest size
	grainShift         uint  // log2 of the grain size in bytes
	tableShift         uint  // log2 of the entries per grain table

	gd, rgd []uint32     // sectors of the tables; 0 none, badTable; rgd is nil without redundancy
	meta    []sectorSpan // tables and directories at or past dataStart, sorted
	// dataStart and fileEnd bound where grains can be: a sector, and a byte.
	dataStart uint64
	fileEnd   int64

	stream *streamWriter // not nil while the extent is a stream that is being written
	space  *engine.Space // nil if the image cannot be written
	spare  engine.Span   // space for grain tables not used yet
	plan   change        // scratch of prepareSet

	written []uint64 // bits of the tables that were changed since the image was opened
}

// sectorSpan is a stretch of a file in sectors.
type sectorSpan struct{ start, end uint64 }

func (s *sparse) grainBytes() int64       { return 1 << s.grainShift }
func (s *sparse) grainsPerTable() int64   { return 1 << s.tableShift }
func (s *sparse) tableBytes() int64       { return gteBytes << s.tableShift }
func (s *sparse) hasZeroGrains() bool     { return s.header.flags&flagZeroedGrain != 0 }
func (s *sparse) grains() int64           { return (s.guestEnd-s.guestOff-1)>>s.grainShift + 1 }
func (s *sparse) grainOf(off int64) int64 { return (off - s.guestOff) >> s.grainShift }

// newSparse reads the directories of an extent whose header is valid. guestOff and length
// are what the extent holds.
func newSparse(f vfs.File, file int, h sparseHeader, size, guestOff, length int64) (*sparse, error) {
	s := &sparse{
		f: f, file: file, header: h,
		guestOff: guestOff, guestEnd: guestOff + length,
		grainShift: uint(bits.TrailingZeros64(h.grainSize * sectorBytes)),
		tableShift: uint(bits.TrailingZeros32(h.numGTEsPerGT)),
		fileEnd:    size,
	}
	var err error
	if s.gd, err = s.readDirectory(h.gdOffset); err != nil {
		return nil, fmt.Errorf("read grain directory: %w", err)
	}
	if h.redundant() {
		if s.rgd, err = s.readDirectory(h.rgdOffset); err != nil {
			return nil, fmt.Errorf("read redundant grain directory: %w", err)
		}
	}
	s.judgeTables()
	return s, nil
}

// readDirectory reads the grain directory at a sector; validate has bounded it.
func (s *sparse) readDirectory(at uint64) ([]uint32, error) {
	raw := make([]byte, s.header.grainTables()*gteBytes)
	if err := readFull(s.f, raw, int64(at)*sectorBytes); err != nil {
		return nil, err
	}
	gd := make([]uint32, len(raw)/gteBytes)
	for i := range gd {
		gd[i] = binary.LittleEndian.Uint32(raw[i*gteBytes:])
	}
	return gd, nil
}

// fixedMetadata returns what lies where the header says.
func (s *sparse) fixedMetadata() []sectorSpan {
	h := &s.header
	fixed := []sectorSpan{{0, 1}, {h.gdOffset, h.gdOffset + h.gdSectors()}}
	if h.descriptorOffset != 0 {
		fixed = append(fixed, sectorSpan{h.descriptorOffset, h.descriptorOffset + h.descriptorSize})
	}
	if s.rgd != nil {
		fixed = append(fixed, sectorSpan{h.rgdOffset, h.rgdOffset + h.gdSectors()})
	}
	return fixed
}

// judgeTables puts badTable in place of directory entries that lie outside the file or
// overlap anything else, and notes where metadata is. The image still opens: what the
// other tables hold is good, and a check can say more.
func (s *sparse) judgeTables() {
	fixed := s.fixedMetadata()
	length := s.header.gtSectors()
	fileSectors := uint64(s.fileEnd / sectorBytes)
	// A key is a table's sector and which entry names it: the low bit tells the
	// directories apart. In files as they are made, the keys are in order already.
	keys := make([]uint64, 0, len(s.gd)+len(s.rgd))
	for which, dir := range [][]uint32{s.gd, s.rgd} {
		for i, gt := range dir {
			if gt == 0 {
				continue
			}
			table := sectorSpan{uint64(gt), uint64(gt) + length}
			if gt == badTable || table.end > fileSectors || slices.ContainsFunc(fixed, table.overlaps) {
				dir[i] = badTable
				continue
			}
			keys = append(keys, uint64(gt)<<32|uint64(i)<<1|uint64(which))
		}
	}
	slices.Sort(keys)
	s.judgeOverlaps(keys)
	s.noteMetadata(fixed, keys)
}

// judgeOverlaps marks tables that overlap others, given all of them in order. Where a
// table overlaps a redundant one, only the latter is bad: nothing is ever read from it.
func (s *sparse) judgeOverlaps(keys []uint64) {
	length := s.header.gtSectors()
	last := [2]uint64{noKey, noKey} // of either directory
	for _, key := range keys {
		redundant := key & 1
		for which, before := range last {
			if before == noKey || key>>32 >= before>>32+length {
				continue
			}
			if redundant == 1 || which == 0 {
				s.markBad(key)
			}
			if redundant == 0 || which == 1 {
				s.markBad(before)
			}
		}
		last[redundant] = key
	}
}

const noKey = 1<<64 - 1

func (a sectorSpan) overlaps(b sectorSpan) bool { return a.start < b.end && b.start < a.end }

func (s *sparse) markBad(key uint64) {
	dir := s.gd
	if key&1 == 1 {
		dir = s.rgd
	}
	dir[uint32(key)>>1] = badTable
}

// noteMetadata sets dataStart, and meta to what lies past it, given the sorted tables.
func (s *sparse) noteMetadata(fixed []sectorSpan, tables []uint64) {
	s.dataStart = max(1, s.header.overHead)
	s.meta = nil
	for _, key := range tables {
		start := key >> 32
		s.meta = appendSpan(s.meta, sectorSpan{start, start + s.header.gtSectors()})
	}
	for _, span := range fixed {
		s.addMeta(span)
	}
	s.meta = slices.DeleteFunc(s.meta, func(m sectorSpan) bool { return m.end <= s.dataStart })
}

// appendSpan adds a span that starts at or after the last one's start.
func appendSpan(spans []sectorSpan, span sectorSpan) []sectorSpan {
	if n := len(spans); n > 0 && span.start <= spans[n-1].end {
		spans[n-1].end = max(spans[n-1].end, span.end)
		return spans
	}
	return append(spans, span)
}

// addMeta notes a span as metadata.
func (s *sparse) addMeta(span sectorSpan) {
	i := sort.Search(len(s.meta), func(i int) bool { return s.meta[i].start > span.start })
	merged := appendSpan(s.meta[:i:i], span)
	for _, next := range s.meta[i:] {
		merged = appendSpan(merged, next)
	}
	s.meta = merged
}

// room returns how many bytes of grains can lie from a sector on, up to the end of the
// file or the next metadata; 0 if none.
func (s *sparse) room(sector uint64) int64 {
	off := int64(sector) * sectorBytes
	if sector < s.dataStart || off >= s.fileEnd {
		return 0
	}
	end := s.fileEnd
	if len(s.meta) > 0 {
		i := sort.Search(len(s.meta), func(i int) bool { return s.meta[i].end > sector })
		if i < len(s.meta) {
			end = min(end, max(off, int64(s.meta[i].start)*sectorBytes))
		}
	}
	return end - off
}

// tableAt returns the sector of grain table ti, 0 if there is none.
func (s *sparse) tableAt(ti int64) (uint32, error) {
	gt := s.gd[ti]
	if gt == badTable {
		return 0, corrupt("grain directory entry %d of %s is bad: its table lies outside the file or overlaps something else", ti, s.f.Name())
	}
	return gt, nil
}

// entries returns the grain table entries from a grain on, at least one, as far as they lie
// together, and how many they are. They are nil if there is no table.
func (s *sparse) entries(grain int64) ([]byte, int64, error) {
	ti, gi := grain>>s.tableShift, grain&(s.grainsPerTable()-1)
	count := s.grainsPerTable() - gi
	if s.stream != nil && s.stream.table == ti {
		return s.stream.entries[gi*gteBytes:], count, nil
	}
	gt, err := s.tableAt(ti)
	if gt == 0 || err != nil {
		return nil, count, err
	}
	p, err := s.tables.View(s.file, int64(gt)*sectorBytes+gi*gteBytes)
	if err != nil {
		return nil, 0, err
	}
	if int64(len(p)) > count*gteBytes {
		p = p[:count*gteBytes]
	}
	return p, int64(len(p)) / gteBytes, nil
}

// lookup is Codec.Lookup within the extent. It is the path of every guest request.
func (s *sparse) lookup(off, n int64) (engine.Run, error) {
	n = min(n, s.guestEnd-off)
	grain := s.grainOf(off)
	p, count, err := s.entries(grain)
	if err != nil {
		return engine.Run{}, err
	}
	first := uint32(gteAbsent)
	if p != nil {
		first = binary.LittleEndian.Uint32(p)
	}
	run, err := s.runAt(grain, first, off, n)
	if err != nil || run.State == engine.Compressed {
		return run, err
	}
	in := (off - s.guestOff) & (s.grainBytes() - 1)
	if s.grainBytes()-in < run.Len {
		grains, err := s.alike(grain, first, p, count, (in+run.Len-1)>>s.grainShift+1)
		if err != nil {
			return engine.Run{}, err
		}
		run.Len = min(run.Len, grains<<s.grainShift-in)
	}
	return run, nil
}

// runAt says what the entry of grain says of the guest bytes at off; its Len is how far a
// run can reach, n or less, if the following entries agree.
func (s *sparse) runAt(grain int64, entry uint32, off, n int64) (engine.Run, error) {
	switch {
	case entry == gteAbsent:
		return engine.Run{State: engine.Absent, Len: n}, nil
	case entry == gteZero && s.hasZeroGrains():
		return engine.Run{State: engine.Zero, Len: n}, nil
	}
	grainOff := s.guestOff + grain<<s.grainShift
	room := s.room(uint64(entry))
	if s.header.compressed() {
		return s.compressedRun(grain, entry, room, off, n)
	}
	// The last grain of a file may be as short as the guest's last bytes.
	if room < min(s.grainBytes(), s.guestEnd-grainOff) {
		return engine.Run{}, s.badEntry(grain, entry)
	}
	return engine.Run{
		State: engine.Data, Len: min(n, room-(off-grainOff)),
		File: s.file, FileOff: int64(entry)*sectorBytes + off - grainOff,
	}, nil
}

func (s *sparse) badEntry(grain int64, entry uint32) error {
	return corrupt("the entry of grain %d (guest offset %#x) in %s is sector %d: outside the file or in its metadata",
		grain, s.guestOff+grain<<s.grainShift, s.f.Name(), entry)
}

// alike returns how many grains from the first on, at most want, continue its run. p are
// the first's entry and the count-1 next ones.
func (s *sparse) alike(grain int64, first uint32, p []byte, count, want int64) (int64, error) {
	step := uint32(0)
	if first != gteAbsent && (first != gteZero || !s.hasZeroGrains()) {
		step = uint32(s.header.grainSize)
	}
	found, expect, asked := int64(0), first, false
	for walked := 0; ; walked++ {
		if p == nil {
			if first != gteAbsent {
				return found, nil
			}
			found += count
		}
		for ; len(p) > 0; p = p[gteBytes:] {
			if binary.LittleEndian.Uint32(p) != expect || found == want {
				return found, nil
			}
			found++
			expect += step
		}
		if !asked && walked >= tablesBeforeHoles && first == gteAbsent && (grain+found)&(s.grainsPerTable()-1) == 0 {
			found += s.holes(grain + found)
			asked = true
		}
		if found >= want || walked == maxTablesPerLookup {
			return min(found, want), nil
		}
		var err error
		if p, count, err = s.entries(grain + found); err != nil {
			return found, nil // whoever asks for those bytes is told
		}
	}
}

// holes returns how many grains from the first of a table on are absent because their
// tables are a hole in the file: 0 if that is not known. Tables lie there in order.
func (s *sparse) holes(grain int64) int64 {
	first := grain >> s.tableShift
	if first >= int64(len(s.gd)) || s.gd[first] == 0 || s.gd[first] == badTable {
		return 0
	}
	start := int64(s.gd[first]) * sectorBytes
	data, _, err := s.f.NextData(start)
	switch {
	case err == io.EOF:
		data = s.fileEnd
	case err != nil:
		return 0
	}
	ti := first
	for at := start; at+s.tableBytes() <= data && ti < int64(len(s.gd)) && int64(s.gd[ti])*sectorBytes == at && !s.isWritten(ti); ti++ {
		at += s.tableBytes()
	}
	return (ti - first) << s.tableShift
}

// isWritten reports whether a table was changed since the image was opened: then what the
// file holds need not be what counts.
func (s *sparse) isWritten(ti int64) bool {
	return ti/64 < int64(len(s.written)) && s.written[ti/64]&(1<<(ti%64)) != 0
}

func (s *sparse) noteWritten(ti int64) {
	if need := len(s.gd)/64 + 1; len(s.written) < need {
		s.written = append(s.written, make([]uint64, need-len(s.written))...)
	}
	s.written[ti/64] |= 1 << (ti % 64)
}

// granule is Codec.Granule within the extent.
func (s *sparse) granule(off int64) (start, end int64) {
	start = s.guestOff + s.grainOf(off)<<s.grainShift
	end = start + s.grainBytes()
	if !s.last {
		end = min(end, s.guestEnd) // what follows is in another extent
	}
	return start, end
}

// allocate is Codec.Allocate within the extent.
func (s *sparse) allocate(off, n int64) (engine.Place, error) {
	_, end := s.granule(s.guestEnd - 1)
	n = min(n, end-off)
	place, err := s.space.Alloc(s.wholeGrains(n), s.grainBytes())
	if err != nil {
		return engine.Place{}, err
	}
	s.fileEnd = max(s.fileEnd, place.Off+place.Len)
	place.Len = min(place.Len, n)
	return place, nil
}

// wholeGrains rounds a length up: the last grain of an extent takes its whole space.
func (s *sparse) wholeGrains(n int64) int64 {
	return (n + s.grainBytes() - 1) >> s.grainShift << s.grainShift
}

// free is Codec.Free within the extent.
func (s *sparse) free(span engine.Span, zeroed bool) {
	s.space.Free(span.Off, s.wholeGrains(span.Len), zeroed)
}
