package vmdk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Resize enlarges an image of one extent.
func (m *image) Resize(c *engine.Commit, size int64) error {
	err := m.checkGrow(size)
	if err == nil && size > m.sizeBytes {
		if e := &m.extents[0]; e.sparse != nil {
			err = m.growSparse(c, e.sparse, size)
		} else {
			err = m.growFlat(c, e, size)
		}
	}
	if err != nil {
		return fmt.Errorf("vmdk: resize %s from %d to %d bytes: %w", m.layer.Name, m.sizeBytes, size, err)
	}
	return nil
}

func (m *image) checkGrow(size int64) error {
	if size < m.sizeBytes || size > maxSizeBytes || size%sectorBytes != 0 {
		return invalid("want a multiple of %d, no smaller, at most %d", sectorBytes, int64(maxSizeBytes))
	}
	if len(m.extents) != 1 || m.extents[0].sparse != nil && m.descriptorRoom == 0 {
		return unsupported("createType %s: only images of one extent can grow", m.createType)
	}
	return nil
}

// setSize makes a new size known.
func (m *image) setSize(size int64) {
	m.sizeBytes = size
	m.extents[0].guestEnd = size
	if s := m.extents[0].sparse; s != nil {
		s.guestEnd = size
	}
}

// growSparse makes larger directories and the missing tables behind everything else, and
// then switches to them by writing one sector, the header. Until then nothing refers to
// them; from then on the descriptor is out of date, and guestSectors knows which counts.
func (m *image) growSparse(c *engine.Commit, s *sparse, size int64) error {
	h := s.header
	h.capacity = uint64(size / sectorBytes)
	if h.grainTables() > maxGrainTables {
		return invalid("with grains of %d bytes want at most %d grain tables", s.grainBytes(), maxGrainTables)
	}
	text, err := m.grownDescriptor(size)
	if err != nil {
		return err
	}
	if err := s.clearTail(c); err != nil {
		return err
	}
	gd, rgd := s.gd, s.rgd
	if h.grainTables() > s.header.grainTables() {
		if gd, rgd, err = s.addDirectories(c, &h); err != nil {
			return err
		}
	}
	if err := c.Sync(); err != nil {
		return err
	}
	head := make([]byte, sectorBytes)
	if err := readFull(s.f, head, 0); err != nil {
		return err
	}
	h.encode(head)
	if err := c.WriteAt(s.file, head, 0); err != nil {
		return err
	}
	if err := c.Sync(); err != nil {
		return err
	}
	s.header, s.gd, s.rgd = h, gd, rgd
	if text != nil {
		if err := m.writeDescriptor(c, text); err != nil {
			return err
		}
	}
	m.setSize(size)
	return nil
}

// clearTail zeroes what the last grain holds past the guest size: it is about to become
// visible.
func (s *sparse) clearTail(c *engine.Commit) error {
	in := (s.guestEnd - s.guestOff) & (s.grainBytes() - 1)
	if in == 0 {
		return nil
	}
	run, err := s.lookup(s.guestEnd-1, 1)
	if err != nil || run.State != engine.Data {
		return err
	}
	tail := make([]byte, s.grainBytes()-in)
	s.fileEnd = max(s.fileEnd, run.FileOff+1+int64(len(tail)))
	return c.WriteAt(s.file, tail, run.FileOff+1)
}

// addDirectories writes directories for the header's capacity, with new empty tables for
// what the present ones lack, and enters their places into the header.
func (s *sparse) addDirectories(c *engine.Commit, h *sparseHeader) (gd, rgd []uint32, err error) {
	added := h.grainTables() - s.header.grainTables()
	one := int64(h.gdSectors()+added*h.gtSectors()) * sectorBytes
	all := one
	if s.rgd != nil {
		all = 2 * one
	}
	all = s.wholeGrains(all)
	place, err := s.space.Alloc(all, all)
	if err != nil {
		return nil, nil, err
	}
	s.fileEnd = max(s.fileEnd, place.Off+place.Len)
	if !place.Zeroed {
		for off := int64(0); off < all; off += s.grainBytes() {
			if err := c.WriteAt(s.file, make([]byte, s.grainBytes()), place.Off+off); err != nil {
				return nil, nil, err
			}
		}
	}
	s.addMeta(sectorSpan{uint64(place.Off / sectorBytes), uint64((place.Off + all) / sectorBytes)})
	at := uint64(place.Off / sectorBytes)
	if s.rgd != nil {
		if rgd, err = s.addDirectory(c, h, s.header.rgdOffset, s.rgd, at); err != nil {
			return nil, nil, err
		}
		h.rgdOffset = at
		at += uint64(one / sectorBytes)
	}
	if gd, err = s.addDirectory(c, h, s.header.gdOffset, s.gd, at); err != nil {
		return nil, nil, err
	}
	h.gdOffset = at
	return gd, rgd, nil
}

