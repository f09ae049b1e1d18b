package vhdx

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// Resize gives the image another size. What is needed for it, a longer BAT at another
// place or the blocks of a fixed image, is made where nothing refers to it; then one log
// entry changes the size and, if need be, the region tables.
func (m *image) Resize(c *engine.Commit, size int64) error {
	if err := m.resize(c, size); err != nil {
		return fmt.Errorf("vhdx: resize %s: %w", m.layer.Name, err)
	}
	return nil
}

func (m *image) resize(c *engine.Commit, size int64) error {
	if size <= 0 || size > maxSizeBytes || size%m.meta.logicalSector != 0 {
		return invalid("size %d, want a multiple of the sector size %d, at most %d", size, m.meta.logicalSector, int64(maxSizeBytes))
	}
	if size > m.meta.sizeBytes {
		return m.grow(c, size)
	}
	return m.shrink(c, size)
}

func (m *image) grow(c *engine.Commit, size int64) error {
	if err := m.clearTail(c); err != nil {
		return err
	}
	move, err := m.moveBAT(c, m.entryCount(size)*batEntryBytes)
	if err != nil {
		return err
	}
	if err := m.addBlocks(c, m.batAtAfter(move), size); err != nil {
		return errors.Join(err, m.undoMove(c, move))
	}
	edits := append(m.moveEdits(move), m.sizeEdit(size))
	if err := m.edit(c, edits); err != nil {
		return errors.Join(err, m.undoMove(c, move))
	}
	m.finishMove(move)
	m.meta.sizeBytes = size
	m.tables.Forget()
	return nil
}

// clearTail zeroes what the last block holds past the guest size, and clears the bits of
// its sectors there: it is about to become visible.
func (m *image) clearTail(c *engine.Commit) error {
	size := m.meta.sizeBytes
	block := size >> m.blockShift
	in := size - block<<m.blockShift
	if in == 0 {
		return nil
	}
	e, err := m.payload(block)
	if err != nil {
		return err
	}
	switch e.state() {
	case stateFull:
		return m.zeroFile(c, e.off()+in, e.off()+m.meta.blockBytes)
	case statePartial:
		return m.clearTailBits(c, block, in>>m.sectorShift)
	}
	return nil
}

func (m *image) clearTailBits(c *engine.Commit, block, first int64) error {
	bitmap, err := m.bitmap(block / m.chunkRatio)
	if err != nil || bitmap == 0 {
		return err
	}
	all := make([]byte, m.blockBitmapBytes())
	at := m.bitmapOf(block, bitmap)
	if err := m.tables.Read(0, at, all); err != nil {
		return err
	}
	was := bytes.Clone(all)
	setBits(all, first, int64(len(all))*8, false)
	if bytes.Equal(was, all) {
		return nil
	}
	if err := m.tables.Write(stageTables, 0, at, all); err != nil {
		return err
	}
	return c.CommitTables()
}

// zeroFile makes a stretch of the file read as zeroes, where it does not.
func (m *image) zeroFile(c *engine.Commit, off, end int64) error {
	p := make([]byte, min(chunkBytes, end-off))
	for off < end {
		start, _, err := m.file.NextData(off)
		if err == io.EOF || err == nil && start >= end {
			return nil
		}
		if err == nil {
			off = max(off, start)
		}
		n := min(int64(len(p)), end-off)
		if err := readPadded(m.file, p[:n], off); err != nil {
			return err
		}
		if len(bytes.TrimLeft(p[:n], "\x00")) > 0 {
			clear(p[:n])
			if err := c.WriteAt(0, p[:n], off); err != nil {
				return err
			}
		}
		off += n
	}
	return nil
}

// moveBAT copies the BAT to where it can have need bytes and more, if it cannot here; nil
// if it can. Nothing refers to the copy yet.
func (m *image) moveBAT(c *engine.Commit, need int64) (*region, error) {
	old := m.regions[findRegion(m.regions, batRegion)]
	if need <= int64(old.length) {
		return nil, nil
	}
	length := alignUp(need+need/4, mib)
	place, err := m.space.Alloc(length, length)
	if err != nil {
		return nil, err
	}
	m.fileEnd = max(m.fileEnd, place.Off+place.Len)
	moved := old
	moved.off, moved.length = uint64(place.Off), uint32(length)
	err = m.copyFile(c, old.span(), place.Off)
	if err == nil && !place.Zeroed {
		err = m.zeroFile(c, place.Off+int64(old.length), place.Off+length)
	}
	if err != nil {
		return nil, errors.Join(err, m.undoMove(c, &moved))
	}
	return &moved, nil
}

