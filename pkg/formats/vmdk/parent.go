package vmdk

import (
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// parentLink returns the link to the image that this one stands on, nil if it is a base.
// A link is the parent's content identifier and its file name, or, of VirtualBox, its
// UUID. Half a link is refused, because reading zeroes in place of the parent's data would
// go unnoticed.
func (m *image) parentLink(name string) (*engine.ParentLink, error) {
	hint, _ := m.descriptor.lookup(keyParentHint)
	uuid, _ := m.descriptor.lookup(keyUUIDParent)
	switch {
	case m.parentCID == noParentCID && hint == "" && isNilUUID(uuid):
		return nil, nil
	case m.parentCID == noParentCID && hint == "":
		return m.linkByUUID(name, uuid)
	case m.parentCID == noParentCID:
		return nil, corrupt("%s is %q, but %s is ffffffff (none)", keyParentHint, shorten(hint), keyParentCID)
	case hint == "":
		return nil, corrupt("%s is %08x, but there is no %s", keyParentCID, m.parentCID, keyParentHint)
	}
	parent, err := m.descriptor.resolve(name, hint)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", keyParentHint, err)
	}
	return &engine.ParentLink{Name: parent, Format: formatName, Verify: m.verifyParent}, nil
}

// isNilUUID reports whether a UUID is missing or all zeroes.
func isNilUUID(uuid string) bool { return strings.Trim(uuid, "0-{} ") == "" }

// sameUUID reports whether two UUIDs, or missing ones, are the same.
func sameUUID(a, b string) bool {
	return strings.EqualFold(a, b) || isNilUUID(a) && isNilUUID(b)
}

// verifyParent reports whether parent has the contents that the image was made on.
func (m *image) verifyParent(parent *engine.Layer) error {
	p := imageOf(parent.Codec)
	if p == nil {
		return unsupported("%s is in format %s, want vmdk", parent.Name, parent.Format)
	}
	if p.cid != m.parentCID {
		return corrupt("%s of %s is %08x, but %s of %s is %08x: the parent was written to after its child was made",
			keyCID, parent.Name, p.cid, keyParentCID, m.layer.Name, m.parentCID)
	}
	return nil
}

// maxCandidates bounds how many files are looked at for a parent that is known by its UUID
// only, and maxCandidateBytes how much of each.
const (
	maxCandidates     = 4096
	maxCandidateBytes = 64 << 10
)

// linkByUUID returns the link to the one image with a UUID that lies beside the image, or
// in the directory above, where VirtualBox keeps what the images in Snapshots stand on.
func (m *image) linkByUUID(name, uuid string) (*engine.ParentLink, error) {
	if !isUUID(uuid) {
		return nil, corrupt("%s is %q, want a UUID", keyUUIDParent, shorten(uuid))
	}
	dirs := []string{path.Dir(name)}
	if dirs[0] != "." {
		dirs = append(dirs, path.Dir(dirs[0]))
	}
	var found []string
	looked := 0
	for _, dir := range dirs {
		entries, err := m.fs.ReadDir(dir)
		if err != nil {
			return nil, fmt.Errorf("look for the image with %s %s: %w", keyUUIDImage, uuid, err)
		}
		for _, e := range entries {
			candidate := path.Join(dir, e.Name())
			if e.IsDir() || candidate == name || !strings.EqualFold(path.Ext(candidate), "."+formatName) {
				continue
			}
			if looked++; looked > maxCandidates {
				return nil, unsupported("more than %d images in %s: too many to find the one with %s %s", maxCandidates, dir, keyUUIDImage, uuid)
			}
			if m.hasUUID(candidate, uuid) {
				found = append(found, candidate)
			}
		}
	}
	switch len(found) {
	case 1:
		return &engine.ParentLink{Name: found[0], Format: formatName, Verify: m.verifyParentUUID}, nil
	case 0:
		return nil, unsupported("it stands on the image with %s %s, which is not beside it: put it there, or in the directory above, under a name that ends in .%s",
			keyUUIDImage, uuid, formatName)
	}
	return nil, corrupt("it stands on the image with %s %s, but %s all have it", keyUUIDImage, uuid, strings.Join(found, ", "))
}

// hasUUID reports whether a file is an image with a UUID. What cannot be read is not.
func (m *image) hasUUID(name, uuid string) bool {
	f, err := m.fs.Open(name, vfs.ReadOnly)
	if err != nil {
		return false
	}
	defer f.Close()
	text, err := readDescriptor(f)
	if err != nil {
		return false
	}
	d, err := parseDescriptor(text)
	if err != nil {
		return false
	}
	found, _ := d.lookup(keyUUIDImage)
	return strings.EqualFold(found, uuid)
}

