package vhd

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const (
	defaultBlockBytes = 2 << 20
	minNewBlockBytes  = 4 << 10
	maxNewBlockBytes  = 64 << 20
	chunkBytes        = 1 << 20 // of what is written at once
)

// Options says what Create accepts.
func (Format) Options() formats.Options {
	return formats.Options{
		Subformats:          []string{subDynamic, subFixed},
		OverlaySubformats:   []string{subDynamic},
		ParentFormats:       []string{formatName},
		MinClusterBytes:     minNewBlockBytes,
		MaxClusterBytes:     maxNewBlockBytes,
		DefaultClusterBytes: defaultBlockBytes,
		Preallocations: []formats.Preallocation{
			formats.PreallocateOff, formats.PreallocateMetadata, formats.PreallocateFalloc, formats.PreallocateFull,
		},
		MaxSizeBytes: maxSizeBytes,
		SizeMultiple: sectorBytes,
	}
}

// creation is a checked request to create an image.
type creation struct {
	formats.CreateRequest
	footer footer
	header header // but of a fixed image
	links  []link

	firstSlot int64 // where the first block is, or would be
	pitch     int64 // from one block to the next
	fileBytes int64
}

// Create makes an image: dynamic, fixed, or differencing if it has a parent.
func (Format) Create(ctx context.Context, req formats.CreateRequest) error {
	c, err := checkCreate(req)
	if err == nil {
		err = c.create(ctx)
	}
	if err != nil {
		return fmt.Errorf("vpc: create %s: %w", req.Name, err)
	}
	return nil
}

// Measure returns the length of an image's file.
func (Format) Measure(req formats.CreateRequest, dataBytes int64) (int64, error) {
	c, err := checkCreate(req)
	if err != nil {
		return 0, fmt.Errorf("vpc: measure: %w", err)
	}
	if c.Subformat == subFixed || c.allocatesAll() {
		return c.fileBytes, nil
	}
	return c.lengthWith((dataBytes + c.ClusterBytes - 1) / c.ClusterBytes), nil
}

func checkCreate(req formats.CreateRequest) (*creation, error) {
	c := &creation{CreateRequest: req}
	if c.Subformat == "" {
		c.Subformat = subDynamic
	}
	if c.Subformat == subFixed && c.ClusterBytes != 0 {
		return nil, invalid("cluster size %d with subformat %s, which has no clusters", c.ClusterBytes, c.Subformat)
	}
	if c.ClusterBytes == 0 {
		c.ClusterBytes = defaultBlockBytes
	}
	if c.Preallocation == "" {
		c.Preallocation = formats.PreallocateOff
	}
	if c.Parent != nil && c.SizeBytes == 0 {
		c.SizeBytes = c.Parent.Layer.Codec.Geometry().SizeBytes
	}
	if err := c.check(); err != nil {
		return nil, err
	}
	return c, c.layOut()
}

func (c *creation) check() error {
	switch {
	case c.Subformat != subDynamic && c.Subformat != subFixed:
		return invalid("subformat %q, want %s or %s", c.Subformat, subDynamic, subFixed)
	case c.ClusterBytes < minNewBlockBytes || c.ClusterBytes > maxNewBlockBytes || bits.OnesCount64(uint64(c.ClusterBytes)) != 1:
		return invalid("cluster size %d, want a power of two from %d to %d", c.ClusterBytes, minNewBlockBytes, maxNewBlockBytes)
	case !slices.Contains(Format{}.Options().Preallocations, c.Preallocation):
		return invalid("preallocation %q, want off, metadata, falloc or full", c.Preallocation)
	case c.Parent != nil && c.Subformat != subDynamic:
		return invalid("subformat %s cannot stand on a parent, want %s", c.Subformat, subDynamic)
	case c.Parent != nil && c.Preallocation != formats.PreallocateOff:
		return invalid("preallocation %q of an overlay, want off: it would hide its parent", c.Preallocation)
	}
	for name := range c.Extra {
		return invalid("option %q: the format has none of its own", name)
	}
	if err := checkSize(c.SizeBytes); err != nil {
		return fmt.Errorf("size %d: %w", c.SizeBytes, err)
	}
	if most := maxEntries * c.ClusterBytes; c.Subformat == subDynamic && c.SizeBytes > most {
		return invalid("size %d with blocks of %d bytes, want at most %d", c.SizeBytes, c.ClusterBytes, most)
	}
	return nil
}

// allocatesAll reports whether all blocks get their place at once.
func (c *creation) allocatesAll() bool {
	return c.Subformat == subDynamic && c.Preallocation != formats.PreallocateOff
}

