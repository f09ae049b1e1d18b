package vhd

import (
	"encoding/binary"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// pack moves the last blocks of the file into gaps before them, where they fit, and returns
// what is in use then. The image is not being used, or nobody is between a lookup and the
// data. Copies are durable before entries name them, and what they were made from stays.
func (m *image) pack(c *engine.Commit) (*usage, error) {
	u, err := m.scan()
	if err != nil || len(u.gaps) == 0 {
		return u, err
	}
	places, err := m.places(func(int64) error { return nil }, func(int64, uint32) {})
	if err != nil {
		return nil, err
	}
	sortPlaces(places)
	var moved []place
	for slot := range m.freeSlots(u) {
		if len(places) == 0 || places[len(places)-1].slot() < slot {
			break
		}
		last := places[len(places)-1]
		places = places[:len(places)-1]
		if err := m.copySlot(c, last.slot(), slot); err != nil {
			return nil, err
		}
		moved = append(moved, place{uint32(slot / sectorBytes), last.number})
	}
	if err := c.Sync(); err != nil {
		return nil, err
	}
	for _, p := range moved {
		if err := m.writeEntry(c, int64(p.number), p.slot()); err != nil {
			return nil, err
		}
	}
	if err := c.Sync(); err != nil {
		return nil, err
	}
	m.layer.Tables.Forget() // bitmaps have moved
	return m.scan()
}

// copySlot copies a block and its bitmap to a place that nothing refers to.
func (m *image) copySlot(c *engine.Commit, from, to int64) error {
	buf := make([]byte, min(copyBytes, m.slotBytes()))
	for done := int64(0); done < m.slotBytes(); {
		p := buf[:min(int64(len(buf)), m.slotBytes()-done)]
		clear(p)
		if n := min(int64(len(p)), max(m.fileBytes-from-done, 0)); n > 0 {
			if err := readFull(m.f, p[:n], from+done); err != nil {
				return err
			}
		}
		if err := c.WriteAt(0, p, to+done); err != nil {
			return err
		}
		done += int64(len(p))
	}
	return nil
}

// writeEntry changes the place of a block in the table.
func (m *image) writeEntry(c *engine.Commit, number, slot int64) error {
	return c.WriteAt(0, binary.BigEndian.AppendUint32(nil, uint32(slot/sectorBytes)), m.entryOff(number))
}
