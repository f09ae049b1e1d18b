package vmdk

import (
	"encoding/binary"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// The layout of seSparse extents (ESXi 5.5 and later) is not published. What is known, by
// other readers and from images: two headers; a directory of 64-bit entries, each of which
// names a table by its number; tables of 4096 entries, each of which names a grain of 4 KiB
// by its number. Beside them are a journal, a bitmap of grains in use, and a map from
// grains back to entries.
const (
	seGrainBytes       = 4096
	seTableSectors     = 64
	seTableEntries     = seTableSectors * sectorBytes / seEntryBytes
	seEntryBytes       = 8
	seVersion          = 0x0000000200000001
	seVolatileMagic    = 0xcafecafe
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

// seHeader is the constant header of an seSparse extent. Offsets and sizes are in sectors.
type seHeader struct {
	capacity                   uint64
	volatileOffset             uint64
	directoryOffset, directory uint64
	tablesOffset, tables       uint64
	grainsOffset, grains       uint64
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
	case v[3] != seGrainBytes/sectorBytes:
		return h, unsupported("seSparse grains of %d sectors, want %d", v[3], seGrainBytes/sectorBytes)
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
	return seHeader{
		capacity: v[2], volatileOffset: v[10],
		directoryOffset: v[16], directory: v[17], tablesOffset: v[18], tables: v[19],
		grainsOffset: v[24], grains: v[25],
	}, nil
}

// validate checks the places of everything. fileSectors is the file's length.
func (h *seHeader) validate(fileSectors uint64) error {
	need := (h.capacity-1)/(seTableEntries*seGrainBytes/sectorBytes) + 1
	switch {
	case need > seMaxDirectory:
		return corrupt("the seSparse capacity of %d sectors needs %d grain tables, want at most %d", h.capacity, need, seMaxDirectory)
	case h.directory > seMaxDirectory || h.directory*sectorBytes/seEntryBytes < need:
		return corrupt("the seSparse grain directory has %d sectors, but %d grain tables need an entry each", h.directory, need)
	case !within(h.directoryOffset, h.directory, fileSectors):
		return corrupt("the seSparse grain directory, %d sectors at sector %d, lies outside the file of %d sectors", h.directory, h.directoryOffset, fileSectors)
	case h.tablesOffset > fileSectors || h.grainsOffset > 1<<53 || h.tables > 1<<53 || h.grains > 1<<53:
		return corrupt("the seSparse tables start at sector %d and the grains at sector %d of a file of %d", h.tablesOffset, h.grainsOffset, fileSectors)
	case !within(h.volatileOffset, 1, fileSectors):
		return corrupt("the seSparse volatile header at sector %d lies outside the file of %d sectors", h.volatileOffset, fileSectors)
	}
	return nil
}

// within reports whether n sectors at a sector lie past the first one and inside a file.
func within(at, n, fileSectors uint64) bool {
	return at >= 1 && n >= 1 && at <= fileSectors && n <= fileSectors-at
}

// seSparse is an extent of ESXi's space-efficient sparse kind. It is not written: what its
// journal must hold is not known.
type seSparse struct {
	tables *engine.Tables
	f      vfs.File
	file   int
	header seHeader

	guestOff, guestEnd int64
	fileEnd            int64
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
	if err := checkVolatile(f, &h); err != nil {
		return err
	}
	if sectors := uint64(line.sectors); sectors > h.capacity {
		return corrupt("the descriptor gives it %d sectors, its header %d", sectors, h.capacity)
	}
	start := o.guestEnd()
	s := &seSparse{
		f: f, file: len(o.files) - 1, header: h,
		guestOff: start, guestEnd: start + line.sectors*sectorBytes, fileEnd: size,
	}
	o.image.readOnly = "what writing to an seSparse extent has to keep up is not public"
	o.image.extents = append(o.image.extents, extent{guestOff: start, guestEnd: s.guestEnd, file: s.file, se: s})
	return nil
}

// checkVolatile refuses an extent that was not closed: its tables are not what they should
// be until its journal is replayed, and how is not known.
func checkVolatile(f vfs.File, h *seHeader) error {
	p := make([]byte, sectorBytes)
	if err := readFull(f, p, int64(h.volatileOffset)*sectorBytes); err != nil {
		return fmt.Errorf("read the volatile header: %w", err)
	}
	le := binary.LittleEndian
	switch {
	case le.Uint64(p) != seVolatileMagic:
		return corrupt("%s: the seSparse volatile header starts with %#x, want %#x", f.Name(), le.Uint64(p), uint64(seVolatileMagic))
	case le.Uint64(p[24:]) != 0:
		return unsupported("%s was not closed, and its journal has to be replayed, in a format that is not public: "+
			"start and stop its machine on ESXi, or clone it there (vmkfstools -i)", f.Name())
	}
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

// grainAt returns where a grain is in the file.
func (s *seSparse) grainAt(number uint64) (int64, bool) {
	end := min(uint64(s.fileEnd)/sectorBytes, s.header.grainsOffset+s.header.grains)
	sector := s.header.grainsOffset + number*seGrainBytes/sectorBytes
	ok := number <= end && sector <= end && end-sector >= seGrainBytes/sectorBytes
	return int64(sector) * sectorBytes, ok
}

func (s *seSparse) badEntry(grain int64, entry uint64) error {
	return corrupt("the entry of grain %d (guest offset %#x) in %s is %#x: outside the grains, or of an unknown kind",
		grain, s.guestOff+grain*seGrainBytes, s.f.Name(), entry)
}

// tableAt returns where a grain table is in the file, 0 if there is none.
func (s *seSparse) tableAt(table int64) (int64, error) {
	p, err := s.tables.View(s.file, int64(s.header.directoryOffset)*sectorBytes+table*seEntryBytes)
	if err != nil {
		return 0, err
	}
	entry := binary.LittleEndian.Uint64(p)
	if entry == 0 {
		return 0, nil
	}
	number := entry &^ seTableMask
	at := s.header.tablesOffset + number*seTableSectors
	end := min(uint64(s.fileEnd)/sectorBytes, s.header.tablesOffset+s.header.tables)
	if entry&seTableMask != seTableAllocated || at+seTableSectors > end {
		return 0, corrupt("grain directory entry %d of %s is %#x: its table lies outside the tables, or it is of an unknown kind",
			table, s.f.Name(), entry)
	}
	return int64(at) * sectorBytes, nil
}

// granule returns the grain around a guest offset.
func (s *seSparse) granule(off int64) (start, end int64) {
	start = off - (off-s.guestOff)%seGrainBytes
	return start, min(start+seGrainBytes, s.guestEnd)
}

// check examines all tables: entries must be of known kinds, inside the file, and no two
// may refer to one grain.
func (s *seSparse) check(result *engine.CheckResult, canceled func() error) error {
	grains := (s.guestEnd - s.guestOff + seGrainBytes - 1) / seGrainBytes
	result.TotalClusters += grains
	used := map[uint64][]uint64{} // bits of grains, by number/64/512
	previous := int64(-1)
	for grain := int64(0); grain < grains; grain++ {
		if grain%seTableEntries == 0 {
			if err := canceled(); err != nil {
				return err
			}
		}
		off := s.guestOff + grain*seGrainBytes
		run, err := s.runAt(grain, off, s.guestEnd-off)
		if err != nil {
			problem := engine.Problem{Corrupt: true, Text: err.Error()}
			report(result, problem)
			if tableOff, err := s.tableAt(grain / seTableEntries); err != nil || tableOff == 0 {
				grain += seTableEntries - 1 - grain%seTableEntries
			}
			continue
		}
		if run.State == engine.Absent && run.Len > seGrainBytes {
			grain += seTableEntries - 1 - grain%seTableEntries
			continue
		}
		if run.State != engine.Data {
			continue
		}
		number := uint64(run.FileOff/sectorBytes-int64(s.header.grainsOffset)) / (seGrainBytes / sectorBytes)
		page := used[number>>15]
		if page == nil {
			page = make([]uint64, 512)
			used[number>>15] = page
		}
		if bit := uint64(1) << (number & 63); page[number>>6&511]&bit != 0 {
			report(result, engine.Problem{Corrupt: true, Text: fmt.Sprintf("grain %d of %s: grain number %d is another's, too", grain, s.f.Name(), number)})
		} else {
			page[number>>6&511] |= bit
		}
		result.AllocatedCount++
		if previous >= 0 && run.FileOff != previous+seGrainBytes {
			result.Fragmented++
		}
		previous = run.FileOff
		result.ImageEndOffset = max(result.ImageEndOffset, run.FileOff+seGrainBytes)
	}
	return nil
}
