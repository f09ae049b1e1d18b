package vhdx

import (
	"fmt"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// parentLink returns the link to the image that this one stands on, nil if it is a base.
func (m *image) parentLink(name string) (*engine.ParentLink, error) {
	if !m.meta.hasParent {
		return nil, nil
	}
	if _, ok := parseGUID(m.meta.locator[keyLinkage]); !ok {
		return nil, corrupt("parent locator: %s is %q, want a GUID", keyLinkage, shorten(m.meta.locator[keyLinkage]))
	}
	link, key := m.parentPath()
	if link == "" {
		return nil, corrupt("parent locator: none of %s, %s and %s names a file", keyRelativePath, keyWin32Path, keyVolumePath)
	}
	parent, err := vfs.Resolve(name, link)
	if err != nil {
		return nil, fmt.Errorf("parent locator: %s: %w", key, err)
	}
	return &engine.ParentLink{Name: parent, Format: formatName, Verify: m.verifyParent}, nil
}

// parentPath returns the parent's name relative to the child's directory, and the key that
// gave it. Absolute paths are of another machine: their last part is taken, for an image
// that was moved together with its parent. Which file it is the linkage decides.
func (m *image) parentPath() (link, key string) {
	if path := m.meta.locator[keyRelativePath]; path != "" {
		return strings.ReplaceAll(path, `\`, "/"), keyRelativePath
	}
	for _, key := range []string{keyVolumePath, keyWin32Path} {
		path := strings.ReplaceAll(m.meta.locator[key], `\`, "/")
		if last := path[strings.LastIndexByte(path, '/')+1:]; last != "" {
			return last, key
		}
	}
	return "", ""
}

// verifyParent reports whether parent has the contents that the image was made on.
func (m *image) verifyParent(parent *engine.Layer) error {
	p, ok := parent.Codec.(*image)
	if !ok {
		return unsupported("%s is in format %s, want vhdx", parent.Name, parent.Format)
	}
	if p.meta.logicalSector != m.meta.logicalSector {
		return corrupt("%s has sectors of %d bytes, its child %s of %d", parent.Name, p.meta.logicalSector, m.layer.Name, m.meta.logicalSector)
	}
	for _, key := range []string{keyLinkage, keyLinkage2} {
		if want, ok := parseGUID(m.meta.locator[key]); ok && want == p.header.dataWrite {
			return nil
		}
	}
	return corrupt("the data write GUID of %s is %s, but %s of %s is %s: the parent was written to after its child was made",
		parent.Name, p.header.dataWrite, keyLinkage, m.layer.Name, shorten(m.meta.locator[keyLinkage]))
}

// locatorFor returns the locator that names a parent in an image called name.
func locatorFor(name string, parent *engine.Parent) (map[string]string, error) {
	p, ok := parent.Layer.Codec.(*image)
	if !ok {
		return nil, unsupported("the parent %s is in format %s, want vhdx", parent.Name, parent.Layer.Format)
	}
	link := vfs.RelativeLink(name, parent.Name)
	if strings.Contains(link, `\`) {
		return nil, invalid("the parent's name %q: want one without backslashes, which part directories in a parent locator", parent.Name)
	}
	if !strings.HasPrefix(link, "./") && !strings.HasPrefix(link, "../") {
		link = "./" + link
	}
	return map[string]string{
		keyLinkage:      "{" + p.header.dataWrite.String() + "}",
		keyRelativePath: strings.ReplaceAll(link, "/", `\`),
	}, nil
}

// shorten returns untrusted text, cut to what fits into a message.
func shorten(text string) string {
	const most = 80
	if len(text) > most {
		return text[:most] + "…"
	}
	return text
}
