package engine

import (
	"errors"
	"path"
	"sync/atomic"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Layer is an open image: one member of a chain.
type Layer struct {
	Name   string     // of the image's main file
	Format string     // "vmdk"
	Files  []vfs.File // what Run.File and Span.File index; the first is the main file
	Tables *Tables    // the codec's view of table sectors in Files
	Codec  Codec
	Parent *ParentLink // nil for a base

	// Writable says that the image was opened for writing.
	Writable bool

	geometry Geometry      // of the codec, as of the last change of size
	unsynced []atomic.Bool // per file: guest data was written since its last sync
	changed  bool          // it was written before it was frozen
}

// ParentLink is an image's reference to the image it stands on, as far as its own
// file says it.
type ParentLink struct {
	Name   string // file name, resolved within the file system and checked by vfs.Resolve
	Format string // "" if the image does not say
	// Broken is why the link cannot be followed, nil if it can; Name is "" then. Only
	// images that were opened alone have such links.
	Broken error
	// Verify reports whether parent is the image the child was made on (CID, UUID).
	Verify func(parent *Layer) error
}

// Parent is what an image is to stand on.
type Parent struct {
	Name  string // in the same file system; becomes a relative link
	Layer *Layer // open, for its format, size and identity
}

// NewLayer returns a layer without a codec, for a format's Open to fill: it reads
// headers from files, makes its codec on the layer's Tables and sets Codec and Parent.
// The layer owns files from now on.
func NewLayer(name, format string, files []vfs.File, writable bool) *Layer {
	return &Layer{
		Name: name, Format: format, Files: files, Writable: writable,
		Tables: newTables(files),
	}
}

// Close closes the codec and the files. A layer that belongs to a Disk is closed by it.
func (l *Layer) Close() error {
	var errs []error
	if l.Codec != nil {
		errs = append(errs, l.Codec.Close())
	}
	for _, f := range l.Files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// journalIdentity is what a redo journal is matched with: the image, unchanged by others
// since. The directory does not count: the same image may be reached from other roots.
func (l *Layer) journalIdentity() []byte {
	return append([]byte(l.Format+"\x00"+path.Base(l.Name)+"\x00"), l.Codec.Identity()...)
}
