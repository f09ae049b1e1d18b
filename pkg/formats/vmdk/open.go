package vmdk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// opener opens one image; what it has opened so far is in files.
type opener struct {
	req    formats.OpenRequest
	files  []vfs.File
	image  *image
	tables uint64 // grain tables of all sparse extents, whose directories are in memory
}

// Open opens an image: a file with an embedded descriptor, or a descriptor file and the
// extents it names.
func (Format) Open(req formats.OpenRequest) (*engine.Layer, error) {
	o := &opener{req: req, image: &image{fs: req.FS, noLock: req.NoLock}}
	layer, err := o.open()
	if err != nil {
		for _, f := range o.files {
			err = errors.Join(err, f.Close())
		}
		return nil, fmt.Errorf("vmdk: open %s: %w", req.Name, err)
	}
	return layer, nil
}

func (o *opener) open() (*engine.Layer, error) {
	f, size, err := o.openFile(o.req.Name)
	if err != nil {
		return nil, err
	}
	head := make([]byte, min(size, sectorBytes))
	if err := readFull(f, head, 0); err != nil {
		return nil, err
	}
	switch kind := foreignExtent(head); {
	case kind != "":
		return nil, unsupported("%s without its descriptor: open the descriptor file that names it", kind)
	case isHeader(head) && size >= sectorBytes:
		err = o.openMonolithic(f, size, head)
	default:
		err = o.openDescriptorFile(f, size)
	}
	if err != nil {
		return nil, err
	}
	return o.finish()
}

// openFile opens and locks a file of the image.
func (o *opener) openFile(name string) (vfs.File, int64, error) {
	f, err := o.req.FS.Open(name, o.req.Mode)
	if err != nil {
		return nil, 0, err
	}
	o.files = append(o.files, f)
	if !o.req.NoLock {
		kind := vfs.LockRead
		if o.req.Mode == vfs.ReadWrite {
			kind = vfs.LockWrite
		}
		if err := f.Lock(kind); err != nil {
			return nil, 0, err
		}
	}
	size, err := f.Size()
	if err != nil {
		return nil, 0, fmt.Errorf("size of %s: %w", name, err)
	}
	return f, size, nil
}

// openMonolithic opens a sparse extent that describes itself.
func (o *opener) openMonolithic(f vfs.File, size int64, head []byte) error {
	h, err := readHeader(f, size, head)
	if err != nil {
		return err
	}
	if h.descriptorOffset == 0 {
		return unsupported("an extent without a descriptor: open the descriptor file that names it")
	}
	text := make([]byte, h.descriptorSize*sectorBytes)
	if err := readFull(f, text, int64(h.descriptorOffset)*sectorBytes); err != nil {
		return fmt.Errorf("read the descriptor: %w", err)
	}
	m := o.image
	m.descriptorAt, m.descriptorRoom = int64(h.descriptorOffset)*sectorBytes, int64(len(text))
	if err := o.describe(text, typeMonolithicSparse, typeStreamOptimized); err != nil {
		return err
	}
	// The file name in the extent line is ignored: files get renamed, and some writers
	// leave it empty.
	if n := len(m.descriptor.extents); n != 1 {
		return corrupt("an image in one file with %d extents, want one", n)
	}
	line := &m.descriptor.extents[0]
	if line.kind != "SPARSE" {
		return corrupt("an image in one sparse file with an extent of kind %q, want SPARSE", shorten(line.kind))
	}
	if err := o.checkAccess(line); err != nil {
		return err
	}
	sectors := guestSectors(h, uint64(line.sectors))
	s, err := newSparse(f, 0, h, size, 0, int64(sectors)*sectorBytes)
	if err != nil {
		return err
	}
	m.extents = []extent{{guestEnd: s.guestEnd, sparse: s}}
	return nil
}

