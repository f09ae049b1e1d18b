package vhd

import (
	"bytes"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// copyBytes is how much is read and written at once.
const copyBytes = 1 << 20

// Resize gives the image another size. In the end it is the footers, of one sector each,
// that decide.
func (m *image) Resize(c *engine.Commit, size int64) error {
	err := checkSize(size)
	if err == nil {
		err = m.uncertain
	}
	switch {
	case err != nil || size == m.sizeBytes:
	case m.fixed():
		err = m.resizeFixed(c, size)
	case size > m.sizeBytes:
		err = m.grow(c, size)
	default:
		err = m.shrink(c, size)
	}
	m.layer.Tables.Forget()
	if err != nil {
		return fmt.Errorf("vpc: resize %s from %d to %d bytes: %w", m.layer.Name, m.sizeBytes, size, err)
	}
	return nil
}

func checkSize(size int64) error {
	if size <= 0 || size > maxSizeBytes || size%sectorBytes != 0 {
		return invalid("want a multiple of %d, at most %d (2040 GiB): VHDX holds more", sectorBytes, int64(maxSizeBytes))
	}
	return nil
}

// blocksOf returns how many blocks hold a size.
func (m *image) blocksOf(size int64) int64 { return (size-1)>>m.blockShift + 1 }

// grow makes sure that what is new reads as zeroes, has a larger table written if need be,
// and writes footers.
func (m *image) grow(c *engine.Commit, size int64) error {
	if blocks := m.blocksOf(size); blocks > maxEntries {
		return invalid("with blocks of %d bytes want at most %d bytes", m.blockBytes(), maxEntries<<m.blockShift)
	}
	if err := m.clearTail(c, m.sizeBytes); err != nil {
		return err
	}
	if err := m.freeEntries(c, m.blocksOf(m.sizeBytes)); err != nil {
		return err
	}
	f, h := m.footer, m.header
	f.setSize(size)
	if blocks := m.blocksOf(size); blocks > h.entries() {
		h.setU32(headerEntries, uint32(blocks))
		return m.replaceMeta(c, f, h, nil)
	}
	return m.adopt(c, f, h)
}

// shrink takes the blocks past a size out of the table, and writes footers.
func (m *image) shrink(c *engine.Commit, size int64) error {
	if err := m.clearTail(c, size); err != nil {
		return err
	}
	f := m.footer
	f.setSize(size)
	if err := m.writeFooters(c, f); err != nil {
		return err
	}
	m.sizeBytes = size
	// Should anything fail from here on, only what is behind everything is known to be free.
	m.room.free, m.room.end = nil, m.fileBytes-footerBytes
	if err := m.freeEntries(c, m.blocksOf(size)); err != nil {
		return err
	}
	if _, err := m.pack(c); err != nil {
		return err
	}
	return m.findRoom()
}

// adopt switches to another footer, and header, which is in the file already.
func (m *image) adopt(c *engine.Commit, f footer, h header) error {
	if err := m.writeFooters(c, f); err != nil {
		return err
	}
	m.header, m.sizeBytes = h, m.footer.guestBytes()
	m.adoptHeader()
	return m.findRoom()
}

// findRoom finds out again what of the file is in use.
func (m *image) findRoom() error {
	u, err := m.scan()
	if err != nil {
		return err
	}
	clean := max(m.room.clean, m.room.end) // what lies below may have been used and given back
	m.setRoom(u)
	m.room.clean = min(m.room.clean, max(clean, u.end))
	return nil
}

// clearTail zeroes what the block that a size lies in holds past it.
func (m *image) clearTail(c *engine.Commit, size int64) error {
	end := m.blocksOf(size) << m.blockShift
	for off := size; off < end; {
		run, err := m.Lookup(off, end-off)
		if err != nil {
			return err
		}
		if run.State == engine.Data {
			if err := m.zeroRange(c, run.FileOff, run.FileOff+run.Len); err != nil {
				return err
			}
		}
		off += run.Len
	}
	return nil
}

// zeroRange writes zeroes over file bytes where there are others.
func (m *image) zeroRange(c *engine.Commit, off, end int64) error {
	if off >= end {
		return nil
	}
	for buf := make([]byte, min(copyBytes, end-off)); off < end; {
		p := buf[:min(int64(len(buf)), end-off)]
		n := min(max(m.fileBytes-off, 0), int64(len(p)))
		if err := readFull(m.f, p[:n], off); err != nil {
			return err
		}
		if len(bytes.TrimLeft(p[:n], "\x00")) > 0 {
			clear(p)
			if err := c.WriteAt(0, p[:n], off); err != nil {
				return err
			}
		}
		off += int64(len(p))
	}
	return nil
}

// freeEntries takes blocks from a number on out of the table, durably.
func (m *image) freeEntries(c *engine.Commit, from int64) error {
	if from < m.header.entries() {
		err := m.eachChunk(from, m.header.entries(), func(first int64, p []byte) error {
			unused := bytes.Repeat([]byte{0xff}, len(p))
			if bytes.Equal(unused, p) {
				return nil
			}
			return c.WriteAt(0, unused, m.entryOff(first))
		})
		if err != nil {
			return err
		}
	}
	return c.Sync()
}

// replaceMeta writes a header, what its locators name, and a table that continues the
// present one, behind everything else, and then the footers, the only sectors that name
// them. The table comes last: QEMU puts new blocks behind it and other blocks, and knows
// of nothing else that could be there.
func (m *image) replaceMeta(c *engine.Commit, f footer, h header, links []link) error {
	before := alignUp(headerBytes+linkBytes(links), sectorBytes)
	size := before + alignUp(h.entries()*entryBytes, sectorBytes)
	at, err := m.append(size, func(off int64) int64 { return alignUp(off, dataAlign) })
	if err != nil {
		return err
	}
	tableOff := at + before
	h.setU64(headerTableOffset, uint64(tableOff))
	if links != nil { // else they stay where they are
		h.setLocators(links, at+headerBytes)
	}
	h.seal()
	if err := c.WriteAt(0, appendLinks(h[:], links), at); err != nil {
		return err
	}
	if err := m.copyTable(c, tableOff, h.entries()); err != nil {
		return err
	}
	if err := c.Sync(); err != nil {
		return err
	}
	f.setU64(footerDataOffset, uint64(at))
	return m.adopt(c, f, h)
}

// copyTable writes a table of a number of entries that continues the present one.
func (m *image) copyTable(c *engine.Commit, off, entries int64) error {
	end := alignUp(off+entries*entryBytes, sectorBytes)
	write := func(_ int64, p []byte) error {
		err := c.WriteAt(0, p, off)
		off += int64(len(p))
		return err
	}
	if err := m.eachChunk(0, min(m.header.entries(), entries), write); err != nil {
		return err
	}
	for off < end {
		if err := write(0, bytes.Repeat([]byte{0xff}, int(min(scanBytes, end-off)))); err != nil {
			return err
		}
	}
	return nil
}

// fillGaps makes all sectors of all blocks present, as readers expect of an image that is
// no differencing one: those that were not are zeroed first, while nobody can see them.
func (m *image) fillGaps(c *engine.Commit) error {
	return m.eachEntry(0, m.header.entries(), func(number int64, entry uint32) error {
		if entry == entryUnused {
			return nil
		}
		slot, err := m.slotAt(number, entry)
		if err != nil {
			return err
		}
		for sector, all := int64(0), m.blockBytes()/sectorBytes; sector < all; {
			present, count, err := m.bitRun(slot, sector, all)
			if err != nil {
				return err
			}
			if off := slot + m.bitmapBytes + sector*sectorBytes; !present {
				if err := m.punchOrWrite(c, off, count*sectorBytes); err != nil {
					return err
				}
			}
			sector += count
		}
		return nil
	})
}

// fillBitmaps sets all bits of all blocks.
func (m *image) fillBitmaps(c *engine.Commit) error {
	full := make([]byte, m.bitmapBytes)
	m.fillBitmap(full)
	return m.eachEntry(0, m.header.entries(), func(_ int64, entry uint32) error {
		if entry == entryUnused {
			return nil
		}
		return c.WriteAt(0, full, int64(entry)*sectorBytes)
	})
}
