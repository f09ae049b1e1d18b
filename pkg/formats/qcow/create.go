package qcow

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"math/bits"
	"slices"
	"strconv"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/internal/aescbc"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const (
	defaultClusterBytes = 64 << 10
	// New level 2 tables are as long as a cluster, but map at most 128 MiB, which is what
	// libqcow accepts. Images of clusters below 4 KiB would have very long level 1 tables
	// then: theirs have 4096 entries.
	maxDefaultMapsBits = 27
	smallClusterBits   = 12
	smallClusterL2Bits = 12

	// maxSizeBytes is what the largest clusters and tables can map.
	maxSizeBytes = maxL1Entries << (maxClusterBits + maxL2Bits)
)

// Options of this format only.
const (
	optionEncryption = "encrypt.format"
	optionL2Bits     = "l2_bits"
)

// Options says what Create accepts. Every registered format can be stood on: the file names
// its backing file, and says nothing about its format.
func (Format) Options() formats.Options {
	return formats.Options{
		OverlaySubformats:   []string{""},
		ParentFormats:       parentFormats(),
		MinClusterBytes:     1 << minClusterBits,
		MaxClusterBytes:     1 << maxClusterBits,
		DefaultClusterBytes: defaultClusterBytes,
		Preallocations:      preallocations(),
		MaxSizeBytes:        maxSizeBytes,
		SizeMultiple:        sectorBytes,
		Extra: []formats.ExtraOption{
			{Name: optionEncryption, Help: "aes: encrypt the contents with a password (weak: for compatibility only)", Values: []string{"aes"}},
			{Name: optionL2Bits, Help: "log2 of the entries of a level 2 table, 6 to 13"},
		},
	}
}

func parentFormats() []string {
	names := []string{formatName}
	for _, f := range formats.All() {
		if name := f.Name(); name != formatName {
			names = append(names, name)
		}
	}
	return names
}

func preallocations() []formats.Preallocation {
	return []formats.Preallocation{
		formats.PreallocateOff, formats.PreallocateMetadata, formats.PreallocateFalloc, formats.PreallocateFull,
	}
}

// creation is a checked request to create an image: header, backing file name, level 1 table,
// level 2 tables, clusters.
type creation struct {
	formats.CreateRequest
	header  header
	name    []byte // of the backing file
	cipher  *aescbc.Cipher
	tables  int64 // level 2 tables that are made
	tableAt int64 // where they start
	dataAt  int64 // where clusters start, and the file ends if there are none
}

// Create makes an image.
func (Format) Create(ctx context.Context, req formats.CreateRequest) error {
	c, err := checkCreate(req)
	if err == nil {
		err = c.create(ctx)
	}
	if err != nil {
		return fmt.Errorf("qcow: create %s: %w", req.Name, err)
	}
	return nil
}

// Measure returns the length of an image that holds data in dataBytes, wherever they are.
func (Format) Measure(req formats.CreateRequest, dataBytes int64) (int64, error) {
	c, err := checkShape(req)
	if err != nil {
		return 0, fmt.Errorf("qcow: measure: %w", err)
	}
	clusters := (dataBytes-1)>>c.header.clusterBits + 1
	if c.fills() {
		clusters = c.clusters()
	}
	tables := max(c.tables, min(clusters, int64(c.header.l1Entries())))
	return c.tableAt + tables*c.tableSpace() + clusters*c.ClusterBytes, nil
}

func checkCreate(req formats.CreateRequest) (*creation, error) {
	c, err := checkShape(req)
	if err != nil {
		return nil, err
	}
	if err := vfs.CheckName(c.Name); err != nil {
		return nil, err
	}
	c.header.mtime = uint32(time.Now().Unix())
	if c.header.cryptMethod == cryptNone {
		return c, nil
	}
	password, err := c.Secret.Ask(c.Name)
	if err != nil {
		return nil, err
	}
	c.cipher = aescbc.New(password)
	clear(password)
	return c, nil
}

