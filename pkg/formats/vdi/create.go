package vdi

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
	defaultBlockBytes  = 1 << 20
	minNewBlockBytes   = 4 << 10
	maxNewBlockBytes   = maxBlockBytes
	maxSizeBytes       = maxBlocks * defaultBlockBytes
	maxReservedMapping = 64 << 20 // of room in a new image for a larger map
	chunkBytes         = 1 << 20  // of what is written at once
)

// Options says what Create accepts.
func (Format) Options() formats.Options {
	return formats.Options{
		Subformats:          []string{subDynamic, subStatic},
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
	h header
}

// Create makes an image: dynamic, static, or differencing if it has a parent.
func (Format) Create(ctx context.Context, req formats.CreateRequest) error {
	c, err := checkCreate(req)
	if err == nil {
		err = c.create(ctx)
	}
	if err != nil {
		return fmt.Errorf("vdi: create %s: %w", req.Name, err)
	}
	return nil
}

// Measure returns the length of an image's file.
func (Format) Measure(req formats.CreateRequest, dataBytes int64) (int64, error) {
	c, err := checkCreate(req)
	if err != nil {
		return 0, fmt.Errorf("vdi: measure: %w", err)
	}
	blocks := c.h.blocksOf(dataBytes)
	if c.allocatesAll() {
		blocks = c.h.blocks()
	}
	return c.h.dataOffset() + blocks*c.h.strideBytes(), nil
}

func checkCreate(req formats.CreateRequest) (*creation, error) {
	c := &creation{CreateRequest: req}
	if c.Subformat == "" {
		c.Subformat = subDynamic
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
	most := min(maxBlocks*c.ClusterBytes, maxSizeBytes)
	switch {
	case c.Subformat != subDynamic && c.Subformat != subStatic:
		return invalid("subformat %q, want %s or %s", c.Subformat, subDynamic, subStatic)
	case c.ClusterBytes < minNewBlockBytes || c.ClusterBytes > maxNewBlockBytes || bits.OnesCount64(uint64(c.ClusterBytes)) != 1:
		return invalid("cluster size %d, want a power of two from %d to %d", c.ClusterBytes, minNewBlockBytes, maxNewBlockBytes)
	case c.SizeBytes <= 0 || c.SizeBytes > most || c.SizeBytes%sectorBytes != 0:
		return invalid("size %d, want a multiple of %d from %d to %d", c.SizeBytes, sectorBytes, sectorBytes, most)
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
	return nil
}

// allocatesAll reports whether all blocks get their place at once.
func (c *creation) allocatesAll() bool {
	return c.Subformat == subStatic || c.Preallocation != formats.PreallocateOff
}

// layOut decides where everything lies, and fills the header. Blocks start at multiples of
// their size, up to 1 MiB, behind room for a larger map: a hole.
func (c *creation) layOut() error {
	h := &c.h
	copy(h[fieldText:fieldText+textBytes], createText)
	h.setU32(fieldSignature, signature)
	h.setU32(fieldVersion, version)
	h.setU32(fieldHeaderSize, sizeOfNew)
	h.setU32(fieldType, typeDynamic)
	if c.Subformat == subStatic {
		h.setU32(fieldType, typeStatic)
	}
	h.setU32(fieldMapOffset, headerBytes)
	h.setU32(fieldSectorSize, sectorBytes)
	h.setU32(fieldLCHSSectorSize, sectorBytes)
	h.setU32(fieldBlockSize, uint32(c.ClusterBytes))
	h.setDiskSize(c.SizeBytes)
	h.setBlocks(h.blocksOf(c.SizeBytes))
	if c.allocatesAll() {
		h.setAllocated(h.blocks())
	}
	need := h.blocks() * entryBytes
	need += min(need*(mapReserve-1), maxReservedMapping)
	align := min(c.ClusterBytes, defaultBlockBytes)
	h.setU32(fieldDataOffset, uint32((headerBytes+need+align-1)/align*align))
	h.setUUID(fieldUUID, newUUID())
	h.setUUID(fieldUUIDModified, newUUID())
	if c.Parent == nil {
		return nil
	}
	return h.setParent(c.Name, c.Parent)
}

// create makes the file. The header comes last: until it is there, nothing can be mistaken
// for an image.
func (c *creation) create(ctx context.Context) error {
	return formats.MakeFile(ctx, c.FS, c.Name, c.fill)
}

func (c *creation) fill(ctx context.Context, f vfs.File) error {
	h := &c.h
	if err := f.Truncate(h.dataOffset() + h.allocated()*h.strideBytes()); err != nil {
		return err
	}
	if err := c.writeMap(ctx, f); err != nil {
		return err
	}
	if err := c.reserve(ctx, f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if _, err := f.WriteAt(h[:], 0); err != nil {
		return err
	}
	return f.Sync()
}

func (c *creation) writeMap(ctx context.Context, f vfs.File) error {
	blocks, off := c.h.blocks(), c.h.mapOffset()
	p := make([]byte, 0, min(chunkBytes, blocks*entryBytes))
	for block := int64(0); block < blocks; {
		if err := ctx.Err(); err != nil {
			return err
		}
		p = p[:0]
		for ; len(p) < cap(p) && block < blocks; block++ {
			entry := uint32(entryFree)
			if c.allocatesAll() {
				entry = uint32(block)
			}
			p = binary.LittleEndian.AppendUint32(p, entry)
		}
		if _, err := f.WriteAt(p, off); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

// reserve takes the space that preallocation asks for.
func (c *creation) reserve(ctx context.Context, f vfs.File) error {
	return c.Preallocation.Reserve(ctx, f, c.h.dataOffset(), c.h.allocated()*c.h.strideBytes())
}
