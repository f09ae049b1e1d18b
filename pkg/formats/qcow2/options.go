package qcow2

import (
	"maps"
	"math/bits"
	"slices"
	"strconv"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
)

// Options of this format only, with qemu-img's names.
const (
	optionCompat       = "compat"
	optionClusterSize  = "cluster_size"
	optionRefcountBits = "refcount_bits"
	optionLazy         = "lazy_refcounts"
	optionExtendedL2   = "extended_l2"
	optionCompression  = "compression_type"
	optionDataFile     = "data_file"
	optionDataFileRaw  = "data_file_raw"
)

const (
	minNewClusterBytes     = 1 << minClusterBits
	maxNewClusterBytes     = 1 << maxClusterBits
	defaultClusterBytes    = 64 << 10
	defaultExtendedCluster = 128 << 10
)

// Options says what Create accepts.
func (Format) Options() formats.Options {
	onOff := []string{"off", "on"}
	var parents []string
	for _, f := range formats.All() {
		parents = append(parents, f.Name())
	}
	if !slices.Contains(parents, formatName) {
		parents = append(parents, formatName)
	}
	return formats.Options{
		OverlaySubformats:   []string{""},
		ParentFormats:       parents,
		MinClusterBytes:     minNewClusterBytes,
		MaxClusterBytes:     maxNewClusterBytes,
		DefaultClusterBytes: defaultClusterBytes,
		Preallocations: []formats.Preallocation{
			formats.PreallocateOff, formats.PreallocateMetadata, formats.PreallocateFalloc, formats.PreallocateFull,
		},
		MaxSizeBytes: maxSizeBytes,
		SizeMultiple: sectorBytes,
		Extra: []formats.ExtraOption{
			{Name: optionCompat, Help: "0.10 for version 2, which older programs read, or 1.1 for version 3 (default)", Values: []string{"0.10", "1.1"}},
			{Name: optionClusterSize, Help: "bytes of a cluster, such as 64k"},
			{Name: optionRefcountBits, Help: "width of a refcount in bits (default 16)", Values: []string{"1", "2", "4", "8", "16", "32", "64"}},
			{Name: optionLazy, Help: "on: programs may leave refcounts for later; this one never does", Values: onOff},
			{Name: optionExtendedL2, Help: "on: clusters have 32 subclusters that are allocated on their own", Values: onOff},
			{Name: optionCompression, Help: "how compressed clusters are compressed", Values: []string{"zlib", "zstd"}},
			{Name: optionDataFile, Help: "name of a new file for the guest's data, beside the image"},
			{Name: optionDataFileRaw, Help: "on: the data file is a raw image as well", Values: onOff},
		},
	}
}

// parseExtra takes over the options of this format.
func (c *creation) parseExtra() error {
	c.version, c.refcountOrder = 3, 4
	for _, name := range slices.Sorted(maps.Keys(c.Extra)) {
		if err := c.parseOption(name, c.Extra[name]); err != nil {
			return err
		}
	}
	if c.ClusterBytes == 0 {
		c.ClusterBytes = defaultClusterBytes
		if c.extended {
			c.ClusterBytes = defaultExtendedCluster
		}
	}
	return nil
}

func (c *creation) parseOption(name, value string) (err error) {
	switch name {
	case optionCompat:
		c.version, err = parseCompat(value)
	case optionClusterSize:
		n, err := parseBytes(value)
		if err != nil || c.ClusterBytes != 0 && n != c.ClusterBytes {
			return invalid("%s %q, want a number of bytes, such as 64k, and no other cluster size", name, value)
		}
		c.ClusterBytes = n
	case optionRefcountBits:
		n, err := strconv.ParseUint(value, 10, 8)
		if err != nil || n == 0 || n > 64 || bits.OnesCount64(n) != 1 {
			return invalid("%s %q, want a power of two from 1 to 64", name, value)
		}
		c.refcountOrder = uint32(bits.TrailingZeros64(n))
	case optionLazy:
		c.lazy, err = parseOnOff(name, value)
	case optionExtendedL2:
		c.extended, err = parseOnOff(name, value)
	case optionCompression:
		if value != "zlib" && value != "zstd" {
			return invalid("%s %q, want zlib or zstd", name, value)
		}
		c.zstd = value == "zstd"
	case optionDataFile:
		if value == "" || len(value) > maxDataFileName {
			return invalid("%s %q, want a name of at most %d bytes", name, shorten(value), maxDataFileName)
		}
		c.dataFile = value
	case optionDataFileRaw:
		c.rawData, err = parseOnOff(name, value)
	default:
		return invalid("option %q, want one of %s", name, strings.Join(optionNames(), ", "))
	}
	return err
}

func optionNames() (names []string) {
	for _, o := range (Format{}).Options().Extra {
		names = append(names, o.Name)
	}
	return names
}

func parseCompat(value string) (uint32, error) {
	switch value {
	case "0.10", "v2":
		return 2, nil
	case "1.1", "v3":
		return 3, nil
	}
	return 0, invalid("%s %q, want 0.10 or 1.1", optionCompat, value)
}

func parseOnOff(name, value string) (bool, error) {
	if value != "on" && value != "off" {
		return false, invalid("%s %q, want on or off", name, value)
	}
	return value == "on", nil
}

// parseBytes reads a number with or without k or M.
func parseBytes(value string) (int64, error) {
	shift := 0
	switch {
	case strings.HasSuffix(value, "k"), strings.HasSuffix(value, "K"):
		shift = 10
	case strings.HasSuffix(value, "M"):
		shift = 20
	}
	if shift > 0 {
		value = value[:len(value)-1]
	}
	n, err := strconv.ParseInt(value, 10, 32)
	return n << shift, err
}
