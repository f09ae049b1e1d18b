package qcow2

import (
	"crypto/rand"
	"errors"
	"fmt"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

const identityBytes = 16

func newIdentity() []byte {
	id := make([]byte, identityBytes)
	_, _ = rand.Read(id) // never fails
	return id
}

// Begin prepares the image for its first change: it makes the refcounts right if they may
// not be, marks what our writing makes outdated, and gives the image another identity.
func (m *image) Begin(c *engine.Commit) error {
	if err := m.begin(c); err != nil {
		return fmt.Errorf("qcow2: %w", err)
	}
	return nil
}

func (m *image) begin(c *engine.Commit) error {
	if m.header.incompatible&incompatCorrupt != 0 {
		return corrupt("%s is marked as corrupt: it can be written to after it has been repaired (image check --repair)", m.layer.Name)
	}
	if err := m.loadRefTable(); err != nil {
		return err
	}
	if m.header.incompatible&incompatDirty != 0 {
		if err := m.rebuildRefcounts(c); err != nil {
			return fmt.Errorf("refcounts of an image that was not closed: %w", err)
		}
	}
	h := m.header.clone()
	h.incompatible &^= incompatDirty
	h.autoclear &= knownAutoclear
	if err := m.outdateBitmaps(c, h, false); err != nil {
		return err
	}
	h.setExtension(extIdentity, newIdentity())
	err := m.replaceHeader(c, h)
	if !errors.Is(err, errNoRoom) {
		return err
	}
	// Another program has left no room in the header. Without an identity, a journal is
	// replayed onto nothing.
	h = m.header.clone()
	h.incompatible &^= incompatDirty
	h.autoclear &= knownAutoclear
	return m.replaceFields(c, h)
}

// clone returns a copy that can be changed.
func (h *header) clone() *header {
	c := *h
	c.extensions = slices.Clone(h.extensions)
	return &c
}

// errNoRoom says that a header cannot be replaced by another one so that a crash leaves the
// old or the new one.
var errNoRoom = unsupported("header and extensions need more room than one sector of the first cluster")

// replaceHeader replaces header, extensions and backing file name, durably, so that a crash
// leaves the old or the new ones: all but the name are in the first sector, which no crash
// tears, and the name is first written to where nothing is.
func (m *image) replaceHeader(c *engine.Commit, h *header) error {
	h.backingFileOffset, h.backingFileSize = 0, 0
	head := h.encode()
	if len(head) > sectorBytes {
		h.setExtension(extFeatureNames, nil) // optional, and long
		head = h.encode()
	}
	if len(head) > sectorBytes {
		return errNoRoom
	}
	if h.backingFile != "" {
		off, ok := m.namePlace(h, int64(len(head)))
		if !ok {
			return errNoRoom
		}
		h.backingFileOffset, h.backingFileSize = uint64(off), uint32(len(h.backingFile))
		head = h.encode()
	}
	sector := make([]byte, min(sectorBytes, m.clusterBytes))
	copy(sector, head)
	if name := h.backingFile; name != "" {
		if in := int(h.backingFileOffset); in+len(name) <= len(sector) {
			copy(sector[in:], name)
		} else if h.backingFileOffset != m.header.backingFileOffset || name != m.header.backingFile {
			if err := c.WriteAt(0, []byte(name), int64(in)); err != nil {
				return err
			}
		}
	}
	return m.writeHeaderSector(c, h, sector)
}

// namePlace returns where the backing file's name can be, so that writing it there harms
// nothing that is in use; head is how long header and extensions are.
func (m *image) namePlace(h *header, head int64) (int64, bool) {
	n := int64(len(h.backingFile))
	if head+n <= sectorBytes {
		return head, true
	}
	old := m.header
	oldEnd := int64(old.backingFileOffset) + int64(old.backingFileSize)
	if h.backingFile == old.backingFile && int64(old.backingFileOffset) >= sectorBytes {
		return int64(old.backingFileOffset), true
	}
	// The old extensions may reach past the first sector.
	oldHead := int64(len(old.encode()))
	for off := int64(sectorBytes); off+n <= m.clusterBytes && off <= 8*sectorBytes; off += sectorBytes {
		overlapsName := old.backingFileSize != 0 && off < oldEnd && int64(old.backingFileOffset) < off+n
		if !overlapsName && off >= oldHead {
			return off, true
		}
	}
	return 0, false
}

// replaceFields replaces fields of the header alone.
func (m *image) replaceFields(c *engine.Commit, h *header) error {
	sector := make([]byte, min(sectorBytes, m.clusterBytes))
	if err := readFull(m.f, sector, 0); err != nil {
		return err
	}
	fixed := min(int(h.headerLength), headerBytesV3)
	copy(sector, h.encode()[:fixed])
	return m.writeHeaderSector(c, h, sector)
}

// writeHeaderSector makes everything before durable, then the header.
func (m *image) writeHeaderSector(c *engine.Commit, h *header, sector []byte) error {
	if err := c.Sync(); err != nil {
		return err
	}
	if err := c.WriteAt(0, sector, 0); err != nil {
		return err
	}
	if err := c.Sync(); err != nil {
		return err
	}
	m.header = h
	if m.headerCached {
		m.tables.Forget()
		m.headerCached = false
	}
	return nil
}
