package store

import "time"

// layoutVersion is the version of the store's layout, see the package documentation.
const layoutVersion = 1

// Record is a volume's volume.json.
type Record struct {
	Layout    int       `json:"layout"` // layoutVersion
	Name      string    `json:"name"`
	Created   time.Time `json:"created"`
	SizeBytes int64     `json:"sizeBytes"` // guest size; grows when an expansion is done
	Format    string    `json:"format"`    // of the layers the volume makes for itself
	// Source says what the volume was made from, as its creator named it.
	Source Source `json:"source,omitzero"`
	// Parameters are what the volume was made with, for idempotency and for overlays.
	Parameters Parameters `json:"parameters,omitzero"`

	// Limits are what the node is to keep the volume to, as it was last asked for.
	Limits Limits `json:"limits,omitzero"`

	// Layers is the chain from base to top, whoever's directories they lie in: the
	// last is written.
	Layers    []LayerRecord    `json:"layers"`
	NextLayer int              `json:"nextLayer"` // number in the next overlay's name
	Snapshots []SnapshotRecord `json:"snapshots,omitempty"`

	// Merging are the files into which layers are being merged; see merge.go. Whoever
	// needs the volume for something else clears it, and the merger gives up.
	Merging []string `json:"merging,omitempty"`

	// MergeWish asks the holder to shorten the chain that it serves.
	MergeWish *MergeWish `json:"mergeWish,omitempty"`

	// Relink says that the top is about to stand on other layers; until it is gone the
	// top's own link tells whether it does. See mergelive.go.
	Relink *Relink `json:"relink,omitempty"`

	// WantSizeBytes is the wish to grow: more than SizeBytes until it is done.
	WantSizeBytes int64 `json:"wantSizeBytes,omitempty"`
	// GrowProblem says why the last try to grow failed.
	GrowProblem *Problem `json:"growProblem,omitempty"`

	// Epoch counts publications, so that each has a number of its own.
	Epoch int64 `json:"epoch"`
	// Attachments are the nodes the volume is published to: one, or several that
	// all only read.
	Attachments []Attachment `json:"attachments,omitempty"`

	// Ready is false while the volume is being made: it is no volume yet.
	Ready bool `json:"ready"`
	// Deleted: the volume is gone, but others stand on layers in its directory.
	Deleted bool `json:"deleted,omitempty"`
}

// LayerRecord is one layer of a chain.
type LayerRecord struct {
	File   string `json:"file"`   // name in the store: "volumes/v/v.vmdk", "images/x.vmdk"
	Format string `json:"format"` // what it is opened as, whatever its contents look like
}

// MergeWish is the wish that a volume in use be merged; see mergelive.go.
type MergeWish struct {
	// Shared are the volume's own layers that other volumes need, too: merging them
	// would save nothing.
	Shared []string `json:"shared,omitempty"`
}

// Relink is a change of what a volume's top stands on.
type Relink struct {
	Layers []LayerRecord `json:"layers"` // the chain afterwards
	// Replaced maps layers that are tops of snapshots to what takes their place.
	Replaced map[string]string `json:"replaced,omitempty"`
}

// Source is what a volume's contents came from. Image, Snapshot and Volume exclude each
// other; all empty: an empty volume.
type Source struct {
	Image    string    `json:"image,omitempty"`    // file under images/, without that prefix
	Mode     ImageMode `json:"mode,omitempty"`     // of Image
	Snapshot string    `json:"snapshot,omitempty"` // "<volume>@<snapshot>"
	Volume   string    `json:"volume,omitempty"`
}

// ImageMode says how a volume is made from an image.
type ImageMode string

const (
	// ImageOverlay makes an overlay on the image, which must stay where it is.
	ImageOverlay ImageMode = "overlay"
	// ImageCopy copies the contents.
	ImageCopy ImageMode = "copy"
)

// Parameters shape a volume's images; zero values are defaults.
type Parameters struct {
	Subformat     string `json:"subformat,omitempty"`
	ClusterBytes  int64  `json:"clusterBytes,omitempty"`
	Preallocation string `json:"preallocation,omitempty"`
	Transport     string `json:"transport,omitempty"` // for the node; opaque here
}

// Limits bound what a volume may do in a second; 0: no bound. They are opaque here.
type Limits struct {
	IOPS           int64 `json:"iops,omitempty"`
	BytesPerSecond int64 `json:"bytesPerSecond,omitempty"`
}

// SnapshotRecord is one snapshot of a volume.
type SnapshotRecord struct {
	Name      string    `json:"name"`
	Requested time.Time `json:"requested"`
	Taken     time.Time `json:"taken,omitzero"`      // when the contents were frozen
	SizeBytes int64     `json:"sizeBytes,omitempty"` // guest size, once taken
	// Layer is the chain's layer that is the snapshot's top, once taken.
	Layer string `json:"layer,omitempty"`
	// Overlay is the file that is to become the volume's top. It is named here before
	// it is made, so that the next holder finds what a dead one left.
	Overlay string `json:"overlay,omitempty"`
	// Ready says that the contents are frozen.
	Ready bool `json:"ready"`
	// Problem says why the last try failed.
	Problem *Problem `json:"problem,omitempty"`
}

// Problem is a failure told from the process that met it to the one that waits.
type Problem struct {
	Kind string    `json:"kind,omitempty"` // which of block's sentinels it was, if one
	Text string    `json:"text"`
	At   time.Time `json:"at"`
}

// Attachment says where a volume is published.
type Attachment struct {
	Node     string    `json:"node"`
	Epoch    int64     `json:"epoch"` // this publication's
	ReadOnly bool      `json:"readOnly,omitempty"`
	Shared   bool      `json:"shared,omitempty"` // others may read beside it
	Since    time.Time `json:"since"`
	// Serving: the node has opened the volume for writing and not closed it cleanly.
	// What a killed server had completed may still be in that node's redo journal, so
	// until then nobody else writes a layer or takes a snapshot.
	Serving bool `json:"serving,omitempty"`
}
