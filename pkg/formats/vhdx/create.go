package vhdx

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strconv"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const (
	defaultLogBytes   = mib
	defaultBlockBytes = mib
	// maxDefaultBAT is how long the BAT of a new image becomes before blocks of the
	// default size grow.
	maxDefaultBAT = 16 * mib
	newMetadata   = mib // length of the region
	chunkBytes    = mib // of what is written at once
	creatorText   = "csi-imgdisk"
)

// Options of this format only. Two are qemu-img's.
const (
	optionLogSize        = "log_size"
	optionLogicalSector  = "logical_sector_size"
	optionPhysicalSector = "physical_sector_size"
)

// Options says what Create accepts.
func (Format) Options() formats.Options {
	return formats.Options{
		Subformats:          []string{subformatDynamic, subformatFixed},
		OverlaySubformats:   []string{subformatDifferencing},
		ParentFormats:       []string{formatName},
		MinClusterBytes:     minBlockBytes,
		MaxClusterBytes:     maxBlockBytes,
		DefaultClusterBytes: defaultBlockBytes,
		Preallocations: []formats.Preallocation{
			formats.PreallocateOff, formats.PreallocateMetadata, formats.PreallocateFalloc, formats.PreallocateFull,
		},
		MaxSizeBytes: maxSizeBytes,
		SizeMultiple: 512,
		Extra: []formats.ExtraOption{
			{Name: optionLogSize, Help: "the log's length in bytes, whole MiB (default 1 MiB)"},
			{Name: optionLogicalSector, Help: "the sector size that a guest sees (default 512, or the parent's)", Values: []string{"512", "4096"}},
			{Name: optionPhysicalSector, Help: "the sector size that a guest should write (default 4096)", Values: []string{"512", "4096"}},
		},
	}
}

// creation is a checked request to create an image.
type creation struct {
	formats.CreateRequest
	image // its shape: meta, header, regions
}

// Create makes a dynamic or fixed image, or a differencing one if it has a parent.
func (Format) Create(ctx context.Context, req formats.CreateRequest) error {
	c, err := checkCreate(req)
	if err == nil {
		err = c.create(ctx)
	}
	if err != nil {
		return fmt.Errorf("vhdx: create %s: %w", req.Name, err)
	}
	return nil
}

// Measure returns the length of an image's file. Sector bitmaps of a differencing image
// are counted for data that lies together.
func (Format) Measure(req formats.CreateRequest, dataBytes int64) (int64, error) {
	c, err := checkCreate(req)
	if err != nil {
		return 0, fmt.Errorf("vhdx: measure: %w", err)
	}
	if c.allocatesAll() {
		dataBytes = c.SizeBytes
	}
	n := c.dataStart() + c.blocks(dataBytes)<<c.blockShift
	if c.meta.hasParent && dataBytes > 0 {
		n += c.chunks(dataBytes) * bitmapBytes
	}
	return n, nil
}

func checkCreate(req formats.CreateRequest) (*creation, error) {
	c := &creation{CreateRequest: req}
	c.meta = &metadata{
		length: newMetadata, diskID: newGUID(), logicalSector: 512, physicalSector: 4096,
	}
	c.header = header{
		sequence: 1, fileWrite: newGUID(), dataWrite: newGUID(), version: formatVersion, logLength: defaultLogBytes, logOffset: headerSection,
	}
	if c.Preallocation == "" {
		c.Preallocation = formats.PreallocateOff
	}
	for _, check := range []func() error{c.checkParent, c.checkExtra, c.checkShape, c.checkSubformat} {
		if err := check(); err != nil {
			return nil, err
		}
	}
	return c, c.layOut()
}

// checkParent takes over what the image stands on.
func (c *creation) checkParent() (err error) {
	if c.Parent == nil {
		return nil
	}
	if c.SizeBytes == 0 {
		c.SizeBytes = c.Parent.Layer.Codec.Geometry().SizeBytes
	}
	if c.meta.locator, err = locatorFor(c.Name, c.Parent); err != nil {
		return err
	}
	parent := c.Parent.Layer.Codec.(*image) // locatorFor has looked
	c.meta.hasParent = true
	c.meta.logicalSector, c.meta.physicalSector = parent.meta.logicalSector, parent.meta.physicalSector
	c.meta.diskID = parent.meta.diskID // it is the same disk, at a later time
	return nil
}

func (c *creation) checkExtra() error {
	for _, name := range slices.Sorted(maps.Keys(c.Extra)) {
		n, err := strconv.ParseInt(c.Extra[name], 10, 64)
		if err != nil {
			return invalid("%s %q, want a number", name, c.Extra[name])
		}
		switch name {
		case optionLogSize:
			if n <= 0 || n%mib != 0 || n > maxLogBytes {
				return invalid("%s %d, want a multiple of %d, at most %d", name, n, mib, maxLogBytes)
			}
			c.header.logLength = uint32(n)
		case optionLogicalSector, optionPhysicalSector:
			if !isSectorSize(n) {
				return invalid("%s %d, want 512 or 4096", name, n)
			}
			switch {
			case name == optionPhysicalSector:
				c.meta.physicalSector = n
			case c.Parent != nil && n != c.meta.logicalSector:
				return invalid("%s %d, want %d as the parent has", name, n, c.meta.logicalSector)
			default:
				c.meta.logicalSector = n
			}
		default:
			return invalid("option %q, want one of %s, %s, %s", name, optionLogSize, optionLogicalSector, optionPhysicalSector)
		}
	}
	return nil
}

