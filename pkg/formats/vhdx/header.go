package vhdx

import (
	"encoding/binary"
	"fmt"
	"slices"
	"unicode/utf16"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// The header section ([MS-VHDX] 2.2): file type identifier, two headers, two region
// tables, each at a multiple of 64 KiB in the first MiB.
const (
	mib = 1 << 20

	fileSignature   = "vhdxfile"
	creatorBytes    = 512
	headerBytes     = 4 << 10
	regionTableSize = 64 << 10
	headerSection   = mib

	headerSignature = "head"
	regionSignature = "regi"
	formatVersion   = 1

	regionHeaderBytes = 16
	regionEntryBytes  = 32
	maxRegions        = 2047
	regionRequired    = 1
)

var (
	headerAt      = [2]int64{64 << 10, 128 << 10}
	regionTableAt = [2]int64{192 << 10, 256 << 10}
)

// header is the image's state ([MS-VHDX] 2.2.2). There are two; the one with the higher
// sequence number counts.
type header struct {
	sequence   uint64
	fileWrite  guid // another one for each session that writes to the file
	dataWrite  guid // another one for each session that changes what a guest sees
	log        guid // of the entries that are valid in the log; zero: it is empty
	logVersion uint16
	version    uint16
	logLength  uint32
	logOffset  uint64
}

// decodeHeader reads a header of headerBytes bytes; ok is false if it is none.
func decodeHeader(p []byte) (h header, ok bool) {
	if string(p[:4]) != headerSignature || !sumIsRight(p) {
		return h, false
	}
	le := binary.LittleEndian
	h.sequence = le.Uint64(p[8:])
	copy(h.fileWrite[:], p[16:])
	copy(h.dataWrite[:], p[32:])
	copy(h.log[:], p[48:])
	h.logVersion, h.version = le.Uint16(p[64:]), le.Uint16(p[66:])
	h.logLength, h.logOffset = le.Uint32(p[68:]), le.Uint64(p[72:])
	return h, true
}

func (h *header) encode() []byte {
	p := make([]byte, headerBytes)
	le := binary.LittleEndian
	copy(p, headerSignature)
	le.PutUint64(p[8:], h.sequence)
	copy(p[16:], h.fileWrite[:])
	copy(p[32:], h.dataWrite[:])
	copy(p[48:], h.log[:])
	le.PutUint16(p[64:], h.logVersion)
	le.PutUint16(p[66:], h.version)
	le.PutUint32(p[68:], h.logLength)
	le.PutUint64(p[72:], h.logOffset)
	putSum(p)
	return p
}

// headers are both headers of an image and which of them counts.
type headers struct {
	copies  [2]header
	valid   [2]bool
	current int
}

func (h *headers) now() *header { return &h.copies[h.current] }

// readHeaders reads both headers and decides between them. Equal sequence numbers are
// accepted if the headers are equal: Disk2VHD writes such.
func readHeaders(f vfs.File) (h headers, err error) {
	for i, off := range headerAt {
		p := make([]byte, headerBytes)
		if err := readFull(f, p, off); err != nil {
			return h, fmt.Errorf("header %d: %w", i+1, err)
		}
		h.copies[i], h.valid[i] = decodeHeader(p)
	}
	a, b := h.copies[0], h.copies[1]
	switch {
	case !h.valid[0] && !h.valid[1]:
		return h, corrupt("both headers are damaged: wrong signature or checksum")
	case h.valid[0] && h.valid[1] && a.sequence == b.sequence && a != b:
		return h, corrupt("both headers have sequence number %d but differ", a.sequence)
	case !h.valid[0] || h.valid[1] && b.sequence > a.sequence:
		h.current = 1
	}
	return h, h.now().validate()
}

func (h *header) validate() error {
	switch {
	case h.version != formatVersion:
		return unsupported("header: version %d, want %d", h.version, formatVersion)
	case h.log != guid{} && h.logVersion != 0:
		return unsupported("header: log version %d, want 0", h.logVersion)
	case h.logLength%mib != 0 || h.logOffset%mib != 0 || h.logLength != 0 && h.logOffset < headerSection || h.logOffset > 1<<62:
		return corrupt("header: a log of %d bytes at %#x, want multiples of 1 MiB behind the header section", h.logLength, h.logOffset)
	case h.log != guid{} && h.logLength == 0:
		return corrupt("header: a log GUID, but no log")
	}
	return nil
}

// checkLogLength refuses logs that are too long to be read, or to be used.
func (h *header) checkLogLength() error {
	if h.logLength > maxLogBytes {
		return unsupported("header: a log of %d bytes, want at most %d", h.logLength, maxLogBytes)
	}
	return nil
}

// span is a stretch [off, end) of the file.
type span struct{ off, end int64 }

// region is an entry of the region table ([MS-VHDX] 2.2.3).
type region struct {
	id       guid
	off      uint64
	length   uint32
	required bool
}

func (r *region) span() span { return span{int64(r.off), int64(r.off) + int64(r.length)} }

// Known regions.
var (
	batRegion      = mustGUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
	metadataRegion = mustGUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
)

// decodeRegions reads a region table; ok is false if it is none.
func decodeRegions(p []byte) (regions []region, ok bool) {
	if string(p[:4]) != regionSignature || !sumIsRight(p) {
		return nil, false
	}
	n := binary.LittleEndian.Uint32(p[8:])
	if n > maxRegions {
		return nil, false
	}
	for i := range int(n) {
		e := p[regionHeaderBytes+i*regionEntryBytes:]
		r := region{
			off: binary.LittleEndian.Uint64(e[16:]), length: binary.LittleEndian.Uint32(e[24:]),
			required: binary.LittleEndian.Uint32(e[28:])&regionRequired != 0,
		}
		copy(r.id[:], e)
		regions = append(regions, r)
	}
	return regions, true
}

func encodeRegions(regions []region) []byte {
	p := make([]byte, regionTableSize)
	copy(p, regionSignature)
	binary.LittleEndian.PutUint32(p[8:], uint32(len(regions)))
	for i, r := range regions {
		e := p[regionHeaderBytes+i*regionEntryBytes:]
		copy(e, r.id[:])
		binary.LittleEndian.PutUint64(e[16:], r.off)
		binary.LittleEndian.PutUint32(e[24:], r.length)
		if r.required {
			binary.LittleEndian.PutUint32(e[28:], regionRequired)
		}
	}
	putSum(p)
	return p
}

// readRegions returns the regions of the first table that is intact, and which are.
func readRegions(f vfs.File) (regions []region, valid [2]bool, err error) {
	for i, off := range regionTableAt {
		p := make([]byte, regionTableSize)
		if err := readFull(f, p, off); err != nil {
			return nil, valid, fmt.Errorf("region table %d: %w", i+1, err)
		}
		r, ok := decodeRegions(p)
		if valid[i] = ok; ok && regions == nil {
			regions = append(make([]region, 0, len(r)+1), r...)
		}
	}
	if regions == nil {
		return nil, valid, corrupt("both region tables are damaged: wrong signature, checksum or count")
	}
	return regions, valid, nil
}

// validateRegions checks that regions are known as far as they have to be, inside a file
// of size bytes, and apart from one another, the header section and the log. It returns
// all of these stretches, in order.
func validateRegions(regions []region, h *header, size int64) ([]span, error) {
	spans := []span{{0, headerSection}}
	if h.logLength > 0 {
		spans = append(spans, span{int64(h.logOffset), int64(h.logOffset) + int64(h.logLength)})
	}
	seen := map[guid]bool{}
	for i, r := range regions {
		known := r.id == batRegion || r.id == metadataRegion
		switch {
		case r.required && !known:
			return nil, unsupported("region table: entry %d, %s, is required and unknown", i, r.id)
		case r.off%mib != 0 || r.length%mib != 0 || r.length == 0 || r.off < headerSection || r.off > 1<<62:
			return nil, corrupt("region table: entry %d has %d bytes at %#x, want multiples of 1 MiB behind the header section", i, r.length, r.off)
		case seen[r.id]:
			return nil, corrupt("region table: %s is there twice", r.id)
		}
		seen[r.id] = true
		spans = append(spans, r.span())
	}
	if !seen[batRegion] || !seen[metadataRegion] {
		return nil, corrupt("region table: the BAT or the metadata region is missing")
	}
	slices.SortFunc(spans, func(a, b span) int { return int(min(max(a.off-b.off, -1), 1)) })
	for i, s := range spans {
		if s.end > size {
			return nil, corrupt("a region ends at %#x, past the end of the file, %#x: it was truncated", s.end, size)
		}
		if i > 0 && s.off < spans[i-1].end {
			return nil, corrupt("the regions, or log, at %#x and %#x overlap", spans[i-1].off, s.off)
		}
	}
	return spans, nil
}

func findRegion(regions []region, id guid) int {
	return slices.IndexFunc(regions, func(r region) bool { return r.id == id })
}

// decodeUTF16 reads text up to its end or a zero.
func decodeUTF16(p []byte) string {
	var units []uint16
	for ; len(p) >= 2; p = p[2:] {
		u := binary.LittleEndian.Uint16(p)
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return string(utf16.Decode(units))
}

func encodeUTF16(text string) (p []byte) {
	for _, u := range utf16.Encode([]rune(text)) {
		p = binary.LittleEndian.AppendUint16(p, u)
	}
	return p
}
