package vmdk

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

const (
	sectorBytes = 512

	// maxFileSectors is what a grain table entry can say: 2 TiB.
	maxFileSectors = 1 << 32

	minGrainSectors = 8
	maxGrainSectors = 4 << 20 / sectorBytes
	minGTEsPerGT    = sectorBytes / gteBytes // a table is whole sectors
	maxGTEsPerGT    = 4096
	gteBytes        = 4

	// maxGrainTables bounds the grain directory: 2 TiB in the smallest grains.
	maxGrainTables = maxFileSectors / (512 * minGrainSectors)

	// maxDescriptorSectors bounds an embedded descriptor.
	maxDescriptorSectors = maxDescriptorBytes / sectorBytes
)

// Flags of SparseExtentHeader.flags.
const (
	flagNewlineTest   = 1 << 0
	flagRedundantGT   = 1 << 1
	flagZeroedGrain   = 1 << 2
	flagCompressed    = 1 << 16
	flagMarkers       = 1 << 17
	knownFlags        = flagNewlineTest | flagRedundantGT | flagZeroedGrain | flagCompressed | flagMarkers
	compressionNone   = 0
	compressDeflate   = 1
	gdAtEnd           = 1<<64 - 1
	headerMagic       = "KDMV"
	cowdMagic         = "COWD"
	seSparseMagic     = 0xcafebabe
	newlineTestString = "\n \r\n"
)

// sparseHeader is SparseExtentHeader, the first sector of a hosted sparse extent ("Virtual
// Disk Format 1.1", section "Hosted Sparse Extents"). Offsets and sizes are in sectors.
type sparseHeader struct {
	version            uint32
	flags              uint32
	capacity           uint64
	grainSize          uint64
	descriptorOffset   uint64
	descriptorSize     uint64
	numGTEsPerGT       uint32
	rgdOffset          uint64
	gdOffset           uint64
	overHead           uint64
	uncleanShutdown    bool
	compressAlgorithm  uint16
	newlineTestDamaged bool
	footer             bool // it was read from the end of the file

	// Of COWD extents (ESX) only, whose other fields are those they share.
	cowd        bool
	cowdEntries uint64 // numGDEntries: room in the directory
	freeSector  uint32 // where the next grain goes
}

// decodeHeader reads the fields of a sector that starts with headerMagic. It judges
// nothing: see validate.
func decodeHeader(p []byte) sparseHeader {
	le := binary.LittleEndian
	h := sparseHeader{
		version:           le.Uint32(p[4:]),
		flags:             le.Uint32(p[8:]),
		capacity:          le.Uint64(p[12:]),
		grainSize:         le.Uint64(p[20:]),
		descriptorOffset:  le.Uint64(p[28:]),
		descriptorSize:    le.Uint64(p[36:]),
		numGTEsPerGT:      le.Uint32(p[44:]),
		rgdOffset:         le.Uint64(p[48:]),
		gdOffset:          le.Uint64(p[56:]),
		overHead:          le.Uint64(p[64:]),
		uncleanShutdown:   p[72] != 0,
		compressAlgorithm: le.Uint16(p[77:]),
	}
	h.newlineTestDamaged = h.flags&flagNewlineTest != 0 && string(p[73:77]) != newlineTestString
	return h
}

// encode puts the header into a sector, whose other bytes it leaves.
func (h *sparseHeader) encode(p []byte) {
	if h.cowd {
		h.encodeCOWD(p)
		return
	}
	le := binary.LittleEndian
	copy(p, headerMagic)
	le.PutUint32(p[4:], h.version)
	le.PutUint32(p[8:], h.flags)
	le.PutUint64(p[12:], h.capacity)
	le.PutUint64(p[20:], h.grainSize)
	le.PutUint64(p[28:], h.descriptorOffset)
	le.PutUint64(p[36:], h.descriptorSize)
	le.PutUint32(p[44:], h.numGTEsPerGT)
	le.PutUint64(p[48:], h.rgdOffset)
	le.PutUint64(p[56:], h.gdOffset)
	le.PutUint64(p[64:], h.overHead)
	p[72] = 0
	if h.uncleanShutdown {
		p[72] = 1
	}
	copy(p[73:77], newlineTestString)
	le.PutUint16(p[77:], h.compressAlgorithm)
}

// isHeader reports whether a file's beginning is that of a hosted sparse extent.
func isHeader(p []byte) bool { return bytes.HasPrefix(p, []byte(headerMagic)) }

// foreignExtent names the kind of extent that starts with p, if it is one that is not
// supported; "" otherwise.
func foreignExtent(p []byte) string {
	switch {
	case len(p) >= 8 && binary.LittleEndian.Uint64(p) == seSparseMagic:
		return "an seSparse extent"
	}
	return ""
}

