package formats

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Rebasing says on what an image shall stand.
type Rebasing struct {
	// Open says how to open the image; its mode is always for writing.
	Open OpenOptions
	// Parent is the name of the new parent, in the same file system; "" for none.
	Parent       string
	ParentFormat string // "" probes
	// Unsafe changes the link alone: what the image reads as changes, unless the new
	// parent has the old one's contents. The old one need not exist.
	Unsafe bool
}

// Rebase lets an image stand on another parent, or on none. First everything in which the
// image's contents would change is copied into it, then its link is changed: it reads the
// same at any moment, also after a crash. See [Rebasing.Unsafe] for the exception.
func Rebase(ctx context.Context, fs vfs.FS, name string, r Rebasing, progress Progress) (err error) {
	r.Open.Mode = vfs.ReadWrite
	r.Open.NoParents = r.Unsafe
	img, err := Open(ctx, fs, name, r.Open)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	below, err := r.openParent(ctx, fs, name)
	if err != nil {
		return err
	}
	removed, err := r.exchange(ctx, img, below, progress)
	if err != nil {
		return errors.Join(fmt.Errorf("rebase %s: %w", name, err), closeLayers(below))
	}
	return closeLayers(removed)
}

// openParent opens the new parent's chain; of an unsafe one, the parent alone.
func (r Rebasing) openParent(ctx context.Context, fs vfs.FS, name string) ([]*engine.Layer, error) {
	if r.Parent == "" {
		return nil, nil
	}
	opts := r.Open
	opts.Format, opts.Mode, opts.NoParents, opts.Journal = r.ParentFormat, vfs.ReadOnly, r.Unsafe, nil
	return chain{fs: fs, opts: opts, above: []string{name}}.open(ctx, r.Parent)
}

// exchange puts an image onto the layers below, which it takes over if it succeeds, and
// returns those that it stood on.
func (r Rebasing) exchange(ctx context.Context, img *Image, below []*engine.Layer, progress Progress) ([]*engine.Layer, error) {
	var parent *engine.Parent
	if len(below) > 0 {
		parent = &engine.Parent{Name: r.Parent, Layer: below[0]}
		if err := checkStandsOn(img.Layers()[0], below[0]); err != nil {
			return nil, err
		}
	}
	if !r.Unsafe {
		if err := keepContents(ctx, img, below, progress); err != nil {
			return nil, err
		}
	}
	return img.SetParent(parent, below)
}

// checkStandsOn reports early what the image's codec would only say when everything has
// been copied.
func checkStandsOn(child, parent *engine.Layer) error {
	f, err := Lookup(child.Format)
	if err != nil {
		return err
	}
	if can := f.Options().ParentFormats; !slices.Contains(can, parent.Format) {
		return fmt.Errorf("%s is %s, %s %s: %w: %s", child.Name, child.Format, parent.Name, parent.Format,
			block.ErrUnsupported, f.Name()+standsOn(can))
	}
	return nil
}

// standsOn says in words what an image can stand on.
func standsOn(formats []string) string {
	if len(formats) == 0 {
		return " images stand on nothing"
	}
	return fmt.Sprintf(" images stand on %v", formats)
}

// keepContents copies into an image's own layer where it would read differently on other
// parents, durably.
func keepContents(ctx context.Context, img *Image, below []*engine.Layer, progress Progress) error {
	size := img.Info().SizeBytes
	other := block.Device(emptyDisk(size))
	if len(below) > 0 {
		disk, err := engine.New(below, engine.Options{}) // never closed: who opened them does
		if err != nil {
			return err
		}
		other = disk
	}
	c := newComparison(img, other, false)
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		extent, err := img.MapLayer(0, off, size-off)
		if err != nil {
			return err
		}
		if extent.State == block.Unallocated {
			if err := holdDifferences(ctx, img, c, off, off+extent.Len); err != nil {
				return err
			}
		}
		off += extent.Len
		if progress != nil {
			progress(off, size)
		}
	}
	return img.Flush()
}

// holdDifferences takes into the image the clusters of a range in which the comparison
// finds a difference.
func holdDifferences(ctx context.Context, img *Image, c *comparison, off, end int64) error {
	cluster := cmp.Or(img.Info().ClusterBytes, sparseUnitBytes)
	for off < end {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, d, err := c.step(off, end-off)
		if err != nil {
			return err
		}
		if d.Kind != "" {
			n = min((d.Off/cluster+1)*cluster, end) - off
			if err := img.Hold(d.Off, off+n-d.Off); err != nil {
				return err
			}
		}
		off += n
	}
	return nil
}

// emptyDisk is a disk of zeroes of a size.
type emptyDisk int64

var _ block.Device = emptyDisk(0)

func (e emptyDisk) Info() block.Info {
	return block.Info{SizeBytes: int64(e), LogicalBlockBytes: 512, ReadOnly: true}
}

func (e emptyDisk) ReadAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange(off, int64(len(p)), int64(e)); err != nil {
		return 0, err
	}
	clear(p)
	return len(p), nil
}

func (e emptyDisk) Map(off, n int64) (block.Extent, error) {
	return block.Extent{Off: off, Len: n, FileOff: -1}, block.CheckRange(off, n, int64(e))
}

func (emptyDisk) WriteAt([]byte, int64) (int, error)              { return 0, block.ErrReadOnly }
func (emptyDisk) WriteZeroes(int64, int64, block.ZeroFlags) error { return block.ErrReadOnly }
func (emptyDisk) Discard(int64, int64) error                      { return block.ErrReadOnly }
func (emptyDisk) Flush() error                                    { return nil }
func (emptyDisk) Close() error                                    { return nil }