// addDirectory writes a directory that continues an old one with tables that follow it.
func (s *sparse) addDirectory(c *engine.Commit, h *sparseHeader, oldAt uint64, old []uint32, at uint64) ([]uint32, error) {
	p := make([]byte, h.gdSectors()*sectorBytes)
	if err := s.tables.Read(s.file, int64(oldAt)*sectorBytes, p[:len(old)*gteBytes]); err != nil {
		return nil, err
	}
	grown := slices.Grow(slices.Clone(old), int(h.grainTables())-len(old))
	for next := at + h.gdSectors(); uint64(len(grown)) < h.grainTables(); next += h.gtSectors() {
		binary.LittleEndian.PutUint32(p[len(grown)*gteBytes:], uint32(next))
		grown = append(grown, uint32(next))
	}
	return grown, c.WriteAt(s.file, p, int64(at)*sectorBytes)
}

// growFlat lengthens the file, which adds zeroes, and then changes the descriptor, which
// alone says how long the disk is.
func (m *image) growFlat(c *engine.Commit, e *extent, size int64) error {
	f := m.layer.Files[e.file]
	have, err := f.Size()
	if err != nil {
		return fmt.Errorf("size of %s: %w", f.Name(), err)
	}
	if end := e.flatOff + m.sizeBytes; have > end {
		// What lies past the disk's end must not become part of it.
		if err := c.Truncate(e.file, end); err != nil {
			return err
		}
	}
	if err := c.Truncate(e.file, e.flatOff+size); err != nil {
		return err
	}
	if err := c.Sync(); err != nil {
		return err
	}
	if err := m.writeDescriptor(c, m.descriptor.resized(size/sectorBytes, true)); err != nil {
		return err
	}
	m.setSize(size)
	return nil
}

// resized returns the text with another length of the only extent, and of the geometry if
// that is wanted.
func (d *descriptor) resized(sectors int64, withGeometry bool) []byte {
	type edit struct {
		at   textRange
		text string
	}
	edits := []edit{{d.extents[0].sectorsAt, strconv.FormatInt(sectors, 10)}}
	if g := d.field(keyCylinders); g != nil && withGeometry {
		heads, tracks := d.number(keyHeads), d.number(keySectors)
		if heads > 0 && tracks > 0 {
			cylinders := sectors / heads / tracks
			if heads == 16 {
				cylinders = min(cylinders, maxIDECylinders)
			}
			edits = append(edits, edit{g.at, strconv.FormatInt(cylinders, 10)})
		}
	}
	slices.SortFunc(edits, func(a, b edit) int { return a.at.start - b.at.start })
	var text []byte
	from := 0
	for _, e := range edits {
		text = append(append(text, d.text[from:e.at.start]...), e.text...)
		from = e.at.end
	}
	return append(text, d.text[from:]...)
}

// number returns a field's value, 0 if it is none.
func (d *descriptor) number(key string) int64 {
	value, _ := d.lookup(key)
	n, err := strconv.ParseInt(value, 10, 32)
	if err != nil {
		return 0
	}
	return n
}

// grownDescriptor returns the descriptor that an embedded one can be replaced with in one
// write that no crash can tear, which is one sector. Without such, it returns nil if the
// header alone says enough, being greater by a grain or more.
func (m *image) grownDescriptor(size int64) ([]byte, error) {
	for _, withGeometry := range []bool{true, false} {
		text := m.descriptor.resized(size/sectorBytes, withGeometry)
		if _, _, ok := m.changedSector(text); ok && int64(len(text)) <= m.descriptorRoom {
			return text, nil
		}
	}
	grain := m.extents[0].sparse.grainBytes()
	if size-m.descriptor.sectors()*sectorBytes < grain {
		return nil, unsupported("its descriptor cannot be changed in one sector, so want at least %d bytes more", grain)
	}
	return nil, nil
}

// changedSector returns the only sector of the descriptor, and its new contents, in which
// text differs from what is there; ok is false if there are more. A shorter text is
// continued with line ends.
func (m *image) changedSector(text []byte) (at int, sector []byte, ok bool) {
	old := m.descriptor.text
	for len(text) < len(old) {
		text = append(text, '\n')
	}
	n := 0
	for off := 0; off < len(text); off += sectorBytes {
		end := min(off+sectorBytes, len(text))
		if string(text[off:end]) != string(old[min(off, len(old)):min(end, len(old))]) {
			at, sector = off, text[off:end]
			n++
		}
	}
	return at, sector, n <= 1
}

// writeDescriptor replaces the descriptor, durably, so that a crash leaves the old or the
// new one.
func (m *image) writeDescriptor(c *engine.Commit, text []byte) error {
	at, sector, ok := m.changedSector(text)
	if !ok && m.descriptorRoom == 0 {
		return m.replaceDescriptorFile(text)
	}
	if m.descriptorRoom == 0 && len(text) > len(m.descriptor.text) {
		// First the length, so that a crash does not cut the new text off.
		longer := slices.Repeat([]byte{'\n'}, len(text)-len(m.descriptor.text))
		if err := c.WriteAt(0, longer, int64(len(m.descriptor.text))); err != nil {
			return err
		}
		if err := c.Sync(); err != nil {
			return err
		}
	}
	if err := c.WriteAt(0, sector, m.descriptorAt+int64(at)); err != nil {
		return err
	}
	if err := c.Sync(); err != nil {
		return err
	}
	return m.adoptDescriptor(text)
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
	return errors.Join(syncNames(m.fs, name), old.Close(), m.adoptDescriptor(text))
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
