package store

import "time"

// Record is a volume's volume.json.
type Record struct {
	Layout    int       `json:"layout"` // 1
	Name      string    `json:"name"`
	Created   time.Time `json:"created"`
	SizeBytes int64     `json:"sizeBytes"` // guest size; grows when an expansion is done
	Format    string    `json:"format"`    // of the volume's own layers
	// Source says what the volume was made from, as its creator named it.
	Source Source `json:"source,omitzero"`
	// Parameters are what the volume was made with, for idempotency and for overlays.
	Parameters Parameters `json:"parameters,omitzero"`

	// Layers is the chain from base to top, all that this volume's own directory or
	// others' (clones) hold: the last is written.
	Layers    []LayerRecord    `json:"layers"`
	NextLayer int              `json:"nextLayer"` // number for the next overlay's name
	Snapshots []SnapshotRecord `json:"snapshots,omitempty"`

	// WantSizeBytes is the wish to grow: more than SizeBytes until it is done.
	WantSizeBytes int64 `json:"wantSizeBytes,omitempty"`

	Epoch      int64       `json:"epoch"`
	Attachment *Attachment `json:"attachment,omitempty"`

	// Ready is false while the volume is being made: it is no volume yet.
	Ready   bool `json:"ready"`
	Deleted bool `json:"deleted,omitempty"`
}

// LayerRecord is one layer of a chain.
type LayerRecord struct {
	File   string `json:"file"`   // name in the store: "volumes/v/v.vmdk", "images/x.vmdk"
	Format string `json:"format"` // what it is opened as
}

// Source is what a volume's contents came from; at most one field is set.
type Source struct {
	Image    string `json:"image,omitempty"`    // file under images/
	Mode     string `json:"mode,omitempty"`     // of Image: "overlay" or "copy"
	Snapshot string `json:"snapshot,omitempty"` // "<volume>@<snapshot>"
	Volume   string `json:"volume,omitempty"`
}

// Parameters shape a volume's images; zero values are defaults.
type Parameters struct {
	Subformat     string `json:"subformat,omitempty"`
	ClusterBytes  int64  `json:"clusterBytes,omitempty"`
	Preallocation string `json:"preallocation,omitempty"`
	Transport     string `json:"transport,omitempty"` // for the node; opaque here
}

// SnapshotRecord is one snapshot of a volume.
type SnapshotRecord struct {
	Name      string    `json:"name"`
	Requested time.Time `json:"requested"`
	Taken     time.Time `json:"taken,omitzero"` // when the contents were frozen
	SizeBytes int64     `json:"sizeBytes,omitempty"`
	// Layer is the chain's layer that is the snapshot's top, once taken.
	Layer string `json:"layer,omitempty"`
	// Overlay is the layer that is to become the volume's top: set before the switch,
	// so that the next holder finishes a switch that a dead one began.
	Overlay string `json:"overlay,omitempty"`
	Ready   bool   `json:"ready"`
	// Problem says why the last try failed; "" if none did.
	Problem string `json:"problem,omitempty"`
	Deleted bool   `json:"deleted,omitempty"`
}

// Attachment says where a volume is published.
type Attachment struct {
	Node     string    `json:"node"`
	ReadOnly bool      `json:"readOnly,omitempty"`
	Since    time.Time `json:"since"`
}
