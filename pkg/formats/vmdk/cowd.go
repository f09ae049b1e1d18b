package vmdk

import (
	"bytes"
	"encoding/binary"
	"io"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

const (
	cowdHeaderSectors = 4
	cowdVersion       = 1
	cowdFlags         = 3 // what ESX writes
	cowdGTEsPerGT     = 4096

	minCOWDGrainSectors = 1

	// cowdFreeSectorAt is where freeSector is in the file.
	cowdFreeSectorAt = 28
)

// isCOWD reports whether a file's beginning is that of a COWD extent.
func isCOWD(p []byte) bool { return bytes.HasPrefix(p, []byte(cowdMagic)) }

// decodeCOWD reads COWDisk_Header ("Virtual Disk Format 1.1", section "ESX Server Sparse
// Extents"), of which all that matters lies in the first sector, as the header of a hosted
// extent that has no copies of its tables, and 4096 entries in each.
func decodeCOWD(p []byte) (sparseHeader, error) {
	le := binary.LittleEndian
	if v := le.Uint32(p[4:]); v != cowdVersion {
		return sparseHeader{}, unsupported("COWD header version %d, want %d", v, cowdVersion)
	}
	h := sparseHeader{
		cowd: true, version: cowdVersion,
		capacity:     uint64(le.Uint32(p[12:])),
		grainSize:    uint64(le.Uint32(p[16:])),
		gdOffset:     uint64(le.Uint32(p[20:])),
		numGTEsPerGT: cowdGTEsPerGT,
		overHead:     cowdHeaderSectors,
		freeSector:   le.Uint32(p[cowdFreeSectorAt:]),
	}
	h.cowdEntries = uint64(le.Uint32(p[24:]))
	return h, nil
}

// encodeCOWD puts the header into its first sector, whose other bytes it leaves.
func (h *sparseHeader) encodeCOWD(p []byte) {
	le := binary.LittleEndian
	copy(p, cowdMagic)
	le.PutUint32(p[4:], cowdVersion)
	le.PutUint32(p[12:], uint32(h.capacity))
	le.PutUint32(p[16:], uint32(h.grainSize))
	le.PutUint32(p[20:], uint32(h.gdOffset))
	le.PutUint32(p[24:], uint32(h.grainTables()))
	le.PutUint32(p[cowdFreeSectorAt:], h.freeSector)
}

// validateCOWD checks what hosted extents do not have.
func (h *sparseHeader) validateCOWD() error {
	switch {
	case !powerOfTwoWithin(h.grainSize, minCOWDGrainSectors, maxGrainSectors):
		return corrupt("granularity is %d sectors, want a power of two from %d to %d", h.grainSize, minCOWDGrainSectors, maxGrainSectors)
	case h.capacity == 0:
		return corrupt("numSectors is 0, want at least 1")
	case h.cowdEntries < h.grainTables():
		return corrupt("numGDEntries is %d, but %d sectors need %d grain tables", h.cowdEntries, h.capacity, h.grainTables())
	case h.gdOffset < cowdHeaderSectors:
		return corrupt("gdOffset is %d: the grain directory overlaps the header, want %d or more", h.gdOffset, cowdHeaderSectors)
	}
	return nil
}

// writeFreeSector writes where the next grain goes, in place.
func (h *sparseHeader) writeFreeSector(w io.WriterAt) error {
	_, err := w.WriteAt(binary.LittleEndian.AppendUint32(nil, h.freeSector), cowdFreeSectorAt)
	return err
}

// freeSectorStep is how far ahead of its use freeSector is raised: it has to be durable
// before a table refers to what lies below it, and each time costs a sync.
const freeSectorStep = 4 << 20 / sectorBytes

// freeSectorNow returns the sector from which on nothing in the file is in use.
func (s *sparse) freeSectorNow() uint32 {
	end := s.fileEnd
	if s.space != nil {
		end = max(end, s.space.End())
	}
	return uint32(min((end+sectorBytes-1)/sectorBytes, maxFileSectors-1))
}

// raiseFreeSectors makes sure that other writers do not take what tables are about to
// refer to for free.
func (m *image) raiseFreeSectors(c *engine.Commit) error {
	raised := false
	for i := range m.extents {
		s := m.extents[i].sparse
		if s == nil || !s.header.cowd || s.freeSectorNow() <= s.header.freeSector {
			continue
		}
		ahead := uint32(min(int64(s.freeSectorNow())+freeSectorStep, maxFileSectors-1))
		if err := s.writeFreeSector(c, ahead); err != nil {
			return err
		}
		raised = true
	}
	if !raised {
		return nil
	}
	return c.Sync()
}

// settleFreeSector takes back what freeSector is ahead.
func (s *sparse) settleFreeSector(c *engine.Commit) error {
	if !s.header.cowd || s.freeSectorNow() == s.header.freeSector {
		return nil
	}
	return s.writeFreeSector(c, s.freeSectorNow())
}

func (s *sparse) writeFreeSector(c *engine.Commit, sector uint32) error {
	if err := c.WriteAt(s.file, binary.LittleEndian.AppendUint32(nil, sector), cowdFreeSectorAt); err != nil {
		return err
	}
	s.header.freeSector = sector
	return nil
}
