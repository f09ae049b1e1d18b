package qcow2

import (
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// parentLink returns the link to the image that this one stands on, nil if it is a base.
// Nothing in the file says which contents the parent had: there is nothing to verify.
func parentLink(name string, h *header) (*engine.ParentLink, error) {
	if h.backingFile == "" {
		return nil, nil
	}
	parent, err := vfs.Resolve(name, h.backingFile)
	if err != nil {
		return nil, fmt.Errorf("backing file: %w", err)
	}
	format, _ := h.extension(extBackingFormat)
	return &engine.ParentLink{Name: parent, Format: string(format)}, nil
}

// SetParent changes the backing file and its format in the header.
func (m *image) SetParent(c *engine.Commit, parent *engine.Parent) error {
	h := m.header.clone()
	h.backingFile = ""
	h.setExtension(extBackingFormat, nil)
	if parent != nil {
		if h.rawData() {
			return unsupported("qcow2: an image with a raw external data file cannot stand on another")
		}
		h.backingFile = vfs.RelativeLink(m.layer.Name, parent.Name)
		if n := len(h.backingFile); n > maxBackingName {
			return unsupported("qcow2: the parent's name has %d bytes, want at most %d", n, maxBackingName)
		}
		h.setExtension(extBackingFormat, []byte(parent.Layer.Format))
	}
	if err := c.CommitTables(); err != nil {
		return fmt.Errorf("qcow2: %w", err)
	}
	if err := m.replaceHeader(c, h); err != nil {
		return fmt.Errorf("qcow2: change the backing file: %w", err)
	}
	link, err := parentLink(m.layer.Name, h)
	if err != nil {
		return fmt.Errorf("qcow2: %w", err)
	}
	m.layer.Parent = link
	return nil
}
