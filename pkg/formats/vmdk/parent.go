package vmdk

import (
	"fmt"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// parentLink returns the link to the image that this one stands on, nil if it is a base.
// A link is the parent's content identifier and its file name; half a link is refused,
// because reading zeroes in place of the parent's data would go unnoticed.
func (m *image) parentLink(name string) (*engine.ParentLink, error) {
	hint, _ := m.descriptor.lookup(keyParentHint)
	uuid, _ := m.descriptor.lookup(keyUUIDParent)
	switch {
	case m.parentCID == noParentCID && hint == "" && isNilUUID(uuid):
		return nil, nil
	case m.parentCID == noParentCID && hint == "":
		return nil, unsupported("it stands on the image with %s %q, but names neither its file (%s) nor its %s: "+
			"give it both, or convert it with the program that made it", keyUUIDParent, shorten(uuid), keyParentHint, keyCID)
	case m.parentCID == noParentCID:
		return nil, corrupt("%s is %q, but %s is ffffffff (none)", keyParentHint, shorten(hint), keyParentCID)
	case hint == "":
		return nil, corrupt("%s is %08x, but there is no %s", keyParentCID, m.parentCID, keyParentHint)
	}
	parent, err := vfs.Resolve(name, hint)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", keyParentHint, err)
	}
	return &engine.ParentLink{Name: parent, Format: formatName, Verify: m.verifyParent}, nil
}

// isNilUUID reports whether a UUID is missing or all zeroes.
func isNilUUID(uuid string) bool { return strings.Trim(uuid, "0-{} ") == "" }

// verifyParent reports whether parent has the contents that the image was made on.
func (m *image) verifyParent(parent *engine.Layer) error {
	p, ok := parent.Codec.(*image)
	if !ok {
		return unsupported("%s is in format %s, want vmdk", parent.Name, parent.Format)
	}
	if p.cid != m.parentCID {
		return corrupt("%s of %s is %08x, but %s of %s is %08x: the parent was written to after its child was made",
			keyCID, parent.Name, p.cid, keyParentCID, m.layer.Name, m.parentCID)
	}
	return nil
}

// SetParent is not possible yet.
func (m *image) SetParent(*engine.Commit, *engine.Parent) error {
	return fmt.Errorf("vmdk: change the parent of %s: %w", m.layer.Name, unsupported("parents are given at creation"))
}
