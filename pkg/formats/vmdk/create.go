package vmdk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const (
	defaultGrainBytes = 64 << 10
	minNewGrainBytes  = minGrainSectors * sectorBytes
	maxNewGrainBytes  = 1 << 20

	// maxSizeBytes leaves room for the tables of the smallest grains within what a grain
	// table entry can say.
	maxSizeBytes = maxFileSectors*sectorBytes - 5<<30

	newGTEsPerGT         = 512
	newDescriptorSectors = 20
	chunkBytes           = 1 << 20 // of what is written at once

	maxIDECylinders = 16383
)

// Options of this format only.
const (
	optionAdapter     = "adapter_type"
	optionHardware    = "hwversion"
	optionZeroedGrain = "zeroed_grain"
)

// adapters are the values of adapter_type.
var adapters = []string{"ide", "lsilogic", "buslogic", "legacyESX"}

// Options says what Create accepts.
func (Format) Options() formats.Options {
	return formats.Options{
		Subformats:          []string{typeMonolithicSparse, typeMonolithicFlat},
		OverlaySubformats:   []string{typeMonolithicSparse},
		ParentFormats:       []string{formatName},
		MinClusterBytes:     minNewGrainBytes,
		MaxClusterBytes:     maxNewGrainBytes,
		DefaultClusterBytes: defaultGrainBytes,
		Preallocations: []formats.Preallocation{
			formats.PreallocateOff, formats.PreallocateMetadata, formats.PreallocateFalloc, formats.PreallocateFull,
		},
		MaxSizeBytes: maxSizeBytes,
		SizeMultiple: sectorBytes,
		Extra: []formats.ExtraOption{
			{Name: optionAdapter, Help: "the disk controller that a hypervisor shall emulate", Values: adapters},
			{Name: optionHardware, Help: "VMware's virtual hardware version, a number (default 4)"},
			{Name: optionZeroedGrain, Help: "on: zeroes are noted without taking space (header version 2)", Values: []string{"off", "on"}},
		},
	}
}

// creation is a checked request to create an image.
type creation struct {
	formats.CreateRequest
	subformat   string
	sectors     int64
	cid         uint32
	parentCID   uint32
	parentHint  string
	adapter     string
	hardware    string
	zeroedGrain bool
	header      sparseHeader // of a sparse image
}

// Create makes a monolithicSparse or monolithicFlat image.
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
	c := &creation{CreateRequest: req, subformat: req.Subformat, parentCID: noParentCID}
	c.cid = nextCID(0, 8)
	if c.subformat == "" {
		c.subformat = typeMonolithicSparse
	}
	if c.subformat == typeMonolithicFlat && c.ClusterBytes != 0 {
		return nil, invalid("cluster size %d with subformat %s, which has no clusters", c.ClusterBytes, c.subformat)
	}
	if c.ClusterBytes == 0 {
		c.ClusterBytes = defaultGrainBytes
	}
	if c.Preallocation == "" {
		c.Preallocation = formats.PreallocateOff
	}
	if err := c.checkParent(); err != nil {
		return nil, err
	}
	c.sectors = c.SizeBytes / sectorBytes
	for _, check := range []func() error{c.checkShape, c.checkExtra, c.checkName} {
		if err := check(); err != nil {
			return nil, err
		}
	}
	c.layOut()
	return c, nil
}

// checkParent takes over what the image stands on.
func (c *creation) checkParent() error {
	if c.Parent == nil {
		return nil
	}
	p, ok := c.Parent.Layer.Codec.(*image)
	switch {
	case !ok:
		return invalid("parent %s is in format %s, want vmdk", c.Parent.Name, c.Parent.Layer.Format)
	case c.subformat != typeMonolithicSparse:
		return invalid("subformat %q cannot stand on a parent, want %s", c.subformat, typeMonolithicSparse)
	case c.Preallocation != formats.PreallocateOff && c.Preallocation != formats.PreallocateMetadata:
		return invalid("preallocation %q of an overlay, want off or metadata: it would hide its parent", c.Preallocation)
	}
	if c.SizeBytes == 0 {
		c.SizeBytes = p.sizeBytes
	}
	c.parentCID, c.parentHint = p.cid, vfs.RelativeLink(c.Name, c.Parent.Name)
	return checkQuotable("parent", c.parentHint)
}

