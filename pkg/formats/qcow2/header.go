package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const magic = "QFI\xfb"

// Lengths of the header ("Header", "Additional fields").
const (
	headerBytesV2  = 72
	headerBytesV3  = 104 // at least
	headerBytesNew = 112 // of images created here
	maxHeaderBytes = 4096
)

// Limits. Those of QEMU are kept, so that it opens what is written here.
const (
	minClusterBits   = 9
	maxClusterBits   = 21
	minExtendedBits  = 14 // cluster_bits with extended L2 entries
	maxBackingName   = 1023
	maxDataFileName  = 1023
	maxL1Bytes       = 32 << 20
	maxRefTableBytes = 8 << 20
	maxSizeBytes     = 1 << 61
	maxExtensions    = 64
)

// Bits of incompatible_features, compatible_features and autoclear_features.
const (
	incompatDirty       = 1 << 0
	incompatCorrupt     = 1 << 1
	incompatDataFile    = 1 << 2
	incompatCompression = 1 << 3
	incompatExtendedL2  = 1 << 4
	knownIncompat       = incompatDirty | incompatCorrupt | incompatDataFile | incompatCompression | incompatExtendedL2

	compatLazyRefcounts = 1 << 0

	autoclearBitmaps = 1 << 0
	autoclearRawData = 1 << 1
	knownAutoclear   = autoclearBitmaps | autoclearRawData
)

// Types of header extensions.
const (
	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extBitmaps       = 0x23852875
	extEncryption    = 0x0537be77
	extDataFile      = 0x44415441
	// extIdentity is ours, and ignored by others: 16 bytes that each session of writing
	// here replaces. See Identity.
	extIdentity = 0x43534944
)

const (
	compressionZlib = 0
	compressionZstd = 1
)

// header is what the first cluster says. Fields have the specification's names.
type header struct {
	version               uint32
	backingFileOffset     uint64
	backingFileSize       uint32
	clusterBits           uint32
	size                  uint64
	cryptMethod           uint32
	l1Size                uint32
	l1TableOffset         uint64
	refcountTableOffset   uint64
	refcountTableClusters uint32
	nbSnapshots           uint32
	snapshotsOffset       uint64
	incompatible          uint64
	compatible            uint64
	autoclear             uint64
	refcountOrder         uint32
	headerLength          uint32
	compressionType       uint8

	extra       []byte // additional fields past compression_type, as they are
	extensions  []extension
	backingFile string
}

// extension is a header extension.
type extension struct {
	kind uint32
	data []byte
}

// paddedBytes returns how much room the extension takes.
func (e *extension) paddedBytes() int { return 8 + (len(e.data)+7)/8*8 }

func (h *header) clusterBytes() int64 { return 1 << h.clusterBits }
func (h *header) extended() bool      { return h.incompatible&incompatExtendedL2 != 0 }
func (h *header) hasDataFile() bool   { return h.incompatible&incompatDataFile != 0 }
func (h *header) rawData() bool       { return h.autoclear&autoclearRawData != 0 }

// l2Bits returns log2 of the entries per L2 table.
func (h *header) l2Bits() uint {
	if h.extended() {
		return uint(h.clusterBits) - 4
	}
	return uint(h.clusterBits) - 3
}

// l1Entries returns how many L1 entries a guest size needs.
func (h *header) l1Entries(size int64) int64 {
	per := uint(h.clusterBits) + h.l2Bits()
	if size == 0 {
		return 0
	}
	return (size-1)>>per + 1
}

// extension returns the data of an extension; ok is false if there is none.
func (h *header) extension(kind uint32) (data []byte, ok bool) {
	for _, e := range h.extensions {
		if e.kind == kind {
			return e.data, true
		}
	}
	return nil, false
}

// setExtension replaces the data of an extension, or adds it before the feature names,
// which are optional and come last. nil data removes it.
func (h *header) setExtension(kind uint32, data []byte) {
	var kept []extension
	placed := data == nil
	for _, e := range h.extensions {
		switch {
		case e.kind == kind && !placed:
			kept = append(kept, extension{kind, data})
			placed = true
		case e.kind == extFeatureNames && !placed:
			kept = append(kept, extension{kind, data}, e)
			placed = true
		case e.kind != kind:
			kept = append(kept, e)
		}
	}
	if !placed {
		kept = append(kept, extension{kind, data})
	}
	h.extensions = kept
}

