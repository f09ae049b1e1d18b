package vdi

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// mapReserve is how many times the entries needed fit into a block map where there is a
// choice: then growing again moves nothing.
const mapReserve = 4

// copyBytes is how much is copied at once.
const copyBytes = 1 << 20

// Resize gives the image another size. In the end it is one sector, the header, that
// decides.
func (m *image) Resize(c *engine.Commit, size int64) error {
	err := m.checkSize(size)
	if err != nil {
		return fmt.Errorf("vdi: resize %s to %d bytes: %w", m.layer.Name, size, err)
	}
	before, err := m.scan()
	if err == nil && size > m.sizeBytes {
		err = m.grow(c, size)
	} else if err == nil && size < m.sizeBytes {
		err = m.shrink(c, size)
	}
	m.layer.Tables.Forget()
	if err != nil {
		m.keepBoth(before)
		return fmt.Errorf("vdi: resize %s from %d to %d bytes: %w", m.layer.Name, m.sizeBytes, size, err)
	}
	return nil
}

// keepBoth takes over which blocks are in use after a resize has failed that may have
// moved some: those that were used before, because entries on disk may name them, and
// those that entries name now.
func (m *image) keepBoth(before *usage) {
	after, err := m.scan()
	if err != nil || before == nil || after.bad > 0 {
		m.room = room{next: max(m.room.next, m.indexLimit)} // only what is behind everything is free
		return
	}
	if missing := len(before.used) - len(after.used); missing > 0 {
		after.used = append(after.used, make([]uint64, missing)...)
	}
	for i := range before.used {
		after.used[i] |= before.used[i]
	}
	after.end = max(after.end, before.end)
	m.useRoom(after)
}

func (m *image) checkSize(size int64) error {
	most := maxBlocks * m.blockBytes()
	if size <= 0 || size > most || size%sectorBytes != 0 {
		return invalid("want a multiple of %d, at most %d", sectorBytes, most)
	}
	return nil
}

// grow adds entries to the block map, where it is or at another place.
func (m *image) grow(c *engine.Commit, size int64) error {
	if err := m.clearTail(c, m.sizeBytes); err != nil {
		return err
	}
	h := m.h
	h.setDiskSize(size)
	h.setBlocks(max(h.blocksOf(size), h.blocks()))
	var err error
	if end := m.entryOff(h.blocks()); end <= m.h.dataOffset() {
		err = m.appendEntries(c, &h)
	} else {
		err = m.moveMap(c, &h)
	}
	if err == nil {
		err = c.Sync()
	}
	if err == nil {
		err = m.writeHeader(c, h)
	}
	if err != nil {
		return err
	}
	m.adoptHeader()
	return m.findRoom(c)
}

// findRoom finds out again which blocks are in use.
func (m *image) findRoom(c *engine.Commit) error {
	u, err := m.scan()
	if err != nil {
		return err
	}
	return m.setRoom(c, u)
}

// clearTail zeroes what the block that a size lies in holds past it.
func (m *image) clearTail(c *engine.Commit, size int64) error {
	if size&(m.blockBytes()-1) == 0 {
		return nil
	}
	run, err := m.Lookup(size-1, 1)
	if err != nil || run.State != engine.Data {
		return err
	}
	off, end := run.FileOff+1, run.FileOff+1+m.blockBytes()-size&(m.blockBytes()-1)
	for buf := make([]byte, min(copyBytes, end-off)); off < end; {
		p := buf[:min(int64(len(buf)), end-off)]
		if err := m.readPadded(p, off); err != nil {
			return err
		}
		if len(bytes.TrimLeft(p, "\x00")) > 0 {
			clear(p)
			if err := c.WriteAt(0, p, off); err != nil {
				return err
			}
		}
		off += int64(len(p))
	}
	return nil
}

