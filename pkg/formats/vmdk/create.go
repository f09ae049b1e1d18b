package vmdk

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const (
	defaultGrainBytes = 64 << 10
	minNewGrainBytes  = minGrainSectors * sectorBytes
	maxNewGrainBytes  = 1 << 20

	// maxSparseBytes leaves room for the tables of the smallest grains within what a grain
	// table entry can say.
	maxSparseBytes = maxFileSectors*sectorBytes - 5<<30

	newGTEsPerGT         = 512
	newDescriptorSectors = 20
	streamOverHead       = 128     // sectors: where VMware's streams begin
	chunkBytes           = 1 << 20 // of what is written at once

	maxIDECylinders = 16383
)

// Options of this format only.
const (
	optionAdapter     = "adapter_type"
	optionHardware    = "hwversion"
	optionTools       = "toolsversion"
	optionGeometry    = "geometry"
	optionZeroedGrain = "zeroed_grain"
)

// adapters are the values of adapter_type.
var adapters = []string{"ide", "lsilogic", "buslogic", "legacyESX"}

// Options says what Create accepts.
func (Format) Options() formats.Options {
	return formats.Options{
		Subformats:          kindNames(anyKind),
		OverlaySubformats:   kindNames(func(k *kind) bool { return k.overlay }),
		ParentFormats:       []string{formatName},
		MinClusterBytes:     minNewGrainBytes,
		MaxClusterBytes:     maxNewGrainBytes,
		DefaultClusterBytes: defaultGrainBytes,
		Preallocations: []formats.Preallocation{
			formats.PreallocateOff, formats.PreallocateMetadata, formats.PreallocateFalloc, formats.PreallocateFull,
		},
		MaxSizeBytes: maxSparseBytes,
		SizeMultiple: sectorBytes,
		Extra: []formats.ExtraOption{
			{Name: optionAdapter, Help: "the disk controller that a hypervisor shall emulate", Values: adapters},
			{Name: optionHardware, Help: "VMware's virtual hardware version, a number (default 4)"},
			{Name: optionTools, Help: "VMware's version of the guest's tools, a number (default: none is said)"},
			{Name: optionGeometry, Help: "cylinders/heads/sectors that old guests are told (default: what VMware would)"},
			{Name: optionZeroedGrain, Help: "on: zeroes are noted without taking space (header version 2)", Values: []string{"off", "on"}},
		},
	}
}

// creation is a checked request to create an image.
type creation struct {
	formats.CreateRequest
	kind        *kind
	sectors     int64
	lengths     []int64 // of the extents, in sectors
	about       about
	zeroedGrain bool
}

// Create makes an image of any kind.
func (Format) Create(ctx context.Context, req formats.CreateRequest) error {
	c, err := checkCreate(req)
	if err == nil {
		err = c.create(ctx)
	}
	if err != nil {
		return fmt.Errorf("vmdk: create %s: %w", req.Name, err)
	}
	return nil
}

