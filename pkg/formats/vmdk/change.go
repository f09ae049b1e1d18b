package vmdk

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// change is a prepared change of the entries of consecutive grains to entry, entry+step,
// and so on. Everything that can fail has been done.
type change struct {
	grain, count int64
	entry, step  uint32
	old          []byte        // the present entries
	tables       []tableCopies // of all grain tables that the grains are in
}

// tableCopies are the sectors of a grain table and of its redundant copy, 0 if there is
// none. New ones are in no directory yet.
type tableCopies struct {
	primary, redundant       uint32
	newPrimary, newRedundant bool
}

// prepareSet prepares a Codec.Set for a range within the extent.
func (s *sparse) prepareSet(off, n int64, to engine.State, at engine.Place) error {
	p := &s.plan
	p.grain, p.count = s.grainOf(off), s.grainOf(off+n-1)+1-s.grainOf(off)
	p.entry, p.step = gteAbsent, 0
	switch to {
	case engine.Zero:
		p.entry = gteZero
	case engine.Data:
		p.entry, p.step = uint32(at.Off/sectorBytes), uint32(s.header.grainSize)
	}
	p.old = slices.Grow(p.old[:0], int(p.count*gteBytes))[:p.count*gteBytes]
	p.tables = p.tables[:0]
	old := p.old
	for grain := p.grain; grain < p.grain+p.count; {
		count := s.inTable(grain, p.grain+p.count)
		copies, err := s.prepareTable(grain, count, old[:count*gteBytes])
		if err != nil {
			return err
		}
		p.tables = append(p.tables, copies)
		old = old[count*gteBytes:]
		grain += count
	}
	return nil
}

// inTable returns how many of the grains [grain, end) are in one table with the first.
func (s *sparse) inTable(grain, end int64) int64 {
	return min(end-grain, s.grainsPerTable()-grain&(s.grainsPerTable()-1))
}

// prepareTable prepares writing the entries of count grains in one table, and reads the
// present ones into old.
func (s *sparse) prepareTable(grain, count int64, old []byte) (t tableCopies, err error) {
	ti := grain >> s.tableShift
	if t.primary, err = s.tableAt(ti); err != nil {
		return t, err
	}
	clear(old)
	if t.primary == 0 {
		if s.plan.entry == gteAbsent {
			return t, nil
		}
		return s.prepareNewTable(ti)
	}
	t.redundant = s.redundantAt(ti)
	off := s.entryOff(grain)
	if err := s.tables.Prepare(s.file, int64(t.primary)*sectorBytes+off, int64(len(old))); err != nil {
		return t, err
	}
	if t.redundant != 0 {
		if err := s.tables.Prepare(s.file, int64(t.redundant)*sectorBytes+off, int64(len(old))); err != nil {
			return t, err
		}
	}
	return t, s.tables.Read(s.file, int64(t.primary)*sectorBytes+off, old)
}

// entryOff returns where in its table the entry of a grain is.
func (s *sparse) entryOff(grain int64) int64 {
	return grain & (s.grainsPerTable() - 1) * gteBytes
}

// redundantAt returns the sector of the redundant copy of a table; 0 if there is none, or
// none that may be written: a check then says that it is stale.
func (s *sparse) redundantAt(ti int64) uint32 {
	if s.rgd == nil || s.rgd[ti] == badTable {
		return 0
	}
	return s.rgd[ti]
}

// prepareNewTable prepares a grain table that does not exist yet, and its redundant copy.
// Images usually come with all their tables.
func (s *sparse) prepareNewTable(ti int64) (t tableCopies, err error) {
	t.newPrimary = true
	if t.primary, err = s.prepareTableSpace(s.header.gdOffset, ti); err != nil || s.rgd == nil {
		return t, err
	}
	if t.redundant = s.redundantAt(ti); t.redundant != 0 || s.rgd[ti] == badTable {
		return t, nil // somebody's stale copy: not ours to write
	}
	t.newRedundant = true
	t.redundant, err = s.prepareTableSpace(s.header.rgdOffset, ti)
	return t, err
}