// readPadded reads file bytes; past the end of the file are zeroes.
func (m *image) readPadded(p []byte, off int64) error {
	n := min(max(m.fileBytes-off, 0), int64(len(p)))
	clear(p[n:])
	return readFull(m.f, p[:n], off)
}

// appendEntries writes the entries that h has more, behind those that are there.
func (m *image) appendEntries(c *engine.Commit, h *header) error {
	next := m.room.next
	if err := m.writeEntries(c, h, m.h.blocks(), &next); err != nil {
		return err
	}
	return m.coverNew(c, h, next)
}

// writeEntries writes entries of new guest blocks, from the first on, into h's map. In a
// static image they get blocks, from next on.
func (m *image) writeEntries(c *engine.Commit, h *header, first int64, next *int64) error {
	buf := make([]byte, 0, min(scanBytes, (h.blocks()-first)*entryBytes))
	for block := first; block < h.blocks(); {
		buf = buf[:0]
		for ; len(buf) < cap(buf) && block < h.blocks(); block++ {
			entry := uint32(entryFree)
			if h.kind() == typeStatic {
				entry = uint32(*next)
				*next++
			}
			buf = binary.LittleEndian.AppendUint32(buf, entry)
		}
		if err := c.WriteAt(0, buf, h.mapOffset()+first*entryBytes); err != nil {
			return err
		}
		first = block
	}
	return nil
}

// coverNew makes the file long enough for next blocks, and has h count them.
func (m *image) coverNew(c *engine.Commit, h *header, next int64) error {
	h.setAllocated(max(next, 0))
	if end := h.dataOffset() + next*m.stride; end > m.fileBytes {
		if err := c.Truncate(0, end); err != nil {
			return err
		}
		m.fileBytes = end
	}
	return nil
}

// moveMap writes a larger block map to where the first blocks are, which go to the end of
// the file first, and enters its place into h. Blocks are counted from behind the map, so
// all entries become smaller.
func (m *image) moveMap(c *engine.Commit, h *header) error {
	need := h.blocks() * entryBytes * mapReserve
	given := (need-1)/m.stride + 1 // blocks given up for the map
	h.setU32(fieldMapOffset, uint32(m.h.dataOffset()))
	if at := m.endOf(given); at > 1<<32-sectorBytes {
		return unsupported("its block map would end at %#x, and can end at %#x at most", at, int64(1<<32-sectorBytes))
	}
	h.setU32(fieldDataOffset, uint32(m.endOf(given)))
	if err := m.moveAway(c, given); err != nil {
		return err
	}
	err := m.eachChunk(0, m.h.blocks(), func(first int64, p []byte) error {
		for i := 0; i < len(p); i += entryBytes {
			if entry := binary.LittleEndian.Uint32(p[i:]); entry < entryZero {
				binary.LittleEndian.PutUint32(p[i:], entry-uint32(given))
			}
		}
		return c.WriteAt(0, p, h.mapOffset()+first*entryBytes)
	})
	if err != nil {
		return err
	}
	next := max(m.room.next, m.h.allocated(), given) - given
	if err := m.writeEntries(c, h, m.h.blocks(), &next); err != nil {
		return err
	}
	return m.coverNew(c, h, next)
}

// moveAway moves the blocks below an index behind all others, durably.
func (m *image) moveAway(c *engine.Commit, below int64) error {
	next := max(m.room.next, below)
	return m.move(c, func(index int64) int64 {
		if index >= below {
			return index
		}
		next++
		return next - 1
	})
}

