package driver

import (
	"context"
	"time"
)

// Store is one shared directory of volumes. Methods are safe for concurrent use, also
// by several processes; each is idempotent, and killed at any point it can be repeated.
// They return when what was asked for is durable. Errors wrap block's sentinels:
// block.ErrNotFound when there is no such volume or snapshot, block.ErrNoSpace for a
// full store, and what each method names.
type Store interface {
	// CreateVolume makes a volume, or returns the one that the same spec made before.
	// block.ErrExists: there is one of this name made from another spec.
	// block.ErrOutOfRange: the size cannot be had from the source or the format, or
	// would be more than spec.LimitBytes. block.ErrInvalid: another part of the spec
	// cannot be had. block.ErrNotFound: there is no such source.
	CreateVolume(ctx context.Context, spec VolumeSpec) (Volume, error)
	// Volume returns a volume.
	Volume(ctx context.Context, name string) (Volume, error)
	// Volumes returns all volumes, sorted by name, also those that something is wrong
	// with.
	Volumes(ctx context.Context) ([]Volume, error)
	// DeleteVolume removes a volume; none of this name is fine. What others need of
	// it stays until they are gone. block.ErrBusy: it is published.
	DeleteVolume(ctx context.Context, name string) error
	// EnsureImageVolume returns the volume that stands for a file under images/ that
	// is used as a volume itself; it is made on first use.
	EnsureImageVolume(ctx context.Context, image string) (Volume, error)
	// ImageVolumeName returns the name of the volume that EnsureImageVolume makes.
	ImageVolumeName(image string) (string, error)

	// Publish gives a volume to a node and returns the epoch with which a server
	// there may open it; the same again returns the same. block.ErrBusy: another node
	// has it. block.ErrExists: the node has it in another way.
	Publish(ctx context.Context, publication Publication) (epoch int64, err error)
	// Unpublish takes a volume from a node, or with node "" from all that have it; a
	// server there stops writing. What is not published, or does not exist, is fine.
	Unpublish(ctx context.Context, name, node string) error
	// Expand makes a volume at least sizeBytes large, also while it is attached; one
	// that is stays as it is. block.ErrOutOfRange: the format cannot, or would have to
	// exceed limitBytes (0: no limit).
	Expand(ctx context.Context, name string, sizeBytes, limitBytes int64) (Volume, error)

	// ChangeLimits changes what a volume may do in a second, also while it is attached:
	// then within seconds.
	ChangeLimits(ctx context.Context, name string, change LimitsChange) error

	// CreateSnapshot freezes a volume's contents, also while it is attached, or
	// returns the snapshot if it was made before. block.ErrExists: another volume of
	// the store has a snapshot of this name.
	CreateSnapshot(ctx context.Context, volume, snapshot string) (Snapshot, error)
	// Snapshot returns one snapshot.
	Snapshot(ctx context.Context, volume, snapshot string) (Snapshot, error)
	// Snapshots returns all snapshots, sorted by volume, then name.
	Snapshots(ctx context.Context) ([]Snapshot, error)
	// DeleteSnapshot removes a snapshot; none of this name is fine. Volumes made from
	// it stay.
	DeleteSnapshot(ctx context.Context, volume, snapshot string) error

	// AvailableBytes returns how much can still be written to the store.
	AvailableBytes(ctx context.Context) (int64, error)
}

// VolumeSpec is a volume to be made.
type VolumeSpec struct {
	Name string
	// SizeBytes is the least size; 0: the source's, or the store's default.
	SizeBytes int64
	// LimitBytes is the greatest size; 0: any.
	LimitBytes int64
	Source     Source
	Parameters Parameters
	// Limits are those it begins with. They do not tell specs apart, since a volume's
	// can be changed.
	Limits Limits
}

// Limits bound what a volume may do in a second; 0: no bound.
type Limits struct {
	IOPS           int64 // requests, at least minIOPS
	BytesPerSecond int64 // read and written, at least minBytesPerSecond
}

// LimitsChange says which limits are to be what; nil: as they are.
type LimitsChange struct {
	IOPS           *int64
	BytesPerSecond *int64
}

// Apply makes the changes.
func (c LimitsChange) Apply(l *Limits) {
	if c.IOPS != nil {
		l.IOPS = *c.IOPS
	}
	if c.BytesPerSecond != nil {
		l.BytesPerSecond = *c.BytesPerSecond
	}
}

// Volume is a volume of a store.
type Volume struct {
	Name       string
	SizeBytes  int64
	Source     Source
	Parameters Parameters
	// Image is the file under images/ that this volume stands for; "" for others.
	// See Store.EnsureImageVolume.
	Image string
	// Nodes are where the volume is published.
	Nodes []string
	// Problem says what is wrong with the volume; "" if nothing is known to be.
	Problem string
}

