package vhdx

import (
	"encoding/binary"
	"math/bits"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// bitmapOf returns the file offset of the bitmap bytes of a block; they are a whole number
// of bytes, at least 32. bitmap is where the chunk's bitmap lies.
func (m *image) bitmapOf(block, bitmap int64) int64 {
	return bitmap + block%m.chunkRatio*m.blockBitmapBytes()
}

// blockBitmapBytes returns how many bytes of bitmap a block has.
func (m *image) blockBitmapBytes() int64 { return m.meta.blockBytes >> m.sectorShift / 8 }

// lookupPartial finds how far the sectors from offset in of a block are alike.
func (m *image) lookupPartial(block int64, e batEntry, in int64, run engine.Run) (engine.Run, error) {
	bitmap, err := m.bitmap(block / m.chunkRatio)
	if err != nil {
		return run, err
	}
	if bitmap == 0 {
		return run, corrupt("BAT entry of block %d: partially present, but its chunk has no sector bitmap", block)
	}
	first := in >> m.sectorShift
	count := (in+run.Len-1)>>m.sectorShift + 1 - first
	isPresent, alike, err := m.alike(m.bitmapOf(block, bitmap), first, count)
	if err != nil {
		return run, err
	}
	run.Len = min(run.Len, (first+alike)<<m.sectorShift-in)
	if isPresent {
		run.State, run.FileOff = engine.Data, e.off()+in
	}
	return run, nil
}

// alike says whether sector first is present, and how many of count sectors from it on
// are as it is. at is the file offset of the block's bitmap bytes.
func (m *image) alike(at, first, count int64) (isPresent bool, n int64, err error) {
	at, bit := at+first/8, first%8
	p, err := m.tables.View(0, at)
	if err != nil {
		return false, 0, err
	}
	isPresent = p[0]>>bit&1 != 0
	flip := byte(0)
	if isPresent {
		flip = 0xff
	}
	for n < count {
		if len(p) == 0 {
			if p, err = m.tables.View(0, at); err != nil {
				return false, 0, err
			}
		}
		if differ := (p[0] ^ flip) >> bit; differ != 0 {
			n += int64(bits.TrailingZeros8(differ))
			break
		}
		n += 8 - bit
		p, at, bit = p[1:], at+1, 0
	}
	return isPresent, min(n, count), nil
}

// setBits gives the bits [first, end) of p a value.
func setBits(p []byte, first, end int64, value bool) {
	whole := byte(0)
	if value {
		whole = 0xff
	}
	for s := first; s < end; {
		if s%8 == 0 && end-s >= 8 {
			p[s/8] = whole
			s += 8
			continue
		}
		p[s/8] = p[s/8]&^(1<<(s%8)) | whole&(1<<(s%8))
		s++
	}
}

// allBits reports whether the first n bits of p all have a value.
func allBits(p []byte, n int64, value bool) bool {
	flip, whole := byte(0), uint64(0)
	if value {
		flip, whole = 0xff, 1<<64-1
	}
	for ; n >= 64; n, p = n-64, p[8:] {
		if binary.LittleEndian.Uint64(p) != whole {
			return false
		}
	}
	for ; n >= 8; n, p = n-8, p[1:] {
		if p[0] != flip {
			return false
		}
	}
	return n <= 0 || (p[0]^flip)&(1<<n-1) == 0
}