// move gives blocks other places: to returns, for each index that an entry names, in the
// order of entries, where the block is to be. Places that change must be unused. The data
// is durable before the entries change, and the count covers them before they do.
func (m *image) move(c *engine.Commit, to func(index int64) int64) error {
	type step struct{ from, to int64 }
	var steps []step
	moved := map[int64]int64{}
	end := m.h.allocated()
	err := m.eachEntry(0, m.h.blocks(), func(_ int64, entry uint32) error {
		index := int64(entry)
		if _, done := moved[index]; done || index >= m.indexLimit {
			return nil // shared, in an image that is being repaired; or free, zero, bad
		}
		if place := to(index); place != index {
			steps = append(steps, step{index, place})
			moved[index] = place
			end = max(end, place+1)
		}
		return nil
	})
	if err != nil || len(steps) == 0 {
		return err
	}
	for _, s := range steps {
		if err := m.copyBlock(c, s.from, s.to); err != nil {
			return err
		}
	}
	if err := c.Sync(); err != nil {
		return err
	}
	if end > m.h.allocated() {
		h := m.h
		h.setAllocated(end)
		if err := m.writeHeader(c, h); err != nil {
			return err
		}
	}
	return m.rewriteEntries(c, moved)
}

// rewriteEntries changes the entries of blocks that were moved, durably.
func (m *image) rewriteEntries(c *engine.Commit, moved map[int64]int64) error {
	err := m.eachChunk(0, m.h.blocks(), func(first int64, p []byte) error {
		changed := false
		for i := 0; i < len(p); i += entryBytes {
			if place, ok := moved[int64(binary.LittleEndian.Uint32(p[i:]))]; ok {
				binary.LittleEndian.PutUint32(p[i:], uint32(place))
				changed = true
			}
		}
		if !changed {
			return nil
		}
		return c.WriteAt(0, p, m.entryOff(first))
	})
	if err != nil {
		return err
	}
	return c.Sync()
}

// copyBlock copies a block, with its extra bytes, to a place that nothing refers to.
func (m *image) copyBlock(c *engine.Commit, from, to int64) error {
	buf := make([]byte, min(copyBytes, m.stride))
	source, target := m.endOf(from), m.endOf(to)
	m.touched = max(m.touched, to+1)
	for done := int64(0); done < m.stride; {
		p := buf[:min(int64(len(buf)), m.stride-done)]
		if err := m.readPadded(p, source+done); err != nil {
			return err
		}
		if err := c.WriteAt(0, p, target+done); err != nil {
			return err
		}
		done += int64(len(p))
	}
	m.fileBytes = max(m.fileBytes, m.endOf(to+1))
	m.limitIndex()
	return nil
}

// shrink takes the blocks past a size out of the map, moves those that stay together, and
// cuts the file.
func (m *image) shrink(c *engine.Commit, size int64) error {
	h := m.h
	h.setDiskSize(size)
	h.setBlocks(h.blocksOf(size))
	if err := m.clearTail(c, size); err != nil {
		return err
	}
	if err := m.freeEntries(c, h.blocks()); err != nil {
		return err
	}
	count, err := m.pack(c)
	if err != nil {
		return err
	}
	h.setAllocated(count)
	if err := m.writeHeader(c, h); err != nil {
		return err
	}
	m.adoptHeader()
	return m.findRoom(c)
}

// freeEntries frees the entries from a guest block on, durably.
func (m *image) freeEntries(c *engine.Commit, from int64) error {
	err := m.eachChunk(from, m.h.blocks(), func(first int64, p []byte) error {
		free := bytes.Repeat([]byte{0xff}, len(p))
		if bytes.Equal(free, p) {
			return nil
		}
		return c.WriteAt(0, free, m.entryOff(first))
	})
	if err != nil {
		return err
	}
	return c.Sync()
}

// pack moves the last blocks of the file into unused places before them, so that the
// blocks in use are the first ones, and returns how many they are.
func (m *image) pack(c *engine.Commit) (int64, error) {
	for {
		u, err := m.scan()
		if err != nil || u.end == u.count {
			return u.count, err
		}
		var places []int64
		for index := range u.free() {
			if index >= u.count {
				break
			}
			places = append(places, index)
		}
		err = m.move(c, func(index int64) int64 {
			if index < u.count || len(places) == 0 {
				return index
			}
			place := places[0]
			places = places[1:]
			return place
		})
		if err != nil {
			return 0, err
		}
	}
}