func (c *creation) checkShape() error {
	sector := c.meta.logicalSector
	if c.SizeBytes <= 0 || c.SizeBytes > maxSizeBytes || c.SizeBytes%sector != 0 {
		return invalid("size %d, want a multiple of the sector size %d from %d to %d", c.SizeBytes, sector, sector, int64(maxSizeBytes))
	}
	if c.ClusterBytes == 0 {
		c.ClusterBytes = defaultBlockBytes
		for c.SizeBytes/c.ClusterBytes*batEntryBytes > maxDefaultBAT {
			c.ClusterBytes *= 2
		}
	}
	if !isBlockSize(c.ClusterBytes) {
		return invalid("cluster size %d, want a power of two from %d to %d", c.ClusterBytes, minBlockBytes, maxBlockBytes)
	}
	c.meta.blockBytes, c.meta.sizeBytes = c.ClusterBytes, c.SizeBytes
	c.adoptShape()
	return vfs.CheckName(c.Name)
}

func (c *creation) checkSubformat() error {
	want := []string{subformatDynamic, subformatFixed}
	if c.Parent != nil {
		want = []string{subformatDifferencing}
	}
	if c.Subformat == "" {
		c.Subformat = want[0]
	}
	switch {
	case !slices.Contains(want, c.Subformat):
		return invalid("subformat %q, want one of %v here", c.Subformat, want)
	case !slices.Contains(Format{}.Options().Preallocations, c.Preallocation):
		return invalid("preallocation %q, want off, metadata, falloc or full", c.Preallocation)
	case c.Parent != nil && c.Preallocation != formats.PreallocateOff && c.Preallocation != formats.PreallocateMetadata:
		return invalid("preallocation %q of an overlay, want off or metadata: it would hide its parent", c.Preallocation)
	}
	c.meta.leaveAllocated = c.Subformat == subformatFixed
	return nil
}

// allocatesAll reports whether all blocks get their place at once.
func (c *creation) allocatesAll() bool {
	return c.meta.leaveAllocated || c.Preallocation == formats.PreallocateFalloc || c.Preallocation == formats.PreallocateFull
}

// layOut decides where everything lies: header section, log, metadata, BAT, blocks. It is
// Windows' order.
func (c *creation) layOut() error {
	at := headerSection + int64(c.header.logLength)
	c.meta.at = at
	bat := alignUp(c.entryCount(c.SizeBytes)*batEntryBytes, mib)
	c.regions = []region{
		{id: batRegion, off: uint64(at + newMetadata), length: uint32(bat), required: true},
		{id: metadataRegion, off: uint64(at), length: newMetadata, required: true},
	}
	return nil
}

// dataStart returns where the blocks of a new image begin.
func (c *creation) dataStart() int64 { return c.regions[0].span().end }

// create makes the file. Its name in the directory becomes durable when everything in it
// is; what is half-made is removed.
func (c *creation) create(ctx context.Context) error {
	return formats.MakeFile(ctx, c.FS, c.Name, c.fill)
}

// fill writes everything but the file type identifier, then that: without it, nobody takes
// a half-made file for an image.
func (c *creation) fill(ctx context.Context, f vfs.File) error {
	body, err := c.meta.encode()
	if err != nil {
		return err
	}
	if err := f.Truncate(c.dataStart()); err != nil {
		return err
	}
	if err := c.fillBlocks(ctx, f); err != nil {
		return err
	}
	regions := encodeRegions(c.regions)
	newer := c.header
	newer.sequence++
	for _, w := range []struct {
		p  []byte
		at int64
	}{
		{body, c.meta.at},
		{regions, regionTableAt[0]}, {regions, regionTableAt[1]},
		{c.header.encode(), headerAt[0]}, {newer.encode(), headerAt[1]},
		{encodeUTF16(creatorText), int64(len(fileSignature))},
	} {
		if _, err := f.WriteAt(w.p, w.at); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if _, err := f.WriteAt([]byte(fileSignature), 0); err != nil {
		return err
	}
	return f.Sync()
}

// fillBlocks takes the space that preallocation asks for, and gives all blocks their place
// if the image is to have that.
func (c *creation) fillBlocks(ctx context.Context, f vfs.File) error {
	if c.Preallocation != formats.PreallocateOff {
		if err := f.Allocate(0, c.dataStart()); err != nil {
			return err
		}
	}
	if !c.allocatesAll() {
		return nil
	}
	start, length := c.dataStart(), c.blocks(c.SizeBytes)<<c.blockShift
	if err := f.Truncate(start + length); err != nil {
		return err
	}
	if err := c.Preallocation.Reserve(ctx, f, start, length); err != nil {
		return err
	}
	return c.writeEntries(ctx, 0, c.blocks(c.SizeBytes), start, f.WriteAt)
}

// writeEntries writes the entries of blocks [first, end), which lie one after the other in
// the file from start on.
func (m *image) writeEntries(ctx context.Context, first, end, start int64, write func([]byte, int64) (int, error)) error {
	for block := first; block < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		// Up to the next bitmap's entry, which is zero.
		stop := min(end, (block/m.chunkRatio+1)*m.chunkRatio, block+chunkBytes/batEntryBytes)
		at := m.entryAt(m.payloadIndex(block))
		p := make([]byte, 0, (stop-block)*batEntryBytes)
		for ; block < stop; block++ {
			p = binary.LittleEndian.AppendUint64(p, uint64(newEntry(stateFull, start+(block-first)<<m.blockShift)))
		}
		if _, err := write(p, at); err != nil {
			return err
		}
	}
	return nil
}
