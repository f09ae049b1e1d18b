package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// DefaultFormat is the format of volumes for which nobody asked for another.
const DefaultFormat = "qcow2"

// openChain opens a chain by what the record says of it. A layer that somebody else holds
// in a contradicting way is ErrLocked.
func openChain(ctx context.Context, fsys vfs.FS, layers []LayerRecord, mode vfs.Mode, journal *engine.JournalFile) (*formats.Image, error) {
	top := layers[len(layers)-1]
	opts := formats.OpenOptions{Format: top.Format, Mode: mode, ParentFormats: map[string]string{}, Journal: journal}
	for _, l := range layers[:len(layers)-1] {
		opts.ParentFormats[l.File] = l.Format
	}
	img, err := formats.Open(ctx, fsys, top.File, opts)
	if err != nil {
		return nil, err
	}
	if err := verifyChain(img, layers); err != nil {
		return nil, errors.Join(err, img.Close())
	}
	return img, nil
}

// verifyChain compares the links in the images with the record: the images come from
// strangers, and somebody may have moved one.
func verifyChain(img *formats.Image, want []LayerRecord) error {
	if got := chainOf(img); !slices.Equal(got, want) {
		return fmt.Errorf("%w: the images stand on each other as %s, but the record says %s",
			block.ErrCorrupt, chainText(got), chainText(want))
	}
	return nil
}

// chainOf returns what an open image stands on, from base to top.
func chainOf(img *formats.Image) []LayerRecord {
	var chain []LayerRecord
	for _, l := range img.Layers() {
		chain = append(chain, LayerRecord{File: l.Name, Format: l.Format})
	}
	slices.Reverse(chain)
	return chain
}

func chainText(layers []LayerRecord) string {
	var names []string
	for _, l := range layers {
		names = append(names, l.File)
	}
	return strings.Join(names, " ← ")
}

// openLayer opens one frozen layer without its parents, for standing on. Its last writer
// may be about to lower its lock, so a lock is waited for, a moment.
func openLayer(ctx context.Context, fsys vfs.FS, l LayerRecord) (*engine.Layer, error) {
	format, err := formats.Lookup(l.Format)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", l.File, err)
	}
	var layer *engine.Layer
	err = retryLocked(ctx, frozenLockWait, func() error {
		layer, err = format.Open(formats.OpenRequest{FS: fsys, Name: l.File, Mode: vfs.ReadOnly})
		return err
	})
	return layer, err
}

// frozenLockWait is how long the lock of a layer that nobody writes any more is waited
// for.
const frozenLockWait = 3 * time.Second

// retryLocked repeats try as long as it says ErrLocked, until wait is over.
func retryLocked(ctx context.Context, wait time.Duration, try func() error) error {
	const step = 30 * time.Millisecond
	deadline := time.Now().Add(wait)
	for {
		err := try()
		if !errors.Is(err, block.ErrLocked) || time.Now().After(deadline) {
			return err
		}
		if ctxErr := sleep(ctx, step); ctxErr != nil {
			return fmt.Errorf("%w (%w)", err, ctxErr)
		}
	}
}

// overlayFormat returns the format of an overlay on a layer of format parent: wanted, if
// it can, or else, with wanted "", the parent's own, the default, or any other.
func overlayFormat(wanted, parent string) (formats.Format, error) {
	if wanted != "" {
		format, err := formats.Lookup(wanted)
		if err != nil {
			return nil, err
		}
		if !standsOn(format, parent) {
			return nil, fmt.Errorf("format %q: %w: a %s image cannot stand on a %s image", wanted, block.ErrUnsupported, wanted, parent)
		}
		return format, nil
	}
	var able []formats.Format
	for _, format := range formats.All() {
		if standsOn(format, parent) {
			able = append(able, format)
		}
	}
	for _, name := range []string{parent, DefaultFormat} {
		for _, format := range able {
			if format.Name() == name {
				return format, nil
			}
		}
	}
	if len(able) == 0 {
		return nil, fmt.Errorf("%w: no format here can stand on a %s image", block.ErrUnsupported, parent)
	}
	return able[0], nil
}

func standsOn(format formats.Format, parent string) bool {
	o := format.Options()
	return len(o.OverlaySubformats) > 0 && slices.Contains(o.ParentFormats, parent)
}

// createOverlay makes an empty overlay on parent, durably. size 0 means the parent's.
func createOverlay(ctx context.Context, fsys vfs.FS, file LayerRecord, size int64, params Parameters, parent *engine.Layer) error {
	format, err := formats.Lookup(file.Format)
	if err != nil {
		return err
	}
	options := format.Options()
	subformat := params.Subformat
	if !slices.Contains(options.OverlaySubformats, subformat) {
		subformat = options.OverlaySubformats[0]
	}
	req := formats.CreateRequest{
		FS: fsys, Name: file.File, SizeBytes: size, Subformat: subformat,
		ClusterBytes: params.ClusterBytes,
		Parent:       &formats.Parent{Name: parent.Name, Layer: parent},
	}
	return format.Create(ctx, req)
}
