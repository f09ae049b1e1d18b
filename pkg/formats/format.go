package formats

import (
	"context"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Format is one on-disk specification. Implementations have no state and are safe for
// concurrent use.
type Format interface {
	// Name is the format's name in qemu-img's words: "raw", "vmdk".
	Name() string

	// Probe reports whether a file that starts with head (up to ProbeBytes) and is
	// size bytes long is of this format.
	Probe(head []byte, size int64) bool

	// Open opens one image, without what it stands on. It locks every file it opens
	// (LockRead or LockWrite, as req.Mode says). On an error nothing stays open.
	Open(req OpenRequest) (*engine.Layer, error)

	// Create makes a new image whose contents are zeroes, or the parent's, and makes
	// it durable. The names it creates must not exist. On an error nothing is left.
	Create(ctx context.Context, req CreateRequest) error

	// Options says what Create accepts.
	Options() Options

	// Measure returns how long the files of an image are together that was created as
	// req says and holds data in dataBytes of its guest bytes, which are whole
	// clusters. Space that is reserved counts, holes do not.
	Measure(req CreateRequest, dataBytes int64) (int64, error)
}

// TailProber is a Format with images that only their end tells from raw ones (fixed VHD).
// Files of other formats may end with anything: ProbeTail must check all that it can.
type TailProber interface {
	Format
	// ProbeTail reports whether a file that ends with tail (up to ProbeTailBytes) and
	// is size bytes long is of this format. It is asked when Probe says no.
	ProbeTail(tail []byte, size int64) bool
}

// ProbeBytes is how much of a file's beginning Probe is shown, ProbeTailBytes how much of
// its end ProbeTail is.
const (
	ProbeBytes     = 2048
	ProbeTailBytes = 512
)

// OpenRequest says what to open.
type OpenRequest struct {
	FS   vfs.FS
	Name string
	Mode vfs.Mode
	// NoLock opens without locks: for looking at images that somebody else writes.
	NoLock bool
	Secret Secret // for encrypted images; nil: no password is known
	// Alone says that nobody is going to follow the link to what the image stands on:
	// one that cannot be used is no error. See Link.
	Alone bool
}

// Link is for what an Open makes of the image's link to its parent: it turns an error into a
// broken link where that is all that was asked for.
func (r OpenRequest) Link(link *engine.ParentLink, err error) (*engine.ParentLink, error) {
	if err != nil && r.Alone {
		return &engine.ParentLink{Broken: err}, nil
	}
	return link, err
}

// CreateRequest says what to create. Zero values mean the format's defaults.
type CreateRequest struct {
	FS            vfs.FS
	Name          string
	SizeBytes     int64 // guest size; of an overlay 0 means the parent's
	Subformat     string
	ClusterBytes  int64
	Preallocation Preallocation
	Parent        *Parent           // nil for a base
	Extra         map[string]string // options of this format only: see Options.Extra
	Secret        Secret            // for kinds that are encrypted; nil: no password is known
}

// Parent is what an overlay will stand on.
type Parent = engine.Parent

// Secret returns the password of an encrypted image, by the name of its file. The bytes
// are the caller's.
type Secret func(file string) ([]byte, error)

// Ask returns the password of an image; block.ErrInvalid if there is nobody to ask.
func (s Secret) Ask(file string) ([]byte, error) {
	if s == nil {
		return nil, fmt.Errorf("%s is encrypted: %w: want a password (--secret-file)", file, block.ErrInvalid)
	}
	return s(file)
}

// Preallocation is how much space a new image takes at once.
type Preallocation string

const (
	PreallocateOff      Preallocation = "off"      // none: thin
	PreallocateMetadata Preallocation = "metadata" // tables
	PreallocateFalloc   Preallocation = "falloc"   // reserve everything, unwritten
	PreallocateFull     Preallocation = "full"     // write everything
)

// Options says what a format's Create accepts.
type Options struct {
	Subformats          []string // the first is the default; nil if there are none
	OverlaySubformats   []string // those that can stand on a parent; nil: cannot
	ParentFormats       []string // formats an overlay can stand on
	MinClusterBytes     int64    // 0: no clusters
	MaxClusterBytes     int64
	DefaultClusterBytes int64
	Preallocations      []Preallocation
	MaxSizeBytes        int64
	SizeMultiple        int64 // guest sizes must be a multiple of this
	Extra               []ExtraOption
}

// ExtraOption is an option of one format.
type ExtraOption struct {
	Name, Help string
	Values     []string // nil: anything that Create accepts
}
