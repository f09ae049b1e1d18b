package vdi

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"math/bits"
	"strings"
)

const (
	sectorBytes = 512
	headerBytes = sectorBytes // all fields are in the first sector

	signature  = 0xbeda107f
	version    = 0x00010001
	preHeader  = 72    // bytes before what headerSize counts
	sizeOfOld  = 0x180 // headerSize without the logical geometry
	sizeOfNew  = 0x190 // and with it
	entryBytes = 4     // of a block map entry
	maxBlocks  = 1<<29 - 128

	minBlockBytes = sectorBytes
	maxBlockBytes = 64 << 20
)

// Where the fields are in the header, all little-endian.
const (
	fieldText            = 0x00 // 64 bytes
	fieldSignature       = 0x40
	fieldVersion         = 0x44
	fieldHeaderSize      = 0x48
	fieldType            = 0x4c
	fieldDescription     = 0x54 // 256 bytes
	fieldMapOffset       = 0x154
	fieldDataOffset      = 0x158
	fieldSectorSize      = 0x168
	fieldDiskSize        = 0x170 // 8 bytes
	fieldBlockSize       = 0x178
	fieldBlockExtra      = 0x17c
	fieldBlocks          = 0x180
	fieldBlocksAllocated = 0x184
	fieldUUID            = 0x188 // of the image
	fieldUUIDModified    = 0x198 // of its contents: another one after each change
	fieldUUIDLink        = 0x1a8 // of the parent
	fieldUUIDParent      = 0x1b8 // of the parent's contents
	fieldLCHSSectorSize  = 0x1d4 // in the logical geometry, else unused

	textBytes        = 64
	descriptionBytes = 256
	createText       = "<<< Oracle VirtualBox Disk Image >>>\n"
)

// Values of the type field.
const (
	typeDynamic      = 1
	typeStatic       = 2
	typeUndo         = 3
	typeDifferencing = 4
)

// Entries of the block map that name no block.
const (
	entryFree = 1<<32 - 1 // never written: ask the parent
	entryZero = 1<<32 - 2 // discarded: zeroes
)

// uuid is as it is stored: the first three groups are little-endian.
type uuid [16]byte

func (u uuid) isNil() bool { return u == uuid{} }

// String returns the UUID as VirtualBox shows it.
func (u uuid) String() string {
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", binary.LittleEndian.Uint32(u[:]),
		binary.LittleEndian.Uint16(u[4:]), binary.LittleEndian.Uint16(u[6:]), u[8:10], u[10:])
}

// newUUID returns a random one.
func newUUID() uuid {
	var u uuid
	_, _ = rand.Read(u[:]) // never fails
	u[7] = u[7]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return u
}

// header is the first sector of an image: its bytes, fields nobody knows included.
type header [headerBytes]byte

func (h *header) u32(field int) uint32       { return binary.LittleEndian.Uint32(h[field:]) }
func (h *header) setU32(field int, v uint32) { binary.LittleEndian.PutUint32(h[field:], v) }
func (h *header) uuid(field int) uuid        { return uuid(h[field : field+16]) }
func (h *header) setUUID(field int, u uuid)  { copy(h[field:], u[:]) }
func (h *header) kind() uint32               { return h.u32(fieldType) }
func (h *header) blocks() int64              { return int64(h.u32(fieldBlocks)) }
func (h *header) mapOffset() int64           { return int64(h.u32(fieldMapOffset)) }
func (h *header) dataOffset() int64          { return int64(h.u32(fieldDataOffset)) }
func (h *header) blockBytes() int64          { return int64(h.u32(fieldBlockSize)) }
func (h *header) extraBytes() int64          { return int64(h.u32(fieldBlockExtra)) }
func (h *header) allocated() int64           { return int64(h.u32(fieldBlocksAllocated)) }
func (h *header) diskSize() uint64           { return binary.LittleEndian.Uint64(h[fieldDiskSize:]) }
func (h *header) setDiskSize(bytes int64) {
	binary.LittleEndian.PutUint64(h[fieldDiskSize:], uint64(bytes))
}
func (h *header) setBlocks(count int64)       { h.setU32(fieldBlocks, uint32(count)) }
func (h *header) setAllocated(count int64)    { h.setU32(fieldBlocksAllocated, uint32(count)) }
func (h *header) strideBytes() int64          { return h.blockBytes() + h.extraBytes() }
func (h *header) isChild() bool               { return !h.uuid(fieldUUIDLink).isNil() }
func (h *header) isProbablyVDI() bool         { return h.u32(fieldSignature) == signature }
func (h *header) mapBytes(blocks int64) int64 { return blocks * entryBytes }
func (h *header) blocksOf(size int64) int64   { return (size + h.blockBytes() - 1) / h.blockBytes() }

