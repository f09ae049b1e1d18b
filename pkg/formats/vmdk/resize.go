package vmdk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Resize gives the image another size.
func (m *image) Resize(c *engine.Commit, size int64) error {
	err := m.checkSize(size)
	switch {
	case err != nil || size == m.sizeBytes:
	case m.descriptorRoom > 0:
		err = m.resizeEmbedded(c, size)
	case size > m.sizeBytes:
		err = m.growExtents(c, size)
	default:
		err = m.cutExtents(c, size)
	}
	if err != nil {
		return fmt.Errorf("vmdk: resize %s from %d to %d bytes: %w", m.layer.Name, m.sizeBytes, size, err)
	}
	return nil
}

func (m *image) checkSize(size int64) error {
	last := &m.extents[len(m.extents)-1]
	switch {
	case last.se != nil:
		return unsupported("the tables of an seSparse extent have the length they were made with")
	case m.stream() != nil:
		return unsupported("the size of a %s image is given when it is created", m.createType)
	}
	limit := int64(maxSparseBytes)
	if k := kindOf(m.createType); k != nil {
		limit = k.maxBytes
	}
	if size <= 0 || size > limit || size%sectorBytes != 0 {
		return invalid("want a multiple of %d, at most %d, where createType %s ends", sectorBytes, limit, m.createType)
	}
	return nil
}

// setSize makes a new size known.
func (m *image) setSize(size int64) {
	m.sizeBytes = size
	last := &m.extents[len(m.extents)-1]
	last.guestEnd = size
	if last.sparse != nil {
		last.sparse.guestEnd = size
	}
}

// resizeEmbedded resizes an image in one file: its header first, then its descriptor.
// Between the two guestSectors knows which counts.
func (m *image) resizeEmbedded(c *engine.Commit, size int64) error {
	s := m.extents[0].sparse
	change, ok := m.fitted(m.descriptor.edited(m.descriptor.resized(0, size/sectorBytes)))
	if difference := size - m.descriptor.sectors()*sectorBytes; !ok && max(difference, -difference) < s.grainBytes() {
		// The header alone would not say enough.
		return unsupported("its descriptor cannot be changed in one sector, so want a size that differs by %d bytes or more", s.grainBytes())
	}
	if err := s.setCapacity(c, size/sectorBytes); err != nil {
		return err
	}
	if ok {
		if err := m.writeSector(c, change); err != nil {
			return err
		}
	}
	m.setSize(size)
	geometry, ok := m.fitted(m.descriptor.edited(m.descriptor.reshaped(size / sectorBytes)...))
	if !ok || len(geometry.data) == 0 {
		return nil // what old guests are told of a disk is not worth refusing for
	}
	return m.writeSector(c, geometry)
}

// growth is how an image in several files is going to grow.
type growth struct {
	last    int64   // sectors of the last extent there is
	lengths []int64 // sectors of the extents to add
}

// planGrowth decides how long the last extent becomes, and which follow it.
func (m *image) planGrowth(size int64) (growth, error) {
	last := &m.extents[len(m.extents)-1]
	want, now := (size-last.guestOff)/sectorBytes, (last.guestEnd-last.guestOff)/sectorBytes
	k := kindOf(m.createType)
	if k == nil || k.splitSectors == 0 {
		return growth{last: want}, nil
	}
	limit, whole := k.splitSectors, int64(1)
	if last.sparse != nil {
		whole = int64(last.sparse.header.grainSize)
		limit = limit / whole * whole
	}
	// An extent that others follow ends with a grain.
	g := growth{last: min(want, max(limit, (now+whole-1)/whole*whole))}
	for rest := want - g.last; rest > 0; rest -= limit {
		g.lengths = append(g.lengths, min(rest, limit))
	}
	if len(m.extents)+len(g.lengths) > maxExtents {
		return g, invalid("it would take %d extents, want at most %d", len(m.extents)+len(g.lengths), maxExtents)
	}
	return g, nil
}

// growExtents lengthens the last extent and adds others, all of which the descriptor does
// not tell yet. Then the descriptor does, at once.
func (m *image) growExtents(c *engine.Commit, size int64) error {
	g, err := m.planGrowth(size)
	if err != nil {
		return err
	}
	last := &m.extents[len(m.extents)-1]
	if err := m.lengthen(c, last, g.last); err != nil {
		return err
	}
	added, err := m.addExtents(last, g.lengths)
	if err == nil {
		err = readExtents(last.guestOff+g.last*sectorBytes, added)
	}
	if err != nil {
		return errors.Join(err, m.removeExtents(added))
	}
	edits := []edit{m.descriptor.resized(len(m.extents)-1, g.last)}
	if len(added) > 0 {
		edits = append(edits, m.descriptor.appended(added))
	}
	edits = append(edits, m.descriptor.reshaped(size/sectorBytes)...)
	before := m.descriptor
	if err = m.writeDescriptor(c, m.descriptor.edited(edits...)); err != nil && m.descriptor == before {
		// Whether it was written is not known: the new files must stay for it.
		return errors.Join(err, closeExtents(added))
	}
	m.adoptExtents(last.guestOff+g.last*sectorBytes, added)
	return err
}

