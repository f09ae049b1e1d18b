package vdi

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// extendBytes is how far the file is extended ahead of its use. The extension is a hole.
const extendBytes = 4 << 20

// room says which blocks of the file are in use: those below next, but for the free ones.
type room struct {
	next int64
	free []freeBlock // by index
}

type freeBlock struct {
	index  int64
	zeroed bool
}

// Begin gives the contents another UUID, so that overlays made on the old ones notice, and
// finds out which blocks of the file are in use: the map says so, and nothing else. What a
// crash or another program has left behind them is cut off, so that new blocks are zeroes.
func (m *image) Begin(c *engine.Commit) error {
	u, err := m.scan()
	if err != nil {
		return fmt.Errorf("vdi: %w", err)
	}
	if u.bad > 0 {
		return fmt.Errorf("vdi: %w", corrupt("%d entries of the block map name blocks that others name, too, or that lie outside the file: "+
			"the image is not written before it is repaired", u.bad))
	}
	h := m.h
	h.setUUID(fieldUUIDModified, newUUID())
	h.setAllocated(u.end)
	if err := m.writeHeader(c, h); err != nil {
		return fmt.Errorf("vdi: change the modification UUID: %w", err)
	}
	if err := m.setRoom(c, u); err != nil {
		return fmt.Errorf("vdi: %w", err)
	}
	return nil
}

// setRoom takes over which blocks are in use, and gives the file the length they need.
func (m *image) setRoom(c *engine.Commit, u *usage) error {
	if end := m.endOf(u.end); end != m.fileBytes || m.touched > u.end {
		if err := c.Truncate(0, end); err != nil {
			return err
		}
		if err := c.Sync(); err != nil {
			return err
		}
		m.fileBytes, m.touched = end, 0
	}
	m.limitIndex()
	m.useRoom(u)
	return nil
}

func (m *image) useRoom(u *usage) {
	m.room = room{next: u.end}
	for index := range u.free() {
		m.room.free = append(m.room.free, freeBlock{index: index})
	}
}

// Allocate reserves blocks: free ones, or new ones behind all others.
func (m *image) Allocate(_, n int64) (engine.Place, error) {
	count := (n-1)>>m.blockShift + 1
	if m.stride != m.blockBytes() {
		count = 1 // two blocks are not adjacent in the file
	}
	if len(m.room.free) > 0 {
		return m.place(m.room.takeFree(count))
	}
	first := m.room.next
	// There are never more blocks than the guest has, but after a resize that failed.
	if first+count > m.mostBlocks() {
		return engine.Place{}, fmt.Errorf("%w: %d blocks of %s may be in use, and it has %d", block.ErrNoSpace, first, m.f.Name(), m.h.blocks())
	}
	if err := m.extend(first + count); err != nil {
		return engine.Place{}, err
	}
	m.room.next += count
	return m.place(first, count, first >= m.touched)
}

func (m *image) place(first, count int64, zeroed bool) (engine.Place, error) {
	span := engine.Span{Off: m.blockOff(first), Len: count << m.blockShift}
	return engine.Place{Span: span, Zeroed: zeroed}, nil
}

// takeFree takes adjacent free blocks, at most count.
func (r *room) takeFree(count int64) (first, taken int64, zeroed bool) {
	first, zeroed = r.free[0].index, r.free[0].zeroed
	for taken < count && taken < int64(len(r.free)) && r.free[taken] == (freeBlock{first + taken, zeroed}) {
		taken++
	}
	r.free = slices.Delete(r.free, 0, int(taken))
	return first, taken, zeroed
}

// extend makes the file long enough for a number of blocks, and some more.
func (m *image) extend(blocks int64) error {
	if m.endOf(blocks) <= m.fileBytes {
		return nil
	}
	ahead := min(blocks+extendBytes>>m.blockShift, max(blocks, m.h.blocks()))
	size := m.endOf(ahead)
	if err := m.f.Truncate(size); err != nil {
		return fmt.Errorf("extend %s to %d bytes: %w", m.f.Name(), size, err)
	}
	m.fileBytes = size
	m.limitIndex()
	return nil
}

// Free takes back blocks.
func (m *image) Free(span engine.Span, zeroed bool) {
	index := (span.Off - m.h.dataOffset()) / m.stride
	for range (span.Len-1)>>m.blockShift + 1 {
		at, _ := slices.BinarySearchFunc(m.room.free, index, func(b freeBlock, i int64) int { return cmp.Compare(b.index, i) })
		m.room.free = slices.Insert(m.room.free, at, freeBlock{index, zeroed})
		index++
	}
}

// Finish cuts off what was reserved ahead, and free blocks at the end. Lookups may go on
// meanwhile, and do not notice: nothing refers to what goes.
func (m *image) Finish(c *engine.Commit) error {
	r := &m.room
	for n := len(r.free); n > 0 && r.free[n-1].index == r.next-1; n-- {
		r.free = r.free[:n-1]
		r.next--
	}
	if r.next != m.h.allocated() {
		h := m.h
		h.setAllocated(r.next)
		if err := m.writeHeader(c, h); err != nil {
			return fmt.Errorf("vdi: %w", err)
		}
	}
	if end := m.endOf(r.next); end != m.fileBytes || m.touched > r.next {
		if err := c.Truncate(0, end); err != nil {
			return fmt.Errorf("vdi: %w", err)
		}
		m.fileBytes, m.touched = end, 0
	}
	return nil
}
