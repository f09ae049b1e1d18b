package vhd

import (
	"encoding/binary"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Stages of a commit: an entry must not name a block whose bitmap is not there yet.
const (
	stageBitmaps engine.Stage = 0
	stageTable   engine.Stage = 1
)

// maxViews bounds how many pages of the block allocation table one Lookup walks: the
// mapping lock is held meanwhile.
const maxViews = 16

// image is an open VHD. It is the engine's Codec; where the engine says in its errors which
// image it asked about what, they are passed on as they are.
type image struct {
	layer *engine.Layer
	f     vfs.File

	footer    footer
	lost      lostFooter
	uncertain error // why nobody knows what the file says: see replaceSector
	sizeBytes int64
	fileBytes int64 // the file's length; but for fixed images, the footer is at its end
	footerOff int64 // of fixed images only

	// All but fixed images only.
	header      header
	blockShift  uint
	bitmapBytes int64
	meta        []span // what in the file is neither block nor the last footer
	room        room   // what is known of the file since Begin
}

// span is a stretch of the file.
type span struct{ start, end int64 }

var _ engine.Codec = (*image)(nil)

func (m *image) fixed() bool        { return m.footer.kind() == kindFixed }
func (m *image) differencing() bool { return m.footer.kind() == kindDifferencing }
func (m *image) blockBytes() int64  { return 1 << m.blockShift }

// slotBytes is what a block takes in the file: its bitmap, then its data.
func (m *image) slotBytes() int64 { return m.bitmapBytes + m.blockBytes() }

// entryOff returns where the table entry of a block is in the file.
func (m *image) entryOff(block int64) int64 { return m.header.tableOffset() + block*entryBytes }

// Geometry describes the image.
func (m *image) Geometry() engine.Geometry {
	g := engine.Geometry{SizeBytes: m.sizeBytes, LogicalBlockBytes: sectorBytes}
	if !m.fixed() {
		g.ClusterBytes = m.blockBytes()
	}
	return g
}

// Lookup says where guest bytes are.
func (m *image) Lookup(off, n int64) (engine.Run, error) {
	if m.fixed() {
		return engine.Run{State: engine.Data, Flat: true, Len: n, FileOff: off}, nil
	}
	block, in := off>>m.blockShift, off&(m.blockBytes()-1)
	p, err := m.layer.Tables.View(0, m.entryOff(block))
	if err != nil {
		return engine.Run{}, err
	}
	entry := binary.BigEndian.Uint32(p)
	if entry == entryUnused {
		count := m.unusedRun(block, p, (in+n-1)>>m.blockShift+1)
		return engine.Run{State: engine.Absent, Len: min(n, count<<m.blockShift-in)}, nil
	}
	slot, err := m.slotAt(block, entry)
	if err != nil {
		return engine.Run{}, err
	}
	return m.lookupIn(slot, in, min(n, m.blockBytes()-in))
}

// unusedRun returns how many blocks from the first on, at most want, have no space. p are
// the first's entry and those after it that come with it.
func (m *image) unusedRun(block int64, p []byte, want int64) int64 {
	want = min(want, m.header.entries()-block)
	found := int64(0)
	for range maxViews {
		for ; len(p) >= entryBytes; p = p[entryBytes:] {
			if found == want || binary.BigEndian.Uint32(p) != entryUnused {
				return found
			}
			found++
		}
		if found == want {
			break
		}
		var err error
		if p, err = m.layer.Tables.View(0, m.entryOff(block+found)); err != nil {
			break
		}
	}
	return found
}

// slotAt returns where the bitmap and data of a block are, as its entry says.
func (m *image) slotAt(block int64, entry uint32) (int64, error) {
	slot := int64(entry) * sectorBytes
	if slot >= m.fileBytes {
		return 0, corrupt("entry %d of the block allocation table is sector %d, which lies outside %s", block, entry, m.f.Name())
	}
	for _, s := range m.meta {
		if slot < s.end && s.start < slot+m.slotBytes() {
			return 0, corrupt("entry %d of the block allocation table is sector %d, which lies in the metadata of %s", block, entry, m.f.Name())
		}
	}
	return slot, nil
}

// lookupIn looks into the bitmap of a block that has space. In a differencing image, what
// is not present is the parent's; in others it is zeroes, whatever is in the data.
func (m *image) lookupIn(slot, in, n int64) (engine.Run, error) {
	present, count, err := m.bitRun(slot, in/sectorBytes, (in+n-1)/sectorBytes+1)
	if err != nil {
		return engine.Run{}, err
	}
	run := engine.Run{State: engine.Absent, Len: min(n, count*sectorBytes-in%sectorBytes)}
	if !present {
		return run, nil
	}
	run.State, run.FileOff = engine.Data, slot+m.bitmapBytes+in
	if !m.differencing() {
		// QEMU takes no notice of the bitmaps of such images: no bit may be cleared
		// in one, so sectors of partly present blocks keep their place.
		whole, err := m.isWhole(slot)
		if err != nil {
			return engine.Run{}, err
		}
		run.Flat = !whole
	}
	return run, nil
}

// isWhole reports whether all sectors of a block are present.
func (m *image) isWhole(slot int64) (bool, error) {
	sectors := m.blockBytes() / sectorBytes
	present, count, err := m.bitRun(slot, 0, sectors)
	return present && count == sectors, err
}

// bitRun returns whether a sector of a block is present, and how many sectors from it on,
// up to end, are like it.
func (m *image) bitRun(slot, sector, end int64) (present bool, count int64, err error) {
	first := sector
	for sector < end {
		p, err := m.layer.Tables.View(0, slot+sector/8)
		if err != nil {
			return false, 0, err
		}
		p = p[:min(int64(len(p)), (end-1)/8-sector/8+1)]
		if sector == first {
			present = p[0]>>(7-sector%8)&1 == 1
		}
		like, likeWord := byte(0), uint64(0)
		if present {
			like, likeWord = 0xff, 1<<64-1
		}
		for len(p) >= 8 && binary.BigEndian.Uint64(p) == likeWord {
			sector, p = sector/8*8+64, p[8:]
		}
		for _, b := range p {
			if b == like {
				sector = sector/8*8 + 8
				continue
			}
			for bit := sector % 8; bit < 8; bit++ {
				if b>>(7-bit)&1 != like&1 {
					return present, min(sector, end) - first, nil
				}
				sector++
			}
		}
	}
	return present, min(sector, end) - first, nil
}

// Granule returns the block around off, if it can only become present as a whole: in
// images that are no differencing ones, while it has no space; or if it is.
func (m *image) Granule(off int64) (start, end int64) {
	start = off / sectorBytes * sectorBytes
	if m.fixed() || m.differencing() {
		return start, start + sectorBytes
	}
	block := off >> m.blockShift
	var entry [entryBytes]byte
	if err := m.layer.Tables.Read(0, m.entryOff(block), entry[:]); err != nil {
		return start, start + sectorBytes // Lookup says what is wrong
	}
	if number := binary.BigEndian.Uint32(entry[:]); number != entryUnused {
		slot, err := m.slotAt(block, number)
		if err != nil {
			return start, start + sectorBytes
		}
		if whole, err := m.isWhole(slot); err != nil || !whole {
			return start, start + sectorBytes
		}
	}
	return block << m.blockShift, (block + 1) << m.blockShift
}

// ReadCompressed is never called: no run is compressed.
func (m *image) ReadCompressed(engine.Run, []byte) error {
	return unsupported("the format has no compression")
}

// Commit writes bitmaps, then the table that names their blocks.
func (m *image) Commit(c *engine.Commit) error {
	if m.uncertain != nil {
		return fmt.Errorf("vpc: %w", m.uncertain)
	}
	if err := c.WriteTables(stageBitmaps); err != nil {
		return fmt.Errorf("vpc: %w", err)
	}
	for _, sector := range c.Sectors() {
		if sector.Stage != stageTable {
			continue
		}
		if err := c.Sync(); err != nil {
			return fmt.Errorf("vpc: %w", err)
		}
		if err := c.WriteTables(stageTable); err != nil {
			return fmt.Errorf("vpc: %w", err)
		}
		break
	}
	return nil
}

// Identity returns the UUID, the time of the last change, and the size.
func (m *image) Identity() []byte {
	return fmt.Appendf(nil, "vpc %s %d %d", m.footer.uuid(), m.footer.timestamp(), m.sizeBytes)
}

// Close releases nothing: the Layer closes the files.
func (m *image) Close() error { return nil }