// readDescriptor reads the descriptor that a candidate is or holds.
func readDescriptor(f vfs.File) ([]byte, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	head := make([]byte, min(size, sectorBytes))
	if err := readFull(f, head, 0); err != nil {
		return nil, err
	}
	off, length := int64(0), size
	if isHeader(head) && size >= sectorBytes {
		h := decodeHeader(head)
		if err := h.validateDescriptorPlace(uint64(size) / sectorBytes); err != nil {
			return nil, err
		}
		off, length = int64(h.descriptorOffset)*sectorBytes, int64(h.descriptorSize)*sectorBytes
	}
	if length == 0 || length > maxCandidateBytes {
		return nil, corrupt("a descriptor of %d bytes", length)
	}
	text := make([]byte, length)
	if n, err := f.ReadAt(text, off); n < len(text) && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return text, nil
}

// verifyParentUUID reports whether parent is the image that the child names, with the
// contents that it was made on.
func (m *image) verifyParentUUID(parent *engine.Layer) error {
	p := imageOf(parent.Codec)
	if p == nil {
		return unsupported("%s is in format %s, want vmdk", parent.Name, parent.Format)
	}
	for _, pair := range [][2]string{{keyUUIDParent, keyUUIDImage}, {keyUUIDParentModification, keyUUIDModification}} {
		want, _ := m.descriptor.lookup(pair[0])
		have, _ := p.descriptor.lookup(pair[1])
		if !sameUUID(want, have) {
			return corrupt("%s of %s is %q, but %s of %s is %q: it is another image, or was written to after its child was made",
				pair[1], parent.Name, shorten(have), pair[0], m.layer.Name, shorten(want))
		}
	}
	return nil
}

// SetParent changes the link: all that names the parent is replaced by one write, or with
// the descriptor file.
func (m *image) SetParent(c *engine.Commit, parent *engine.Parent) error {
	if err := m.setParent(c, parent); err != nil {
		return fmt.Errorf("vmdk: change the parent of %s: %w", m.layer.Name, err)
	}
	return nil
}

func (m *image) setParent(c *engine.Commit, parent *engine.Parent) error {
	l := noLink()
	if parent != nil {
		p := imageOf(parent.Layer.Codec)
		switch {
		case p == nil:
			return unsupported("%s is in format %s, want vmdk", parent.Name, parent.Layer.Format)
		case m.extents[0].flat():
			return unsupported("createType %s holds all of its disk: it stands on nothing", m.createType)
		}
		var err error
		if l, err = linkTo(m.layer.Name, parent.Name, p); err != nil {
			return err
		}
	}
	edits, err := m.descriptor.relinked(l)
	if err != nil {
		return err
	}
	before := m.descriptor
	err = m.writeDescriptor(c, m.descriptor.edited(edits...))
	if err != nil && m.descriptor == before {
		return err
	}
	m.parentCID = l.cid
	changed, linkErr := m.parentLink(m.layer.Name)
	m.layer.Parent = changed
	return errors.Join(err, linkErr)
}

// relinked are the edits that change what the image stands on.
func (d *descriptor) relinked(l link) ([]edit, error) {
	hint, err := d.encodeName(l.hint)
	if err != nil {
		return nil, err
	}
	cid := fmt.Sprintf("%08x", l.cid)
	end := d.lineEnd()
	var edits []edit
	after := d.field(keyCID) // new lines go behind this one
	added := ""
	if f := d.field(keyParentCID); f != nil {
		edits = append(edits, edit{f.at, cid})
		after = f
	} else {
		added += end + keyParentCID + "=" + cid
	}
	switch f := d.field(keyParentHint); {
	case f != nil && hint == "":
		edits = append(edits, edit{at: d.wholeLine(f.line)})
	case f != nil:
		edits = append(edits, edit{f.line, keyParentHint + `="` + hint + `"`})
	case hint != "":
		added += end + keyParentHint + `="` + hint + `"`
	}
	if added != "" {
		edits = append(edits, edit{textRange{after.line.end, after.line.end}, added})
	}
	for _, u := range [][2]string{{keyUUIDParent, l.uuid}, {keyUUIDParentModification, l.modification}} {
		if f := d.field(u[0]); f != nil && !sameUUID(f.value, u[1]) {
			edits = append(edits, edit{f.at, u[1]})
		}
	}
	return edits, nil
}
