package vmdk

import (
	"bytes"
	"errors"
	"io/fs"
	"slices"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// edit replaces a stretch of a descriptor's text.
type edit struct {
	at   textRange
	text string
}

// edited returns the text after edits that do not overlap.
func (d *descriptor) edited(edits ...edit) []byte {
	slices.SortFunc(edits, func(a, b edit) int { return a.at.start - b.at.start })
	var text []byte
	from := 0
	for _, e := range edits {
		text = append(append(text, d.text[from:e.at.start]...), e.text...)
		from = e.at.end
	}
	return append(text, d.text[from:]...)
}

// sectorChange is a change of a descriptor that one write makes, which no crash tears: the
// bytes from at on, within one sector, and the whole text with them.
type sectorChange struct {
	at   int
	data []byte
	text []byte
}

// fit finds a change that makes the present descriptor say what text says, by writing one
// sector: lines that say nothing are added to it or taken from it, so that what follows
// stays in its place. ok is false if there is none. room bounds the text's length.
func (d *descriptor) fit(text []byte, room int) (change sectorChange, ok bool) {
	old := d.text
	start := commonPrefix(old, text)
	if start == len(old) && start == len(text) {
		return sectorChange{text: text}, true
	}
	tail := min(commonPrefix(reversed(old), reversed(text)), len(old)-start, len(text)-start)
	from := start / sectorBytes * sectorBytes
	until := min(from+sectorBytes, len(old)) // of the old text, in this sector
	if len(old)-tail > until {
		return sectorChange{}, false
	}
	part := append(slices.Clone(text[from:len(text)-tail]), old[len(old)-tail:until]...)
	want := until - from
	if until == len(old) { // the last sector: it may become longer
		want = max(want, min(len(part), sectorBytes, room-from))
	}
	if part, ok = setLength(part, want); !ok {
		return sectorChange{}, false
	}
	whole := slices.Concat(old[:from], part, old[until:])
	if len(whole) > room || !sameMeaning(whole, text) {
		return sectorChange{}, false
	}
	return sectorChange{at: from, data: part, text: whole}, true
}

func commonPrefix(a, b []byte) int {
	n := 0
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	return n
}

func reversed(p []byte) []byte {
	p = slices.Clone(p)
	slices.Reverse(p)
	return p
}

// setLength makes a part of a descriptor n bytes long by adding a line that says nothing,
// or taking such lines away.
func setLength(part []byte, n int) ([]byte, bool) {
	lines := bytes.SplitAfter(part, []byte("\n"))
	// The first and the last may be parts of lines.
	for i := len(lines) - 2; i >= 1 && len(part) > n; i-- {
		if line := lines[i]; isFiller(strings.TrimSuffix(string(line), "\n")) {
			lines = slices.Delete(lines, i, i+1)
			part = bytes.Join(lines, nil)
		}
	}
	missing := n - len(part)
	if missing < 0 || missing > 0 && len(lines) < 2 {
		return nil, false
	}
	last := len(lines) - 1
	return bytes.Join(slices.Insert(lines, last, []byte(filler(missing))), nil), true
}

// sameMeaning reports whether two descriptors say the same.
func sameMeaning(a, b []byte) bool {
	one, err := parseDescriptor(a)
	if err != nil {
		return false
	}
	other, err := parseDescriptor(b)
	if err != nil {
		return false
	}
	return slices.EqualFunc(one.fields, other.fields, func(a, b field) bool {
		return a.key == b.key && a.value == b.value
	}) && slices.EqualFunc(one.extents, other.extents, func(a, b extentLine) bool {
		a.sectorsAt, b.sectorsAt, a.at, b.at = textRange{}, textRange{}, textRange{}, textRange{}
		return a == b
	})
}

// fitted is fit for the image's descriptor, wherever it is.
func (m *image) fitted(text []byte) (sectorChange, bool) {
	room := int(m.descriptorRoom)
	if room == 0 {
		room = maxDescriptorBytes
	}
	return m.descriptor.fit(text, room)
}

// writeDescriptor replaces the descriptor, durably, so that a crash leaves the old or the
// new one. An embedded one whose change does not fit into a sector is refused.
func (m *image) writeDescriptor(c *engine.Commit, text []byte) error {
	change, ok := m.fitted(text)
	switch {
	case ok && len(change.data) == 0:
		return nil
	case ok:
		return m.writeSector(c, change)
	case m.descriptorRoom == 0:
		return m.replaceDescriptorFile(text)
	}
	return errNoFit
}

var errNoFit = unsupported("its embedded descriptor cannot be changed so with the write of one sector, which alone is safe: " +
	"convert the image, or give it a descriptor file of its own")

func (m *image) writeSector(c *engine.Commit, change sectorChange) error {
	if more := len(change.text) - len(m.descriptor.text); m.descriptorRoom == 0 && more > 0 {
		// First the length, so that a crash does not cut the new text off.
		if err := c.WriteAt(0, slices.Repeat([]byte{'\n'}, more), int64(len(m.descriptor.text))); err != nil {
			return err
		}
		if err := c.Sync(); err != nil {
			return err
		}
	}
	if err := c.WriteAt(0, change.data, m.descriptorAt+int64(change.at)); err != nil {
		return err
	}
	if err := c.Sync(); err != nil {
		return err
	}
	return m.adoptDescriptor(change.text)
}

func (m *image) adoptDescriptor(text []byte) error {
	d, err := parseDescriptor(text)
	if err != nil {
		return err
	}
	m.descriptor = d
	return nil
}

// replaceDescriptorFile writes a new descriptor file and gives it the old one's name. The
// new one is locked before it has the name, so that nobody else can take the image.
func (m *image) replaceDescriptorFile(text []byte) error {
	name := m.layer.Name
	temporary := name + ".new"
	if err := m.fs.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := m.fs.Create(temporary)
	if err != nil {
		return err
	}
	err = m.fillReplacement(f, text)
	if err == nil {
		err = m.fs.Rename(temporary, name)
	}
	if err != nil {
		return errors.Join(err, f.Close(), m.fs.Remove(temporary))
	}
	old := m.layer.Files[0]
	m.layer.Files[0] = f
	return errors.Join(formats.SyncNames(m.fs, name), old.Close(), m.adoptDescriptor(text))
}

func (m *image) fillReplacement(f vfs.File, text []byte) error {
	if !m.noLock {
		if err := f.Lock(vfs.LockWrite); err != nil {
			return err
		}
	}
	if _, err := f.WriteAt(text, 0); err != nil {
		return err
	}
	return f.Sync()
}
