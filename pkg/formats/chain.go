package formats

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// chain opens an image and what it stands on.
type chain struct {
	fs   vfs.FS
	opts OpenOptions
	// above are names of images that stand on the chain: it must not have them.
	above []string
	// until reports whether the layers below an image are wanted; nil: they are, unless
	// the options say otherwise.
	until func(link *engine.ParentLink) bool
}

// open opens the layers from name downwards, the top one first. On an error nothing stays
// open.
func (c chain) open(ctx context.Context, name string) (layers []*engine.Layer, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, closeLayers(layers))
		}
	}()
	seen := map[string]bool{}
	for _, n := range c.above {
		seen[n] = true
	}
	mode, format := c.opts.Mode, c.opts.Format
	for {
		if err := c.check(ctx, seen, name); err != nil {
			return layers, err
		}
		seen[name] = true
		layer, err := openLayer(c.fs, name, format, mode, c.opts)
		if err != nil {
			return layers, err
		}
		layers = append(layers, layer)
		if err := verifyLink(layers); err != nil {
			return layers, err
		}
		if layer.Parent == nil || c.opts.NoParents || c.until != nil && c.until(layer.Parent) {
			return layers, nil
		}
		name, mode, format = layer.Parent.Name, vfs.ReadOnly, c.opts.formatOf(layer.Parent)
	}
}

// check reports whether another layer may be opened.
func (c chain) check(ctx context.Context, seen map[string]bool, name string) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case seen[name]:
		return fmt.Errorf("open chain: %s stands on itself: %w", name, block.ErrCorrupt)
	case len(seen) == MaxDepth:
		return fmt.Errorf("open chain: more than %d layers: %w", MaxDepth, block.ErrUnsupported)
	}
	return nil
}

// formatOf returns the name of the format of an image's parent, "" if it has to be probed.
func (o OpenOptions) formatOf(link *engine.ParentLink) string {
	return cmp.Or(o.ParentFormats[link.Name], link.Format, o.ParentFormats[""])
}

// verifyLink checks the newest parent against the child above it.
func verifyLink(layers []*engine.Layer) error {
	if len(layers) < 2 {
		return nil
	}
	return verifyParent(layers[len(layers)-2], layers[len(layers)-1])
}

func verifyParent(child, parent *engine.Layer) error {
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
	return f.Open(OpenRequest{
		FS: fs, Name: name, Mode: mode, NoLock: opts.NoLock, Secret: opts.Secret, Alone: opts.NoParents,
	})
}

func closeLayers(layers []*engine.Layer) error {
	var errs []error
	for _, l := range layers {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}