// layOut decides where everything lies, and fills footer and header.
func (c *creation) layOut() error {
	f := &c.footer
	copy(f[:], footerCookie)
	f.setU32(footerFeatures, featuresFixed)
	f.setU32(footerVersion, formatVersion)
	f.setU32(footerTimestamp, now())
	f.setU32(footerCreatorVer, creatorVersion)
	copy(f[footerCreatorHost:], creatorHost)
	f.setU64(footerOriginalSize, uint64(c.SizeBytes))
	f.setSize(c.SizeBytes)
	id := newUUID()
	copy(f[footerUUID:], id[:])
	if c.Subformat == subFixed {
		f.setU32(footerKind, kindFixed)
		f.setU64(footerDataOffset, noOffset)
		f.seal()
		c.fileBytes = c.SizeBytes + footerBytes
		return nil
	}
	f.setU32(footerKind, kindDynamic)
	f.setU64(footerDataOffset, footerBytes)
	return c.layOutDynamic()
}

func (c *creation) layOutDynamic() error {
	f, h := &c.footer, &c.header
	copy(h[:], headerCookie)
	h.setU64(8, noOffset)
	h.setU32(headerVersion, formatVersion)
	h.setU32(headerBlockSize, uint32(c.ClusterBytes))
	h.setU32(headerEntries, uint32((c.SizeBytes-1)/c.ClusterBytes+1))
	if c.Parent != nil {
		var err error
		if c.links, err = h.setParent(c.Name, c.Parent); err != nil {
			return err
		}
		f.setU32(footerKind, kindDifferencing)
		h.setLocators(c.links, footerBytes+headerBytes)
	}
	f.seal()
	table := alignUp(footerBytes+headerBytes+linkBytes(c.links), sectorBytes)
	h.setU64(headerTableOffset, uint64(table))
	h.seal()
	bitmap := bitmapBytesOf(c.ClusterBytes)
	c.pitch = alignUp(bitmap+c.ClusterBytes, dataAlign)
	c.firstSlot = alignUp(alignUp(table+h.entries()*entryBytes, sectorBytes)+bitmap, dataAlign) - bitmap
	c.fileBytes = alignUp(table+h.entries()*entryBytes, sectorBytes) + footerBytes
	if c.allocatesAll() {
		c.fileBytes = c.lengthWith(h.entries())
	}
	return nil
}

// lengthWith returns the length of the file of a dynamic image with a number of blocks.
func (c *creation) lengthWith(blocks int64) int64 {
	if blocks == 0 {
		return c.fileBytes
	}
	return c.firstSlot + (blocks-1)*c.pitch + bitmapBytesOf(c.ClusterBytes) + c.ClusterBytes + footerBytes
}

// create makes the file. What a reader looks for first comes last: until it is there,
// nothing can be mistaken for an image.
func (c *creation) create(ctx context.Context) error {
	return formats.MakeFile(ctx, c.FS, c.Name, c.fill)
}

func (c *creation) fill(ctx context.Context, f vfs.File) error {
	fill := c.fillDynamic
	if c.Subformat == subFixed {
		fill = c.fillFixed
	}
	if err := f.Truncate(c.fileBytes); err != nil {
		return err
	}
	if err := fill(ctx, f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if _, err := f.WriteAt(c.footer[:], c.fileBytes-footerBytes); err != nil {
		return err
	}
	return f.Sync()
}

func (c *creation) fillFixed(ctx context.Context, f vfs.File) error {
	return c.Preallocation.Reserve(ctx, f, 0, c.SizeBytes)
}

// fillDynamic writes everything but the footer at the end.
func (c *creation) fillDynamic(ctx context.Context, f vfs.File) error {
	if err := c.writeTable(ctx, f); err != nil {
		return err
	}
	if c.allocatesAll() {
		if err := c.Preallocation.Reserve(ctx, f, c.firstSlot, c.fileBytes-footerBytes-c.firstSlot); err != nil {
			return err
		}
		if err := c.writeBitmaps(ctx, f); err != nil {
			return err
		}
	}
	if _, err := f.WriteAt(appendLinks(c.header[:], c.links), footerBytes); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	_, err := f.WriteAt(c.footer[:], 0)
	return err
}

func (c *creation) writeTable(ctx context.Context, f vfs.File) error {
	off := c.header.tableOffset()
	end := alignUp(off+c.header.entries()*entryBytes, sectorBytes)
	p := make([]byte, 0, min(chunkBytes, end-off))
	for number := int64(0); off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		p = p[:0]
		for ; len(p) < cap(p) && off+int64(len(p)) < end; number++ {
			entry := uint32(entryUnused)
			if c.allocatesAll() && number < c.header.entries() {
				entry = uint32((c.firstSlot + number*c.pitch) / sectorBytes)
			}
			p = binary.BigEndian.AppendUint32(p, entry)
		}
		if _, err := f.WriteAt(p, off); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

func (c *creation) writeBitmaps(ctx context.Context, f vfs.File) error {
	m := image{bitmapBytes: c.header.bitmapBytes(), blockShift: uint(bits.TrailingZeros64(uint64(c.ClusterBytes)))}
	full := make([]byte, m.bitmapBytes)
	m.fillBitmap(full)
	for number := range c.header.entries() {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := f.WriteAt(full, c.firstSlot+number*c.pitch); err != nil {
			return err
		}
	}
	return nil
}
