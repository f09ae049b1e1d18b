package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const chunkBytes = 1 << 20 // of what is written at once

// creation is a checked request to create an image.
type creation struct {
	formats.CreateRequest
	version       uint32
	refcountOrder uint32
	lazy          bool
	extended      bool
	zstd          bool
	dataFile      string // as given
	dataFileName  string // in the file system
	rawData       bool

	header header
	layout layout
}

// layout says where everything lies in a new image, in clusters: the header, the refcount
// table, its blocks, the L1 table, and if they are preallocated L2 tables and guest data.
type layout struct {
	refTable, refBlocks, l1, l2, data                          int64 // where they begin
	refTableClusters, blocks, l1Clusters, l2Clusters, clusters int64 // how many they are
	end                                                        int64
}

// Create makes an image, and its external data file if it is to have one.
func (Format) Create(ctx context.Context, req formats.CreateRequest) error {
	c, err := checkCreate(req)
	if err == nil {
		err = c.create(ctx)
	}
	if err != nil {
		return fmt.Errorf("qcow2: create %s: %w", req.Name, err)
	}
	return nil
}

// Measure returns how long the files of an image are that holds so much data, in the worst
// case that it is spread over the whole disk.
func (Format) Measure(req formats.CreateRequest, dataBytes int64) (int64, error) {
	if req.Name == "" {
		req.Name = "measured" // it is not created
	}
	c, err := checkCreate(req)
	if err != nil {
		return 0, fmt.Errorf("qcow2: measure: %w", err)
	}
	if c.preallocates() {
		dataBytes = c.SizeBytes
	}
	data := (min(dataBytes, c.SizeBytes) + c.ClusterBytes - 1) / c.ClusterBytes
	l2 := min(c.header.l1Entries(c.SizeBytes), data)
	if c.preallocates() {
		l2 = c.header.l1Entries(c.SizeBytes)
	}
	if c.dataFile != "" {
		return c.layOut(l2, 0).end*c.ClusterBytes + c.SizeBytes, nil
	}
	return c.layOut(l2, data).end * c.ClusterBytes, nil
}

func checkCreate(req formats.CreateRequest) (*creation, error) {
	c := &creation{CreateRequest: req}
	if err := c.parseExtra(); err != nil {
		return nil, err
	}
	if c.Preallocation == "" {
		c.Preallocation = formats.PreallocateOff
	}
	for _, check := range []func() error{c.checkParent, c.checkShape, c.checkFeatures, c.checkNames} {
		if err := check(); err != nil {
			return nil, err
		}
	}
	if c.preallocates() {
		data := (c.SizeBytes + c.ClusterBytes - 1) / c.ClusterBytes
		if c.dataFile != "" {
			data = 0
		}
		c.layout = c.layOut(c.header.l1Entries(c.SizeBytes), data)
	} else {
		c.layout = c.layOut(0, 0)
	}
	return c, c.finishHeader()
}

// preallocates reports whether all guest clusters are mapped from the start. A raw data file
// can only be read by itself and with the image alike if they are.
func (c *creation) preallocates() bool {
	return c.Preallocation != formats.PreallocateOff || c.rawData
}

// checkParent takes over what the image stands on.
func (c *creation) checkParent() error {
	if c.Parent == nil {
		return nil
	}
	switch {
	case c.rawData:
		return invalid("%s on with a parent: a raw data file cannot stand on another image", optionDataFileRaw)
	case c.preallocates():
		return invalid("preallocation %q of an overlay, want off: it would hide its parent", c.Preallocation)
	}
	if c.SizeBytes == 0 {
		size := c.Parent.Layer.Codec.Geometry().SizeBytes
		c.SizeBytes = (size + sectorBytes - 1) / sectorBytes * sectorBytes
	}
	return nil
}

func (c *creation) checkShape() error {
	switch {
	case c.Subformat != "":
		return invalid("subformat %q, but there are none", c.Subformat)
	case c.ClusterBytes < minNewClusterBytes || c.ClusterBytes > maxNewClusterBytes || c.ClusterBytes&(c.ClusterBytes-1) != 0:
		return invalid("cluster size %d, want a power of two from %d to %d", c.ClusterBytes, minNewClusterBytes, maxNewClusterBytes)
	case c.SizeBytes <= 0 || c.SizeBytes > maxSizeBytes || c.SizeBytes%sectorBytes != 0:
		return invalid("size %d, want a multiple of %d from %d to %d", c.SizeBytes, sectorBytes, sectorBytes, int64(maxSizeBytes))
	case !slices.Contains(Format{}.Options().Preallocations, c.Preallocation):
		return invalid("preallocation %q, want off, metadata, falloc or full", c.Preallocation)
	}
	c.header = header{
		version: c.version, clusterBits: uint32(bits.TrailingZeros64(uint64(c.ClusterBytes))), size: uint64(c.SizeBytes),
		refcountOrder: c.refcountOrder, headerLength: headerBytesV2,
	}
	h := &c.header
	if c.version >= 3 {
		h.headerLength = headerBytesNew
		h.extra = make([]byte, headerBytesNew-headerBytesV3-1)
	}
	if c.lazy {
		h.compatible |= compatLazyRefcounts
	}
	if c.extended {
		h.incompatible |= incompatExtendedL2
	}
	if c.zstd {
		h.incompatible |= incompatCompression
		h.compressionType = compressionZstd
	}
	if c.dataFile != "" {
		h.incompatible |= incompatDataFile
	}
	if c.rawData {
		h.autoclear |= autoclearRawData
	}
	if h.l1Entries(c.SizeBytes)*8 > maxL1Bytes {
		return invalid("size %d with clusters of %d bytes, want at most %d", c.SizeBytes, c.ClusterBytes,
			int64(maxL1Bytes/8)<<(h.l2Bits()+uint(h.clusterBits)))
	}
	return nil
}