// undoMove gives back the space of a BAT that was not moved after all. It may have been, if
// the log says so.
func (m *image) undoMove(c *engine.Commit, move *region) error {
	if move != nil && !c.Lost() {
		m.release(move.span())
	}
	return nil
}

// release frees a stretch of the file that nothing durable refers to any more, and gives
// its space back if the file system can.
func (m *image) release(s span) {
	err := m.file.PunchHole(s.off, s.end-s.off)
	m.space.Free(s.off, s.end-s.off, err == nil)
}

// batAtAfter returns where the BAT is after a move.
func (m *image) batAtAfter(move *region) int64 {
	if move != nil {
		return int64(move.off)
	}
	return m.batAt()
}

// copyFile copies a stretch of the file that holds tables, all of which are committed.
func (m *image) copyFile(c *engine.Commit, from span, to int64) error {
	p := make([]byte, chunkBytes)
	for off := from.off; off < from.end; off += int64(len(p)) {
		p = p[:min(chunkBytes, from.end-off)]
		if err := readPadded(m.file, p, off); err != nil {
			return err
		}
		if err := c.WriteAt(0, p, to+off-from.off); err != nil {
			return err
		}
	}
	return nil
}

// moveEdits returns the changes of both region tables that make a moved BAT the BAT.
func (m *image) moveEdits(move *region) []edit {
	if move == nil {
		return nil
	}
	regions := slices.Clone(m.regions)
	regions[findRegion(regions, batRegion)] = *move
	table := encodeRegions(regions)
	return []edit{{regionTableAt[0], table}, {regionTableAt[1], table}}
}

// finishMove uses a moved BAT; the old one's place is free.
func (m *image) finishMove(move *region) {
	if move == nil {
		return
	}
	old := &m.regions[findRegion(m.regions, batRegion)]
	was := old.span()
	*old = *move
	m.reserved = slices.DeleteFunc(slices.Clone(m.reserved), func(s span) bool { return s == was })
	m.reserve(move.span())
	m.release(was)
}

// addBlocks sees to the entries of the blocks that a greater size adds: in a fixed image
// they get their places, in others they are zero. They do not count until the size does.
func (m *image) addBlocks(c *engine.Commit, bat, size int64) error {
	first, end := m.blocks(m.meta.sizeBytes), m.blocks(size)
	if first == end {
		return nil
	}
	for block := first; block < end; {
		stop := min(end, (block/m.chunkRatio+1)*m.chunkRatio)
		from, to := bat+m.payloadIndex(block)*batEntryBytes, bat+(m.payloadIndex(stop-1)+1)*batEntryBytes
		if err := m.zeroFile(c, from, to); err != nil {
			return err
		}
		chunk := block / m.chunkRatio
		if block = stop; m.meta.hasParent && chunk < m.chunks(m.meta.sizeBytes) || !m.meta.hasParent && block == end {
			continue // it has a bitmap, or needs no entry for one
		}
		at := bat + m.bitmapIndex(chunk)*batEntryBytes
		if err := m.zeroFile(c, at, at+batEntryBytes); err != nil {
			return err
		}
	}
	if m.isFixed() {
		return m.addFixedBlocks(c, bat, first, end)
	}
	return nil
}

func (m *image) addFixedBlocks(c *engine.Commit, bat, first, end int64) error {
	length := (end - first) << m.blockShift
	place, err := m.space.Alloc(length, length)
	if err != nil {
		return err
	}
	m.fileEnd = max(m.fileEnd, place.Off+place.Len)
	if !place.Zeroed {
		if err := m.zeroFile(c, place.Off, place.Off+length); err != nil {
			return err
		}
	}
	now := m.batAt()
	err = m.writeEntries(context.Background(), first, end, place.Off, func(p []byte, at int64) (int, error) {
		return len(p), c.WriteAt(0, p, at-now+bat)
	})
	if err != nil {
		m.release(span{place.Off, place.Off + length})
	}
	return err
}