// description returns the comment that people can give an image.
func (h *header) description() string {
	text, _, _ := bytes.Cut(h[fieldDescription:fieldDescription+descriptionBytes], []byte{0})
	return strings.ToValidUTF8(string(text), "?")
}

func (h *header) setDescription(text string) {
	clear(h[fieldDescription : fieldDescription+descriptionBytes])
	copy(h[fieldDescription:fieldDescription+descriptionBytes-1], text)
}

// guestBytes returns the disk's size: some writers make odd ones, which count as whole
// sectors, as they do for QEMU.
func (h *header) guestBytes() int64 {
	return int64(h.diskSize()+sectorBytes-1) / sectorBytes * sectorBytes
}

// validate returns what makes a header unusable. fileBytes is the file's length.
func (h *header) validate(fileBytes int64) error {
	switch {
	case !h.isProbablyVDI():
		return corrupt("signature %#x, want %#x", h.u32(fieldSignature), uint32(signature))
	case h.u32(fieldVersion) != version:
		return unsupported("version %d.%d, want 1.1", h.u32(fieldVersion)>>16, h.u32(fieldVersion)&0xffff)
	case h.u32(fieldHeaderSize) < sizeOfOld:
		return corrupt("header size %#x, want at least %#x", h.u32(fieldHeaderSize), sizeOfOld)
	case h.kind() == typeUndo:
		return unsupported("image type %d (undo), want 1 (dynamic), 2 (static) or 4 (differencing)", h.kind())
	case h.kind() != typeDynamic && h.kind() != typeStatic && h.kind() != typeDifferencing:
		return corrupt("image type %d, want 1 (dynamic), 2 (static) or 4 (differencing)", h.kind())
	case h.u32(fieldSectorSize) != sectorBytes:
		return unsupported("sector size %d, want %d", h.u32(fieldSectorSize), sectorBytes)
	}
	if err := h.validateBlocks(); err != nil {
		return err
	}
	return h.validatePlaces(fileBytes)
}

func (h *header) validateBlocks() error {
	size := h.blockBytes()
	switch {
	case size < minBlockBytes || size > maxBlockBytes || bits.OnesCount32(uint32(size)) != 1:
		return unsupported("block size %d, want a power of two from %d to %d", size, minBlockBytes, maxBlockBytes)
	case h.extraBytes() > size || h.extraBytes()%sectorBytes != 0:
		return unsupported("%d extra bytes in each block of %d, want a multiple of %d, no more than a block",
			h.extraBytes(), size, sectorBytes)
	case h.blocks() > maxBlocks:
		return unsupported("%d blocks, want at most %d", h.blocks(), maxBlocks)
	case h.diskSize() > uint64(h.blocks()*size):
		return corrupt("disk size %d, but its %d blocks of %d hold %d bytes", h.diskSize(), h.blocks(), size, h.blocks()*size)
	case h.diskSize() == 0:
		return unsupported("disk size 0, want at least one byte")
	case h.kind() == typeDifferencing && !h.isChild():
		return corrupt("image type 4 (differencing), but the UUID of its parent is nil")
	}
	return nil
}

func (h *header) validatePlaces(fileBytes int64) error {
	at, data := h.mapOffset(), h.dataOffset()
	end := at + h.mapBytes(h.blocks())
	switch {
	case at%sectorBytes != 0 || data%sectorBytes != 0:
		return unsupported("block map at %#x and blocks at %#x, want multiples of %d", at, data, sectorBytes)
	case at < headerBytes || at < preHeader+int64(h.u32(fieldHeaderSize)):
		return corrupt("block map at %#x, which is in the header", at)
	case data < end:
		return corrupt("blocks at %#x, but the block map of %d entries ends at %#x", data, h.blocks(), end)
	case end > fileBytes:
		return corrupt("the block map of %d entries ends at %#x, but the file at %#x: it was truncated", h.blocks(), end, fileBytes)
	}
	return nil
}