func (c *creation) checkFeatures() error {
	h := &c.header
	switch {
	case c.version == 2 && (h.compatible != 0 || h.incompatible != 0 || h.autoclear != 0 || c.refcountOrder != 4):
		return invalid("%s 0.10 has none of %s, %s, %s, %s zstd, and %s 16 only", optionCompat, optionLazy, optionExtendedL2,
			optionDataFile, optionCompression, optionRefcountBits)
	case c.extended && h.clusterBits < minExtendedBits:
		return invalid("%s with clusters of %d bytes, want at least %d", optionExtendedL2, c.ClusterBytes, 1<<minExtendedBits)
	case c.rawData && c.dataFile == "":
		return invalid("%s without %s", optionDataFileRaw, optionDataFile)
	case c.lazy && c.dataFile != "":
		return invalid("%s with %s: its clusters have no refcounts", optionLazy, optionDataFile)
	}
	return nil
}

func (c *creation) checkNames() error {
	if err := vfs.CheckName(c.Name); err != nil {
		return err
	}
	h := &c.header
	if c.Parent != nil {
		h.backingFile = vfs.RelativeLink(c.Name, c.Parent.Name)
		if len(h.backingFile) > maxBackingName {
			return invalid("the parent's name has %d bytes, want at most %d", len(h.backingFile), maxBackingName)
		}
		h.extensions = append(h.extensions, extension{extBackingFormat, []byte(c.Parent.Layer.Format)})
	}
	if c.dataFile != "" {
		name, err := vfs.Resolve(c.Name, c.dataFile)
		if err != nil {
			return fmt.Errorf("%s: %w", optionDataFile, err)
		}
		if name == c.Name {
			return invalid("%s %q is the image itself", optionDataFile, c.dataFile)
		}
		c.dataFileName = name
		h.extensions = append(h.extensions, extension{extDataFile, []byte(vfs.RelativeLink(c.Name, name))})
	}
	h.extensions = append(h.extensions, extension{extIdentity, newIdentity()})
	return nil
}

// layOut decides where everything lies, given how many L2 tables and guest clusters are to
// have their place.
func (c *creation) layOut(l2, data int64) layout {
	up := func(n int64) int64 { return (n + c.ClusterBytes - 1) / c.ClusterBytes }
	l := layout{refTable: 1, refTableClusters: 1, blocks: 1, l2Clusters: l2, clusters: data}
	l.l1Clusters = up(c.header.l1Entries(c.SizeBytes) * 8)
	perBlock := c.ClusterBytes * 8 >> c.refcountOrder
	for {
		l.refBlocks = l.refTable + l.refTableClusters
		l.l1 = l.refBlocks + l.blocks
		l.l2 = l.l1 + l.l1Clusters
		l.data = l.l2 + l.l2Clusters
		l.end = l.data + l.clusters
		blocks := (l.end + perBlock - 1) / perBlock
		table := up(blocks * 8)
		if blocks == l.blocks && table == l.refTableClusters {
			return l
		}
		l.blocks, l.refTableClusters = blocks, table
	}
}

// finishHeader enters what the layout says, and places the parent's name.
func (c *creation) finishHeader() error {
	h, l := &c.header, &c.layout
	if l.refTableClusters*c.ClusterBytes > maxRefTableBytes || l.end > maxClusterOff/c.ClusterBytes {
		return invalid("size %d with clusters of %d bytes and preallocation, which needs too large a refcount table", c.SizeBytes, c.ClusterBytes)
	}
	h.l1Size, h.l1TableOffset = uint32(h.l1Entries(c.SizeBytes)), uint64(l.l1*c.ClusterBytes)
	h.refcountTableOffset, h.refcountTableClusters = uint64(l.refTable*c.ClusterBytes), uint32(l.refTableClusters)
	if c.version >= 3 {
		h.setExtension(extFeatureNames, featureTable())
		if len(h.encode()) > sectorBytes {
			h.setExtension(extFeatureNames, nil)
		}
	}
	head, name := int64(len(h.encode())), int64(len(h.backingFile))
	if name > 0 {
		at := head
		if head+name > sectorBytes {
			at = (head + sectorBytes - 1) / sectorBytes * sectorBytes
		}
		h.backingFileOffset, h.backingFileSize = uint64(at), uint32(name)
		head = at + name
	}
	if head > c.ClusterBytes {
		return invalid("names of %d bytes, want at most %d with clusters of %d bytes", name, name-(head-c.ClusterBytes), c.ClusterBytes)
	}
	return nil
}