// guestSectors decides, for an image in one file, between header and descriptor: some writers round the header's
// capacity up to a grain and tell the true size in the descriptor. A greater difference
// means that the descriptor is out of date, as after a crash while growing.
func guestSectors(h sparseHeader, described uint64) uint64 {
	tabled := (h.capacity + h.grainSize - 1) / h.grainSize * h.grainSize
	difference := max(h.capacity, described) - min(h.capacity, described)
	if difference < h.grainSize && described <= tabled {
		return described
	}
	return h.capacity
}

// readHeader returns the header that counts, valid: the first sector, or the footer.
func readHeader(f vfs.File, size int64, head []byte) (h sparseHeader, err error) {
	if isCOWD(head) {
		h, err = decodeCOWD(head)
	} else {
		h = decodeHeader(head)
	}
	if err != nil {
		return h, fmt.Errorf("header of %s: %w", f.Name(), err)
	}
	if h.gdOffset == gdAtEnd {
		footer, err := readFooter(f, size)
		if err != nil {
			return h, err
		}
		// The descriptor is where the header says: a footer need not repeat it.
		footer.descriptorOffset, footer.descriptorSize = h.descriptorOffset, h.descriptorSize
		h = footer
		h.footer = true
	}
	if err := h.validate(uint64(size) / sectorBytes); err != nil {
		return h, fmt.Errorf("header of %s: %w", f.Name(), err)
	}
	return h, nil
}

// openDescriptorFile opens the extents that a descriptor file names.
func (o *opener) openDescriptorFile(f vfs.File, size int64) error {
	if size > maxDescriptorBytes {
		return unsupported("neither a sparse extent nor a descriptor: a descriptor has at most %d bytes", maxDescriptorBytes)
	}
	text := make([]byte, size)
	if err := readFull(f, text, 0); err != nil {
		return fmt.Errorf("read the descriptor: %w", err)
	}
	if !looksLikeDescriptor(text) {
		return unsupported("neither a sparse extent nor a descriptor")
	}
	err := o.describe(text, typeMonolithicFlat, typeVMFS, typeSplitFlat, typeSplitSparse, typeMonolithicSparse,
		typeVMFSSparse, typeSESparse)
	if err != nil {
		return err
	}
	if len(o.image.descriptor.extents) == 0 {
		return corrupt("the descriptor names no extents")
	}
	names := map[string]bool{o.req.Name: true}
	for i := range o.image.descriptor.extents {
		if err := o.openExtent(&o.image.descriptor.extents[i], names); err != nil {
			return fmt.Errorf("extent %d: %w", i, err)
		}
	}
	return nil
}

// maxGuestBytes bounds a guest's size, far above every format's limit.
const maxGuestBytes = 1 << 56

// openExtent opens the next extent. names are the files already in use: two extents in one
// file would be two owners of one cluster.
func (o *opener) openExtent(line *extentLine, names map[string]bool) error {
	if why := refusedExtentKinds[line.kind]; why != "" {
		return unsupported("kind %s: %s", line.kind, why)
	}
	add := extentKinds[line.kind]
	if add == nil {
		return unsupported("kind %q, want SPARSE, FLAT, VMFS, VMFSSPARSE, SESPARSE or ZERO", shorten(line.kind))
	}
	if err := o.checkAccess(line); err != nil {
		return err
	}
	if line.sectors > (maxGuestBytes-o.guestEnd())/sectorBytes {
		return corrupt("the extents up to it have more than %d bytes", int64(maxGuestBytes))
	}
	if line.kind == "ZERO" {
		return o.addZero(line)
	}
	name, err := o.image.descriptor.resolve(o.req.Name, line.file)
	if err != nil {
		return err
	}
	if names[name] {
		return corrupt("file %s is used twice", name)
	}
	names[name] = true
	f, size, err := o.openFile(name)
	if err != nil {
		return err
	}
	return add(o, f, size, line)
}

// extentKinds are the kinds of extents that can be read, and what opens them.
var extentKinds = map[string]func(o *opener, f vfs.File, size int64, line *extentLine) error{
	"SPARSE":     (*opener).addSparse,
	"VMFSSPARSE": (*opener).addSparse,
	"FLAT":       (*opener).addFlat,
	"VMFS":       (*opener).addFlat,
	"SESPARSE":   (*opener).addSESparse,
	"ZERO":       func(*opener, vfs.File, int64, *extentLine) error { return nil },
}