// prepareTableSpace reserves space for table ti and prepares writing it and its entry in
// a directory.
func (s *sparse) prepareTableSpace(dirSector uint64, ti int64) (uint32, error) {
	off, err := s.tableSpace()
	if err != nil {
		return 0, fmt.Errorf("add grain table %d: %w", ti, err)
	}
	if err := s.tables.Prepare(s.file, off, s.tableBytes()); err != nil {
		return 0, err
	}
	return uint32(off / sectorBytes), s.tables.Prepare(s.file, int64(dirSector)*sectorBytes+ti*gteBytes, gteBytes)
}

// tableSpace reserves space for one grain table. It is taken from the file by whole
// grains, so that grains stay aligned.
func (s *sparse) tableSpace() (int64, error) {
	if s.spare.Len < s.tableBytes() {
		n := s.wholeGrains(2 * s.tableBytes())
		place, err := s.space.Alloc(n, n)
		if err != nil {
			return 0, err
		}
		s.spare = place.Span
		s.fileEnd = max(s.fileEnd, place.Off+place.Len)
		s.addMeta(sectorSpan{uint64(place.Off / sectorBytes), uint64((place.Off + place.Len) / sectorBytes)})
	}
	off := s.spare.Off
	s.spare.Off += s.tableBytes()
	s.spare.Len -= s.tableBytes()
	return off, nil
}

// applySet makes the prepared change and returns the space that nothing refers to any more.
func (s *sparse) applySet() (unused []engine.Span, err error) {
	p := &s.plan
	grain, end, entries := p.grain, p.grain+p.count, p.old
	for _, t := range p.tables {
		count := s.inTable(grain, end)
		mine := entries[:count*gteBytes]
		changed := false
		for i := range count {
			was, is := binary.LittleEndian.Uint32(mine[i*gteBytes:]), p.entry
			unused = s.appendUnused(unused, was, is)
			changed = changed || was != is
			binary.LittleEndian.PutUint32(mine[i*gteBytes:], is)
			p.entry += p.step
		}
		if changed {
			if err := s.applyTable(grain, t, mine); err != nil {
				return nil, err
			}
		}
		entries = entries[count*gteBytes:]
		grain += count
	}
	return unused, nil
}

// applyTable writes entries into a table and its redundant copy, in whatever order: each
// is good without the other, because what both refer to is durable before either is
// written. New tables are written as a whole, and named in the directories.
func (s *sparse) applyTable(grain int64, t tableCopies, entries []byte) error {
	ti := grain >> s.tableShift
	s.noteWritten(ti)
	if t.redundant != 0 {
		if err := s.applyCopy(grain, t.redundant, t.newRedundant, s.header.rgdOffset, entries); err != nil {
			return err
		}
		s.rgd[ti] = t.redundant
	}
	if err := s.applyCopy(grain, t.primary, t.newPrimary, s.header.gdOffset, entries); err != nil {
		return err
	}
	s.gd[ti] = t.primary
	return nil
}

func (s *sparse) applyCopy(grain int64, table uint32, isNew bool, dirSector uint64, entries []byte) error {
	off, at := int64(table)*sectorBytes, s.entryOff(grain)
	if !isNew {
		return s.tables.Write(stageTables, s.file, off+at, entries)
	}
	whole := make([]byte, s.tableBytes())
	copy(whole[at:], entries)
	if err := s.tables.Write(stageTables, s.file, off, whole); err != nil {
		return err
	}
	entry := binary.LittleEndian.AppendUint32(nil, table)
	return s.tables.Write(stageDirectories, s.file, int64(dirSector)*sectorBytes+grain>>s.tableShift*gteBytes, entry)
}

// appendUnused adds the grain that an entry referred to, if it does not any more. What a
// bad entry refers to is left alone.
func (s *sparse) appendUnused(unused []engine.Span, was, is uint32) []engine.Span {
	if was == gteAbsent || was == is || was == gteZero && s.hasZeroGrains() {
		return unused
	}
	if s.room(uint64(was)) < s.grainBytes() {
		return unused
	}
	span := engine.Span{File: s.file, Off: int64(was) * sectorBytes, Len: s.grainBytes()}
	if n := len(unused); n > 0 && unused[n-1].Off+unused[n-1].Len == span.Off {
		unused[n-1].Len += span.Len
		return unused
	}
	return append(unused, span)
}
