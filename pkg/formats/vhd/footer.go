package vhd

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"time"
)

const (
	sectorBytes = 512
	footerBytes = 512

	footerCookie  = "conectix"
	formatVersion = 0x00010000
	featuresFixed = 2 // a bit that is always set
	noOffset      = 1<<64 - 1

	// maxSizeBytes is what Microsoft's programs take: 2040 GiB.
	maxSizeBytes = 2040 << 30
	// maxReadBytes is what entries of the block allocation table can reach.
	maxReadBytes = 1 << 32 * sectorBytes
)

// Where the fields are in a footer ("Hard Disk Footer Format"), all big-endian.
const (
	footerFeatures     = 8
	footerVersion      = 12
	footerDataOffset   = 16 // 8 bytes
	footerTimestamp    = 24
	footerCreator      = 28
	footerCreatorVer   = 32
	footerCreatorHost  = 36
	footerOriginalSize = 40 // 8 bytes
	footerCurrentSize  = 48 // 8 bytes
	footerCylinders    = 56 // 2 bytes
	footerHeads        = 58 // 1 byte
	footerTracks       = 59 // 1 byte: sectors per track
	footerKind         = 60
	footerChecksum     = 64
	footerUUID         = 68 // 16 bytes
	footerSavedState   = 84 // 1 byte
)

// Values of the disk type.
const (
	kindFixed        = 2
	kindDynamic      = 3
	kindDifferencing = 4
)

const (
	// creatorExact is Windows' own mark. Readers that know of the mess (see guestBytes)
	// take it to mean that the size in the footer counts.
	creatorExact     = "win "
	creatorHost      = "Wi2k"
	creatorVersion   = 0x000a0000
	maxCylinders     = 65535
	maxCHSHeads      = 16
	maxCHSTracks     = 255
	timestampSeconds = 946684800 // 2000-01-01 00:00:00 UTC, in Unix time
)

// uuid is as it is stored: big-endian throughout.
type uuid [16]byte

// String returns the UUID in its usual form.
func (u uuid) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// newUUID returns a random one.
func newUUID() uuid {
	var u uuid
	_, _ = rand.Read(u[:]) // never fails
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return u
}

// footer is the sector at the end of every image, and at the start of all but fixed ones:
// its bytes, fields nobody knows included.
type footer [footerBytes]byte

func (f *footer) u32(field int) uint32       { return binary.BigEndian.Uint32(f[field:]) }
func (f *footer) u64(field int) uint64       { return binary.BigEndian.Uint64(f[field:]) }
func (f *footer) setU32(field int, v uint32) { binary.BigEndian.PutUint32(f[field:], v) }
func (f *footer) setU64(field int, v uint64) { binary.BigEndian.PutUint64(f[field:], v) }
func (f *footer) kind() uint32               { return f.u32(footerKind) }
func (f *footer) dataOffset() uint64         { return f.u64(footerDataOffset) }
func (f *footer) timestamp() uint32          { return f.u32(footerTimestamp) }
func (f *footer) uuid() uuid                 { return uuid(f[footerUUID : footerUUID+16]) }
func (f *footer) creator() string            { return string(f[footerCreator : footerCreator+4]) }

// parseFooter returns the footer in the first sector of p, if there is a valid one. Some
// old programs wrote one byte less, which is zero.
func parseFooter(p []byte) (footer, bool) {
	var f footer
	if len(p) < footerBytes-1 || string(p[:len(footerCookie)]) != footerCookie {
		return f, false
	}
	copy(f[:], p)
	if f.u32(footerVersion)>>16 != formatVersion>>16 {
		return f, false
	}
	return f, f.u32(footerChecksum) == checksum(f[:], footerChecksum)
}

// seal makes the checksum right.
func (f *footer) seal() { f.setU32(footerChecksum, checksum(f[:], footerChecksum)) }

// checksum is the one's complement of the sum of all bytes but those of the checksum.
func checksum(p []byte, field int) uint32 {
	var sum uint32
	for i, b := range p {
		if i < field || i >= field+4 {
			sum += uint32(b)
		}
	}
	return ^sum
}

// geometry is what old guests and controllers are told of a disk.
type geometry struct{ cylinders, heads, tracks int64 }

func (g geometry) bytes() int64 { return g.cylinders * g.heads * g.tracks * sectorBytes }

func (f *footer) geometry() geometry {
	return geometry{int64(binary.BigEndian.Uint16(f[footerCylinders:])), int64(f[footerHeads]), int64(f[footerTracks])}
}

// guestBytes returns the disk's size. Virtual PC and Virtual Server show their guests what
// the geometry says, which is a little less than the size in the footer unless that is too
// large for a geometry; so does QEMU with images of its own, whose sizes agree. With all
// other programs the size in the footer counts.
func (f *footer) guestBytes() int64 {
	size := int64(f.u64(footerCurrentSize) / sectorBytes * sectorBytes)
	if !f.usesGeometry() {
		return size
	}
	return f.geometry().bytes()
}

// usesGeometry reports whether the geometry says how large the disk is.
func (f *footer) usesGeometry() bool {
	switch f.creator() {
	case "vpc ", "vs  ", "qemu":
		g := f.geometry()
		return g != geometry{maxCylinders, maxCHSHeads, maxCHSTracks} && g.bytes() > 0 &&
			uint64(g.bytes()) <= f.u64(footerCurrentSize)
	}
	return false
}

// setSize enters a size, such that it counts for every reader.
func (f *footer) setSize(size int64) {
	g := geometryOf(size / sectorBytes)
	binary.BigEndian.PutUint16(f[footerCylinders:], uint16(g.cylinders))
	f[footerHeads], f[footerTracks] = byte(g.heads), byte(g.tracks)
	f.setU64(footerCurrentSize, uint64(size))
	copy(f[footerCreator:], creatorExact)
}

// geometryOf returns the geometry of a disk of a length ("Appendix: CHS Calculation").
func geometryOf(sectors int64) geometry {
	sectors = min(sectors, maxCylinders*maxCHSHeads*maxCHSTracks)
	if sectors >= maxCylinders*16*63 {
		return geometry{sectors / 255 / 16, 16, 255}
	}
	g := geometry{tracks: 17}
	all := sectors / g.tracks
	g.heads = max((all+1023)/1024, 4)
	if all >= g.heads*1024 || g.heads > 16 {
		g.tracks, g.heads = 31, 16
		all = sectors / g.tracks
	}
	if all >= g.heads*1024 {
		g.tracks, g.heads = 63, 16
		all = sectors / g.tracks
	}
	g.cylinders = all / g.heads
	return g
}

// now returns the time as footers have it.
func now() uint32 { return uint32(time.Now().Unix() - timestampSeconds) }

// validateSize returns what is wrong with the size.
func (f *footer) validateSize() error {
	if size := f.u64(footerCurrentSize); size > maxReadBytes || f.guestBytes() <= 0 {
		return corrupt("current size %d, want at least %d and at most %d", size, sectorBytes, int64(maxReadBytes))
	}
	return nil
}