// addZero adds a stretch that reads as zeroes, whatever a parent holds. There is no file
// that could be written to.
func (o *opener) addZero(line *extentLine) error {
	start := o.guestEnd()
	o.image.readOnly = "a ZERO extent has no file to write to"
	o.image.extents = append(o.image.extents, extent{guestOff: start, guestEnd: start + line.sectors*sectorBytes, zero: true, file: -1})
	return nil
}

func (o *opener) checkAccess(line *extentLine) error {
	switch line.access {
	case "NOACCESS":
		return unsupported("its access is NOACCESS, want RW or RDONLY")
	case "RDONLY":
		o.image.readOnly = "an extent's access is RDONLY"
	}
	return nil
}

func (o *opener) guestEnd() int64 {
	if n := len(o.image.extents); n > 0 {
		return o.image.extents[n-1].guestEnd
	}
	return 0
}

func (o *opener) addFlat(f vfs.File, size int64, line *extentLine) error {
	off, length := line.offset*sectorBytes, line.sectors*sectorBytes
	if off > size || length > size-off {
		return corrupt("%s has %d bytes, want %d from %d on: it was truncated", f.Name(), size, length, off)
	}
	start := o.guestEnd()
	o.image.extents = append(o.image.extents, extent{
		guestOff: start, guestEnd: start + length, file: len(o.files) - 1, flatOff: off,
	})
	return nil
}

func (o *opener) addSparse(f vfs.File, size int64, line *extentLine) error {
	head := make([]byte, sectorBytes)
	if err := readFull(f, head, 0); err != nil {
		return err
	}
	if kind := foreignExtent(head); kind != "" {
		return unsupported("%s is %s", f.Name(), kind)
	}
	if !isHeader(head) && !isCOWD(head) {
		return corrupt("%s does not start with the header of a sparse extent", f.Name())
	}
	h, err := readHeader(f, size, head)
	if err != nil {
		return err
	}
	// The header may say more, as after a crash while growing.
	sectors := uint64(line.sectors)
	if sectors > h.wholeGrains(h.capacity) {
		return corrupt("the descriptor gives it %d sectors, its header %d", sectors, h.capacity)
	}
	if o.tables += h.grainTables(); o.tables > maxGrainTables {
		return corrupt("the extents up to it have %d grain tables, want at most %d", o.tables, maxGrainTables)
	}
	start := o.guestEnd()
	s, err := newSparse(f, len(o.files)-1, h, size, start, int64(sectors)*sectorBytes)
	if err != nil {
		return err
	}
	o.image.extents = append(o.image.extents, extent{guestOff: start, guestEnd: s.guestEnd, file: s.file, sparse: s})
	return nil
}

// refusedExtentKinds are kinds of extents that exist but are not supported, and what they
// are.
var refusedExtentKinds = map[string]string{
	"VMFSRDM": "a device of the host, through VMFS",
	"VMFSRAW": "a device of the host, through VMFS",
}

// refusedTypes are values of createType that exist but are not supported, and what they
// are.
var refusedTypes = map[string]string{
	"fullDevice":                   "a whole disk of the host",
	"partitionedDevice":            "partitions of a disk of the host",
	"vmfsRaw":                      "a device of the host",
	"vmfsRDM":                      "a device of the host",
	"vmfsRDMP":                     "a device of the host",
	"vmfsRawDeviceMap":             "a device of the host",
	"vmfsPassthroughRawDeviceMap":  "a device of the host",
	"vmfsPassthroughRawDeviceMapP": "a device of the host",
	"custom":                       "a mix that only its maker knows",
}