// checkShape checks what decides where in the file everything is.
func checkShape(req formats.CreateRequest) (*creation, error) {
	c := &creation{CreateRequest: req}
	if c.ClusterBytes == 0 {
		c.ClusterBytes = defaultClusterBytes
	}
	if c.Preallocation == "" {
		c.Preallocation = formats.PreallocateOff
	}
	for _, check := range []func() error{c.checkParent, c.checkSizes, c.checkExtra} {
		if err := check(); err != nil {
			return nil, err
		}
	}
	h := &c.header
	h.size = uint64(c.SizeBytes)
	if n := h.l1Entries(); n > maxL1Entries {
		return nil, invalid("size %d with clusters of %d bytes would take %d level 1 entries, want at most %d: choose larger clusters or a larger %s",
			c.SizeBytes, c.ClusterBytes, n, maxL1Entries, optionL2Bits)
	}
	c.layOut()
	return c, nil
}

func (c *creation) checkParent() error {
	switch {
	case c.Subformat != "":
		return invalid("subformat %q, want none: the format has no subformats", c.Subformat)
	case !slices.Contains(preallocations(), c.Preallocation):
		return invalid("preallocation %q, want one of %q", c.Preallocation, preallocations())
	case c.Parent == nil:
		return nil
	case c.fills():
		return invalid("preallocation %q of an overlay, want off or metadata: it would hide its parent", c.Preallocation)
	}
	if c.SizeBytes == 0 {
		parentBytes := c.Parent.Layer.Codec.Geometry().SizeBytes
		c.SizeBytes = (parentBytes + sectorBytes - 1) / sectorBytes * sectorBytes
	}
	var err error
	c.name, err = backingName(c.Name, c.Parent.Name)
	return err
}

// fills reports whether all clusters get their place at once.
func (c *creation) fills() bool {
	return c.Preallocation == formats.PreallocateFalloc || c.Preallocation == formats.PreallocateFull
}

func (c *creation) checkSizes() error {
	if c.SizeBytes <= 0 || c.SizeBytes > maxSizeBytes || c.SizeBytes%sectorBytes != 0 {
		return invalid("size %d, want a multiple of %d from %d to %d", c.SizeBytes, sectorBytes, sectorBytes, int64(maxSizeBytes))
	}
	shift := bits.TrailingZeros64(uint64(c.ClusterBytes))
	if shift < minClusterBits || shift > maxClusterBits || c.ClusterBytes != 1<<shift {
		return invalid("cluster size %d, want a power of two from %d to %d", c.ClusterBytes, 1<<minClusterBits, 1<<maxClusterBits)
	}
	c.header.clusterBits = uint8(shift)
	c.header.l2Bits = uint8(min(shift-bits.TrailingZeros64(entryBytes), maxDefaultMapsBits-shift))
	if shift < smallClusterBits {
		c.header.l2Bits = smallClusterL2Bits
	}
	return nil
}

func (c *creation) checkExtra() error {
	for _, name := range slices.Sorted(maps.Keys(c.Extra)) {
		value := c.Extra[name]
		switch name {
		case optionEncryption:
			if value != "aes" {
				return invalid("%s %q, want aes", name, value)
			}
			c.header.cryptMethod = cryptAES
		case optionL2Bits:
			n, err := strconv.Atoi(value)
			if err != nil || n < minL2Bits || n > maxL2Bits {
				return invalid("%s %q, want a number from %d to %d", name, value, minL2Bits, maxL2Bits)
			}
			c.header.l2Bits = uint8(n)
		default:
			return invalid("option %q, want one of %s, %s", name, optionEncryption, optionL2Bits)
		}
	}
	if c.header.cryptMethod == cryptAES && c.Preallocation == formats.PreallocateFalloc {
		return invalid("preallocation falloc of an encrypted image, want another: reserved space would not read as zeroes")
	}
	return nil
}