// lengthen makes an extent longer than the descriptor says.
func (m *image) lengthen(c *engine.Commit, e *extent, sectors int64) error {
	if e.sparse != nil {
		return e.sparse.setCapacity(c, sectors)
	}
	f := m.layer.Files[e.file]
	have, err := f.Size()
	if err != nil {
		return fmt.Errorf("size of %s: %w", f.Name(), err)
	}
	if end := e.flatOff + e.guestEnd - e.guestOff; have > end {
		// What lies past the disk's end must not become part of it.
		if err := c.Truncate(e.file, end); err != nil {
			return err
		}
	}
	if err := c.Truncate(e.file, e.flatOff+sectors*sectorBytes); err != nil {
		return err
	}
	return c.Sync()
}

// newExtent is an extent file that was made and is not part of the image yet.
type newExtent struct {
	file   vfs.File
	name   string
	line   string
	header *sparseHeader // nil if flat
	bytes  int64         // of the guest
	sparse *sparse       // what header says, once readExtents has read it
}

// addExtents makes the files of further extents like the last one, durably.
func (m *image) addExtents(last *extent, lengths []int64) (added []newExtent, err error) {
	k := kindOf(m.createType)
	number := len(m.extents) + 1
	for _, sectors := range lengths {
		e := newExtent{bytes: sectors * sectorBytes}
		fill := func(f vfs.File) error { return f.Truncate(e.bytes) }
		if last.sparse != nil {
			h := last.sparse.header.likeNew(sectors)
			e.header = &h
			fill = func(f vfs.File) error { return writeEmptySparse(f, e.header) }
		}
		// Names may be taken, by what a crash has left.
		for tries := 0; ; tries++ {
			e.name = k.extentName(m.layer.Name, number)
			number++
			e.file, err = makeFile(m.fs, e.name, fill)
			if !errors.Is(err, fs.ErrExist) || tries == maxExtents {
				break
			}
		}
		e.line = k.extentLine(sectors, e.name)
		if e.file != nil {
			added = append(added, e)
		}
		if err != nil {
			return added, err
		}
	}
	return added, formats.SyncNames(m.fs, m.layer.Name)
}

// likeNew returns the header of a new extent of the same kind.
func (h *sparseHeader) likeNew(sectors int64) sparseHeader {
	n := sparseHeader{
		version: h.version, flags: h.flags &^ flagRedundantGT,
		capacity: uint64(sectors), grainSize: h.grainSize, numGTEsPerGT: h.numGTEsPerGT,
	}
	if h.cowd {
		n.layOutCOWD()
	} else {
		n.layOut()
	}
	return n
}

func closeExtents(added []newExtent) error {
	var errs []error
	for _, e := range added {
		errs = append(errs, e.file.Close())
	}
	return errors.Join(errs...)
}

func (m *image) removeExtents(added []newExtent) error {
	err := closeExtents(added)
	for _, e := range added {
		err = errors.Join(err, m.fs.Remove(e.name))
	}
	return err
}

// readExtents reads the tables of new extents, the first of which begins at guest offset
// off: whatever can fail has to do so before the descriptor names them.
func readExtents(off int64, added []newExtent) error {
	for i := range added {
		e := &added[i]
		if e.header != nil {
			size, err := e.file.Size()
			if err != nil {
				return fmt.Errorf("size of %s: %w", e.name, err)
			}
			if e.sparse, err = newSparse(e.file, -1, *e.header, size, off, e.bytes); err != nil {
				return fmt.Errorf("%s: %w", e.name, err)
			}
		}
		off += e.bytes
	}
	return nil
}

// adoptExtents makes new extents part of the open image, whose last one ends at lastEnd.
func (m *image) adoptExtents(lastEnd int64, added []newExtent) {
	m.setSize(lastEnd)
	for _, e := range added {
		previous := &m.extents[len(m.extents)-1]
		if previous.sparse != nil {
			previous.sparse.last = false
		}
		next := extent{guestOff: m.sizeBytes, guestEnd: m.sizeBytes + e.bytes, file: m.layer.AddFile(e.file), sparse: e.sparse}
		if s := next.sparse; s != nil {
			s.file, s.tables, s.last = next.file, m.layer.Tables, true
			s.makeSpace(s.fileEnd)
		}
		m.extents = append(m.extents, next)
		m.setSize(next.guestEnd)
	}
}