func (c *creation) checkShape() error {
	switch {
	case c.subformat != typeMonolithicSparse && c.subformat != typeMonolithicFlat:
		return invalid("subformat %q, want %s or %s", c.subformat, typeMonolithicSparse, typeMonolithicFlat)
	case c.SizeBytes <= 0 || c.SizeBytes > maxSizeBytes || c.SizeBytes%sectorBytes != 0:
		return invalid("size %d, want a multiple of %d from %d to %d", c.SizeBytes, sectorBytes, sectorBytes, int64(maxSizeBytes))
	case !powerOfTwoWithin(uint64(c.ClusterBytes), minNewGrainBytes, maxNewGrainBytes):
		return invalid("cluster size %d, want a power of two from %d to %d", c.ClusterBytes, minNewGrainBytes, maxNewGrainBytes)
	case !slices.Contains(Format{}.Options().Preallocations, c.Preallocation):
		return invalid("preallocation %q, want off, metadata, falloc or full", c.Preallocation)
	}
	return nil
}

func (c *creation) checkExtra() error {
	c.adapter, c.hardware = "ide", "4"
	for _, name := range slices.Sorted(maps.Keys(c.Extra)) {
		value := c.Extra[name]
		switch name {
		case optionAdapter:
			if !slices.Contains(adapters, value) {
				return invalid("%s %q, want one of %s", name, value, strings.Join(adapters, ", "))
			}
			c.adapter = value
		case optionHardware:
			if len(value) == 0 || len(value) > 3 || strings.Trim(value, "0123456789") != "" {
				return invalid("%s %q, want a number such as 4 or 21", name, value)
			}
			c.hardware = value
		case optionZeroedGrain:
			if value != "on" && value != "off" {
				return invalid("%s %q, want on or off", name, value)
			}
			c.zeroedGrain = value == "on"
		default:
			return invalid("option %q, want one of %s, %s, %s", name, optionAdapter, optionHardware, optionZeroedGrain)
		}
	}
	if c.zeroedGrain && c.subformat == typeMonolithicFlat {
		return invalid("%s on with subformat %s, want %s", optionZeroedGrain, c.subformat, typeMonolithicSparse)
	}
	return nil
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

// layOut decides where everything lies in a sparse image: header, descriptor, redundant
// directory and tables, directory and tables, grains. It is VMware's order.
func (c *creation) layOut() {
	h := &c.header
	*h = sparseHeader{
		version: 1, flags: flagNewlineTest | flagRedundantGT,
		capacity: uint64(c.sectors), grainSize: uint64(c.ClusterBytes / sectorBytes),
		descriptorOffset: 1, descriptorSize: newDescriptorSectors, numGTEsPerGT: newGTEsPerGT,
	}
	if c.zeroedGrain {
		h.version = 2
		h.flags |= flagZeroedGrain
	}
	tables := h.gdSectors() + h.grainTables()*h.gtSectors()
	h.rgdOffset = h.descriptorOffset + h.descriptorSize
	h.gdOffset = h.rgdOffset + tables
	h.overHead = (h.gdOffset + tables + h.grainSize - 1) / h.grainSize * h.grainSize
}

// flatName returns the name of a flat image's extent, as VMware and QEMU build it.
func flatName(name string) string {
	ext := path.Ext(name)
	return strings.TrimSuffix(name, ext) + "-flat" + ext
}

// create makes the files. The one with the descriptor comes last and gets its name in the
// directory first when everything is durable; what is half-made is removed.
func (c *creation) create(ctx context.Context) (err error) {
	var made []string
	defer func() {
		if err != nil {
			for _, name := range slices.Backward(made) {
				err = errors.Join(err, c.FS.Remove(name))
			}
		}
	}()
	makeFile := func(name string, fill func(context.Context, vfs.File) error) error {
		f, err := c.FS.Create(name)
		if err != nil {
			return err
		}
		made = append(made, name)
		if err := f.Lock(vfs.LockWrite); err != nil {
			return errors.Join(err, f.Close())
		}
		err = fill(ctx, f)
		if err == nil {
			err = f.Sync()
		}
		return errors.Join(err, f.Close())
	}
	if c.subformat == typeMonolithicFlat {
		if err := makeFile(flatName(c.Name), c.fillFlat); err != nil {
			return err
		}
		err = makeFile(c.Name, c.fillDescriptor)
	} else {
		err = makeFile(c.Name, c.fillSparse)
	}
	if err != nil {
		return err
	}
	return syncNames(c.FS, c.Name)
}

// syncNames makes the names in a file's directory durable, where the file system can.
func syncNames(fsys vfs.FS, name string) error {
	if err := fsys.SyncDir(path.Dir(name)); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}

func (c *creation) fillFlat(ctx context.Context, f vfs.File) error {
	if err := f.Truncate(c.SizeBytes); err != nil {
		return err
	}
	return c.fillData(ctx, f, 0, c.SizeBytes)
}

// fillData takes the space that preallocation asks for.
func (c *creation) fillData(ctx context.Context, f vfs.File, off, n int64) error {
	switch c.Preallocation {
	case formats.PreallocateFalloc:
		return f.Allocate(off, n)
	case formats.PreallocateFull:
		return writeZeroes(ctx, f, off, n)
	}
	return nil
}

func writeZeroes(ctx context.Context, f vfs.File, off, n int64) error {
	zeroes := make([]byte, min(n, chunkBytes))
	for end := off + n; off < end; off += int64(len(zeroes)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := f.WriteAt(zeroes[:min(int64(len(zeroes)), end-off)], off); err != nil {
			return err
		}
	}
	return nil
}

func (c *creation) fillDescriptor(_ context.Context, f vfs.File) error {
	line := fmt.Sprintf("RW %d FLAT \"%s\" 0", c.sectors, path.Base(flatName(c.Name)))
	_, err := f.WriteAt([]byte(c.descriptorText(line)), 0)
	return err
}

// fillSparse writes header, descriptor, directories, and what preallocation asks for.
func (c *creation) fillSparse(ctx context.Context, f vfs.File) error {
	h := &c.header
	if err := f.Truncate(int64(h.overHead) * sectorBytes); err != nil {
		return err
	}
	text := c.descriptorText(fmt.Sprintf("RW %d SPARSE \"%s\"", c.sectors, path.Base(c.Name)))
	if len(text) > newDescriptorSectors*sectorBytes {
		return invalid("the descriptor needs %d bytes, want at most %d: use shorter names", len(text), newDescriptorSectors*sectorBytes)
	}
	head := make([]byte, sectorBytes, sectorBytes+len(text))
	h.encode(head)
	if _, err := f.WriteAt(append(head, text...), 0); err != nil {
		return err
	}
	for _, dir := range []uint64{h.rgdOffset, h.gdOffset} {
		if err := writeDirectory(f, h, dir); err != nil {
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
	return c.fillGrains(ctx, f)
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
func (c *creation) fillGrains(ctx context.Context, f vfs.File) error {
	h := &c.header
	start, grains := int64(h.overHead)*sectorBytes, (h.capacity-1)/h.grainSize+1
	length := int64(grains*h.grainSize) * sectorBytes
	if err := f.Truncate(start + length); err != nil {
		return err
	}
	if err := c.fillData(ctx, f, start, length); err != nil {
		return err
	}
	for _, dir := range []uint64{h.rgdOffset, h.gdOffset} {
		if err := writeTables(ctx, f, h, dir+h.gdSectors(), grains); err != nil {
			return err
		}
	}
	return nil
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

// descriptorText returns the descriptor, with line for the only extent. The order of the
// lines matters to some readers: CID before anything else that contains these letters.
func (c *creation) descriptorText(line string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Disk DescriptorFile\nversion=1\nCID=%08x\nparentCID=%08x\ncreateType=%q\n", c.cid, c.parentCID, c.subformat)
	if c.parentHint != "" {
		fmt.Fprintf(&b, "parentFileNameHint=\"%s\"\n", c.parentHint)
	}
	fmt.Fprintf(&b, "\n# Extent description\n%s\n\n# The Disk Data Base\n#DDB\n\n", line)
	g := geometryOf(c.sectors, c.adapter)
	for _, ddb := range [][2]string{
		{"adapterType", c.adapter},
		{"encoding", "UTF-8"},
		{"geometry.cylinders", fmt.Sprint(g.cylinders)},
		{"geometry.heads", fmt.Sprint(g.heads)},
		{"geometry.sectors", fmt.Sprint(g.sectors)},
		{"longContentID", fmt.Sprintf("%016x%08x%08x", rand.Uint64(), rand.Uint32(), c.cid)},
		{"virtualHWVersion", c.hardware},
	} {
		fmt.Fprintf(&b, "ddb.%s = \"%s\"\n", ddb[0], ddb[1])
	}
	return b.String()
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
