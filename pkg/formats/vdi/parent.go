package vdi

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const (
	// maxCandidates bounds how many files are looked at for a parent.
	maxCandidates = 1024
	// hintPrefix starts the comment of images that we make on a parent. What follows is
	// a relative link to it, for whoever reads the comment, and for finding a parent that
	// is in another directory or has copies. It is not trusted: the UUIDs decide.
	hintPrefix = "parent: "
)

// parentHint returns the link in the comment, "" if there is none.
func (h *header) parentHint() string {
	link, ok := strings.CutPrefix(h.description(), hintPrefix)
	if !ok {
		return ""
	}
	return link
}

// candidate says how well a file fits as a parent.
type candidate int

const (
	unfit  candidate = iota
	sameID           // the image that is wanted, with other contents
	exact
)

// findParent returns the name of the image that h, the header of name, stands on. The
// format has no name for it, so it is looked for by its UUID: where the comment says, then
// in the image's directory.
func findParent(fsys vfs.FS, name string, h *header) (string, error) {
	if link := h.parentHint(); link != "" {
		hinted, err := vfs.Resolve(name, link)
		if err == nil && hinted != name {
			if fit, err := judge(fsys, hinted, h); err == nil && fit == exact {
				return hinted, nil
			}
		}
	}
	return searchParent(fsys, name, h)
}

func searchParent(fsys vfs.FS, name string, h *header) (string, error) {
	dir := path.Dir(name)
	entries, err := fsys.ReadDir(dir)
	if err != nil {
		return "", fmt.Errorf("look for the parent with UUID %s: %w", h.uuid(fieldUUIDLink), err)
	}
	found := map[candidate][]string{}
	var unread []error
	looked := 0
	for _, e := range entries {
		other := path.Join(dir, e.Name())
		if e.IsDir() || other == name {
			continue
		}
		if looked++; looked > maxCandidates {
			return "", unsupported("it stands on the image with UUID %s, and %s has more than %d files to look for it in",
				h.uuid(fieldUUIDLink), dir, maxCandidates)
		}
		fit, err := judge(fsys, other, h)
		if err != nil {
			unread = append(unread, err)
		}
		found[fit] = append(found[fit], other)
	}
	for _, fit := range []candidate{exact, sameID} {
		switch names := found[fit]; len(names) {
		case 0:
		case 1:
			return names[0], nil
		default:
			return "", corrupt("it stands on the image with UUID %s, which both %s and %s have: move one away",
				h.uuid(fieldUUIDLink), names[0], names[1])
		}
	}
	return "", errors.Join(corrupt("it stands on the image with UUID %s, which no file in directory %s has: put its parent there",
		h.uuid(fieldUUIDLink), dir), errors.Join(unread...))
}

// judge says how well the file name fits as the parent of an image with header h. What
// cannot be opened as a file, like a socket, does not fit.
func judge(fsys vfs.FS, name string, h *header) (candidate, error) {
	f, err := fsys.Open(name, vfs.ReadOnly)
	if err != nil {
		return unfit, err
	}
	defer f.Close()
	var other header
	if n, _ := f.ReadAt(other[:], 0); n < headerBytes || !other.isProbablyVDI() {
		return unfit, nil
	}
	switch {
	case other.uuid(fieldUUID) != h.uuid(fieldUUIDLink):
		return unfit, nil
	case other.uuid(fieldUUIDModified) == h.uuid(fieldUUIDParent):
		return exact, nil
	}
	return sameID, nil
}

// findLink returns the link to what a differencing image stands on.
func (m *image) findLink(req formats.OpenRequest) (*engine.ParentLink, error) {
	name, err := findParent(req.FS, req.Name, &m.h)
	if err != nil {
		return nil, err
	}
	return m.parentLink(name), nil
}

func (m *image) parentLink(name string) *engine.ParentLink {
	return &engine.ParentLink{Name: name, Format: formatName, Verify: m.verifyParent}
}

// verifyParent reports whether parent has the contents that the image was made on.
func (m *image) verifyParent(parent *engine.Layer) error {
	p, ok := parent.Codec.(*image)
	if !ok {
		return unsupported("%s is in format %s, want vdi", parent.Name, parent.Format)
	}
	if want, is := m.h.uuid(fieldUUIDLink), p.h.uuid(fieldUUID); want != is {
		return corrupt("%s has UUID %s, but %s stands on %s", parent.Name, is, m.layer.Name, want)
	}
	want, is := m.h.uuid(fieldUUIDParent), p.h.uuid(fieldUUIDModified)
	if want != is {
		return corrupt("%s has modification UUID %s, but %s was made on %s: the parent was written to after its child was made",
			parent.Name, is, m.layer.Name, want)
	}
	return nil
}

// setParent enters a parent into a header, nil for none. name is the image's.
func (h *header) setParent(name string, parent *engine.Parent) error {
	if parent == nil {
		h.setUUID(fieldUUIDLink, uuid{})
		h.setUUID(fieldUUIDParent, uuid{})
		if h.kind() == typeDifferencing {
			h.setU32(fieldType, typeDynamic)
		}
		if h.parentHint() != "" {
			h.setDescription("")
		}
		return nil
	}
	p, ok := parent.Layer.Codec.(*image)
	switch {
	case !ok:
		return unsupported("parent %s is in format %s, want vdi", parent.Name, parent.Layer.Format)
	case h.kind() == typeStatic:
		return unsupported("a static image cannot stand on a parent")
	}
	if err := h.setHint(name, parent.Name); err != nil {
		return err
	}
	h.setU32(fieldType, typeDifferencing)
	h.setUUID(fieldUUIDLink, p.h.uuid(fieldUUID))
	h.setUUID(fieldUUIDParent, p.h.uuid(fieldUUIDModified))
	return nil
}

// setHint notes where the parent is, unless somebody's comment is there: then it has to be
// in the image's directory, where it is looked for.
func (h *header) setHint(name, parent string) error {
	link := vfs.RelativeLink(name, parent)
	if (h.description() == "" || h.parentHint() != "") && len(hintPrefix)+len(link) < descriptionBytes {
		h.setDescription(hintPrefix + link)
		return nil
	}
	if path.Dir(name) == path.Dir(parent) {
		if h.parentHint() != "" {
			h.setDescription("")
		}
		return nil
	}
	return unsupported("parent %s is in another directory, and its name does not fit into the comment of %s: "+
		"the format finds parents by UUID only, in the same directory", parent, name)
}

// SetParent changes what the image stands on, by one sector.
func (m *image) SetParent(c *engine.Commit, parent *engine.Parent) error {
	h := m.h
	if err := h.setParent(m.layer.Name, parent); err != nil {
		return fmt.Errorf("vdi: change the parent: %w", err)
	}
	if err := m.writeHeader(c, h); err != nil {
		return fmt.Errorf("vdi: change the parent: %w", err)
	}
	m.layer.Parent = nil
	if parent != nil {
		m.layer.Parent = m.parentLink(parent.Name)
	}
	return nil
}
