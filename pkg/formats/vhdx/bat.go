package vhdx

import (
	"encoding/binary"
	"sort"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// The block allocation table ([MS-VHDX] 2.5): an entry for each payload block, and after
// those of each chunk one for the chunk's sector bitmap.
const (
	batEntryBytes    = 8
	sectorsPerBitmap = 1 << 23
	bitmapBytes      = mib // of a chunk's sector bitmap

	stateMask = 7
)

// States of a payload block; of a bitmap, stateNotPresent and stateFull.
const (
	stateNotPresent  = 0 // zeroes, or what the parent holds
	stateUndefined   = 1
	stateZero        = 2
	stateUnmapped    = 3
	stateUnmappedOld = 5 // of version 0.95 of the specification
	stateFull        = 6
	statePartial     = 7 // some sectors: the bitmap says which
	maxBATOffsetMiB  = 1<<43 - 1
	offsetShift      = 20
)

// batEntry is an entry as it is stored.
type batEntry uint64

func (e batEntry) state() int { return int(e & stateMask) }

// off returns the file offset; -1 if it is none.
func (e batEntry) off() int64 {
	if n := uint64(e) >> offsetShift; n <= maxBATOffsetMiB {
		return int64(n) << offsetShift
	}
	return -1
}

// holds reports whether the entry has a place in the file: also one of a block that was
// unmapped may keep it.
func (e batEntry) holds() bool {
	switch e.state() {
	case stateFull, statePartial:
		return true
	case stateUndefined, stateUnmapped, stateUnmappedOld:
		return e.off() != 0
	}
	return false
}

func newEntry(state int, off int64) batEntry { return batEntry(uint64(off)) | batEntry(state) }

func (m *image) batAt() int64 { return int64(m.regions[findRegion(m.regions, batRegion)].off) }

// payloadIndex returns the index of a payload block's entry.
func (m *image) payloadIndex(block int64) int64 { return block + block/m.chunkRatio }

// bitmapIndex returns the index of a chunk's bitmap's entry.
func (m *image) bitmapIndex(chunk int64) int64 { return chunk*(m.chunkRatio+1) + m.chunkRatio }

// blocks returns how many blocks a disk of size bytes has.
func (m *image) blocks(size int64) int64 { return (size + m.meta.blockBytes - 1) >> m.blockShift }

// chunks returns how many chunks a disk of size bytes has.
func (m *image) chunks(size int64) int64 { return (m.blocks(size) + m.chunkRatio - 1) / m.chunkRatio }

// entryCount returns how many entries the table of a disk of size bytes needs.
func (m *image) entryCount(size int64) int64 {
	if m.meta.hasParent {
		return m.chunks(size) * (m.chunkRatio + 1)
	}
	blocks := m.blocks(size)
	return blocks + (blocks-1)/m.chunkRatio
}

func (m *image) entryAt(index int64) int64 { return m.batAt() + index*batEntryBytes }

// entry returns an entry of the table.
func (m *image) entry(index int64) (batEntry, error) {
	p, err := m.tables.View(0, m.entryAt(index))
	if err != nil {
		return 0, err
	}
	return batEntry(binary.LittleEndian.Uint64(p)), nil
}

// payload returns the validated entry of a payload block.
func (m *image) payload(block int64) (batEntry, error) {
	e, err := m.entry(m.payloadIndex(block))
	if err != nil {
		return 0, err
	}
	return e, m.checkPayload(block, e)
}

func (m *image) checkPayload(block int64, e batEntry) error {
	switch e.state() {
	case stateNotPresent, stateZero:
		return nil
	case stateUndefined, stateUnmapped, stateUnmappedOld:
		if !e.holds() {
			return nil
		}
	case stateFull:
	case statePartial:
		if !m.meta.hasParent {
			return corrupt("BAT entry of block %d: partially present, but the image has no parent", block)
		}
	default:
		return corrupt("BAT entry of block %d: state %d, want 0 to 3, 6 or 7", block, e.state())
	}
	// Some writers end the file with the guest's last byte.
	n := min(m.meta.blockBytes, m.meta.sizeBytes-block<<m.blockShift)
	if !m.isFree(e.off(), n) {
		return corrupt("BAT entry of block %d: %d bytes at %#x lie outside the file of %d bytes or in its metadata", block, n, e.off(), m.fileEnd)
	}
	return nil
}

// isFree reports whether a stretch lies inside the file and apart from headers, log and
// regions.
func (m *image) isFree(off, n int64) bool {
	if off < headerSection || off > m.fileEnd-n {
		return false
	}
	if last := m.reserved[len(m.reserved)-1]; off >= last.end {
		return true // as a rule everything reserved comes first
	}
	i := sort.Search(len(m.reserved), func(i int) bool { return m.reserved[i].end > off })
	return i == len(m.reserved) || m.reserved[i].off >= off+n
}

// bitmap returns the file offset of a chunk's sector bitmap, 0 if it has none.
func (m *image) bitmap(chunk int64) (int64, error) {
	e, err := m.entry(m.bitmapIndex(chunk))
	if err != nil {
		return 0, err
	}
	return m.checkBitmap(chunk, e)
}

func (m *image) checkBitmap(chunk int64, e batEntry) (int64, error) {
	switch {
	case e.state() == stateNotPresent:
		return 0, nil
	case e.state() != stateFull:
		return 0, corrupt("BAT entry of sector bitmap %d: state %d, want 0 or 6", chunk, e.state())
	case !m.isFree(e.off(), bitmapBytes):
		return 0, corrupt("BAT entry of sector bitmap %d: %#x lies outside the file of %d bytes or in its metadata", chunk, e.off(), m.fileEnd)
	}
	return e.off(), nil
}

// Lookup says where guest bytes are.
func (m *image) Lookup(off, n int64) (engine.Run, error) {
	block := off >> m.blockShift
	p, err := m.tables.View(0, m.entryAt(m.payloadIndex(block)))
	if err != nil {
		return engine.Run{}, err
	}
	e := batEntry(binary.LittleEndian.Uint64(p))
	if err := m.checkPayload(block, e); err != nil {
		return engine.Run{}, err
	}
	n = min(n, m.meta.sizeBytes-off)
	in := off - block<<m.blockShift
	run := engine.Run{Len: min(n, m.meta.blockBytes-in)}
	switch e.state() {
	case stateFull:
		run.State, run.FileOff, run.Flat = engine.Data, e.off()+in, m.isFixed()
	case statePartial:
		return m.lookupPartial(block, e, in, run)
	case stateNotPresent:
		if m.meta.hasParent {
			// Its granules are sectors: a run ends with the block, so that whole blocks
			// can be found among the granules of a range.
			return run, nil
		}
	default:
		run.State = engine.Zero
	}
	return m.extend(block, run, n, p[batEntryBytes:]), nil
}

// extend lengthens a run to following blocks of the same kind, as far as their entries
// are at hand: p holds those behind the run's block.
func (m *image) extend(block int64, run engine.Run, n int64, p []byte) engine.Run {
	for ; run.Len < n && len(p) > 0; p = p[batEntryBytes:] {
		if block++; block%m.chunkRatio == 0 {
			return run // this one is a bitmap's
		}
		e := batEntry(binary.LittleEndian.Uint64(p))
		if m.checkPayload(block, e) != nil {
			return run
		}
		isSame := false
		switch e.state() {
		case stateFull:
			isSame = run.State == engine.Data && e.off() == run.FileOff+run.Len
		case statePartial:
		case stateNotPresent:
			isSame = run.State == engine.Absent && !m.meta.hasParent
		default:
			isSame = run.State == engine.Zero
		}
		if !isSame {
			return run
		}
		run.Len += min(n-run.Len, m.meta.blockBytes)
	}
	return run
}

// Granule returns the block around off; in a differencing image only the sector, where
// the block is not present or partially so.
func (m *image) Granule(off int64) (start, end int64) {
	block := off >> m.blockShift
	shift := m.blockShift
	if m.meta.hasParent && m.hasSectors(block) {
		shift = m.sectorShift
	}
	start = off >> shift << shift
	return start, start + 1<<shift
}

// hasSectors reports whether a block of a differencing image becomes present sector by
// sector. A block that was given back while the disk is in use is an exception until
// that is durable: see blockClaims. An entry that cannot be read is the next Lookup's to
// report.
func (m *image) hasSectors(block int64) bool {
	e, err := m.payload(block)
	if err != nil {
		return false
	}
	return e.state() == statePartial || e.state() == stateNotPresent && !m.claims.isVacated(block)
}
