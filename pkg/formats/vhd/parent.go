package vhd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"path"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Codes of parent locators ("Parent Locator Entry"). Others are obsolete or opaque.
const (
	codeRelative = "W2ru" // a path with backslashes, in UTF-16
	codeAbsolute = "W2ku" // the same, with a drive
	codeMac      = "MacX" // a file URL in UTF-8
)

// link is what a locator names: text in the file.
type link struct {
	code string
	text []byte
}

// linkSpace is what one link takes of the file: Microsoft's programs want whole sectors.
func (l link) space() int64 { return alignUp(int64(len(l.text)), sectorBytes) }

func linkBytes(links []link) (n int64) {
	for _, l := range links {
		n += l.space()
	}
	return n
}

// appendLinks appends the texts of links, each padded to whole sectors.
func appendLinks(p []byte, links []link) []byte {
	p = append([]byte(nil), p...)
	for _, l := range links {
		p = append(p, l.text...)
		p = append(p, make([]byte, l.space()-int64(len(l.text)))...)
	}
	return p
}

// setLocators makes links the header's only ones; their texts are at off.
func (h *header) setLocators(links []link, off int64) {
	clear(h[headerLocators : headerLocators+locators*locatorBytes])
	for i, l := range links {
		p := h[headerLocators+i*locatorBytes:][:locatorBytes]
		copy(p, l.code)
		binary.BigEndian.PutUint32(p[locatorSpace:], uint32(l.space()))
		binary.BigEndian.PutUint32(p[locatorLength:], uint32(len(l.text)))
		binary.BigEndian.PutUint64(p[locatorOffset:], uint64(off))
		off += l.space()
	}
}

