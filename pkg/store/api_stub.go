package store

import (
	"context"
	"io"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Options shape an open store; zero values are defaults.
type Options struct {
	// ReadOnly looks only: whatever would change the store fails with ErrReadOnly.
	ReadOnly bool
	// MaxChain is the most layers a volume may stand on, 32 by default.
	MaxChain int
	// PollInterval is how often a holder looks for wishes: 300 ms by default.
	PollInterval time.Duration
	// HolderWait is how long Attach and DeleteVolume wait for a previous holder of
	// the volume to go: 20 s by default.
	HolderWait time.Duration
}

// Store is an open store. All methods are safe for concurrent use.
type Store struct{ name string }

// Init makes a store of the directory fs and returns its identity. A store that exists
// already is left as it is.
func Init(fs vfs.FS) (id string, err error) { return "", block.ErrUnsupported }

// Open opens the store in fs; name is how handles and messages call it.
func Open(ctx context.Context, name string, fs vfs.FS, opts Options) (*Store, error) {
	return nil, block.ErrUnsupported
}

// Name returns the store's name.
func (s *Store) Name() string { return s.name }

// ID returns the identity the store got when it was made.
func (s *Store) ID() string { return "" }

// Usage returns the store's capacity.
func (s *Store) Usage() (vfs.Usage, error) { return vfs.Usage{}, block.ErrUnsupported }

// Close releases the store. Attached volumes stay attached.
func (s *Store) Close() error { return nil }

// CreateVolumeRequest describes a volume to be made.
type CreateVolumeRequest struct {
	Name string
	// SizeBytes is the least guest size; 0 means the source's, or 1 GiB. It is rounded
	// up to what the format can do.
	SizeBytes int64
	// LimitBytes is the greatest acceptable size; 0: none.
	LimitBytes int64
	// Format of the volume's own layers; "" is the source's where that can carry
	// overlays, else vmdk.
	Format     string
	Parameters Parameters
	Source     Source
}

// CreateVolume makes a volume, or returns the one that the same request made before.
func (s *Store) CreateVolume(ctx context.Context, req CreateVolumeRequest) (Record, error) {
	return Record{}, block.ErrUnsupported
}

// EnsureImageVolume returns the volume that stands for images/<file> in static
// provisioning, made on first use: an overlay, so that the image is never written.
func (s *Store) EnsureImageVolume(ctx context.Context, file string) (Record, error) {
	return Record{}, block.ErrUnsupported
}

// ImageVolumeName returns the name of the volume that EnsureImageVolume makes for
// images/<file>. No volume made by CreateVolume can have such a name.
func ImageVolumeName(file string) (string, error) { return "", block.ErrUnsupported }

// DeleteVolume removes a volume. One that does not exist is fine. A published or attached
// one is ErrBusy. Snapshots and clones of it live on.
func (s *Store) DeleteVolume(ctx context.Context, name string) error { return block.ErrUnsupported }

// Volume returns a volume's record; ErrNotFound if there is none.
func (s *Store) Volume(ctx context.Context, name string) (Record, error) {
	return Record{}, block.ErrUnsupported
}

// VolumeEntry is a volume in a list.
type VolumeEntry struct {
	Name   string
	Record Record
	Err    error // why the record cannot be read; Record is empty then
}

// Volumes lists all volumes, sorted by name. An unreadable record hides no others.
func (s *Store) Volumes(ctx context.Context) ([]VolumeEntry, error) {
	return nil, block.ErrUnsupported
}

// SnapshotEntry is a snapshot in a list.
type SnapshotEntry struct {
	Volume string
	SnapshotRecord
}

// Snapshots lists the snapshots of all volumes, those of deleted volumes too, sorted by
// volume and name. Wishes that are not fulfilled yet are listed as not Ready.
func (s *Store) Snapshots(ctx context.Context) ([]SnapshotEntry, error) {
	return nil, block.ErrUnsupported
}

// Snapshot returns one snapshot; ErrNotFound if there is none.
func (s *Store) Snapshot(ctx context.Context, volume, snapshot string) (SnapshotRecord, error) {
	return SnapshotRecord{}, block.ErrUnsupported
}

// PublishRequest says where a volume is going to be used.
type PublishRequest struct {
	Volume   string
	Node     string
	ReadOnly bool
	// Shared lets other nodes read the volume too; it needs ReadOnly.
	Shared bool
}

// Publish gives a volume to a node and returns the publication's epoch, with which the
// node attaches it. The same request again returns the same epoch. ErrBusy names the node
// that has the volume; ErrExists says that this node has it in another way.
func (s *Store) Publish(ctx context.Context, req PublishRequest) (epoch int64, err error) {
	return 0, block.ErrUnsupported
}

// Unpublish takes a volume from a node, or from all if node is "". A server that still
// has it there is fenced. What is not published, or does not exist, is fine.
func (s *Store) Unpublish(ctx context.Context, name, node string) error { return block.ErrUnsupported }

// CreateSnapshot takes a snapshot, live if the volume is attached, and returns it once it
// is taken. The same call again returns the same snapshot. Names are unique in the store:
// ErrExists if another volume has a snapshot of that name. When ctx ends first the wish
// stays and is carried out later; the same call again waits for it, DeleteSnapshot takes
// it back.
func (s *Store) CreateSnapshot(ctx context.Context, volume, snapshot string) (SnapshotRecord, error) {
	return SnapshotRecord{}, block.ErrUnsupported
}

// DeleteSnapshot removes a snapshot. One that does not exist is fine.
func (s *Store) DeleteSnapshot(ctx context.Context, volume, snapshot string) error {
	return block.ErrUnsupported
}

// Expand grows a volume to at least sizeBytes, live if it is attached, and returns its
// record once that is done. A volume that is large enough is left as it is. A size that,
// rounded up to what the format can do, exceeds limitBytes (0: no limit) is
// ErrOutOfRange. When ctx ends first the wish stays.
func (s *Store) Expand(ctx context.Context, name string, sizeBytes, limitBytes int64) (Record, error) {
	return Record{}, block.ErrUnsupported
}

// AttachOptions say how a volume is opened.
type AttachOptions struct {
	// Node and Epoch are those of the publication that allows it. With Node "" the
	// volume must not be published at all (local use).
	Node  string
	Epoch int64
	// ReadOnly opens for reading; any number can at once.
	ReadOnly bool
	// Snapshot opens a snapshot of the volume, read-only, published or not.
	Snapshot string
	// Journal is the host path of the redo journal, on tmpfs; "" is none.
	Journal string
}

// Attached is a volume opened by Attach.
type Attached struct{}

// Attach opens a volume, for the process that serves it. It waits for a previous holder
// to go, a bounded time (ErrLocked), finishes what a dead one left, and from then on
// carries out the wishes in the record. ErrFenced: the publication is not, or no longer,
// the node's.
func (s *Store) Attach(ctx context.Context, name string, opts AttachOptions) (*Attached, error) {
	return nil, block.ErrUnsupported
}

// Device returns the volume's device. It is closed by Close only.
func (a *Attached) Device() block.Device { return nil }

// Record returns the record as the holder last saw it.
func (a *Attached) Record() Record { return Record{} }

// Stats returns the engine's counters, for JSON.
func (a *Attached) Stats() any { return nil }

// Lost delivers one error when the volume must no longer be used: another node owns it,
// or it was deleted. From then on the device fails with ErrFenced. The channel is closed
// by Close.
func (a *Attached) Lost() <-chan error { return nil }

// Close makes everything durable and lets the volume go.
func (a *Attached) Close() error { return nil }

// GCResult says what a collection did.
type GCResult struct {
	RemovedVolumes []string `json:"removedVolumes"` // interrupted creations, deleted volumes
	RemovedFiles   []string `json:"removedFiles"`
	MergedVolumes  []string `json:"mergedVolumes"` // whose chains became shorter
	Problems       []string `json:"problems"`      // volumes that could not be looked after
}

// GC removes what nothing needs and shortens chains of volumes that nobody has attached.
func (s *Store) GC(ctx context.Context) (GCResult, error) { return GCResult{}, block.ErrUnsupported }

// CheckProblem is one thing Check found.
type CheckProblem struct {
	Volume string `json:"volume,omitempty"`
	File   string `json:"file,omitempty"`
	Text   string `json:"text"`
	// Corrupt: data is in danger, or lost; else only space is.
	Corrupt bool `json:"corrupt"`
	Fixed   bool `json:"fixed"`
}

// CheckReport is what Check found.
type CheckReport struct {
	Volumes  int            `json:"volumes"`
	Layers   int            `json:"layers"`
	Skipped  []string       `json:"skipped"` // layers in use, which were not looked into
	Problems []CheckProblem `json:"problems"`
}

// Check examines records, layers, links and images; with repair it also removes orphans
// and fixes what it can without touching good data.
func (s *Store) Check(ctx context.Context, repair bool) (CheckReport, error) {
	return CheckReport{}, block.ErrUnsupported
}

// TreeNode is one layer of the store's tree: what stands on it are its Children.
type TreeNode struct {
	File           string     `json:"file"`
	Format         string     `json:"format"`
	SizeBytes      int64      `json:"sizeBytes"`           // guest size, 0 if unknown
	AllocatedBytes int64      `json:"allocatedBytes"`      // in the store
	Volumes        []string   `json:"volumes,omitempty"`   // whose top it is
	Snapshots      []string   `json:"snapshots,omitempty"` // "<volume>@<snapshot>" whose top it is
	Missing        bool       `json:"missing,omitempty"`
	Children       []TreeNode `json:"children,omitempty"`
}

// TreeData is the store's layers, as they stand on each other.
type TreeData struct {
	Name     string     `json:"name"`
	Usage    vfs.Usage  `json:"usage"`
	Roots    []TreeNode `json:"roots"`
	Problems []string   `json:"problems,omitempty"`
}

// Tree returns which layer stands on which.
func (s *Store) Tree(ctx context.Context) (TreeData, error) { return TreeData{}, block.ErrUnsupported }

// Draw writes the tree for people.
func (t TreeData) Draw(w io.Writer) error { return nil }
