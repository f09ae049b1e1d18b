package vmdk

import (
	"fmt"
	"math/rand/v2"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// Begin changes the content identifier, and VirtualBox's, so that overlays made on the old contents, and
// other programs that remember them, notice. It happens once after opening: the first
// change makes all older overlays wrong, and later ones nothing worse.
//
// The digits are replaced in place, as many as there are, so that no other byte of the
// descriptor moves: whatever a crash leaves of it parses, and is not the old identifier
// unless nothing was written.
func (m *image) Begin(c *engine.Commit) error {
	if err := m.judgeOwners(); err != nil {
		return fmt.Errorf("vmdk: %w", err)
	}
	for i := range m.extents {
		if se := m.extents[i].se; se != nil {
			if err := se.begin(c); err != nil {
				return fmt.Errorf("vmdk: %w", err)
			}
		}
	}
	if w := m.stream(); w != nil {
		if err := w.begin(c); err != nil {
			return fmt.Errorf("vmdk: begin the stream %s: %w", m.layer.Name, err)
		}
	}
	f := m.descriptor.field(keyCID)
	digits := f.at.end - f.at.start
	next := nextCID(m.cid, digits)
	text := fmt.Sprintf("%0*x", digits, next)
	if err := m.replaceText(c, f.at, text); err != nil {
		return fmt.Errorf("vmdk: change %s: %w", keyCID, err)
	}
	// The last digits of the long identifier are the short one.
	if long := m.descriptor.field(keyLongContent); long != nil && digits == 8 && strings.HasSuffix(long.value, f.value) {
		at := textRange{long.at.end - digits, long.at.end}
		if err := m.replaceText(c, at, text); err != nil {
			return fmt.Errorf("vmdk: change %s: %w", keyLongContent, err)
		}
		long.value = long.value[:len(long.value)-digits] + text
	}
	if uuid := m.descriptor.field(keyUUIDModification); uuid != nil && isUUID(uuid.value) {
		text := newUUID()
		if err := m.replaceText(c, uuid.at, text); err != nil {
			return fmt.Errorf("vmdk: change %s: %w", keyUUIDModification, err)
		}
		uuid.value = text
	}
	if err := c.Sync(); err != nil {
		return fmt.Errorf("vmdk: change %s: %w", keyCID, err)
	}
	if m.descriptorRoom == 0 {
		// Who resized the image last may have been killed after it renamed the new
		// descriptor: what is written to its new end needs that name.
		if err := formats.SyncNames(m.fs, m.layer.Name); err != nil {
			return fmt.Errorf("vmdk: begin to change %s: %w", m.layer.Name, err)
		}
	}
	m.cid, f.value = next, text
	return nil
}

// replaceText overwrites a stretch of the descriptor with text of the same length.
func (m *image) replaceText(c *engine.Commit, at textRange, text string) error {
	if err := c.WriteAt(0, []byte(text), m.descriptorAt+int64(at.start)); err != nil {
		return err
	}
	copy(m.descriptor.text[at.start:at.end], text)
	return nil
}

// nextCID returns a content identifier of at most digits hexadecimal digits that is not
// old, and none of those that mean something.
func nextCID(old uint32, digits int) uint32 {
	for {
		n := rand.Uint32()
		if digits < 8 {
			n &= 1<<(4*digits) - 1
		}
		if n != old && n != 0 && n < noParentCID-1 {
			return n
		}
	}
}
