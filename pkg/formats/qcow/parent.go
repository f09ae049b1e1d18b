package qcow

import (
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// SetParent changes the backing file's name, for which the header is written once. The format
// says nothing else about the backing file.
func (m *image) SetParent(c *engine.Commit, parent *engine.Parent) error {
	if err := m.setParent(c, parent); err != nil {
		return fmt.Errorf("qcow: change the backing file of %s: %w", m.layer.Name, err)
	}
	return nil
}

func (m *image) setParent(c *engine.Commit, parent *engine.Parent) error {
	h := m.header
	h.backingFileOffset, h.backingFileSize = 0, 0
	old := span{int64(m.header.backingFileOffset), int64(m.header.backingFileOffset) + int64(m.header.backingFileSize)}
	if parent == nil {
		if err := m.switchHeader(c, h); err != nil {
			return err
		}
		m.layer.Parent = nil
		m.noteFixed()
		m.freeFixed(old)
		return nil
	}
	link, err := backingName(m.layer.Name, parent.Name)
	if err != nil {
		return err
	}
	h.backingFileSize = uint32(len(link))
	if headerBytes+len(link) <= int(min(sectorBytes, h.l1TableOffset)) {
		h.backingFileOffset = headerBytes
		err = m.switchFirstSector(c, h, link)
	} else {
		err = m.switchFarName(c, h, link)
	}
	if err != nil {
		return err
	}
	m.layer.Parent = &engine.ParentLink{Name: parent.Name}
	m.noteFixed()
	m.freeFixed(old)
	return nil
}

// switchFarName writes a name that does not fit beside the header to space of its own, and
// then the header.
func (m *image) switchFarName(c *engine.Commit, h header, link []byte) error {
	length := m.wholeClusters(int64(len(link)))
	place, err := m.space.Alloc(length, length)
	if err != nil {
		return err
	}
	h.backingFileOffset = uint64(place.Off)
	err = c.WriteAt(0, link, place.Off)
	if err == nil {
		err = m.switchHeader(c, h)
	}
	if err != nil {
		m.space.Free(place.Off, place.Len, false)
		return err
	}
	m.fileEnd = max(m.fileEnd, place.Off+place.Len)
	return nil
}

// backingName returns what the file name says of a backing file.
func backingName(name, parent string) ([]byte, error) {
	link := vfs.RelativeLink(name, parent)
	if len(link) > maxNameBytes {
		return nil, invalid("the backing file's name has %d bytes, want at most %d", len(link), maxNameBytes)
	}
	return []byte(link), nil
}