// readHeader reads and validates the first cluster.
func readHeader(f vfs.File, fileBytes int64) (*header, error) {
	fixed := make([]byte, headerBytesNew)
	if n, err := f.ReadAt(fixed, 0); n < headerBytesV2 {
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("read the header: %w", err)
		}
		return nil, unsupported("no QCOW2 image: %d bytes long", fileBytes)
	}
	if string(fixed[:4]) != magic {
		return nil, unsupported("no QCOW2 image: the magic is missing")
	}
	h := decodeHeader(fixed)
	if err := h.validateShape(); err != nil {
		return nil, err
	}
	cluster := make([]byte, min(h.clusterBytes(), fileBytes))
	if err := readFull(f, cluster, 0); err != nil {
		return nil, fmt.Errorf("read the header: %w", err)
	}
	if int64(h.headerLength) > int64(len(cluster)) {
		return nil, corrupt("header_length is %d in a file of %d bytes", h.headerLength, fileBytes)
	}
	if h.headerLength > headerBytesV3 {
		h.compressionType = cluster[headerBytesV3]
		h.extra = append([]byte(nil), cluster[headerBytesV3+1:h.headerLength]...)
	}
	if err := h.readExtensions(cluster); err != nil {
		return nil, err
	}
	if err := h.readBackingName(cluster); err != nil {
		return nil, err
	}
	if err := h.validateFeatures(); err != nil {
		return nil, err
	}
	return h, h.validateTables(fileBytes)
}

// decodeHeader reads the fields up to header_length ("Header").
func decodeHeader(p []byte) *header {
	be := binary.BigEndian
	h := &header{
		version:               be.Uint32(p[4:]),
		backingFileOffset:     be.Uint64(p[8:]),
		backingFileSize:       be.Uint32(p[16:]),
		clusterBits:           be.Uint32(p[20:]),
		size:                  be.Uint64(p[24:]),
		cryptMethod:           be.Uint32(p[32:]),
		l1Size:                be.Uint32(p[36:]),
		l1TableOffset:         be.Uint64(p[40:]),
		refcountTableOffset:   be.Uint64(p[48:]),
		refcountTableClusters: be.Uint32(p[56:]),
		nbSnapshots:           be.Uint32(p[60:]),
		snapshotsOffset:       be.Uint64(p[64:]),
		refcountOrder:         4,
		headerLength:          headerBytesV2,
	}
	if h.version >= 3 {
		h.incompatible = be.Uint64(p[72:])
		h.compatible = be.Uint64(p[80:])
		h.autoclear = be.Uint64(p[88:])
		h.refcountOrder = be.Uint32(p[96:])
		h.headerLength = be.Uint32(p[100:])
	}
	return h
}

// validateShape checks what must be known to read the rest of the first cluster.
func (h *header) validateShape() error {
	switch {
	case h.version != 2 && h.version != 3:
		return unsupported("version %d, want 2 or 3", h.version)
	case h.clusterBits < minClusterBits || h.clusterBits > maxClusterBits:
		return unsupported("cluster_bits is %d, want %d to %d", h.clusterBits, minClusterBits, maxClusterBits)
	case h.version == 2:
		return nil
	case h.headerLength < headerBytesV3 || h.headerLength > maxHeaderBytes || h.headerLength%8 != 0 || int64(h.headerLength) > h.clusterBytes():
		return corrupt("header_length is %d, want a multiple of 8 from %d to %d", h.headerLength, headerBytesV3, min(maxHeaderBytes, h.clusterBytes()))
	case h.refcountOrder > 6:
		return corrupt("refcount_order is %d, want at most 6", h.refcountOrder)
	}
	return nil
}

