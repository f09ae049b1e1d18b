package vhdx

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// SetParent changes the parent locator. The new one is written to a part of the metadata
// region that nothing refers to; then one log entry changes the metadata table and the
// file parameters.
func (m *image) SetParent(c *engine.Commit, parent *engine.Parent) error {
	if err := m.setParent(c, parent); err != nil {
		return fmt.Errorf("vhdx: change the parent of %s: %w", m.layer.Name, err)
	}
	return nil
}

func (m *image) setParent(c *engine.Commit, parent *engine.Parent) error {
	changed := *m.meta
	changed.items = slices.DeleteFunc(slices.Clone(m.meta.items), func(it item) bool { return it.id == itemParentLocator })
	changed.locator, changed.hasParent = nil, parent != nil
	if parent == nil {
		if err := m.completeBlocks(c); err != nil {
			return err
		}
	} else if err := m.addLocator(c, &changed, parent); err != nil {
		return err
	}
	move, err := m.batForParent(c, changed.hasParent)
	if err != nil {
		return err
	}
	edits := append(m.moveEdits(move), edit{m.meta.at, encodeTable(changed.items)}, changed.paramsEdit())
	if err := m.edit(c, edits); err != nil {
		return errors.Join(err, m.undoMove(c, move))
	}
	m.finishMove(move)
	hadParent := m.meta.hasParent
	m.meta = &changed
	if hadParent && !changed.hasParent {
		m.dropBitmaps(c)
	}
	m.tables.Forget()
	m.layer.Parent, err = m.parentLink(m.layer.Name)
	return err
}

// dropBitmaps clears the entries of sector bitmaps, which no longer count, and gives their
// places back. If that fails, a check finds them.
func (m *image) dropBitmaps(c *engine.Commit) {
	var freed []int64
	for chunk := range m.chunks(m.meta.sizeBytes) {
		at, err := m.bitmap(chunk)
		if err != nil || at == 0 {
			continue
		}
		if c.WriteAt(0, make([]byte, batEntryBytes), m.entryAt(m.bitmapIndex(chunk))) != nil {
			return
		}
		freed = append(freed, at)
	}
	if c.Sync() != nil {
		return
	}
	for _, at := range m.claims.bitmaps {
		freed = append(freed, at)
	}
	m.claims.bitmaps = nil
	for _, at := range freed {
		m.release(span{at, at + bitmapBytes})
	}
}

// addLocator writes the locator of a parent, and enters it into the changed metadata.
func (m *image) addLocator(c *engine.Commit, changed *metadata, parent *engine.Parent) (err error) {
	if changed.locator, err = locatorFor(m.layer.Name, parent); err != nil {
		return err
	}
	if sector := parent.Layer.Codec.(*image).meta.logicalSector; sector != m.meta.logicalSector { // locatorFor has looked
		return unsupported("%s has sectors of %d bytes, want %d", parent.Name, sector, m.meta.logicalSector)
	}
	p, err := encodeLocator(changed.locator)
	if err != nil {
		return err
	}
	at, err := m.meta.gap(int64(len(p)))
	if err != nil {
		return err
	}
	if len(changed.items) >= maxMetadataEntries {
		return unsupported("the metadata table is full")
	}
	changed.items = append(changed.items, item{id: itemParentLocator, off: uint32(at), length: uint32(len(p)), flags: itemRequired})
	return c.WriteAt(0, p, m.meta.at+at)
}

// gap returns where in the metadata region n bytes are free, apart from the sectors that
// hold items: those are only changed through the log.
func (m *metadata) gap(n int64) (int64, error) {
	used := []span{{0, metadataTableBytes}}
	for _, it := range m.items {
		if it.length > 0 {
			used = append(used, span{int64(it.off) &^ (logSectorBytes - 1), alignUp(int64(it.off)+int64(it.length), logSectorBytes)})
		}
	}
	slices.SortFunc(used, func(a, b span) int { return int(min(max(a.off-b.off, -1), 1)) })
	at := int64(0)
	for _, s := range used {
		if s.off-at >= n && at > 0 {
			return at, nil
		}
		at = max(at, s.end)
	}
	if m.length-at < n {
		return 0, unsupported("the metadata region of %d bytes has no room for %d more", m.length, n)
	}
	return at, nil
}

// paramsEdit returns the change of the file parameters.
func (m *metadata) paramsEdit() edit {
	flags := uint32(0)
	if m.leaveAllocated {
		flags |= paramLeaveAllocated
	}
	if m.hasParent {
		flags |= paramHasParent
	}
	p := binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, uint32(m.blockBytes)), flags)
	return edit{m.at + int64(m.item(itemFileParameters).off), p}
}

// batForParent makes room for the last chunk's bitmap in the BAT of an image that gets a
// parent, and sees that the entries of bitmaps, which did not count, are zero.
func (m *image) batForParent(c *engine.Commit, hasParent bool) (*region, error) {
	if !hasParent || m.meta.hasParent {
		return nil, nil
	}
	chunks := m.chunks(m.meta.sizeBytes)
	move, err := m.moveBAT(c, chunks*(m.chunkRatio+1)*batEntryBytes)
	if err != nil {
		return nil, err
	}
	bat := m.batAtAfter(move)
	// Behind the last block, and between the chunks.
	from := bat + (m.payloadIndex(m.blocks(m.meta.sizeBytes)-1)+1)*batEntryBytes
	err = m.zeroFile(c, from, bat+chunks*(m.chunkRatio+1)*batEntryBytes)
	for chunk := int64(0); chunk < chunks && err == nil; chunk++ {
		at := bat + m.bitmapIndex(chunk)*batEntryBytes
		err = m.zeroFile(c, at, at+batEntryBytes)
	}
	if err != nil {
		return nil, errors.Join(err, m.undoMove(c, move))
	}
	return move, nil
}

// completeBlocks makes partially present blocks fully present, for an image that will have
// no parent: the sectors that they lack read as zeroes by now, and become that.
func (m *image) completeBlocks(c *engine.Commit) error {
	if !m.meta.hasParent {
		return nil
	}
	for block := range m.blocks(m.meta.sizeBytes) {
		e, err := m.payload(block)
		if err != nil {
			return err
		}
		if e.state() != statePartial {
			continue
		}
		if err := m.zeroAbsent(c, block, e); err != nil {
			return err
		}
		if err := m.tables.Prepare(0, m.entryAt(m.payloadIndex(block)), batEntryBytes); err != nil {
			return err
		}
		if err := m.writeEntry(m.payloadIndex(block), newEntry(stateFull, e.off())); err != nil {
			return err
		}
	}
	// The zeroes are durable before the table says that they count.
	if err := c.Sync(); err != nil {
		return err
	}
	return c.CommitTables()
}

// zeroAbsent writes zeroes where a block has sectors that are not present.
func (m *image) zeroAbsent(c *engine.Commit, block int64, e batEntry) error {
	for in := int64(0); in < m.meta.blockBytes; {
		run, err := m.lookupPartial(block, e, in, engine.Run{Len: m.meta.blockBytes - in})
		if err != nil {
			return err
		}
		if run.State == engine.Absent {
			if err := m.zeroFile(c, e.off()+in, e.off()+in+run.Len); err != nil {
				return err
			}
		}
		in += run.Len
	}
	return nil
}
