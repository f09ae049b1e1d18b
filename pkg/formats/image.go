package formats

import (
	"context"
	"errors"
	"fmt"

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
	// ParentFormats names formats of images further down by file name, whatever their
	// children say; under "", the format of those whose child does not say. Others are
	// probed.
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
	layers, err := chain{fs: fs, opts: opts}.open(ctx, name)
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
