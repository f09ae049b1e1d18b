package vhdx

import (
	"fmt"
	"math/bits"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// image is an open VHDX. It is the engine's Codec; where the engine says in its errors
// which image it asked about what, they are passed on as they are.
type image struct {
	layer  *engine.Layer
	tables *engine.Tables
	file   *replayedFile

	headers  headers
	header   header // the one that counts
	regions  []region
	reserved []span // header section, log and regions, in order
	meta     *metadata

	blockShift  uint
	sectorShift uint
	chunkRatio  int64 // blocks per sector bitmap

	fileEnd int64         // nothing of the image lies past it
	space   *engine.Space // nil before the first change
	torn    bool          // the headers say that there is something in the log, but there is not
	claims  blockClaims

	// What only Begin, Commit, Resize, SetParent, Finish and Check use, which the
	// engine calls one at a time.
	sequence   uint64 // of the last log entry
	slot       int    // of the log for the next one
	logIsOurs  bool   // nothing but what this session wrote is in the log
	durableEnd int64  // the file is at least this long, durably
}

var _ engine.Codec = (*image)(nil)

// adoptShape derives what depends on block and sector sizes.
func (m *image) adoptShape() {
	m.blockShift = uint(bits.TrailingZeros64(uint64(m.meta.blockBytes)))
	m.sectorShift = uint(bits.TrailingZeros64(uint64(m.meta.logicalSector)))
	m.chunkRatio = sectorsPerBitmap << m.sectorShift >> m.blockShift
}

// isFixed reports whether blocks keep their place. With a parent they do not.
func (m *image) isFixed() bool { return m.meta.leaveAllocated && !m.meta.hasParent }

// Geometry describes the image.
func (m *image) Geometry() engine.Geometry {
	return engine.Geometry{
		SizeBytes: m.meta.sizeBytes, ClusterBytes: m.meta.blockBytes, LogicalBlockBytes: int(m.meta.logicalSector), ZeroState: true,
	}
}

// ReadCompressed is never called: no block is compressed.
func (m *image) ReadCompressed(engine.Run, []byte) error {
	return unsupported("VHDX has no compressed blocks")
}

// Identity returns the GUIDs that every writer changes, and the size.
func (m *image) Identity() []byte {
	return fmt.Appendf(nil, "vhdx %s %s %d", m.header.fileWrite, m.header.dataWrite, m.meta.sizeBytes)
}

// Close releases nothing: the Layer closes the file.
func (m *image) Close() error { return nil }
