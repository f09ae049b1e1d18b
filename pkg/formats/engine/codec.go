package engine

import (
	"context"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Codec knows the tables of one open image. The engine calls Lookup, Granule and
// ReadCompressed from many goroutines at once, and every other method alone, with no
// Lookup running: a Codec needs no locks.
//
// Guest ranges given to a Codec start inside the image; only the ranges of Allocate and
// Set may reach past the guest size, to the end of the last granule.
//
// A Codec reads and changes its tables through its Layer's Tables, whose errors it
// passes on wrapped. It never writes to the files itself, except through a Commit.
type Codec interface {
	// Geometry describes the image. SizeBytes changes with Resize only.
	Geometry() Geometry

	// Lookup says where the guest bytes at off are: for as long a run as it can
	// cheaply say, at most n bytes. An entry that points outside the file or at
	// tables is block.ErrCorrupt.
	Lookup(off, n int64) (Run, error)

	// Granule returns the guest range [start, end) around off that can only become
	// present as a whole: a cluster, a subcluster, a sector of a partially present
	// block. The end may lie past the guest size.
	Granule(off int64) (start, end int64)

	// ReadCompressed fills p with the whole granule that run, a Compressed one,
	// lies in; len(p) is run.GranuleLen. It must bound what it inflates.
	ReadCompressed(run Run, p []byte) error

	// Allocate reserves space for whole granules at the guest range [off, off+n),
	// for all of them or for leading ones. Nothing refers to the space until Set.
	Allocate(off, n int64) (Place, error)

	// Set changes the mapping of whole granules [off, off+n): to Data at a place
	// Allocate gave, to Zero (if Geometry.ZeroState), to Absent, or of one granule to
	// Compressed at a place AllocateCompressed gave. It returns
	// space that nothing refers to any more, which stays untouched until Free. When
	// it fails, nothing has changed.
	Set(off, n int64, to State, at Place) (unused []Span, err error)

	// Free takes back space: reserved and never Set, or returned by a Set that is
	// durable now. The space may be used again at once. zeroed says that it reads
	// as zeroes.
	Free(s Span, zeroed bool)

	// Begin prepares an image for its first change since it was opened (new
	// identifiers, dirty marks), durably. It may be called again if it failed.
	Begin(c *Commit) error

	// Commit makes all changes of tables that c holds durable. The data they refer
	// to is durable already; the engine syncs once more after it.
	Commit(c *Commit) error

	// Finish leaves a changed image as a clean close does: surplus space trimmed,
	// dirty marks cleared. Everything is committed already.
	Finish(c *Commit) error

	// Resize gives the image another size, crash-safely: durable when it returns, and
	// either the old or the new size at any moment before. When it fails, the image
	// is used on at its old size, unless c was lost. Before it shrinks, the engine has set every granule
	// past the new size to Absent, durably, and zeroed what is past it of the last
	// one; files of flat images are cut by Resize itself. A kind of image that cannot
	// grow or shrink returns block.ErrUnsupported.
	Resize(c *Commit, size int64) error

	// SetParent changes what the image says it stands on; nil: nothing. The mapping
	// stays. It is durable when it returns, with the old or the new parent at any
	// moment before. When it fails, the image is used on, unless c was lost. Kinds of images without parents, or that cannot name this one,
	// return block.ErrUnsupported. The Layer's Parent is changed, too.
	SetParent(c *Commit, parent *Parent) error

	// Identity returns bytes that change whenever somebody else changes the image,
	// as far as the format has such; the redo journal is only replayed onto the
	// image it was written for.
	Identity() []byte

	// Check examines all tables. With repair it also fixes what it can without
	// touching good data, through c (nil otherwise); the image is not being used.
	Check(ctx context.Context, c *Commit, progress func(done, total int64)) (CheckResult, error)

	// Describe returns what `image info` shows beside sizes.
	Describe() Description

	// Close releases what the codec holds; the Layer closes the files.
	Close() error
}

// Compressor is a Codec of images that can hold compressed granules. It is used for
// converting: what guests write is stored plain.
type Compressor interface {
	Codec

	// Compress returns the granule at guest offset off, p, as the image stores it,
	// with markers and padding if the format has such; nil if that does not save
	// space. It is safe for concurrent use, beside any other method.
	Compress(off int64, p []byte) ([]byte, error)

	// AllocateCompressed reserves n bytes for the granule at off. It is called as
	// Allocate is, and followed by Set of the granule to Compressed.
	AllocateCompressed(off, n int64) (Place, error)
}

// PartZeroer is a Codec with a ZeroState that not all granules can have: of a block that
// becomes present sector by sector, only all sectors together. Such a Codec may also
// change what Granule says of a place, in a Set of a range that covers the old granules
// and the new one.
type PartZeroer interface {
	Codec

	// CanZero reports whether Set can make whole granules [off, off+n) Zero. It is called
	// as Lookup is.
	CanZero(off, n int64) bool
}

// State is the state of a Run in one layer.
type State uint8

const (
	Absent     State = iota // this layer does not hold the bytes: ask the parent
	Zero                    // explicitly zero, whatever a parent holds
	Data                    // in Files[File] at FileOff, plain (or through the Cipher)
	Compressed              // in a compressed granule: see ReadCompressed
)

// Run is a stretch of guest bytes with one state, in one layer.
type Run struct {
	State   State
	Len     int64 // > 0
	File    int   // Data, Compressed: index into Layer.Files
	FileOff int64 // Data: of the first byte; Compressed: of the compressed granule
	// Flat says that the bytes' place is fixed (raw and flat extents): zeroing and
	// discard punch holes there, and holes in the file are worth reporting.
	Flat bool
	// Shared says of Data that others refer to it, too (snapshots within the image): it
	// is never overwritten, what changes is placed anew.
	Shared bool

	// Compressed only.
	GranuleOff    int64 // guest offset of the granule the run lies in
	GranuleLen    int64 // its length when inflated
	CompressedLen int64 // upper bound of its stored length
}

// Span is a stretch of a file.
type Span struct {
	File     int
	Off, Len int64
	// Shared says of an unused span that somebody else still refers to it: its contents
	// stay, and Free takes back one reference.
	Shared bool
}

// Place is space for granules.
type Place struct {
	Span
	Zeroed bool // reads as zeroes now: what is to be zero need not be written
}

// Geometry describes an image to the engine.
type Geometry struct {
	SizeBytes         int64 // guest size
	ClusterBytes      int64 // allocation unit; 0 for flat images
	LogicalBlockBytes int   // 512 or 4096
	ZeroState         bool  // Set(Zero) is possible
	ReadOnly          bool  // this kind of image cannot be changed in place (streamOptimized)
	Cipher            Cipher
	// Sequential says that only compressed granules can be written, each once and in
	// ascending order: a streamOptimized image from its creation until it is closed.
	Sequential bool
}

// Cipher encrypts the sectors of an image; nil is none. Ranges are whole 512-byte
// sectors. It is safe for concurrent use.
type Cipher interface {
	Encrypt(p []byte, guestOff int64)
	Decrypt(p []byte, guestOff int64)
}

// CheckResult is what a check found. The counts have qemu-img's meaning.
type CheckResult struct {
	Problems       []Problem
	Corruptions    int64
	Leaks          int64 // clusters, or other units of space, that nothing refers to
	FixedProblems  int64
	FixedLeaks     int64
	TotalClusters  int64
	AllocatedCount int64
	Compressed     int64
	Fragmented     int64
	ImageEndOffset int64
}

// Problem is one thing a check found, as a sentence.
type Problem struct {
	Corrupt bool // else a leak or a stale redundant copy
	Fixed   bool
	Text    string
}

// Description is what a format tells people about an image.
type Description struct {
	Subformat string
	// Details are shown in this order; values are strings, numbers or booleans, or
	// slices of map[string]any.
	Details []Detail
}

// Detail is one format-specific fact, with qemu-img's name where it has one.
type Detail struct {
	Name  string
	Value any
}

// blockState translates a run's state for block.Extent.
func (s State) blockState() block.State {
	switch s {
	case Data, Compressed:
		return block.Data
	case Zero:
		return block.Zero
	}
	return block.Unallocated
}