// describe takes over a descriptor, whose createType must be one of types.
func (o *opener) describe(text []byte, types ...string) error {
	d, err := parseDescriptor(text)
	if err != nil {
		return err
	}
	m := o.image
	m.descriptor = d
	filters, _ := d.lookup(keyFilters)
	if d.hasKeyPrefix("encryption") || d.hasKeyPrefix("ddb.encryption") || strings.Contains(strings.ToLower(filters), "vmcrypt") {
		return unsupported("the image is encrypted")
	}
	if filters != "" {
		m.readOnly = "what is written would pass by its I/O filters, " + shorten(filters)
	}
	if m.createType, err = matchType(d.createType(), types); err != nil {
		return err
	}
	if m.cid, err = d.contentID(keyCID); err != nil {
		return err
	}
	m.parentCID = noParentCID
	if _, ok := d.lookup(keyParentCID); ok {
		if m.parentCID, err = d.contentID(keyParentCID); err != nil {
			return err
		}
	}
	if path, ok := d.lookup(keyChangeTrack); ok && path != "" {
		m.readOnly = "what is written would be missing from the changes tracked in " + shorten(path)
	}
	return nil
}

// matchType returns the member of types that is meant, which writers spell with whatever
// case.
func matchType(createType string, types []string) (string, error) {
	for _, known := range types {
		if strings.EqualFold(createType, known) {
			return known, nil
		}
	}
	for name, why := range refusedTypes {
		if strings.EqualFold(createType, name) {
			return "", unsupported("createType %s: %s", name, why)
		}
	}
	return "", unsupported("createType %q, want one of %s here", shorten(createType), strings.Join(types, ", "))
}

// finish makes the layer of what was opened.
func (o *opener) finish() (*engine.Layer, error) {
	m := o.image
	m.sizeBytes = o.guestEnd()
	layer := engine.NewLayer(o.req.Name, formatName, o.files, o.req.Mode == vfs.ReadWrite)
	parent, err := o.req.Link(m.parentLink(o.req.Name))
	if err != nil {
		return nil, err
	}
	layer.Parent, layer.Codec, m.layer = parent, m, layer
	for i := range m.extents {
		s := m.extents[i].sparse
		if se := m.extents[i].se; se != nil {
			se.tables = layer.Tables
		}
		if s == nil {
			continue
		}
		s.tables, s.last = layer.Tables, i == len(m.extents)-1
		switch {
		case layer.Writable && m.isEmptyStream():
			s.stream = newStreamWriter(s)
			m.readOnly = ""
		case s.header.compressed():
			m.readOnly = "compressed grains are written once"
		case s.header.flags&^knownFlags != 0:
			m.readOnly = fmt.Sprintf("what the flags %#x mean is not known", s.header.flags&^knownFlags)
		}
	}
	if m.stream() != nil {
		layer.Codec = streamImage{m}
		return layer, nil
	}
	if m.readOnly == "" && layer.Writable {
		if err := m.makeSpaces(); err != nil {
			return nil, err
		}
	}
	return layer, nil
}

// makeSpaces prepares the extents for new grains.
func (m *image) makeSpaces() error {
	for i := range m.extents {
		s := m.extents[i].sparse
		if s == nil {
			continue
		}
		end, err := s.end()
		if err != nil {
			return err
		}
		s.makeSpace(end)
		if err := s.reclaim(); err != nil {
			return err
		}
	}
	return nil
}

// makeSpace prepares an extent for new grains from a file offset on.
func (s *sparse) makeSpace(end int64) {
	s.space = engine.NewSpace(s.f, s.file, end, s.grainBytes(), maxFileSectors*sectorBytes)
}

// end returns where new grains can begin: the file's end, unless the extent's last grain
// was written only as far as the guest goes. A greater guest will use the rest.
func (s *sparse) end() (int64, error) {
	p, _, err := s.entries(s.grains() - 1)
	if err != nil && !errors.Is(err, block.ErrCorrupt) {
		return 0, err
	}
	if err != nil || p == nil {
		return s.fileEnd, nil
	}
	entry := binary.LittleEndian.Uint32(p)
	if s.room(uint64(entry)) == 0 {
		return s.fileEnd, nil
	}
	return max(s.fileEnd, int64(entry)*sectorBytes+s.grainBytes()), nil
}