// readExtensions parses the header extensions of the first cluster ("Header extensions").
func (h *header) readExtensions(cluster []byte) error {
	end := len(cluster)
	if off := h.backingFileOffset; off != 0 && off < uint64(end) {
		end = int(off) // the name follows the extensions
	}
	at := int(h.headerLength)
	for at+8 <= end {
		kind, n := binary.BigEndian.Uint32(cluster[at:]), binary.BigEndian.Uint32(cluster[at+4:])
		if kind == extEnd {
			return nil
		}
		if int64(n) > int64(end-at-8) {
			return corrupt("header extension %#x at %#x has %d bytes, want at most %d", kind, at, n, end-at-8)
		}
		if _, twice := h.extension(kind); twice {
			return corrupt("header extension %#x occurs twice", kind)
		}
		if len(h.extensions) == maxExtensions {
			return corrupt("more than %d header extensions", maxExtensions)
		}
		h.extensions = append(h.extensions, extension{kind, append([]byte(nil), cluster[at+8:at+8+int(n)]...)})
		at += h.extensions[len(h.extensions)-1].paddedBytes()
	}
	return nil
}

func (h *header) readBackingName(cluster []byte) error {
	if h.backingFileOffset == 0 {
		return nil
	}
	off, n := h.backingFileOffset, uint64(h.backingFileSize)
	if n == 0 || n > maxBackingName || off < uint64(h.headerLength) || off > uint64(len(cluster)) || n > uint64(len(cluster))-off {
		return corrupt("the backing file name has %d bytes at %#x, want 1 to %d within the first cluster", n, off, maxBackingName)
	}
	h.backingFile = string(cluster[off : off+n])
	return nil
}

// validateFeatures refuses what is not understood.
func (h *header) validateFeatures() error {
	if unknown := h.incompatible &^ knownIncompat; unknown != 0 {
		return unsupported("incompatible features %s", h.featureNames(0, unknown))
	}
	switch {
	case h.cryptMethod == 1:
		return unsupported("the image is encrypted with AES (crypt_method 1), which QEMU has given up: convert it with qemu-img")
	case h.cryptMethod == 2:
		return unsupported("the image is encrypted with LUKS (crypt_method 2): convert it with qemu-img")
	case h.cryptMethod != 0:
		return unsupported("crypt_method is %d, want 0 (none)", h.cryptMethod)
	case h.incompatible&incompatCompression != 0 && h.compressionType != compressionZstd:
		return unsupported("compression_type is %d, want 1 (zstd)", h.compressionType)
	case h.incompatible&incompatCompression == 0 && h.compressionType != compressionZlib:
		return corrupt("compression_type is %d, but the compression type bit is not set", h.compressionType)
	case h.extended() && h.clusterBits < minExtendedBits:
		return corrupt("cluster_bits is %d with extended L2 entries, want at least %d", h.clusterBits, minExtendedBits)
	case h.rawData() && !h.hasDataFile():
		h.autoclear &^= autoclearRawData // of no meaning without a data file
	case h.rawData() && h.backingFileOffset != 0:
		return corrupt("a raw external data file and a backing file: the one excludes the other")
	}
	if h.hasDataFile() && h.nbSnapshots != 0 {
		return corrupt("an external data file and %d internal snapshots: the one excludes the other", h.nbSnapshots)
	}
	return nil
}

// featureNames lists the bits of a feature set, by the image's own table of names where it
// has one ("Feature name table").
func (h *header) featureNames(kind byte, bits uint64) string {
	table, _ := h.extension(extFeatureNames)
	var names []string
	for bit := range 64 {
		if bits&(1<<bit) == 0 {
			continue
		}
		name := fmt.Sprintf("bit %d", bit)
		for t := table; len(t) >= featureNameBytes; t = t[featureNameBytes:] {
			if t[0] == kind && int(t[1]) == bit {
				name = fmt.Sprintf("%q (bit %d)", strings.TrimRight(string(t[2:featureNameBytes]), "\x00"), bit)
				break
			}
		}
		names = append(names, name)
	}
	return strings.Join(names, ", ") + ": want an image without"
}

const featureNameBytes = 48

// featureTable is what new images tell readers that are older than a feature. Only
// incompatible ones make somebody refuse an image, and all of the header is to fit into one
// sector.
func featureTable() []byte {
	var table []byte
	for bit, name := range []string{"dirty bit", "corrupt bit", "external data file", "compression type", "extended L2 entries"} {
		entry := make([]byte, featureNameBytes)
		entry[1] = byte(bit)
		copy(entry[2:], name)
		table = append(table, entry...)
	}
	return table
}

