package vhd

import (
	"errors"
	"fmt"
	"iter"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

const (
	// extendBytes is how far the file is extended ahead of its use. The extension is a
	// hole.
	extendBytes = 32 << 20
	// dataAlign is what the data of new blocks is aligned to, if they are as large.
	dataAlign = 4096
	// maxFreeSlots bounds how many are remembered.
	maxFreeSlots = 1 << 20
	// maxFileBytes is where entries of the table end, the last one being none.
	maxFileBytes = (1<<32 - 1) * sectorBytes
)

// room says which parts of the file are in use: those below end, but for the free slots.
type room struct {
	end   int64
	clean int64 // from here on there are zeroes
	free  []freeSlot
	loans map[int64]*loan // by block
}

type freeSlot struct {
	off    int64
	zeroed bool
}

// loan is a slot in which sectors were allocated and not set yet, in parts perhaps.
type loan struct {
	slot   int64
	parts  int
	isNew  bool // no entry named the slot when it was lent
	filled bool // its bitmap is in the file, and says that all sectors are present
	zeroed bool
}

// settle ends one part of a loan with the slot in the table.
func (r *room) settle(block int64) {
	l := r.loans[block]
	if l == nil {
		return
	}
	l.isNew = false
	if l.parts--; l.parts == 0 {
		delete(r.loans, block)
	}
}

// Begin gives the image another time of its last change, so that overlays made on the old
// contents notice, makes both footers the same, and finds out what of the file is in use:
// the table says so, and nothing else.
func (m *image) Begin(c *engine.Commit) error {
	if err := m.begin(c); err != nil {
		return fmt.Errorf("vpc: %w", err)
	}
	return nil
}

func (m *image) begin(c *engine.Commit) error {
	if m.uncertain != nil {
		return m.uncertain
	}
	f := m.footer
	f.setU32(footerTimestamp, max(now(), f.timestamp()+1))
	if m.fixed() {
		return m.beginFixed(c, f)
	}
	u, err := m.scan()
	if err != nil {
		return err
	}
	if u.bad > 0 {
		return corrupt("%d entries of the block allocation table lie outside the file or overlap something else: "+
			"the image is not written before it is repaired", u.bad)
	}
	if err := m.normalize(c, u.end); err != nil {
		return err
	}
	if err := m.writeFooters(c, f); err != nil {
		return err
	}
	m.setRoom(u)
	return nil
}

// normalize gives the file a length with room for a footer behind what is in use.
func (m *image) normalize(c *engine.Commit, end int64) error {
	size := max(alignUp(m.fileBytes, sectorBytes), alignUp(end, sectorBytes)+footerBytes)
	if size != m.fileBytes {
		if err := c.Truncate(0, size); err != nil {
			return err
		}
		m.fileBytes = size
	}
	return nil
}

// writeFooters replaces both copies of the footer durably, one after the other: each is a
// sector, which no crash tears. The one at the start comes last, because it decides.
func (m *image) writeFooters(c *engine.Commit, f footer) error {
	f.seal()
	m.lost.tail = true // until it is certain
	for _, off := range []int64{m.fileBytes - footerBytes, 0} {
		if err := m.replaceSector(c, m.footer[:], f[:], off); err != nil {
			return err
		}
	}
	m.footer, m.lost = f, lostFooter{}
	return nil
}

// replaceSector writes a sector durably. When that fails, it puts the old one back, because
// the image is used on: if that fails, too, nobody knows what the file says, and nothing
// that relies on it is written any more.
func (m *image) replaceSector(c *engine.Commit, old, replacement []byte, off int64) error {
	err := writeSynced(c, replacement, off)
	if err == nil {
		return nil
	}
	if back := writeSynced(c, old, off); back != nil {
		m.uncertain = errors.Join(err, back)
	}
	return err
}

func writeSynced(c *engine.Commit, p []byte, off int64) error {
	if err := c.WriteAt(0, p, off); err != nil {
		return err
	}
	return c.Sync()
}

// setRoom takes over what is in use. What lies between the last block and the footer may
// have been left there by a crash.
func (m *image) setRoom(u *usage) {
	m.room = room{end: u.end, clean: m.fileBytes, loans: map[int64]*loan{}}
	for slot := range m.freeSlots(u) {
		m.room.free = append(m.room.free, freeSlot{off: slot})
	}
	if rest := m.fileBytes - footerBytes - u.end; rest == 0 || m.f.PunchHole(u.end, rest) == nil {
		m.room.clean = u.end
	}
}

// freeSlots are the places for blocks in gaps, in order: not all of them, if a file says
// that it has very many. Others are found another time.
func (m *image) freeSlots(u *usage) iter.Seq[int64] {
	return func(yield func(int64) bool) {
		count := 0
		for _, gap := range u.gaps {
			for slot := m.alignSlot(gap.start); slot+m.slotBytes() <= gap.end; slot = m.alignSlot(slot + m.slotBytes()) {
				if count++; count > maxFreeSlots || !yield(slot) {
					return
				}
			}
		}
	}
}

// alignSlot returns the first place for a slot at or after off.
func (m *image) alignSlot(off int64) int64 {
	align := max(min(m.blockBytes(), dataAlign), sectorBytes)
	return alignUp(off+m.bitmapBytes, align) - m.bitmapBytes
}

// Allocate reserves sectors of one block: in the slot that it has, or in one that it is to
// have, free or new.
func (m *image) Allocate(off, n int64) (engine.Place, error) {
	if m.fixed() {
		return engine.Place{}, unsupported("a fixed image has no mapping")
	}
	number, in := off>>m.blockShift, off&(m.blockBytes()-1)
	l := m.room.loans[number]
	if l == nil {
		var err error
		if l, err = m.lend(number); err != nil {
			return engine.Place{}, err
		}
		m.room.loans[number] = l
	}
	l.parts++
	span := engine.Span{Off: l.slot + m.bitmapBytes + in, Len: min(n, m.blockBytes()-in)}
	return engine.Place{Span: span, Zeroed: l.zeroed}, nil
}

func (m *image) lend(number int64) (*loan, error) {
	p := part{block: number}
	if err := m.prepare(&p); err != nil {
		return nil, err
	}
	if p.slot != 0 {
		return &loan{slot: p.slot}, nil
	}
	if r := &m.room; len(r.free) > 0 {
		slot := r.free[0]
		r.free = slices.Delete(r.free, 0, 1)
		return &loan{slot: slot.off, zeroed: slot.zeroed, isNew: true}, nil
	}
	slot, err := m.append(m.slotBytes(), m.alignSlot)
	if err != nil {
		return nil, err
	}
	filled, err := m.fillNew(slot)
	if err != nil {
		m.room.release(slot, false)
		return nil, err
	}
	return &loan{slot: slot, zeroed: slot >= m.room.clean, isNew: true, filled: filled}, nil
}

// fillNew writes the bitmap of a slot behind everything else, if it is known that all
// sectors are going to be present.
func (m *image) fillNew(slot int64) (bool, error) {
	if m.differencing() {
		return false, nil
	}
	bitmap := make([]byte, m.bitmapBytes)
	m.fillBitmap(bitmap)
	return m.layer.Tables.WriteNew(0, slot, bitmap)
}

// append reserves n bytes behind everything else, aligned by align.
func (m *image) append(n int64, align func(off int64) int64) (int64, error) {
	off := align(m.room.end)
	if off+n > m.fileBytes-footerBytes {
		off = align(m.fileBytes)
		if err := m.extend(off + n); err != nil {
			return 0, err
		}
	}
	m.room.end = off + n
	return off, nil
}

// extend makes the file long enough for what ends at end, and then some more blocks, with
// the footer behind them. The old footer stays where it is, between blocks: there is no
// telling which of the two a loss of power leaves at the end of the file.
func (m *image) extend(end int64) error {
	if end > maxFileBytes {
		return fmt.Errorf("%w: entries of the block allocation table end at %#x", block.ErrNoSpace, int64(maxFileBytes))
	}
	for ahead := min(extendBytes, m.sizeBytes/8); ahead > 0; {
		next := m.alignSlot(end) + m.slotBytes()
		ahead -= next - end
		end = next
	}
	at := alignUp(end, sectorBytes)
	if _, err := m.f.WriteAt(m.footer[:], at); err != nil {
		return fmt.Errorf("extend %s to %d bytes: %w", m.f.Name(), at+footerBytes, err)
	}
	m.fileBytes = at + footerBytes
	return nil
}

// Free takes back sectors that were allocated and not set, or a slot that no entry names.
func (m *image) Free(s engine.Span, zeroed bool) {
	for number, l := range m.room.loans {
		if s.Off < l.slot+m.bitmapBytes || s.Off >= l.slot+m.slotBytes() {
			continue
		}
		if l.zeroed = false; l.parts > 1 {
			l.parts--
			return
		}
		delete(m.room.loans, number)
		if l.isNew {
			m.room.release(l.slot, false)
		}
		return
	}
	m.room.release(s.Off, zeroed)
}

func (r *room) release(slot int64, zeroed bool) {
	at, _ := slices.BinarySearchFunc(r.free, slot, func(f freeSlot, off int64) int { return int(f.off - off) })
	r.free = slices.Insert(r.free, at, freeSlot{slot, zeroed})
}

// Finish puts the footer behind the last block and cuts off what was reserved ahead.
// Lookups may go on meanwhile, and do not notice: nothing refers to what goes.
func (m *image) Finish(c *engine.Commit) error {
	if m.fixed() {
		return nil
	}
	r := &m.room
	for n := len(r.free); n > 0 && r.free[n-1].off+m.slotBytes() == r.end; n-- {
		r.end = r.free[n-1].off
		r.free = r.free[:n-1]
	}
	if err := m.cut(c, r.end); err != nil {
		return fmt.Errorf("vpc: %w", err)
	}
	return nil
}

// cut shortens the file to what ends at end and a footer.
func (m *image) cut(c *engine.Commit, end int64) error {
	at := alignUp(end, sectorBytes)
	if at+footerBytes >= m.fileBytes {
		return nil
	}
	if err := c.WriteAt(0, m.footer[:], at); err != nil {
		return err
	}
	if err := c.Sync(); err != nil {
		return err
	}
	if err := c.Truncate(0, at+footerBytes); err != nil {
		return err
	}
	m.fileBytes = at + footerBytes
	return nil
}

func alignUp(n, align int64) int64 { return (n + align - 1) / align * align }

// punchOrWrite zeroes file bytes.
func (m *image) punchOrWrite(c *engine.Commit, off, n int64) error {
	err := m.f.PunchHole(off, n)
	if !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	zeroes := make([]byte, min(n, 1<<20))
	for end := off + n; off < end; off += int64(len(zeroes)) {
		if err := c.WriteAt(0, zeroes[:min(int64(len(zeroes)), end-off)], off); err != nil {
			return err
		}
	}
	return nil
}