// layOut decides where everything is. The level 1 table has a sector of its own, so that the
// rest of the header's can hold another backing file's name one day.
func (c *creation) layOut() {
	h := &c.header
	if len(c.name) > 0 {
		h.backingFileOffset, h.backingFileSize = headerBytes, uint32(len(c.name))
	}
	// VirtualBox reads the level 1 table as whole clusters, counted from where it begins.
	h.l1TableOffset = uint64(roundUp(headerBytes+int64(len(c.name)), c.ClusterBytes))
	c.tableAt = int64(h.l1TableOffset) + roundUp(int64(h.l1Entries()*entryBytes), c.ClusterBytes)
	if c.Preallocation != formats.PreallocateOff {
		c.tables = int64(h.l1Entries())
	}
	c.dataAt = c.tableAt + c.tables*c.tableSpace()
}

func roundUp(n, multiple int64) int64 { return (n + multiple - 1) / multiple * multiple }

func (c *creation) clusters() int64 { return (c.SizeBytes-1)>>c.header.clusterBits + 1 }

// tableSpace returns what a level 2 table takes in the file.
func (c *creation) tableSpace() int64 { return roundUp(entryBytes<<c.header.l2Bits, c.ClusterBytes) }

// create makes the file. What is half-made is removed.
func (c *creation) create(ctx context.Context) error {
	return formats.MakeFile(ctx, c.FS, c.Name, c.fill)
}

// fill writes everything, the header last: until then it is no image.
func (c *creation) fill(ctx context.Context, f vfs.File) error {
	if err := f.Truncate(c.dataAt); err != nil {
		return err
	}
	if c.Preallocation != formats.PreallocateOff {
		if err := c.preallocate(ctx, f); err != nil {
			return err
		}
	}
	first := append(c.header.encode(), c.name...)
	if len(first) > sectorBytes {
		if _, err := f.WriteAt(first[sectorBytes:], sectorBytes); err != nil {
			return err
		}
		first = first[:sectorBytes]
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if _, err := f.WriteAt(first, 0); err != nil {
		return err
	}
	return f.Sync()
}

// preallocate makes all level 2 tables and, if asked for, all clusters.
func (c *creation) preallocate(ctx context.Context, f vfs.File) error {
	if err := f.Allocate(0, c.dataAt); err != nil {
		return err
	}
	table := func(i int64) uint64 { return uint64(c.tableAt + i*c.tableSpace()) }
	if err := writeEntries(ctx, f, int64(c.header.l1TableOffset), c.tables, table); err != nil {
		return err
	}
	if !c.fills() {
		return nil
	}
	length := c.clusters() * c.ClusterBytes
	if err := f.Truncate(c.dataAt + length); err != nil {
		return err
	}
	if err := f.Allocate(c.dataAt, length); err != nil {
		return err
	}
	if c.Preallocation == formats.PreallocateFull {
		if err := c.writeData(ctx, f, length); err != nil {
			return err
		}
	}
	cluster := func(i int64) uint64 { return uint64(c.dataAt + i*c.ClusterBytes) }
	perTable := int64(1) << c.header.l2Bits
	for i := range c.tables {
		count := min(perTable, c.clusters()-i*perTable)
		at := func(j int64) uint64 { return cluster(i*perTable + j) }
		if err := writeEntries(ctx, f, int64(table(i)), count, at); err != nil {
			return err
		}
	}
	return nil
}

// writeEntries writes count entries of a table at off.
func writeEntries(ctx context.Context, f vfs.File, off, count int64, entry func(i int64) uint64) error {
	p := make([]byte, 0, min(count*entryBytes, chunkBytes))
	for i := range count {
		p = binary.BigEndian.AppendUint64(p, entry(i))
		if len(p) < chunkBytes && i < count-1 {
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

// writeData writes zeroes, encrypted if the image is.
func (c *creation) writeData(ctx context.Context, f vfs.File, length int64) error {
	p := make([]byte, min(length, chunkBytes))
	for off := int64(0); off < length; off += int64(len(p)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		p = p[:min(int64(len(p)), length-off)]
		if c.cipher != nil {
			clear(p)
			c.cipher.Encrypt(p, off)
		}
		if _, err := f.WriteAt(p, c.dataAt+off); err != nil {
			return err
		}
	}
	return nil
}