func checkCreate(req formats.CreateRequest) (*creation, error) {
	c := &creation{CreateRequest: req, kind: kindOf(req.Subformat)}
	if c.kind == nil {
		return nil, invalid("subformat %q, want one of %s", req.Subformat, wantKinds(anyKind))
	}
	c.about = newAbout(c.kind)
	if !c.kind.sparse && c.ClusterBytes != 0 {
		return nil, invalid("cluster size %d with subformat %s, which has no clusters", c.ClusterBytes, c.kind.name)
	}
	if c.ClusterBytes == 0 {
		c.ClusterBytes = c.kind.defaultGrain
	}
	if c.Preallocation == "" {
		c.Preallocation = formats.PreallocateOff
	}
	for _, check := range []func() error{c.checkParent, c.checkShape, c.checkExtra, c.checkName} {
		if err := check(); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// checkParent takes over what the image stands on.
func (c *creation) checkParent() error {
	if c.Parent == nil {
		return nil
	}
	p := imageOf(c.Parent.Layer.Codec)
	isOverlay := func(k *kind) bool { return k.overlay }
	switch {
	case p == nil:
		return invalid("parent %s is in format %s, want vmdk", c.Parent.Name, c.Parent.Layer.Format)
	case !c.kind.overlay:
		return invalid("subformat %q cannot stand on a parent, want one of %s", c.kind.name, wantKinds(isOverlay))
	case c.Preallocation != formats.PreallocateOff && c.Preallocation != formats.PreallocateMetadata:
		return invalid("preallocation %q of an overlay, want off or metadata: it would hide its parent", c.Preallocation)
	}
	if c.SizeBytes == 0 {
		c.SizeBytes = p.sizeBytes
	}
	return c.about.setParent(c.Name, c.Parent.Name, p)
}

func (c *creation) checkShape() error {
	switch {
	case c.SizeBytes <= 0 || c.SizeBytes > c.kind.maxBytes || c.SizeBytes%sectorBytes != 0:
		return invalid("size %d, want a multiple of %d from %d to %d, where subformat %s ends",
			c.SizeBytes, sectorBytes, sectorBytes, c.kind.maxBytes, c.kind.name)
	case c.kind.sparse && !powerOfTwoWithin(uint64(c.ClusterBytes), uint64(c.kind.minGrain), maxNewGrainBytes):
		return invalid("cluster size %d, want a power of two from %d to %d", c.ClusterBytes, c.kind.minGrain, maxNewGrainBytes)
	case !slices.Contains(Format{}.Options().Preallocations, c.Preallocation):
		return invalid("preallocation %q, want off, metadata, falloc or full", c.Preallocation)
	case c.kind.stream && c.Preallocation != formats.PreallocateOff:
		return invalid("preallocation %q with subformat %s, want off: what is in it is written once, compressed", c.Preallocation, c.kind.name)
	}
	c.sectors = c.SizeBytes / sectorBytes
	c.lengths = c.kind.extentLengths(c.sectors)
	return nil
}

func (c *creation) checkExtra() error {
	for _, name := range slices.Sorted(maps.Keys(c.Extra)) {
		if err := c.takeExtra(name, c.Extra[name]); err != nil {
			return err
		}
	}
	if c.zeroedGrain && !c.kind.zeroGrains {
		return invalid("%s on with subformat %s, want one of %s", optionZeroedGrain, c.kind.name,
			wantKinds(func(k *kind) bool { return k.zeroGrains }))
	}
	if c.about.geometry == (geometry{}) {
		c.about.geometry = geometryOf(c.sectors, c.about.adapter)
	}
	return nil
}

// takeExtra checks an option of this format only, and takes it over.
func (c *creation) takeExtra(name, value string) error {
	switch name {
	case optionAdapter:
		if !slices.Contains(adapters, value) {
			return invalid("%s %q, want one of %s", name, value, strings.Join(adapters, ", "))
		}
		c.about.adapter = value
	case optionHardware:
		if !isNumber(value, 3) {
			return invalid("%s %q, want a number such as 4 or 21", name, value)
		}
		c.about.hardware = value
	case optionTools:
		if !isNumber(value, 10) {
			return invalid("%s %q, want a number such as 2147483647", name, value)
		}
		c.about.tools = value
	case optionGeometry:
		g, err := parseGeometry(value)
		if err != nil {
			return err
		}
		c.about.geometry = g
	case optionZeroedGrain:
		if value != "on" && value != "off" {
			return invalid("%s %q, want on or off", name, value)
		}
		c.zeroedGrain = value == "on"
	default:
		return invalid("option %q, want one of %s", name,
			strings.Join([]string{optionAdapter, optionGeometry, optionHardware, optionTools, optionZeroedGrain}, ", "))
	}
	return nil
}

// isNumber reports whether a text is 1 to digits decimal digits.
func isNumber(text string, digits int) bool {
	return len(text) > 0 && len(text) <= digits && strings.Trim(text, "0123456789") == ""
}

func (c *creation) checkName() error {
	if err := vfs.CheckName(c.Name); err != nil {
		return err
	}
	return checkQuotable("name", path.Base(c.Name))
}

// checkQuotable refuses names that a descriptor cannot hold.
func checkQuotable(what, name string) error {
	if strings.ContainsAny(name, "\"\n\r\x00") || len(name) > 2048 {
		return invalid("%s %q: a descriptor cannot hold a name with quotes, line ends or more than 2048 bytes", what, shorten(name))
	}
	return nil
}

// header returns the header of a new sparse extent, with the place of everything in it.
func (c *creation) header(sectors int64) sparseHeader {
	h := sparseHeader{
		version: 1, flags: flagNewlineTest,
		capacity: uint64(sectors), grainSize: uint64(c.ClusterBytes / sectorBytes), numGTEsPerGT: newGTEsPerGT,
	}
	if c.kind.embedded {
		h.descriptorOffset, h.descriptorSize = 1, newDescriptorSectors
	}
	switch {
	case c.kind.stream:
		h.layOutStream()
	case c.kind.cowd:
		h.layOutCOWD()
	default:
		if c.zeroedGrain {
			h.version = 2
			h.flags |= flagZeroedGrain
		}
		h.layOut()
	}
	return h
}

// layOut decides where everything lies in a hosted sparse extent: header, descriptor,
// redundant directory and tables, directory and tables, grains. It is VMware's order.
func (h *sparseHeader) layOut() {
	h.flags |= flagRedundantGT
	tables := h.gdSectors() + h.grainTables()*h.gtSectors()
	h.rgdOffset = 1 + h.descriptorSize
	h.gdOffset = h.rgdOffset + tables
	h.overHead = h.wholeGrains(h.gdOffset + tables)
}

// layOutCOWD is layOut for a COWD extent: header, directory, tables, grains.
func (h *sparseHeader) layOutCOWD() {
	h.cowd, h.version, h.flags, h.numGTEsPerGT = true, cowdVersion, 0, cowdGTEsPerGT
	h.gdOffset = cowdHeaderSectors
	h.cowdEntries = h.grainTables()
	h.overHead = h.wholeGrains(h.gdOffset + h.gdSectors() + h.grainTables()*h.gtSectors())
	h.freeSector = uint32(h.overHead)
}

// layOutStream is layOut for a stream: header and descriptor, and the rest follows as it
// comes.
func (h *sparseHeader) layOutStream() {
	h.version = 3
	h.flags |= flagCompressed | flagMarkers
	h.compressAlgorithm = compressDeflate
	h.gdOffset = gdAtEnd
	h.overHead = streamOverHead
}

// wholeGrains rounds sectors up.
func (h *sparseHeader) wholeGrains(sectors uint64) uint64 {
	return (sectors + h.grainSize - 1) / h.grainSize * h.grainSize
}

// create makes the files. The one with the descriptor comes last and gets its name in the
// directory first when everything is durable; what is half-made is removed.
func (c *creation) create(ctx context.Context) error {
	files := formats.NewFiles{FS: c.FS}
	return files.Finish(c.makeFiles(ctx, &files))
}

func (c *creation) makeFiles(ctx context.Context, files *formats.NewFiles) error {
	for i, sectors := range c.lengths {
		if err := ctx.Err(); err != nil {
			return err
		}
		fill := func(ctx context.Context, f vfs.File) error { return c.fillExtent(ctx, f, sectors) }
		if err := files.Make(ctx, c.kind.extentName(c.Name, i+1), fill); err != nil {
			return err
		}
	}
	if c.kind.embedded {
		return nil
	}
	return files.Make(ctx, c.Name, c.fillDescriptor)
}

// makeFile makes a new file, locked and with durable contents. It returns the file, open,
// also when filling it fails.
func makeFile(fsys vfs.FS, name string, fill func(vfs.File) error) (vfs.File, error) {
	f, err := fsys.Create(name)
	if err != nil {
		return nil, err
	}
	if err := f.Lock(vfs.LockWrite); err != nil {
		return f, err
	}
	if err := fill(f); err != nil {
		return f, err
	}
	return f, f.Sync()
}

// fillExtent writes an extent's file.
func (c *creation) fillExtent(ctx context.Context, f vfs.File, sectors int64) error {
	switch {
	case c.kind.stream:
		return c.fillStream(f)
	case c.kind.sparse:
		return c.fillSparse(ctx, f, c.header(sectors))
	}
	if err := f.Truncate(sectors * sectorBytes); err != nil {
		return err
	}
	return c.Preallocation.Reserve(ctx, f, 0, sectors*sectorBytes)
}

func (c *creation) fillDescriptor(_ context.Context, f vfs.File) error {
	_, err := f.WriteAt([]byte(c.descriptorText()), 0)
	return err
}

// descriptorText returns the descriptor of the image.
func (c *creation) descriptorText() string {
	lines := make([]string, len(c.lengths))
	for i, sectors := range c.lengths {
		lines[i] = c.kind.extentLine(sectors, c.kind.extentName(c.Name, i+1))
	}
	return c.about.descriptorText(lines)
}

// embeddedDescriptor returns the descriptor of an image in one file.
func (c *creation) embeddedDescriptor() ([]byte, error) {
	text := c.descriptorText()
	if len(text) > newDescriptorSectors*sectorBytes {
		return nil, invalid("the descriptor needs %d bytes, want at most %d: use shorter names", len(text), newDescriptorSectors*sectorBytes)
	}
	return []byte(text), nil
}

// fillSparse writes header, descriptor, directories, and what preallocation asks for.
func (c *creation) fillSparse(ctx context.Context, f vfs.File, h sparseHeader) error {
	if err := writeEmptySparse(f, &h); err != nil {
		return err
	}
	if c.kind.embedded {
		text, err := c.embeddedDescriptor()
		if err != nil {
			return err
		}
		if _, err := f.WriteAt(text, int64(h.descriptorOffset)*sectorBytes); err != nil {
			return err
		}
	}
	if c.Preallocation == formats.PreallocateOff {
		return nil
	}
	if err := f.Allocate(0, int64(h.overHead)*sectorBytes); err != nil {
		return err
	}
	if c.Preallocation == formats.PreallocateMetadata {
		return nil
	}
	return c.fillGrains(ctx, f, &h)
}

// directories returns where a new extent has its directories, each with its tables.
func (h *sparseHeader) directories() []uint64 {
	if h.cowd {
		return []uint64{h.gdOffset}
	}
	return []uint64{h.rgdOffset, h.gdOffset}
}

// writeEmptySparse writes an extent without data, all of whose tables have their place, as
// holes. Its descriptor, if it holds one, is still missing.
func writeEmptySparse(f vfs.File, h *sparseHeader) error {
	if err := f.Truncate(int64(h.overHead) * sectorBytes); err != nil {
		return err
	}
	head := make([]byte, sectorBytes)
	if h.cowd {
		binary.LittleEndian.PutUint32(head[8:], cowdFlags)
	}
	h.encode(head)
	if _, err := f.WriteAt(head, 0); err != nil {
		return err
	}
	for _, dir := range h.directories() {
		if err := writeDirectory(f, h, dir); err != nil {
			return err
		}
	}
	return nil
}

// writeDirectory writes a grain directory whose tables follow it.
func writeDirectory(f vfs.File, h *sparseHeader, at uint64) error {
	p := make([]byte, 0, h.grainTables()*gteBytes)
	for i := range h.grainTables() {
		p = binary.LittleEndian.AppendUint32(p, uint32(at+h.gdSectors()+i*h.gtSectors()))
	}
	_, err := f.WriteAt(p, int64(at)*sectorBytes)
	return err
}

// fillGrains gives every grain its place, in order.
func (c *creation) fillGrains(ctx context.Context, f vfs.File, h *sparseHeader) error {
	start, grains := int64(h.overHead)*sectorBytes, (h.capacity-1)/h.grainSize+1
	length := int64(grains*h.grainSize) * sectorBytes
	if err := f.Truncate(start + length); err != nil {
		return err
	}
	if err := c.Preallocation.Reserve(ctx, f, start, length); err != nil {
		return err
	}
	for _, dir := range h.directories() {
		if err := writeTables(ctx, f, h, dir+h.gdSectors(), grains); err != nil {
			return err
		}
	}
	if !h.cowd {
		return nil
	}
	full := *h
	full.freeSector = uint32(min(h.overHead+grains*h.grainSize, maxFileSectors-1))
	return full.writeFreeSector(f)
}

// writeTables writes grain tables, which lie together, for grains that do, too.
func writeTables(ctx context.Context, f vfs.File, h *sparseHeader, at, grains uint64) error {
	off := int64(at) * sectorBytes
	p := make([]byte, 0, chunkBytes)
	for i := range grains {
		p = binary.LittleEndian.AppendUint32(p, uint32(h.overHead+i*h.grainSize))
		if len(p) < chunkBytes && i < grains-1 {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := f.WriteAt(p, off); err != nil {
			return err
		}
		off += int64(len(p))
		p = p[:0]
	}
	return nil
}

// geometry is what old guests and controllers are told of a disk.
type geometry struct{ cylinders, heads, sectors int64 }

// geometryOf returns the geometry that VMware gives a disk of a length: an IDE disk has 16
// heads and 63 sectors, and at most 16383 cylinders; another depends on its size.
func geometryOf(sectors int64, adapter string) geometry {
	g := geometry{heads: 16, sectors: 63}
	if adapter != "ide" {
		const gigabyte = 1 << 30 / sectorBytes
		switch {
		case sectors < gigabyte:
			g = geometry{heads: 64, sectors: 32}
		case sectors < 2*gigabyte:
			g = geometry{heads: 128, sectors: 32}
		default:
			g = geometry{heads: 255, sectors: 63}
		}
	}
	g.cylinders = sectors / (g.heads * g.sectors)
	if adapter == "ide" {
		g.cylinders = min(g.cylinders, maxIDECylinders)
	}
	return g
}

// parseGeometry reads "cylinders/heads/sectors".
func parseGeometry(text string) (geometry, error) {
	parts := strings.Split(text, "/")
	var n [3]int64
	for i := range n {
		if len(parts) != len(n) || !isNumber(parts[i], 9) {
			return geometry{}, invalid("%s %q, want three numbers such as 1024/16/63", optionGeometry, text)
		}
		n[i], _ = strconv.ParseInt(parts[i], 10, 64) // cannot fail: at most nine digits
	}
	g := geometry{n[0], n[1], n[2]}
	if g.cylinders < 1 || g.heads < 1 || g.heads > 255 || g.sectors < 1 || g.sectors > 255 {
		return geometry{}, invalid("%s %q, want at least 1 of each, at most 255 heads and 255 sectors", optionGeometry, text)
	}
	return g, nil
}
