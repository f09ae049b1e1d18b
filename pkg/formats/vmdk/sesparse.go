package vmdk

import (
	"encoding/binary"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// The layout of seSparse extents (ESXi 5.5 and later) is not published. What is known, from
// other readers, from what their authors have said, and from an extent that ESXi has
// written: two headers; a directory of 64-bit entries, each of which names a table by its
// number; tables of 4096 entries, each of which names a grain of 4 KiB by its number; a
// bitmap of the grains in use; a map from grains back to the entries that name them; and a
// journal of sectors that these are to become. The decision record of 2026-11-21 says what is
// known by what.
const (
	seGrainBytes       = 4096
	seGrainSectors     = seGrainBytes / sectorBytes
	seTableSectors     = 64
	seTableBytes       = seTableSectors * sectorBytes
	seTableEntries     = seTableBytes / seEntryBytes
	seEntryBytes       = 8
	seEntriesPerSector = sectorBytes / seEntryBytes
	seVersion          = 0x0000000200000001
	seHeaderBytes      = sectorBytes
	seMaxDirectory     = 1 << 22 // entries: 64 TiB
	seTableMask        = 0xffffffff00000000
	seTableAllocated   = 0x1000000000000000
	seEntryKind        = 0xf000000000000000
	seEntryUnmapped    = 0x1000000000000000 // by the guest: it reads as zeroes
	seEntryZero        = 0x2000000000000000
	seEntryAllocated   = 0x3000000000000000
	seMaxGrainsPerRun  = 1 << 15
	seConstFields      = 26
	seConstFieldsBytes = seConstFields * 8
)

// Where the fields of the volatile header are.
const (
	seVolatileMagic  = 0xcafecafe
	seVolatileFreeGT = 8  // the number of the first grain table that was never used
	seVolatileNext   = 16 // the sequence number of the next transaction
	seVolatileReplay = 24 // not 0: the journal has to be replayed
)

// seRegion is a stretch of an extent's file in sectors.
type seRegion struct{ at, sectors uint64 }

func (r seRegion) end() uint64  { return r.at + r.sectors }
func (r seRegion) bytes() int64 { return int64(r.at) * sectorBytes }

// holds reports whether a sector lies in the region.
func (r seRegion) holds(sector uint64) bool { return sector >= r.at && sector-r.at < r.sectors }

// seHeader is the constant header of an seSparse extent: where everything is.
type seHeader struct {
	capacity               uint64 // sectors
	volatile               seRegion
	journalHeader, journal seRegion
	directory, tables      seRegion
	bitmap, backMap        seRegion
	grains                 seRegion
}

// decodeSE reads and judges the constant header. It is as strict as what is known: an
// unknown value may mean anything.
func decodeSE(p []byte) (h seHeader, err error) {
	var v [seConstFields]uint64
	for i := range v {
		v[i] = binary.LittleEndian.Uint64(p[8*i:])
	}
	switch {
	case v[0] != seSparseMagic:
		return h, corrupt("it does not start with the header of an seSparse extent")
	case v[1] != seVersion:
		return h, unsupported("seSparse version %#x, want %#x", v[1], uint64(seVersion))
	case v[3] != seGrainSectors:
		return h, unsupported("seSparse grains of %d sectors, want %d", v[3], seGrainSectors)
	case v[4] != seTableSectors:
		return h, unsupported("seSparse grain tables of %d sectors, want %d", v[4], seTableSectors)
	case v[5] != 0 || v[6] != 0 || v[7] != 0 || v[8] != 0 || v[9] != 0:
		return h, unsupported("seSparse flags %#x and reserved fields %#x, want 0: what they mean is not known", v[5], v[6:10])
	case v[2] == 0:
		return h, corrupt("the seSparse capacity is 0 sectors, want at least 1")
	}
	for _, b := range p[seConstFieldsBytes:seHeaderBytes] {
		if b != 0 {
			return h, unsupported("the seSparse header says more than is known: want zeroes from byte %d on", seConstFieldsBytes)
		}
	}
	region := func(i int) seRegion { return seRegion{v[i], v[i+1]} }
	return seHeader{
		capacity: v[2], volatile: region(10), journalHeader: region(12), journal: region(14),
		directory: region(16), tables: region(18), bitmap: region(20), backMap: region(22), grains: region(24),
	}, nil
}

// directoryEntries returns how many entries of the directory count.
func (h *seHeader) directoryEntries() int64 {
	return int64((h.capacity-1)/(seTableEntries*seGrainSectors) + 1)
}

// validate checks what reading needs. fileSectors is the file's length.
func (h *seHeader) validate(fileSectors uint64) error {
	need := (h.capacity-1)/(seTableEntries*seGrainSectors) + 1
	switch {
	case need > seMaxDirectory:
		return corrupt("the seSparse capacity of %d sectors needs %d grain tables, want at most %d", h.capacity, need, seMaxDirectory)
	case h.directory.sectors > seMaxDirectory || h.directory.sectors*seEntriesPerSector < need:
		return corrupt("the seSparse grain directory has %d sectors, but %d grain tables need an entry each", h.directory.sectors, need)
	case !h.directory.within(fileSectors):
		return corrupt("the seSparse grain directory, %d sectors at sector %d, lies outside the file of %d sectors",
			h.directory.sectors, h.directory.at, fileSectors)
	case h.tables.at > fileSectors || h.grains.at > 1<<53 || h.tables.sectors > 1<<53 || h.grains.sectors > 1<<53:
		return corrupt("the seSparse tables start at sector %d and the grains at sector %d of a file of %d", h.tables.at, h.grains.at, fileSectors)
	case !(seRegion{h.volatile.at, 1}).within(fileSectors):
		return corrupt("the seSparse volatile header at sector %d lies outside the file of %d sectors", h.volatile.at, fileSectors)
	}
	return nil
}

// within reports whether the region lies past the first sector and inside a file.
func (r seRegion) within(fileSectors uint64) bool {
	return r.at >= 1 && r.sectors >= 1 && r.at <= fileSectors && r.sectors <= fileSectors-r.at
}

// validateAll checks what replaying and writing need beside: all of the metadata inside the
// file, nothing in two regions, and the grains behind the rest as far as the file goes.
func (h *seHeader) validateAll(fileSectors uint64) error {
	named := []struct {
		name string
		seRegion
	}{
		{"volatile header", h.volatile}, {"journal header", h.journalHeader}, {"journal", h.journal},
		{"grain directory", h.directory}, {"grain tables", h.tables}, {"free bitmap", h.bitmap}, {"back map", h.backMap},
	}
	for i, r := range named {
		if !r.within(fileSectors) {
			return corrupt("the seSparse %s, %d sectors at sector %d, lies outside the file of %d sectors", r.name, r.sectors, r.at, fileSectors)
		}
		for _, other := range named[:i] {
			if r.at < other.end() && other.at < r.end() {
				return corrupt("the seSparse %s and %s overlap, at sectors %d and %d", other.name, r.name, other.at, r.at)
			}
		}
		if h.grains.at < r.end() && r.at < h.grains.end() {
			return corrupt("the seSparse %s and the grains overlap, at sectors %d and %d", r.name, r.at, h.grains.at)
		}
	}
	switch {
	case h.grains.at > fileSectors:
		return corrupt("the seSparse grains start at sector %d of a file of %d", h.grains.at, fileSectors)
	case h.journal.sectors > seMaxJournalSectors:
		return unsupported("the seSparse journal has %d sectors, want at most %d", h.journal.sectors, seMaxJournalSectors)
	}
	return nil
}

// seSparse is an extent of ESXi's space-efficient sparse kind.
type seSparse struct {
	tables *engine.Tables
	f      vfs.File
	file   int
	header seHeader

	guestOff, guestEnd int64
	fileEnd            int64

	dirty      *seReplayedFile // f, if it was not closed; nil if it was
	unwritable error           // why it is not written, nil if it can be
	space      *seSpace        // nil until the first change
	plan       seChange        // scratch of prepareSet
}

// addSESparse opens an seSparse extent.
func (o *opener) addSESparse(f vfs.File, size int64, line *extentLine) error {
	head := make([]byte, seHeaderBytes)
	if err := readFull(f, head, 0); err != nil {
		return err
	}
	h, err := decodeSE(head)
	if err == nil {
		err = h.validate(uint64(size) / sectorBytes)
	}
	if err != nil {
		return fmt.Errorf("header of %s: %w", f.Name(), err)
	}
	if sectors := uint64(line.sectors); sectors > h.capacity {
		return corrupt("the descriptor gives it %d sectors, its header %d", sectors, h.capacity)
	}
	start := o.guestEnd()
	s := &seSparse{
		f: f, file: len(o.files) - 1, header: h, unwritable: h.validateAll(uint64(size) / sectorBytes),
		guestOff: start, guestEnd: start + line.sectors*sectorBytes, fileEnd: size,
	}
	if err := s.openJournal(); err != nil {
		return err
	}
	if s.dirty != nil {
		o.files[s.file] = s.dirty
	}
	if s.unwritable != nil {
		o.image.readOnly = s.unwritable.Error()
	}
	o.image.extents = append(o.image.extents, extent{guestOff: start, guestEnd: s.guestEnd, file: s.file, se: s})
	return nil
}

// lookup is Codec.Lookup within the extent.
func (s *seSparse) lookup(off, n int64) (engine.Run, error) {
	grain := (off - s.guestOff) / seGrainBytes
	first, err := s.runAt(grain, off, n)
	if err != nil {
		return first, err
	}
	run := first
	run.Len = min(n, seGrainBytes-(off-s.guestOff)%seGrainBytes)
	for walked := 0; run.Len < n && walked < seMaxGrainsPerRun; walked++ {
		grain++
		next, err := s.runAt(grain, off+run.Len, n-run.Len)
		if err != nil || next.State != run.State || run.State == engine.Data && next.FileOff != run.FileOff+run.Len {
			break // whoever asks for those bytes is told
		}
		// A grain table that is missing is one long run.
		length := next.Len
		if next.State != engine.Absent {
			length = min(length, seGrainBytes)
		}
		run.Len = min(n, run.Len+length)
		grain = (off + run.Len - 1 - s.guestOff) / seGrainBytes
	}
	return run, nil
}

// runAt says what the entry of a grain says about the guest bytes at off; its Len is how
// far the run can reach at most: to the end of the table if there is none.
func (s *seSparse) runAt(grain, off, n int64) (engine.Run, error) {
	table, in := grain/seTableEntries, grain%seTableEntries
	tableOff, err := s.tableAt(table)
	if err != nil {
		return engine.Run{}, err
	}
	if tableOff == 0 {
		end := s.guestOff + (table+1)*seTableEntries*seGrainBytes
		return engine.Run{State: engine.Absent, Len: min(n, end-off)}, nil
	}
	p, err := s.tables.View(s.file, tableOff+in*seEntryBytes)
	if err != nil {
		return engine.Run{}, err
	}
	end := s.guestOff + (grain+1)*seGrainBytes
	run := engine.Run{Len: min(n, end-off)}
	switch entry := binary.LittleEndian.Uint64(p); entry & seEntryKind {
	case 0:
		if entry != 0 {
			return engine.Run{}, s.badEntry(grain, entry)
		}
		run.State = engine.Absent
	case seEntryUnmapped, seEntryZero:
		run.State = engine.Zero
	case seEntryAllocated:
		place, ok := s.grainAt(seGrainNumber(entry))
		if !ok {
			return engine.Run{}, s.badEntry(grain, entry)
		}
		run.State, run.File = engine.Data, s.file
		run.FileOff = place + (off-s.guestOff)%seGrainBytes
	default:
		return engine.Run{}, s.badEntry(grain, entry)
	}
	return run, nil
}

// seGrainNumber returns the number of the grain that an entry names: its low 12 bits come
// before the others.
func seGrainNumber(entry uint64) uint64 {
	return entry&0x0fff000000000000>>48 | entry&0x0000ffffffffffff<<12
}

// seGrainEntry returns what in an entry names a grain: the opposite of seGrainNumber.
func seGrainEntry(number uint64) uint64 { return number<<48&0x0fff000000000000 | number>>12 }

// grainAt returns where a grain is in the file.
func (s *seSparse) grainAt(number uint64) (int64, bool) {
	end := min(uint64(s.fileEnd)/sectorBytes, s.header.grains.end())
	sector := s.header.grains.at + number*seGrainSectors
	ok := number <= end && sector <= end && end-sector >= seGrainSectors
	return int64(sector) * sectorBytes, ok
}

func (s *seSparse) badEntry(grain int64, entry uint64) error {
	return corrupt("the entry of grain %d (guest offset %#x) in %s is %#x: outside the grains, or of an unknown kind",
		grain, s.guestOff+grain*seGrainBytes, s.f.Name(), entry)
}

// tableAt returns where a grain table is in the file, 0 if there is none.
func (s *seSparse) tableAt(table int64) (int64, error) {
	p, err := s.tables.View(s.file, s.header.directory.bytes()+table*seEntryBytes)
	if err != nil {
		return 0, err
	}
	entry := binary.LittleEndian.Uint64(p)
	if entry == 0 {
		return 0, nil
	}
	number, ok := s.tableNumber(entry)
	if !ok {
		return 0, s.badTable(table, entry)
	}
	return s.tableOff(number), nil
}

// tableNumber returns which table a directory entry names.
func (s *seSparse) tableNumber(entry uint64) (number uint64, ok bool) {
	number = entry &^ seTableMask
	end := min(uint64(s.fileEnd)/sectorBytes, s.header.tables.end())
	return number, entry&seTableMask == seTableAllocated && s.header.tables.at+(number+1)*seTableSectors <= end
}

func (s *seSparse) tableOff(number uint64) int64 {
	return s.header.tables.bytes() + int64(number)*seTableBytes
}

func (s *seSparse) badTable(table int64, entry uint64) error {
	return corrupt("grain directory entry %d of %s is %#x: its table lies outside the tables, or it is of an unknown kind",
		table, s.f.Name(), entry)
}

// granule returns the grain around a guest offset.
func (s *seSparse) granule(off int64) (start, end int64) {
	start = off - (off-s.guestOff)%seGrainBytes
	return start, min(start+seGrainBytes, s.guestEnd)
}
