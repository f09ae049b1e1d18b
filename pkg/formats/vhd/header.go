package vhd

import (
	"encoding/binary"
	"math/bits"
	"unicode/utf16"
)

const (
	headerBytes  = 1024
	headerCookie = "cxsparse"
	entryBytes   = 4
	entryUnused  = 1<<32 - 1

	minBlockBytes = sectorBytes
	maxBlockBytes = 256 << 20
	// maxEntries bounds the block allocation table: twice as many as blocks of 256 KiB
	// need, which is an eighth of the usual size.
	maxEntries = 1 << 24
)

// Where the fields are in the header of dynamic and differencing images ("Dynamic Disk
// Header Format"), all big-endian.
const (
	headerTableOffset     = 16 // 8 bytes
	headerVersion         = 24
	headerEntries         = 28
	headerBlockSize       = 32
	headerChecksum        = 36
	headerParentUUID      = 40 // 16 bytes
	headerParentTimestamp = 56
	headerParentName      = 64 // 512 bytes, UTF-16
	headerParentNameBytes = 512
	headerLocators        = 576
)

// A parent locator: 24 bytes of the header, and text elsewhere in the file.
const (
	locators            = 8
	locatorBytes        = 24
	locatorSpace        = 4 // sectors by the specification, bytes by its programs
	locatorLength       = 8
	locatorOffset       = 16 // 8 bytes
	maxLocatorTextBytes = 16 << 10
)

// header is the second structure of dynamic and differencing images.
type header [headerBytes]byte

func (h *header) u32(field int) uint32       { return binary.BigEndian.Uint32(h[field:]) }
func (h *header) u64(field int) uint64       { return binary.BigEndian.Uint64(h[field:]) }
func (h *header) setU32(field int, v uint32) { binary.BigEndian.PutUint32(h[field:], v) }
func (h *header) setU64(field int, v uint64) { binary.BigEndian.PutUint64(h[field:], v) }
func (h *header) entries() int64             { return int64(h.u32(headerEntries)) }
func (h *header) blockBytes() int64          { return int64(h.u32(headerBlockSize)) }
func (h *header) tableOffset() int64         { return int64(h.u64(headerTableOffset)) }
func (h *header) parentUUID() uuid           { return uuid(h[headerParentUUID : headerParentUUID+16]) }
func (h *header) seal()                      { h.setU32(headerChecksum, checksum(h[:], headerChecksum)) }

// bitmapBytes returns the length of the sector bitmap before each block.
func (h *header) bitmapBytes() int64 { return bitmapBytesOf(h.blockBytes()) }

func bitmapBytesOf(blockBytes int64) int64 {
	return (blockBytes/sectorBytes/8 + sectorBytes - 1) / sectorBytes * sectorBytes
}

// parentName returns the parent's file name.
func (h *header) parentName() string {
	return decodeUTF16(h[headerParentName:headerParentName+headerParentNameBytes], binary.BigEndian)
}

// decodeUTF16 returns text up to the first zero.
func decodeUTF16(p []byte, order binary.ByteOrder) string {
	var units []uint16
	for ; len(p) >= 2; p = p[2:] {
		unit := order.Uint16(p)
		if unit == 0 {
			break
		}
		units = append(units, unit)
	}
	return string(utf16.Decode(units))
}

func encodeUTF16(text string, order binary.AppendByteOrder) []byte {
	var p []byte
	for _, unit := range utf16.Encode([]rune(text)) {
		p = order.AppendUint16(p, unit)
	}
	return p
}

// locator is where a link to the parent is, of some kind.
type locator struct {
	code        string
	off, length int64
}

// locators returns those that are used.
func (h *header) locators() []locator {
	var found []locator
	for i := range locators {
		p := h[headerLocators+i*locatorBytes:][:locatorBytes]
		l := locator{
			code: string(p[:4]), off: int64(binary.BigEndian.Uint64(p[locatorOffset:])),
			length: int64(binary.BigEndian.Uint32(p[locatorLength:])),
		}
		if l.code != "\x00\x00\x00\x00" {
			found = append(found, l)
		}
	}
	return found
}

// validate returns what makes a header unusable. fileBytes is the file's length, size the
// guest's.
func (h *header) validate(fileBytes, size int64) error {
	blockBytes, at := h.blockBytes(), h.tableOffset()
	switch {
	case string(h[:len(headerCookie)]) != headerCookie:
		return corrupt("dynamic disk header starts with %q, want %q", h[:len(headerCookie)], headerCookie)
	case h.u32(headerChecksum) != checksum(h[:], headerChecksum):
		return corrupt("dynamic disk header has checksum %#x, want %#x", h.u32(headerChecksum), checksum(h[:], headerChecksum))
	case h.u32(headerVersion)>>16 != formatVersion>>16:
		return unsupported("dynamic disk header version %#x, want 1.0", h.u32(headerVersion))
	case blockBytes < minBlockBytes || blockBytes > maxBlockBytes || bits.OnesCount64(uint64(blockBytes)) != 1:
		return unsupported("block size %d, want a power of two from %d to %d", blockBytes, minBlockBytes, maxBlockBytes)
	case h.entries() > maxEntries:
		return unsupported("%d blocks, want at most %d", h.entries(), maxEntries)
	case h.entries()*blockBytes < size:
		return corrupt("size %d, but %d blocks of %d hold %d bytes", size, h.entries(), blockBytes, h.entries()*blockBytes)
	case at < footerBytes || at%sectorBytes != 0 || at > fileBytes:
		return corrupt("block allocation table at %#x, want a multiple of %d in the file of %d bytes", at, sectorBytes, fileBytes)
	case at+h.entries()*entryBytes > fileBytes:
		return corrupt("block allocation table of %d entries ends at %#x, but the file at %#x: it was truncated",
			h.entries(), at+h.entries()*entryBytes, fileBytes)
	}
	return nil
}