// cutExtents shortens an image in several files: the descriptor first, at once, then the
// files that are not needed, or not as long, any more.
func (m *image) cutExtents(c *engine.Commit, size int64) error {
	keep := 1 + slices.IndexFunc(m.extents, func(e extent) bool { return size <= e.guestEnd })
	last := &m.extents[keep-1]
	sectors := (size - last.guestOff) / sectorBytes
	edits := append(m.descriptor.reshaped(size/sectorBytes), m.descriptor.resized(keep-1, sectors))
	for i := keep; i < len(m.extents); i++ {
		edits = append(edits, m.descriptor.removed(i))
	}
	before := m.descriptor
	err := m.writeDescriptor(c, m.descriptor.edited(edits...))
	if err != nil && m.descriptor == before {
		return err
	}
	dropped := m.extents[keep:]
	m.extents = m.extents[:keep]
	m.setSize(size)
	if last.sparse != nil {
		last.sparse.last = true
	}
	if err != nil { // the descriptor says so, though perhaps not durably
		return err
	}
	return errors.Join(m.shorten(c, last, sectors), m.dropExtents(dropped))
}

// shorten cuts an extent that the descriptor says is shorter.
func (m *image) shorten(c *engine.Commit, e *extent, sectors int64) error {
	if e.sparse != nil {
		return e.sparse.setCapacity(c, sectors)
	}
	if err := c.Truncate(e.file, e.flatOff+sectors*sectorBytes); err != nil {
		return err
	}
	return c.Sync()
}

// dropExtents removes the files of extents that the descriptor does not name any more.
func (m *image) dropExtents(dropped []extent) error {
	if len(dropped) == 0 {
		return nil
	}
	var err error
	for _, e := range dropped {
		err = errors.Join(err, m.fs.Remove(m.layer.Files[e.file].Name()))
	}
	return errors.Join(err, formats.SyncNames(m.fs, m.layer.Name), m.layer.DropFiles(dropped[0].file))
}

// setCapacity changes how much of the guest the tables can map. Larger directories and the
// missing tables are made behind everything else; then one sector, the header, switches to
// them. Until then nothing refers to them.
func (s *sparse) setCapacity(c *engine.Commit, sectors int64) error {
	h := s.header
	h.capacity = uint64(sectors)
	if h.grainTables() > maxGrainTables {
		return invalid("with grains of %d bytes want at most %d grain tables", s.grainBytes(), maxGrainTables)
	}
	if h.capacity == s.header.capacity {
		return nil
	}
	gd, rgd := s.gd, s.rgd
	if h.capacity > s.header.capacity {
		if err := s.clearTail(c); err != nil {
			return err
		}
	}
	tables := int(h.grainTables())
	if tables > len(gd) {
		var err error
		if gd, rgd, err = s.addDirectories(c, &h); err != nil {
			return err
		}
	}
	if err := c.Sync(); err != nil {
		return err
	}
	if h.cowd {
		h.cowdEntries = h.grainTables()
		h.freeSector = s.freeSectorNow()
	}
	if err := s.writeHeader(c, &h); err != nil {
		return err
	}
	s.header, s.gd = h, gd[:tables:tables]
	if rgd != nil {
		s.rgd = rgd[:tables:tables]
	}
	return nil
}

// writeHeader replaces the extent's header, durably: one sector.
func (s *sparse) writeHeader(c *engine.Commit, h *sparseHeader) error {
	head := make([]byte, sectorBytes)
	if err := readFull(s.f, head, 0); err != nil {
		return err
	}
	h.encode(head)
	if err := c.WriteAt(s.file, head, 0); err != nil {
		return err
	}
	return c.Sync()
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
	added := h.grainTables() - uint64(len(s.gd))
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

// resized is the edit that gives an extent another length.
func (d *descriptor) resized(i int, sectors int64) edit {
	return edit{d.extents[i].sectorsAt, strconv.FormatInt(sectors, 10)}
}

// removed is the edit that takes an extent's line away.
func (d *descriptor) removed(i int) edit { return edit{at: d.wholeLine(d.extents[i].at)} }

// wholeLine returns a line with its end.
func (d *descriptor) wholeLine(line textRange) textRange {
	for line.end < len(d.text) && isSpace(d.text[line.end]) {
		line.end++
	}
	if line.end < len(d.text) {
		line.end++ // the newline
	}
	return line
}

// appended is the edit that adds lines behind the last extent's.
func (d *descriptor) appended(added []newExtent) edit {
	end := d.extents[len(d.extents)-1].at.end
	var b strings.Builder
	for _, e := range added {
		b.WriteString(d.lineEnd() + e.line)
	}
	return edit{textRange{end, end}, b.String()}
}

// lineEnd returns how lines end.
func (d *descriptor) lineEnd() string {
	if i := slices.Index(d.text, '\n'); i > 0 && d.text[i-1] == '\r' {
		return "\r\n"
	}
	return "\n"
}

// reshaped are the edits that give the disk the number of cylinders that its heads and
// sectors leave it; none if there is no geometry.
func (d *descriptor) reshaped(sectors int64) []edit {
	g := d.field(keyCylinders)
	heads, tracks := d.number(keyHeads), d.number(keySectors)
	if g == nil || heads <= 0 || tracks <= 0 {
		return nil
	}
	cylinders := sectors / heads / tracks
	if heads == 16 {
		cylinders = min(cylinders, maxIDECylinders)
	}
	return []edit{{g.at, strconv.FormatInt(cylinders, 10)}}
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