// validateTables checks where the header says that tables are, and how large they are.
func (h *header) validateTables(fileBytes int64) error {
	if h.size > maxSizeBytes {
		return unsupported("size is %d, want at most %d", h.size, uint64(maxSizeBytes))
	}
	l1Bytes := int64(h.l1Size) * 8
	if l1Bytes > maxL1Bytes {
		return unsupported("l1_size is %d, want at most %d", h.l1Size, maxL1Bytes/8)
	}
	if need := h.l1Entries(int64(h.size)); int64(h.l1Size) < need {
		return corrupt("l1_size is %d, but a size of %d needs %d", h.l1Size, h.size, need)
	}
	refBytes := int64(h.refcountTableClusters) << h.clusterBits
	if refBytes > maxRefTableBytes {
		return unsupported("the refcount table has %d bytes, want at most %d", refBytes, maxRefTableBytes)
	}
	if h.refcountTableClusters == 0 {
		return corrupt("refcount_table_clusters is 0")
	}
	for _, t := range []struct {
		name   string
		off    uint64
		length int64
	}{
		{"the L1 table", h.l1TableOffset, l1Bytes},
		{"the refcount table", h.refcountTableOffset, refBytes},
	} {
		if t.length == 0 {
			continue
		}
		if err := h.checkTable(t.name, t.off, t.length, fileBytes); err != nil {
			return err
		}
	}
	return nil
}

// checkTable refuses a table that is not where tables can be.
func (h *header) checkTable(name string, off uint64, length, fileBytes int64) error {
	switch {
	case off%uint64(h.clusterBytes()) != 0 || off == 0:
		return corrupt("%s is at %#x, want a multiple of the cluster size %d", name, off, h.clusterBytes())
	case off > uint64(fileBytes) || length > fileBytes-int64(off):
		return corrupt("%s of %d bytes at %#x does not lie in the file of %d bytes", name, length, off, fileBytes)
	}
	return nil
}

// encode returns header and extensions as they are written, without the backing file's
// name.
func (h *header) encode() []byte {
	be := binary.BigEndian
	p := make([]byte, h.headerLength)
	copy(p, magic)
	be.PutUint32(p[4:], h.version)
	be.PutUint64(p[8:], h.backingFileOffset)
	be.PutUint32(p[16:], h.backingFileSize)
	be.PutUint32(p[20:], h.clusterBits)
	be.PutUint64(p[24:], h.size)
	be.PutUint32(p[32:], h.cryptMethod)
	be.PutUint32(p[36:], h.l1Size)
	be.PutUint64(p[40:], h.l1TableOffset)
	be.PutUint64(p[48:], h.refcountTableOffset)
	be.PutUint32(p[56:], h.refcountTableClusters)
	be.PutUint32(p[60:], h.nbSnapshots)
	be.PutUint64(p[64:], h.snapshotsOffset)
	if h.version >= 3 {
		be.PutUint64(p[72:], h.incompatible)
		be.PutUint64(p[80:], h.compatible)
		be.PutUint64(p[88:], h.autoclear)
		be.PutUint32(p[96:], h.refcountOrder)
		be.PutUint32(p[100:], h.headerLength)
	}
	if h.headerLength > headerBytesV3 {
		p[headerBytesV3] = h.compressionType
		copy(p[headerBytesV3+1:], h.extra)
	}
	for _, e := range h.extensions {
		p = be.AppendUint32(p, e.kind)
		p = be.AppendUint32(p, uint32(len(e.data)))
		p = append(p, e.data...)
		p = append(p, make([]byte, e.paddedBytes()-8-len(e.data))...)
	}
	return append(p, make([]byte, 8)...) // the end of the extensions
}

// readFull reads all of p; a file that ends before is truncated.
func readFull(f vfs.File, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return corrupt("%s ends at %d, want %d bytes at %#x: it was truncated", f.Name(), off+int64(n), len(p), off)
	}
	return fmt.Errorf("read %d bytes at %#x of %s: %w", len(p), off, f.Name(), err)
}