// setParent enters a parent into a header, nil for none, and returns the links that its
// locators shall name. name is the image's.
func (h *header) setParent(name string, parent *engine.Parent) ([]link, error) {
	clear(h[headerParentUUID : headerParentName+headerParentNameBytes])
	if parent == nil {
		return []link{}, nil
	}
	p, ok := parent.Layer.Codec.(*image)
	if !ok {
		return nil, unsupported("parent %s is in format %s, want %s", parent.Name, parent.Layer.Format, formatName)
	}
	relative := vfs.RelativeLink(name, parent.Name)
	if strings.ContainsRune(relative, '\\') {
		return nil, unsupported("parent %q: links have backslashes in place of slashes, so no name may contain one", parent.Name)
	}
	if !strings.HasPrefix(relative, "../") && !strings.HasPrefix(relative, "./") {
		relative = "./" + relative
	}
	text := encodeUTF16(strings.ReplaceAll(relative, "/", `\`), binary.LittleEndian)
	if len(text) > maxLocatorTextBytes {
		return nil, unsupported("parent %q: its name is too long for a link", parent.Name)
	}
	uuid := p.footer.uuid()
	copy(h[headerParentUUID:], uuid[:])
	h.setU32(headerParentTimestamp, p.footer.timestamp())
	short := encodeUTF16(path.Base(parent.Name), binary.BigEndian)
	copy(h[headerParentName:], short[:min(len(short), headerParentNameBytes-2)])
	return []link{{codeRelative, text}}, nil
}

// findParent returns the name of the image that h, the header of name, stands on: what the
// first link that leads to it says. Links that are no use here, because they are absolute,
// still say what the file is called, and it may lie beside its child.
func findParent(fsys vfs.FS, name string, f vfs.File, h *header) (string, error) {
	var refused []error
	other := ""
	for _, l := range parentLinks(f, h) {
		candidate, err := vfs.Resolve(name, l)
		if err != nil {
			refused = append(refused, err)
			continue
		}
		if candidate == name {
			continue
		}
		id, err := identityOf(fsys, candidate)
		switch {
		case err != nil:
			refused = append(refused, err)
		case id == h.parentUUID():
			return candidate, nil
		case other == "":
			other = candidate
		}
	}
	if other != "" {
		return other, nil // which verifyParent refuses when the chain is opened
	}
	return "", errors.Join(corrupt("it stands on the image with UUID %s, called %q, and no link leads to it",
		h.parentUUID(), h.parentName()), errors.Join(refused...))
}

// identityOf returns the UUID of an image.
func identityOf(fsys vfs.FS, name string) (uuid, error) {
	f, err := fsys.Open(name, vfs.ReadOnly)
	if err != nil {
		return uuid{}, err
	}
	defer f.Close()
	e, err := readEnds(f)
	return e.footer.uuid(), err
}

// parentLinks returns the links to the parent, the most telling one first.
func parentLinks(f vfs.File, h *header) []string {
	var relative, named []string
	for _, l := range h.locators() {
		if l.length <= 0 || l.length > maxLocatorTextBytes || l.off < 0 {
			continue
		}
		text := make([]byte, l.length)
		if err := readFull(f, text, l.off); err != nil {
			continue // another link may be whole
		}
		switch l.code {
		case codeRelative:
			relative = append(relative, slashed(decodeUTF16(text, binary.LittleEndian)))
		case codeAbsolute:
			named = append(named, path.Base(slashed(decodeUTF16(text, binary.LittleEndian))))
		case codeMac:
			url := strings.TrimRight(string(text), "\x00")
			if link, ok := strings.CutPrefix(url, "file://./"); ok {
				relative = append(relative, link)
			} else {
				named = append(named, path.Base(url))
			}
		}
	}
	if name := h.parentName(); name != "" {
		named = append(named, path.Base(slashed(name)))
	}
	return append(relative, named...)
}

func slashed(link string) string { return strings.ReplaceAll(link, `\`, "/") }

// findLink returns the link to what a differencing image in f stands on.
func (m *image) findLink(req formats.OpenRequest, f vfs.File) (*engine.ParentLink, error) {
	name, err := findParent(req.FS, req.Name, f, &m.header)
	if err != nil {
		return nil, err
	}
	return m.parentLink(name), nil
}

func (m *image) parentLink(name string) *engine.ParentLink {
	return &engine.ParentLink{Name: name, Format: formatName, Verify: m.verifyParent}
}

// verifyParent reports whether parent has the contents that the image was made on. The
// parent's UUID never changes. The child also notes a time: we note the parent's own, other
// programs that of its file, which is later. So a parent that was changed later still is
// not the one the child was made on. Other programs do not note the time of changes.
func (m *image) verifyParent(parent *engine.Layer) error {
	p, ok := parent.Codec.(*image)
	if !ok {
		return unsupported("%s is in format %s, want %s", parent.Name, parent.Format, formatName)
	}
	if want, is := m.header.parentUUID(), p.footer.uuid(); want != is {
		return corrupt("%s has UUID %s, but %s stands on %s", parent.Name, is, m.layer.Name, want)
	}
	want, is := m.header.u32(headerParentTimestamp), p.footer.timestamp()
	if want != 0 && is > want {
		return corrupt("%s was changed at %d (seconds of the year 2000), but %s was made on it at %d: "+
			"the parent was written to after its child was made", parent.Name, is, m.layer.Name, want)
	}
	return nil
}

// SetParent changes what the image stands on.
func (m *image) SetParent(c *engine.Commit, parent *engine.Parent) error {
	if err := m.setParent(c, parent); err != nil {
		return fmt.Errorf("vpc: change the parent: %w", err)
	}
	m.layer.Parent = nil
	if parent != nil {
		m.layer.Parent = m.parentLink(parent.Name)
	}
	return nil
}

func (m *image) setParent(c *engine.Commit, parent *engine.Parent) error {
	if m.fixed() {
		return unsupported("a fixed image cannot stand on a parent")
	}
	f, h := m.footer, m.header
	links, err := h.setParent(m.layer.Name, parent)
	if err != nil {
		return err
	}
	defer m.layer.Tables.Forget()
	if parent != nil {
		f.setU32(footerKind, kindDifferencing)
		return m.replaceMeta(c, f, h, links)
	}
	f.setU32(footerKind, kindDynamic)
	if err := m.fillGaps(c); err != nil {
		return err
	}
	if err := m.replaceMeta(c, f, h, links); err != nil {
		return err
	}
	return m.fillBitmaps(c)
}