// create makes the files. The header comes last, when everything else is durable: a file
// without is no image. What is half-made is removed.
func (c *creation) create(ctx context.Context) error {
	files := formats.NewFiles{FS: c.FS}
	if c.dataFile != "" {
		err := files.Make(ctx, c.dataFileName, c.fillDataFile)
		if err == nil {
			err = formats.SyncNames(c.FS, c.dataFileName)
		}
		if err != nil {
			return files.Finish(err)
		}
	}
	return files.Finish(files.Make(ctx, c.Name, c.fill))
}

func (c *creation) fillDataFile(ctx context.Context, f vfs.File) error {
	if err := f.Truncate(c.SizeBytes); err != nil {
		return err
	}
	return c.Preallocation.Reserve(ctx, f, 0, c.SizeBytes)
}

// fill writes tables, what preallocation asks for, and then the header: first what is not
// in its first sector, because that sector makes the file an image.
func (c *creation) fill(ctx context.Context, f vfs.File) error {
	l := &c.layout
	if err := f.Truncate(l.end * c.ClusterBytes); err != nil {
		return err
	}
	if c.Preallocation != formats.PreallocateOff {
		if err := f.Allocate(0, l.data*c.ClusterBytes); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	for _, write := range []func(context.Context, vfs.File) error{c.writeRefcounts, c.writeL2, c.writeL1} {
		if err := write(ctx, f); err != nil {
			return err
		}
	}
	if l.clusters > 0 {
		if err := c.Preallocation.Reserve(ctx, f, l.data*c.ClusterBytes, l.clusters*c.ClusterBytes); err != nil {
			return err
		}
	}
	return c.writeHeader(f)
}

func (c *creation) writeHeader(f vfs.File) error {
	h := &c.header
	p := h.encode()
	if h.backingFile != "" {
		p = append(p, make([]byte, int(h.backingFileOffset)-len(p))...)
		p = append(p, h.backingFile...)
	}
	if len(p) > sectorBytes {
		if _, err := f.WriteAt(p[sectorBytes:], sectorBytes); err != nil {
			return err
		}
		p = p[:sectorBytes]
	}
	if err := f.Sync(); err != nil {
		return err
	}
	_, err := f.WriteAt(p, 0)
	return err
}

// writeRefcounts writes a refcount of 1 for every cluster.
func (c *creation) writeRefcounts(ctx context.Context, f vfs.File) error {
	l := &c.layout
	table := make([]uint64, l.blocks)
	for i := range table {
		table[i] = uint64((l.refBlocks + int64(i)) * c.ClusterBytes)
	}
	if _, err := f.WriteAt(encodeEntries(table), l.refTable*c.ClusterBytes); err != nil {
		return err
	}
	order := uint(c.refcountOrder)
	perChunk := int64(chunkBytes * 8 >> order)
	for first := int64(0); first < l.end; first += perChunk {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(perChunk, l.end-first)
		p := make([]byte, (n<<order+7)/8)
		for i := range n {
			bit := i << order
			encodeRefcount(p[bit>>3:], uint(bit&7), order, 1)
		}
		if _, err := f.WriteAt(p, l.refBlocks*c.ClusterBytes+first<<order/8); err != nil {
			return err
		}
	}
	return nil
}

// writeL2 writes L2 tables that map all clusters in order.
func (c *creation) writeL2(ctx context.Context, f vfs.File) error {
	l := &c.layout
	if l.l2Clusters == 0 {
		return nil
	}
	off, base := l.l2*c.ClusterBytes, uint64(l.data*c.ClusterBytes)
	if c.dataFile != "" {
		base = 0
	}
	clusters := (c.SizeBytes + c.ClusterBytes - 1) / c.ClusterBytes
	p := make([]byte, 0, chunkBytes)
	for i := range clusters {
		p = binary.BigEndian.AppendUint64(p, base+uint64(i*c.ClusterBytes)|flagCopied)
		if c.extended {
			p = binary.BigEndian.AppendUint64(p, allSubclusters)
		}
		if len(p) < chunkBytes && i < clusters-1 {
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

// writeL1 writes an L1 table that names the L2 tables.
func (c *creation) writeL1(_ context.Context, f vfs.File) error {
	l := &c.layout
	if l.l2Clusters == 0 {
		return nil // a hole
	}
	table := make([]uint64, l.l2Clusters)
	for i := range table {
		table[i] = uint64((l.l2+int64(i))*c.ClusterBytes) | flagCopied
	}
	_, err := f.WriteAt(encodeEntries(table), l.l1*c.ClusterBytes)
	return err
}