// sizeEdit returns the change of the metadata that another size is.
func (m *image) sizeEdit(size int64) edit {
	return edit{m.meta.at + int64(m.meta.item(itemVirtualSize).off), binary.LittleEndian.AppendUint64(nil, uint64(size))}
}

// edit is a change of bytes of the file.
type edit struct {
	off  int64
	data []byte
}

// edit makes changes of header-section tables and metadata durable, all or none, through
// one log entry.
func (m *image) edit(c *engine.Commit, edits []edit) error {
	pages := map[int64][]byte{}
	for _, e := range edits {
		for at := e.off &^ (logSectorBytes - 1); at < e.off+int64(len(e.data)); at += logSectorBytes {
			if err := m.editPage(pages, at, e); err != nil {
				return err
			}
		}
	}
	var changed []page
	for off, data := range pages {
		changed = append(changed, page{off, data})
	}
	slices.SortFunc(changed, func(a, b page) int { return int(min(max(a.off-b.off, -1), 1)) })
	if int64(len(changed)) > entryPages(int64(m.header.logLength)) {
		return unsupported("change %d sectors at once with a log of %d bytes", len(changed), m.header.logLength)
	}
	// What the edits refer to comes first, and the file's length.
	if err := c.Sync(); err != nil {
		return err
	}
	if err := m.syncLength(); err != nil {
		return err
	}
	if err := m.writeLogged(c, changed); err != nil {
		return err
	}
	return c.Sync()
}

// editPage puts the part of an edit that lies in the sector at into pages, unless it
// changes nothing there.
func (m *image) editPage(pages map[int64][]byte, at int64, e edit) error {
	p := pages[at]
	if p == nil {
		p = make([]byte, logSectorBytes)
		if err := readPadded(m.file, p, at); err != nil {
			return err
		}
	}
	from, to := max(at, e.off), min(at+logSectorBytes, e.off+int64(len(e.data)))
	if part := e.data[from-e.off : to-e.off]; !bytes.Equal(p[from-at:to-at], part) {
		copy(p[from-at:], part)
		pages[at] = p
	}
	return nil
}

// shrink changes the size first: what is past it does not count from then on, and goes.
func (m *image) shrink(c *engine.Commit, size int64) error {
	if err := m.edit(c, []edit{m.sizeEdit(size)}); err != nil {
		return err
	}
	was := m.meta.sizeBytes
	m.meta.sizeBytes = size
	freed, err := m.dropEntries(c, size, was)
	if err == nil {
		err = c.Sync()
	}
	m.tables.Forget()
	if err != nil {
		return nil // the size has changed; a check finds the space that is lost
	}
	for _, s := range freed {
		m.release(s)
	}
	return nil
}

// dropEntries clears the entries past a size that a disk of was bytes had, and returns the
// places that they held: blocks of fixed images, sector bitmaps.
func (m *image) dropEntries(c *engine.Commit, size, was int64) (freed []span, err error) {
	first := m.entryCount(size)
	if !m.meta.hasParent {
		first = m.payloadIndex(m.blocks(size)-1) + 1
	}
	last := m.payloadIndex(m.blocks(was)-1) + 1
	if m.meta.hasParent {
		last = m.chunks(was) * (m.chunkRatio + 1)
	}
	p := make([]byte, chunkBytes)
	for index := first; index < last; {
		p = p[:min(chunkBytes, (last-index)*batEntryBytes)]
		if err := readPadded(m.file, p, m.entryAt(index)); err != nil {
			return nil, err
		}
		used := false
		for i := 0; i < len(p); i += batEntryBytes {
			e := batEntry(binary.LittleEndian.Uint64(p[i:]))
			used = used || e != 0
			if e.state() != stateFull || e.off() < headerSection {
				continue
			}
			n := m.meta.blockBytes
			if (index+int64(i/batEntryBytes))%(m.chunkRatio+1) == m.chunkRatio {
				n = bitmapBytes
			}
			if last := len(freed) - 1; last >= 0 && freed[last].end == e.off() {
				freed[last].end += n
			} else {
				freed = append(freed, span{e.off(), e.off() + n})
			}
		}
		if used {
			if err := c.WriteAt(0, make([]byte, len(p)), m.entryAt(index)); err != nil {
				return nil, err
			}
		}
		index += int64(len(p) / batEntryBytes)
	}
	return freed, nil
}
