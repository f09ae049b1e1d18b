package vhd

import (
	"bytes"
	"encoding/binary"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// part is what a Set changes in one block.
type part struct {
	block      int64
	first, end int64 // sectors of the block
	slot       int64 // where the block is, or is to be; 0: nowhere
	isNew      bool  // the table does not name the slot yet
	filled     bool  // its bitmap says already that all sectors are present
}

// Set makes sectors present, or absent. Whole blocks of which nothing is left go.
func (m *image) Set(off, n int64, to engine.State, _ engine.Place) ([]engine.Span, error) {
	if m.fixed() {
		return nil, unsupported("a fixed image has no mapping")
	}
	var parts []part
	for done := int64(0); done < n; {
		in := (off + done) & (m.blockBytes() - 1)
		length := min(n-done, m.blockBytes()-in)
		p := part{block: (off + done) >> m.blockShift, first: in / sectorBytes, end: (in + length) / sectorBytes}
		if err := m.prepare(&p); err != nil {
			return nil, err
		}
		parts = append(parts, p)
		done += length
	}
	var unused []engine.Span
	for _, p := range parts {
		var err error
		if to == engine.Data {
			err = m.makePresent(p)
		} else {
			unused, err = m.makeAbsent(p, unused)
		}
		if err != nil {
			return nil, err
		}
	}
	return unused, nil
}

// prepare finds the slot of a part, and does what can fail of changing it.
func (m *image) prepare(p *part) error {
	tables := m.layer.Tables
	if err := tables.Prepare(0, m.entryOff(p.block), entryBytes); err != nil {
		return err
	}
	var entry [entryBytes]byte
	if err := tables.Read(0, m.entryOff(p.block), entry[:]); err != nil {
		return err
	}
	if number := binary.BigEndian.Uint32(entry[:]); number != entryUnused {
		slot, err := m.slotAt(p.block, number)
		if err != nil {
			return err
		}
		p.slot = slot
	} else if loan := m.room.loans[p.block]; loan != nil {
		p.slot, p.isNew, p.filled = loan.slot, true, loan.filled
	}
	if p.slot == 0 || p.filled {
		return nil
	}
	return tables.Prepare(0, p.slot, m.bitmapBytes)
}

// makePresent sets the bits of a part, whose loan ends. The bitmap of a new block is
// written as a whole: in a differencing image only what the part holds is present, in
// others everything, as readers expect that take no notice of bitmaps.
func (m *image) makePresent(p part) error {
	if !p.filled {
		if err := m.setBits(p); err != nil {
			return err
		}
	}
	if p.isNew {
		entry := binary.BigEndian.AppendUint32(nil, uint32(p.slot/sectorBytes))
		if err := m.layer.Tables.Write(stageTable, 0, m.entryOff(p.block), entry); err != nil {
			return err
		}
	}
	m.room.settle(p.block)
	return nil
}

// setBits notes in its block's bitmap that a part is present.
func (m *image) setBits(p part) error {
	bitmap, err := m.bitmapOf(p)
	if err != nil {
		return err
	}
	for s := p.first; s < p.end; s++ {
		bitmap[s/8] |= 0x80 >> (s % 8)
	}
	return m.layer.Tables.Write(stageBitmaps, 0, p.slot, bitmap)
}

// bitmapOf returns the present bitmap of a part's block.
func (m *image) bitmapOf(p part) ([]byte, error) {
	bitmap := make([]byte, m.bitmapBytes)
	switch {
	case !p.isNew:
		return bitmap, m.layer.Tables.Read(0, p.slot, bitmap)
	case !m.differencing():
		m.fillBitmap(bitmap)
	}
	return bitmap, nil
}

// fillBitmap sets the bits of all sectors of a block.
func (m *image) fillBitmap(bitmap []byte) {
	sectors := m.blockBytes() / sectorBytes
	for i := range bitmap[:(sectors+7)/8] {
		bitmap[i] = 0xff
	}
	if rest := sectors % 8; rest != 0 {
		bitmap[sectors/8] = ^byte(0xff >> rest)
	}
}

// makeAbsent clears the bits of a part, or takes the block out of the table if no other
// sector of it is present, nor about to be.
func (m *image) makeAbsent(p part, unused []engine.Span) ([]engine.Span, error) {
	if p.slot == 0 || p.isNew {
		return unused, nil
	}
	bitmap, err := m.bitmapOf(p)
	if err != nil {
		return unused, err
	}
	for s := p.first; s < p.end; s++ {
		bitmap[s/8] &^= 0x80 >> (s % 8)
	}
	whole := p.end-p.first == m.blockBytes()/sectorBytes
	if m.room.loans[p.block] == nil && (whole || len(bytes.Trim(bitmap, "\x00")) == 0) {
		entry := binary.BigEndian.AppendUint32(nil, entryUnused)
		span := engine.Span{Off: p.slot, Len: m.slotBytes()}
		return append(unused, span), m.layer.Tables.Write(stageTable, 0, m.entryOff(p.block), entry)
	}
	return unused, m.layer.Tables.Write(stageBitmaps, 0, p.slot, bitmap)
}
