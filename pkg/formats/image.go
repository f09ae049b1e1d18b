package formats

import (
	"context"
	"errors"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// MaxDepth is the most layers a chain may have.
const MaxDepth = 64

// OpenOptions say how to open an image.
type OpenOptions struct {
	Format string // name of the top image's format; "" probes (only for images people bring)
	Mode   vfs.Mode
	NoLock bool // look without locks, at an image somebody else may be writing
	// NoParents opens the image alone: what its parents hold reads as zeroes.
	NoParents bool
	// ParentFormats names formats of images further down by file name, for parents
	// whose child does not say; others are probed.
	ParentFormats map[string]string
	// Secret is asked for the passwords of encrypted images, parents included.
	Secret Secret
	// TableCacheBytes bounds the memory for cached tables, of all layers together; 0
	// means 32 MiB.
	TableCacheBytes int64
	// Journal is where the redo journal is kept; nil: none.
	Journal *engine.JournalFile
}

// Image is an open image with the chain it stands on, as a block.Device.
type Image struct {
	*engine.Disk
}

// Open opens the image name in fs with everything it stands on. Parents are opened
// read-only. On an error nothing stays open.
func Open(ctx context.Context, fs vfs.FS, name string, opts OpenOptions) (*Image, error) {
	if err := replay(fs, name, opts); err != nil {
		return nil, err
	}
	layers, err := openChain(ctx, fs, name, opts)
	if err != nil {
		return nil, err
	}
	disk, err := engine.New(layers, engine.Options{Journal: opts.Journal, TableCacheBytes: opts.TableCacheBytes})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", name, err), closeLayers(layers))
	}
	return &Image{Disk: disk}, nil
}

// replay brings back what a killed process had completed but not yet flushed. The image
// is opened alone for it and closed again, because its tables change underneath.
func replay(fs vfs.FS, name string, opts OpenOptions) error {
	if opts.Journal == nil || opts.Mode != vfs.ReadWrite {
		return nil
	}
	layer, err := openLayer(fs, name, opts.Format, opts.Mode, opts)
	if err != nil {
		return err
	}
	_, err = engine.Replay(layer, opts.Journal)
	return errors.Join(err, layer.Close())
}

// openChain opens the layers of a chain, the top one first.
func openChain(ctx context.Context, fs vfs.FS, name string, opts OpenOptions) (layers []*engine.Layer, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, closeLayers(layers))
		}
	}()
	seen := map[string]bool{}
	mode, format := opts.Mode, opts.Format
	for name != "" {
		if err := ctx.Err(); err != nil {
			return layers, err
		}
		if seen[name] {
			return layers, fmt.Errorf("open chain: %s stands on itself: %w", name, block.ErrCorrupt)
		}
		if len(layers) == MaxDepth {
			return layers, fmt.Errorf("open chain: more than %d layers: %w", MaxDepth, block.ErrUnsupported)
		}
		seen[name] = true
		layer, err := openLayer(fs, name, format, mode, opts)
		if err != nil {
			return layers, err
		}
		layers = append(layers, layer)
		if err := verifyLink(layers); err != nil {
			return layers, err
		}
		if layer.Parent == nil || opts.NoParents {
			break
		}
		name, mode = layer.Parent.Name, vfs.ReadOnly
		format = opts.ParentFormats[name]
		if format == "" {
			format = layer.Parent.Format
		}
	}
	return layers, nil
}

// verifyLink checks the newest parent against the child above it.
func verifyLink(layers []*engine.Layer) error {
	if len(layers) < 2 {
		return nil
	}
	child, parent := layers[len(layers)-2], layers[len(layers)-1]
	if child.Parent.Verify == nil {
		return nil
	}
	if err := child.Parent.Verify(parent); err != nil {
		return fmt.Errorf("%s stands on %s: %w", child.Name, parent.Name, err)
	}
	return nil
}

func openLayer(fs vfs.FS, name, format string, mode vfs.Mode, opts OpenOptions) (*engine.Layer, error) {
	f, err := Lookup(format)
	if format == "" {
		f, err = Probe(fs, name)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	return f.Open(OpenRequest{FS: fs, Name: name, Mode: mode, NoLock: opts.NoLock, Secret: opts.Secret})
}

func closeLayers(layers []*engine.Layer) error {
	var errs []error
	for _, l := range layers {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}
