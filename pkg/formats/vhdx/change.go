package vhdx

import (
	"encoding/binary"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// stageTables is the only stage: what has to come first or last within a commit is the
// log's business.
const stageTables engine.Stage = 0

// blockClaims are places that the table does not tell of, or not durably. They are changed
// only where the engine calls alone.
type blockClaims struct {
	// filling are the blocks, by number, of which sectors were reserved and not Set yet.
	filling map[int64]*fillingBlock
	// vacated are the places, by file offset, that blocks of a differencing image left
	// and that are not free yet, with the block's number. Until they are, the block gets
	// new space as a whole: a log too small for a commit brings bitmaps up to date before
	// the table, and must not show old sectors of the old place for it.
	vacated map[int64]int64
	// leaving counts, by block, the entries of vacated.
	leaving map[int64]int
	// bitmaps are places for sector bitmaps, by chunk, that the table does not have yet.
	bitmaps map[int64]int64
}

type fillingBlock struct {
	off   int64 // in the file
	count int   // reservations
}

func (c *blockClaims) isVacated(block int64) bool { return c.leaving[block] > 0 }

func (c *blockClaims) vacate(block, off int64) {
	if c.vacated == nil {
		c.vacated, c.leaving = map[int64]int64{}, map[int64]int{}
	}
	c.vacated[off] = block
	c.leaving[block]++
}

// freed notes that a place is free.
func (c *blockClaims) freed(off int64) {
	block, ok := c.vacated[off]
	if !ok {
		return
	}
	delete(c.vacated, off)
	if c.leaving[block]--; c.leaving[block] == 0 {
		delete(c.leaving, block)
	}
}

// fillingAt returns the block being filled whose place holds a file offset.
func (c *blockClaims) fillingAt(off, blockBytes int64) (block int64, f *fillingBlock) {
	for block, f := range c.filling {
		if f.off <= off && off < f.off+blockBytes {
			return block, f
		}
	}
	return 0, nil
}

// Allocate reserves space: of a block that becomes present sector by sector, the place
// that it has, or a new one for all of it; otherwise, for whole blocks.
func (m *image) Allocate(off, n int64) (engine.Place, error) {
	block := off >> m.blockShift
	if m.meta.hasParent && m.hasSectors(block) {
		return m.allocateSectors(block, off, n)
	}
	want := m.meta.blockBytes
	for block++; want < n && (!m.meta.hasParent || !m.hasSectors(block)); block++ {
		want += m.meta.blockBytes
	}
	return m.allocateBlocks(want)
}

// allocateBlocks reserves space for blocks, or for fewer, but at least one.
func (m *image) allocateBlocks(n int64) (engine.Place, error) {
	place, err := m.space.Alloc(n, m.meta.blockBytes)
	if err != nil {
		return place, err
	}
	if odd := place.Len % m.meta.blockBytes; odd != 0 {
		place.Len -= odd
		m.space.Free(place.Off+place.Len, odd, place.Zeroed)
	}
	m.fileEnd = max(m.fileEnd, place.Off+place.Len)
	return place, nil
}

func (m *image) allocateSectors(block, off, n int64) (engine.Place, error) {
	f := m.claims.filling[block]
	if f == nil {
		var err error
		if f, err = m.startFilling(block); err != nil {
			return engine.Place{}, err
		}
		if m.claims.filling == nil {
			m.claims.filling = map[int64]*fillingBlock{}
		}
		m.claims.filling[block] = f
	}
	f.count++
	in := off - block<<m.blockShift
	return engine.Place{Span: engine.Span{Off: f.off + in, Len: min(n, m.meta.blockBytes-in)}}, nil
}

// startFilling finds the place of a block whose sectors are about to be reserved, and one
// for its chunk's bitmap.
func (m *image) startFilling(block int64) (*fillingBlock, error) {
	e, err := m.payload(block)
	if err != nil {
		return nil, err
	}
	if e.state() == statePartial {
		return &fillingBlock{off: e.off()}, nil
	}
	if err := m.reserveBitmap(block / m.chunkRatio); err != nil {
		return nil, err
	}
	place, err := m.allocateBlocks(m.meta.blockBytes)
	return &fillingBlock{off: place.Off}, err
}

func (m *image) reserveBitmap(chunk int64) error {
	at, err := m.bitmap(chunk)
	if err != nil || at != 0 || m.claims.bitmaps[chunk] != 0 {
		return err
	}
	place, err := m.space.Alloc(bitmapBytes, bitmapBytes)
	if err != nil {
		return err
	}
	m.fileEnd = max(m.fileEnd, place.Off+place.Len)
	if m.claims.bitmaps == nil {
		m.claims.bitmaps = map[int64]int64{}
	}
	m.claims.bitmaps[chunk] = place.Off
	return nil
}

// Free takes space back.
func (m *image) Free(s engine.Span, zeroed bool) {
	if block, f := m.claims.fillingAt(s.Off, m.meta.blockBytes); f != nil {
		m.endFilling(block, f)
		return
	}
	m.claims.freed(s.Off)
	m.space.Free(s.Off, s.Len, zeroed)
}

// endFilling notes that a reservation of sectors is over. A place that the table does not
// tell of then is free.
func (m *image) endFilling(block int64, f *fillingBlock) {
	if f.count--; f.count > 0 {
		return
	}
	delete(m.claims.filling, block)
	if e, err := m.payload(block); err == nil && (e.state() != statePartial && e.state() != stateFull || e.off() != f.off) {
		m.space.Free(f.off, m.meta.blockBytes, false)
	}
}

// blockChange is a prepared change of one block.
type blockChange struct {
	block    int64
	old, new batEntry
	bits     []byte // of the block's bitmap, from bitsAt in the file on; nil: as they are
	bitsAt   int64
	bitmap   int64 // where the chunk gets a bitmap; 0: it has one, or needs none
}

// Set changes the mapping: what can fail is done for all blocks first.
func (m *image) Set(off, n int64, to engine.State, at engine.Place) ([]engine.Span, error) {
	var changes []blockChange
	for block := off >> m.blockShift; block<<m.blockShift < off+n; block++ {
		c, err := m.prepareBlock(block, off, off+n, to, at.Off-off)
		if err != nil {
			return nil, err
		}
		changes = append(changes, c)
	}
	var unused []engine.Span
	for i := range changes {
		c := &changes[i]
		if err := m.apply(c); err != nil {
			return nil, err
		}
		if to == engine.Data && m.meta.hasParent {
			if f := m.claims.filling[c.block]; f != nil {
				m.endFilling(c.block, f)
			}
		}
		unused = m.appendUnused(unused, c)
	}
	return unused, nil
}

// prepareBlock prepares what a Set of the guest range [off, end) does to one block. The
// place of guest byte g is in the file at g+shift.
func (m *image) prepareBlock(block, off, end int64, to engine.State, shift int64) (c blockChange, err error) {
	start := block << m.blockShift
	off, end = max(off, start), min(end, start+m.meta.blockBytes)
	if c.old, err = m.payload(block); err != nil {
		return c, err
	}
	c.block = block
	isWhole := off == start && (end == start+m.meta.blockBytes || end >= m.meta.sizeBytes)
	switch {
	case m.meta.hasParent && !isWhole && m.hasSectors(block):
		err = m.prepareSectors(&c, (off-start)>>m.sectorShift, (end-start)>>m.sectorShift, to, start+shift)
	case !isWhole:
		err = unsupported("change %d bytes at %d alone: the block becomes present as a whole", end-off, off)
	case to == engine.Data:
		c.new = newEntry(stateFull, start+shift)
	case to == engine.Zero, !m.meta.hasParent:
		// What a block that is not present reads as is up to the reader; what the engine
		// sets to be absent in a base has to read as zeroes.
		c.new = newEntry(stateZero, 0)
	}
	if err != nil {
		return c, err
	}
	if c.new.state() == stateZero && c.old.state() == stateNotPresent && to == engine.Absent {
		c.new = c.old // it has never been anything else
	}
	return c, m.tables.Prepare(0, m.entryAt(m.payloadIndex(block)), batEntryBytes)
}

// prepareSectors prepares a change of sectors [first, end) of a block that becomes present
// sector by sector; place is where the block lies, or will.
func (m *image) prepareSectors(c *blockChange, first, end int64, to engine.State, place int64) error {
	c.new = c.old
	switch {
	case to == engine.Zero:
		return unsupported("make a part of a block zero without writing to it")
	case to == engine.Absent && c.old.state() == stateNotPresent:
		return nil
	case to == engine.Data:
		c.new = newEntry(statePartial, place)
	}
	chunk := c.block / m.chunkRatio
	bitmap, err := m.bitmap(chunk)
	if err != nil {
		return err
	}
	if bitmap == 0 {
		if bitmap = m.claims.bitmaps[chunk]; bitmap == 0 {
			return corrupt("block %d is partially present, but its chunk has no sector bitmap", c.block)
		}
		c.bitmap = bitmap
		if err := m.tables.Prepare(0, m.entryAt(m.bitmapIndex(chunk)), batEntryBytes); err != nil {
			return err
		}
	}
	return m.prepareBits(c, bitmap, first, end, to == engine.Data)
}

// prepareBits prepares the block's bitmap: all of it if the block was not present, because
// what is there may be of an earlier time.
func (m *image) prepareBits(c *blockChange, bitmap, first, end int64, value bool) error {
	at := m.bitmapOf(c.block, bitmap)
	all := make([]byte, m.blockBitmapBytes())
	if c.old.state() == statePartial {
		if err := m.tables.Read(0, at, all); err != nil {
			return err
		}
	}
	setBits(all, first, end, value)
	isEmpty := !value && m.claims.filling[c.block] == nil && allBits(all, int64(len(all))*8, false)
	from, to := first/8, (end+7)/8
	if c.old.state() != statePartial {
		from, to = 0, int64(len(all))
	}
	c.bits, c.bitsAt = all[from:to], at+from
	if isEmpty {
		c.new = newEntry(stateNotPresent, 0)
	}
	return m.tables.Prepare(0, c.bitsAt, int64(len(c.bits)))
}

// apply makes a prepared change.
func (m *image) apply(c *blockChange) error {
	if c.bits != nil {
		if err := m.tables.Write(stageTables, 0, c.bitsAt, c.bits); err != nil {
			return err
		}
	}
	chunk := c.block / m.chunkRatio
	if c.bitmap != 0 && m.claims.bitmaps[chunk] != 0 {
		if err := m.writeEntry(m.bitmapIndex(chunk), newEntry(stateFull, c.bitmap)); err != nil {
			return err
		}
		delete(m.claims.bitmaps, chunk)
	}
	if c.new == c.old {
		return nil
	}
	return m.writeEntry(m.payloadIndex(c.block), c.new)
}

func (m *image) writeEntry(index int64, e batEntry) error {
	p := binary.LittleEndian.AppendUint64(nil, uint64(e))
	if err := m.tables.Write(stageTables, 0, m.entryAt(index), p); err != nil {
		return fmt.Errorf("BAT entry %d: %w", index, err)
	}
	return nil
}

// appendUnused adds the place that a block has left.
func (m *image) appendUnused(unused []engine.Span, c *blockChange) []engine.Span {
	if !c.old.holds() || c.new.holds() && c.new.off() == c.old.off() {
		return unused
	}
	if m.meta.hasParent {
		m.claims.vacate(c.block, c.old.off())
	} else if n := len(unused); n > 0 && unused[n-1].Off+unused[n-1].Len == c.old.off() {
		unused[n-1].Len += m.meta.blockBytes
		return unused
	}
	return append(unused, engine.Span{Off: c.old.off(), Len: m.meta.blockBytes})
}

// CanZero reports whether whole granules [off, off+n) can be Set to Zero: sectors cannot,
// unless they are all of a block.
func (m *image) CanZero(off, n int64) bool {
	if !m.meta.hasParent {
		return true
	}
	for block := off >> m.blockShift; block<<m.blockShift < off+n; block++ {
		start := block << m.blockShift
		isWhole := off <= start && (off+n >= start+m.meta.blockBytes || off+n >= m.meta.sizeBytes)
		if !isWhole && m.hasSectors(block) {
			return false
		}
	}
	return true
}
