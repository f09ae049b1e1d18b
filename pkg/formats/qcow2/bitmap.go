package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// bitmap is an entry of the bitmap directory ("Bitmaps").
type bitmap struct {
	name            string
	flags           uint32
	flagsAt         int64 // where in the file flags are
	granularityBits uint8
	tableOffset     int64
	tableSize       int64 // entries
}

const (
	bitmapInUse = 1 << 0
	bitmapAuto  = 1 << 1

	bitmapExtBytes   = 24
	bitmapFixedBytes = 24

	// Limits. QEMU has the first, the second and the last, too.
	maxBitmaps           = 65535
	maxBitmapDirBytes    = 64 << 20
	maxBitmapExtra       = 4096
	maxBitmapTableBytes  = 32 << 20
	maxBitmapTablesBytes = 256 << 20 // of all bitmaps together
)

// readBitmaps reads the bitmap directory, if it is there and counts: its clusters and those
// of bitmap tables are metadata.
func (m *image) readBitmaps(fileBytes int64) ([]bitmap, error) {
	ext, ok := m.header.extension(extBitmaps)
	if !ok || m.header.autoclear&autoclearBitmaps == 0 {
		return nil, nil
	}
	if len(ext) < bitmapExtBytes {
		return nil, corrupt("the bitmaps extension has %d bytes, want %d", len(ext), bitmapExtBytes)
	}
	be := binary.BigEndian
	count, size, off := be.Uint32(ext), be.Uint64(ext[8:]), be.Uint64(ext[16:])
	if count == 0 || count > maxBitmaps || size > maxBitmapDirBytes {
		return nil, unsupported("%d bitmaps in a directory of %d bytes, want 1 to %d in at most %d", count, size, maxBitmaps, maxBitmapDirBytes)
	}
	if err := m.header.checkTable("the bitmap directory", off, int64(size), fileBytes); err != nil {
		return nil, err
	}
	r := &tableReader{image: m, off: int64(off), end: int64(off + size)}
	var all []bitmap
	var tables int64
	for i := range count {
		b, err := r.bitmap()
		if err == nil {
			err = m.header.checkTable("its table", uint64(b.tableOffset), b.tableSize*8, fileBytes)
		}
		if tables += b.tableSize * 8; err == nil && (b.tableSize*8 > maxBitmapTableBytes || tables > maxBitmapTablesBytes) {
			err = unsupported("its table has %d entries, want at most %d, and %d bytes in all bitmaps", b.tableSize, maxBitmapTableBytes/8, maxBitmapTablesBytes)
		}
		if err != nil {
			return nil, fmt.Errorf("bitmap %d of %d: %w", i+1, count, err)
		}
		all = append(all, b)
	}
	m.metadata.addRange(int64(off)>>m.clusterBits, m.clusters(int64(size)))
	for _, b := range all {
		m.metadata.addRange(b.tableOffset>>m.clusterBits, m.clusters(b.tableSize*8))
	}
	return all, nil
}

// bitmap reads the next entry of the bitmap directory.
func (r *tableReader) bitmap() (b bitmap, err error) {
	be := binary.BigEndian
	at := r.off
	p, err := r.next(bitmapFixedBytes)
	if err != nil {
		return b, err
	}
	b = bitmap{
		tableOffset: int64(be.Uint64(p)), tableSize: int64(be.Uint32(p[8:])),
		flags: be.Uint32(p[12:]), flagsAt: at + 12, granularityBits: p[17],
	}
	kind, nameLen, extraLen := p[16], int64(be.Uint16(p[18:])), int64(be.Uint32(p[20:]))
	if nameLen == 0 || extraLen > maxBitmapExtra || kind != 1 || b.granularityBits > 63 {
		return b, unsupported("type %d, granularity_bits %d, a name of %d bytes and %d more", kind, b.granularityBits, nameLen, extraLen)
	}
	length := extraLen + nameLen
	if p, err = r.next(length + (8-(bitmapFixedBytes+length)%8)%8); err != nil {
		return b, err
	}
	b.name = string(p[extraLen:length])
	return b, nil
}

// outdateBitmaps marks, before a change of the image, the bitmaps that our not maintaining
// them makes wrong as in use, which is to say inconsistent: those that track changes, or
// all if the disk is to have another size. Bitmaps that track nothing stay good. If the
// directory is not understood, h says that none of it is to be trusted.
func (m *image) outdateBitmaps(c *engine.Commit, h *header, all bool) error {
	if m.bitmapsBroken != nil {
		h.autoclear &^= autoclearBitmaps
		return nil
	}
	for i := range m.bitmaps {
		b := &m.bitmaps[i]
		if b.flags&bitmapInUse != 0 || !all && b.flags&bitmapAuto == 0 {
			continue
		}
		flags := b.flags | bitmapInUse
		if err := c.WriteAt(0, binary.BigEndian.AppendUint32(nil, flags), b.flagsAt); err != nil {
			return fmt.Errorf("mark bitmap %q as outdated: %w", shorten(b.name), err)
		}
		b.flags = flags
	}
	return nil
}