// Source is what a volume's contents come from; at most one of Image, Snapshot and
// Volume is set.
type Source struct {
	Image     string // file under the store's images/
	ImageMode string // of Image: ImageOverlay or ImageCopy
	Snapshot  string // "<volume>@<snapshot>" in the same store
	Volume    string // in the same store
}

// How a volume is made from an image.
const (
	ImageOverlay = "overlay" // the volume stands on the image, which is never written
	ImageCopy    = "copy"    // the image's contents are copied
)

// Parameters shape a volume's images; zero values are the store's defaults.
type Parameters struct {
	Format        string
	Subformat     string
	ClusterBytes  int64
	Preallocation string
	Transport     string // how the node is to attach it
}

// Publication says where a volume is to be used, and how.
type Publication struct {
	Volume, Node string
	ReadOnly     bool
	// Shared lets other nodes read the volume too; it needs ReadOnly.
	Shared bool
}

// Snapshot is a snapshot of a volume.
type Snapshot struct {
	Volume, Name string
	// VolumeImage is the volume's Image.
	VolumeImage string
	// Taken is when the contents were frozen.
	Taken time.Time
	// SizeBytes is the least size of a volume made from it.
	SizeBytes int64
	// Ready says that volumes can be made from it.
	Ready bool
}

// Attacher makes local block devices out of published volumes. Methods are safe for
// concurrent use and idempotent. ErrUnavailable: nobody answers; try again.
type Attacher interface {
	// Attach returns the volume's device, making it if there is none.
	// block.ErrExists: it is attached with another spec.
	Attach(ctx context.Context, spec AttachSpec) (Attachment, error)
	// Attachment returns what is attached for a handle, or block.ErrNotFound.
	Attachment(ctx context.Context, handle string) (Attachment, error)
	// Resize lets the device have the size that the volume has now.
	Resize(ctx context.Context, handle string) (Attachment, error)
	// Detach removes the device; then everything written is durable and the image
	// closed. block.ErrBusy: the device is in use. block.ErrNotFound: there is none.
	Detach(ctx context.Context, handle string) error
	// Transports returns the names of the transports that work on this node.
	Transports(ctx context.Context) ([]string, error)
}

// AttachSpec says which volume to attach, and as what.
type AttachSpec struct {
	Handle    string // the CSI volume's; names the attachment
	Store     string // as configured
	Volume    string // in the store
	Epoch     int64
	Node      string
	ReadOnly  bool
	Transport string // "": the attacher's choice
	// Limits count instead of those in the store, if there are any. They do not tell
	// specs apart.
	Limits Limits
}

// Attachment is a volume's device on this node.
type Attachment struct {
	Device    string // path of the block device; "" if there is none
	SizeBytes int64
	ReadOnly  bool
	// Lost says that the device is gone without a detach.
	Lost bool
	// Problem says why the volume is not being served now; "" if it is.
	Problem string
}

// Mounter is the node's mount table and its file-system tools. Methods are safe for
// concurrent use for different devices and paths. They may hang while storage does.
type Mounter interface {
	// Mounts returns the mounts of block devices, file systems on them and bind
	// mounts of their nodes, in the order in which they were made.
	Mounts() ([]Mount, error)
	// FileSystem returns the type of the file system on a device, "" if there is
	// nothing on it, or PartitionTable.
	FileSystem(device string) (string, error)
	// FormatAndMount mounts the file system on a device at a directory that exists,
	// after making it if there is nothing on the device, or repairing it; neither
	// with the option "ro". block.ErrBusy: an earlier call is still making it.
	FormatAndMount(device, path, fsType string, options []string) error
	// Bind makes source appear at path. Both are directories, or both are files.
	Bind(source, path string, readOnly bool) error
	// RemountReadOnly makes a bind mount read-only.
	RemountReadOnly(path string) error
	// Unmount undoes the last mount at path. It returns when that is gone from the
	// mount table and what it held is written.
	Unmount(path string) error
	// Grow makes the mounted file system on a device as large as the device.
	Grow(device, path string) error
	// Usage returns the figures of the file system at path.
	Usage(path string) (Usage, error)
}

// PartitionTable is what Mounter.FileSystem returns for a device with partitions.
const PartitionTable = "partition table"

// Mount is one mount of a block device.
type Mount struct {
	Path string
	// Device is the block device's path, as an Attachment has it.
	Device string
	// FSType is the file system's type; "" for a bind mount of the device's node.
	FSType   string
	ReadOnly bool
}

// Usage is how full a file system is. Available is what unprivileged users can use.
type Usage struct {
	TotalBytes, UsedBytes, AvailableBytes    int64
	TotalInodes, UsedInodes, AvailableInodes int64
}

// Format is what the parameter "format" may name, and what goes with it.
type Format struct {
	Name           string
	Subformats     []string // nil: none
	MinClusterSize int64    // 0: no cluster size can be set
	MaxClusterSize int64
	Preallocations []string
}
