package vmdk

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// kind is a subformat that Create makes: a value of createType.
type kind struct {
	name       string
	extentKind string // in the descriptor's extent lines
	sparse     bool   // has grains
	embedded   bool   // the descriptor lies in the only extent
	overlay    bool   // can stand on a parent
	zeroGrains bool   // can note zeroes (header version 2)
	cowd       bool   // its extent has a COWD header
	stream     bool   // compressed, written once
	// splitSectors is how much of the guest an extent file holds at most; 0: all of it.
	splitSectors int64
	suffix       string // of the extent's file name; splits number theirs
	maxBytes     int64  // of the guest
	minGrain     int64
	defaultGrain int64
}

const (
	// splitSparseSectors and splitFlatSectors are VMware's lengths: with its tables, and
	// with what a file system may add, a file stays below 2 GiB. Both are whole grains.
	splitSparseSectors = 2047 << 20 / sectorBytes
	splitFlatSectors   = 4193792

	// maxFlatBytes is vSphere's limit for disks, 62 TiB; a flat file has none of its own.
	maxFlatBytes = 62 << 40
)

// kinds are the subformats that Create makes, the default first.
var kinds = []kind{
	{
		name: typeMonolithicSparse, extentKind: "SPARSE", sparse: true, embedded: true, overlay: true, zeroGrains: true,
		maxBytes: maxSparseBytes, minGrain: minNewGrainBytes, defaultGrain: defaultGrainBytes,
	},
	{name: typeMonolithicFlat, extentKind: "FLAT", suffix: "flat", maxBytes: maxFlatBytes},
	{
		name: typeSplitSparse, extentKind: "SPARSE", sparse: true, overlay: true, zeroGrains: true,
		splitSectors: splitSparseSectors, suffix: "s",
		maxBytes: maxExtents * splitSparseSectors * sectorBytes, minGrain: minNewGrainBytes, defaultGrain: defaultGrainBytes,
	},
	{
		name: typeSplitFlat, extentKind: "FLAT", splitSectors: splitFlatSectors, suffix: "f",
		maxBytes: maxExtents * splitFlatSectors * sectorBytes,
	},
	{
		name: typeStreamOptimized, extentKind: "SPARSE", sparse: true, embedded: true, stream: true,
		maxBytes: maxSparseBytes, minGrain: minNewGrainBytes, defaultGrain: defaultGrainBytes,
	},
	{name: typeVMFS, extentKind: "VMFS", suffix: "flat", maxBytes: maxFlatBytes},
	{
		// ESX makes grains of one sector; others are legal.
		name: typeVMFSSparse, extentKind: "VMFSSPARSE", sparse: true, overlay: true, cowd: true, suffix: "delta",
		maxBytes: maxSparseBytes, minGrain: sectorBytes, defaultGrain: sectorBytes,
	},
}

// kindOf returns the kind of a subformat, "" being the default; nil if there is none.
func kindOf(subformat string) *kind {
	if subformat == "" {
		return &kinds[0]
	}
	for i := range kinds {
		if kinds[i].name == subformat {
			return &kinds[i]
		}
	}
	return nil
}

// kindNames returns the names of the kinds that ok accepts.
func kindNames(ok func(*kind) bool) []string {
	var names []string
	for i := range kinds {
		if ok(&kinds[i]) {
			names = append(names, kinds[i].name)
		}
	}
	return names
}

func anyKind(*kind) bool { return true }

// wantKinds is kindNames for an error's sentence.
func wantKinds(ok func(*kind) bool) string { return strings.Join(kindNames(ok), ", ") }

// extentName returns the name of the extent file number i, counted from 1, of an image
// whose main file has a name: VMware's and QEMU's way to build it.
func (k *kind) extentName(name string, i int) string {
	if k.embedded {
		return name
	}
	ext := path.Ext(name)
	base := strings.TrimSuffix(name, ext)
	if k.splitSectors > 0 {
		return fmt.Sprintf("%s-%s%03d%s", base, k.suffix, i, ext)
	}
	return base + "-" + k.suffix + ext
}

// extentLengths returns the sectors of each extent of an image.
func (k *kind) extentLengths(sectors int64) []int64 {
	if k.splitSectors == 0 {
		return []int64{sectors}
	}
	lengths := slices.Repeat([]int64{k.splitSectors}, int(sectors/k.splitSectors))
	if rest := sectors % k.splitSectors; rest > 0 {
		lengths = append(lengths, rest)
	}
	return lengths
}

// extentLine returns the descriptor's line for an extent.
func (k *kind) extentLine(sectors int64, name string) string {
	access, offset := "RW", ""
	if k.stream {
		access = "RDONLY" // what VMware's tools write: it is written once
	}
	if k.extentKind == "FLAT" {
		offset = " 0"
	}
	return fmt.Sprintf("%s %d %s \"%s\"%s", access, sectors, k.extentKind, path.Base(name), offset)
}