// validate checks everything that can be said without reading further. fileSectors is
// the file's length, rounded down.
func (h *sparseHeader) validate(fileSectors uint64) error {
	own := h.validateHosted
	if h.cowd {
		own = h.validateCOWD
	}
	if err := own(); err != nil {
		return err
	}
	switch {
	case h.grainTables() > maxGrainTables:
		return corrupt("capacity of %d sectors needs %d grain tables, want at most %d", h.capacity, h.grainTables(), maxGrainTables)
	case h.overHead > fileSectors:
		return corrupt("overHead is %d sectors, but the file has %d: it was truncated", h.overHead, fileSectors)
	}
	if err := h.validateDescriptorPlace(fileSectors); err != nil {
		return err
	}
	if err := h.validateDirectory("gdOffset", h.gdOffset, fileSectors); err != nil {
		return err
	}
	if h.redundant() {
		return h.validateDirectory("rgdOffset", h.rgdOffset, fileSectors)
	}
	return nil
}

// validateHosted checks the fields of a hosted extent by themselves.
func (h *sparseHeader) validateHosted() error {
	switch {
	case h.newlineTestDamaged:
		return corrupt("its line ends were converted, as by a transfer in text mode: every byte is suspect")
	case h.version < 1 || h.version > 3:
		return unsupported("header version %d, want 1 to 3", h.version)
	case h.compressAlgorithm != compressionNone && h.compressAlgorithm != compressDeflate:
		return unsupported("compressAlgorithm %d, want 0 (none) or 1 (deflate)", h.compressAlgorithm)
	case !powerOfTwoWithin(h.grainSize, minGrainSectors, maxGrainSectors):
		return corrupt("grainSize is %d sectors, want a power of two from %d to %d", h.grainSize, minGrainSectors, maxGrainSectors)
	case !powerOfTwoWithin(uint64(h.numGTEsPerGT), minGTEsPerGT, maxGTEsPerGT):
		return corrupt("numGTEsPerGT is %d, want a power of two from %d to %d", h.numGTEsPerGT, minGTEsPerGT, maxGTEsPerGT)
	case h.capacity == 0:
		return corrupt("capacity is 0 sectors, want at least 1")
	}
	return nil
}

func (h *sparseHeader) validateDescriptorPlace(fileSectors uint64) error {
	if h.descriptorOffset == 0 {
		return nil
	}
	if h.descriptorSize == 0 || h.descriptorSize > maxDescriptorSectors {
		return corrupt("descriptorSize is %d sectors, want 1 to %d", h.descriptorSize, maxDescriptorSectors)
	}
	if h.descriptorOffset > fileSectors || h.descriptorSize > fileSectors-h.descriptorOffset {
		return corrupt("the descriptor at sector %d lies outside the file of %d sectors", h.descriptorOffset, fileSectors)
	}
	return nil
}

// validateDirectory checks the place of a grain directory, before memory for it is taken.
func (h *sparseHeader) validateDirectory(field string, at, fileSectors uint64) error {
	size := h.gdSectors()
	if at == 0 || at > fileSectors || size > fileSectors-at {
		return corrupt("%s is %d, but a grain directory of %d sectors fits only into sectors 1 to %d",
			field, at, size, fileSectors)
	}
	if h.descriptorOffset != 0 && at < h.descriptorOffset+h.descriptorSize && h.descriptorOffset < at+size {
		return corrupt("%s is %d: the grain directory overlaps the descriptor at sector %d", field, at, h.descriptorOffset)
	}
	return nil
}

// grainTables returns how many grain tables the capacity needs.
func (h *sparseHeader) grainTables() uint64 {
	perTable := h.grainSize * uint64(h.numGTEsPerGT)
	return (h.capacity-1)/perTable + 1
}

// gdSectors returns the length of a grain directory.
func (h *sparseHeader) gdSectors() uint64 {
	return (h.grainTables()*gteBytes + sectorBytes - 1) / sectorBytes
}

// gtSectors returns the length of a grain table.
func (h *sparseHeader) gtSectors() uint64 { return uint64(h.numGTEsPerGT) * gteBytes / sectorBytes }

func (h *sparseHeader) compressed() bool {
	return h.flags&flagCompressed != 0 || h.compressAlgorithm == compressDeflate
}

// redundant reports whether a second directory with tables of its own is kept. Compressed
// extents never have one, whatever their flags say.
func (h *sparseHeader) redundant() bool {
	return h.flags&flagRedundantGT != 0 && h.rgdOffset != 0 && h.rgdOffset != h.gdOffset && !h.compressed()
}

func powerOfTwoWithin(n, low, high uint64) bool {
	return n >= low && n <= high && bits.OnesCount64(n) == 1
}

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{block.ErrCorrupt}, args...)...)
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{block.ErrUnsupported}, args...)...)
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{block.ErrInvalid}, args...)...)
}
