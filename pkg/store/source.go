package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// openParent is the layer a new overlay is going to stand on.
type openParent struct {
	layer     *engine.Layer
	sizeBytes int64
}

// resolve finds and opens what a volume is to be made from.
func (s *Store) resolve(ctx context.Context, req CreateVolumeRequest) (*base, error) {
	if err := checkParameters(req); err != nil {
		return nil, err
	}
	switch src := req.Source; {
	case src.Image != "":
		return s.resolveImage(ctx, req)
	case src.Snapshot != "":
		volume, snapshot, err := SplitSnapshotID(src.Snapshot)
		if err != nil {
			return nil, err
		}
		return s.resolveFrozen(ctx, volume, snapshot, req.Format)
	case src.Volume != "":
		if err := s.checkCloneable(ctx, src.Volume); err != nil {
			return nil, err
		}
		if _, err := s.freeze(ctx, src.Volume, pinOf(req.Name)); err != nil {
			return nil, err
		}
		return s.resolveFrozen(ctx, src.Volume, pinOf(req.Name), req.Format)
	}
	format, err := formats.Lookup(orDefault(req.Format))
	return &base{format: format}, err
}

func orDefault(format string) string {
	if format == "" {
		return DefaultFormat
	}
	return format
}

// checkParameters refuses what the format cannot do, by the parameter's name.
func checkParameters(req CreateVolumeRequest) error {
	overlay := req.Source.Image != "" && req.Source.Mode == ImageOverlay || req.Source.Snapshot != "" || req.Source.Volume != ""
	if format, err := formats.Lookup(req.Format); err == nil && len(format.Options().OverlaySubformats) == 0 {
		overlay = false // it is copied
	}
	switch req.Parameters.Preallocation {
	case "", string(formats.PreallocateOff):
	default:
		if overlay {
			return fmt.Errorf("preallocation %q: %w: the volume becomes an overlay, which is thin: want %s",
				req.Parameters.Preallocation, block.ErrInvalid, formats.PreallocateOff)
		}
	}
	if req.Parameters.ClusterBytes < 0 {
		return fmt.Errorf("clusterSize %d: %w: want a positive size", req.Parameters.ClusterBytes, block.ErrInvalid)
	}
	return nil
}

// checkCloneable says early and plainly that a source is not there.
func (s *Store) checkCloneable(ctx context.Context, volume string) error {
	if _, err := s.Volume(ctx, volume); err != nil {
		return fmt.Errorf("source: %w", err)
	}
	return nil
}

// resolveFrozen opens a snapshot, or a pin, to stand on.
func (s *Store) resolveFrozen(ctx context.Context, volume, snapshot, format string) (*base, error) {
	rec, err := s.readRecord(volume)
	if err != nil {
		return nil, fmt.Errorf("source: %w", notFound(volume, err))
	}
	snap := rec.snapshot(snapshot)
	switch {
	case snap == nil:
		return nil, fmt.Errorf("source: snapshot %s of volume %s: %w", snapshot, volume, block.ErrNotFound)
	case !snap.Ready:
		return nil, fmt.Errorf("source: snapshot %s of volume %s is not taken yet: %w", snapshot, volume, block.ErrBusy)
	}
	b, err := s.baseOn(ctx, rec.chainTo(snap.Layer), format, snap.SizeBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, s.explainMissing(volume, *snap, err)
	}
	return b, err
}

// baseOn returns a frozen chain to stand on, or to be copied if the wanted format cannot
// stand on it: a storage class names the format of all of its volumes, restored ones too.
func (s *Store) baseOn(ctx context.Context, layers []LayerRecord, wanted string, sizeBytes int64) (*base, error) {
	if wanted == "" {
		return s.standOn(ctx, layers, wanted, sizeBytes)
	}
	format, err := formats.Lookup(wanted)
	if err != nil {
		return nil, err
	}
	if standsOn(format, layers[len(layers)-1].Format) {
		return s.standOn(ctx, layers, wanted, sizeBytes)
	}
	img, err := openChain(ctx, s.fs, layers, vfs.ReadOnly, nil)
	if err != nil {
		return nil, err
	}
	return &base{format: format, content: img}, nil
}

// explainMissing says why a snapshot's layer is not there: it was removed or merged since
// the record was read, or the store is damaged.
func (s *Store) explainMissing(volume string, was SnapshotRecord, missing error) error {
	rec, err := s.readRecord(volume)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if now := rec.snapshot(was.Name); now != nil && now.Layer == was.Layer {
		return fmt.Errorf("source: snapshot %s of volume %s: %w: %w", was.Name, volume, block.ErrCorrupt, missing)
	}
	return fmt.Errorf("source: %w: snapshot %s of volume %s has just been removed, or its layers merged", block.ErrBusy, was.Name, volume)
}

// standOn opens the top of a chain that nobody writes any more.
func (s *Store) standOn(ctx context.Context, layers []LayerRecord, wanted string, sizeBytes int64) (*base, error) {
	top := layers[len(layers)-1]
	format, err := overlayFormat(wanted, top.Format)
	if err != nil {
		return nil, err
	}
	layer, err := openLayer(ctx, s.fs, top)
	if err != nil {
		return nil, err
	}
	return &base{format: format, layers: layers, parent: &openParent{layer: layer, sizeBytes: sizeBytes}}, nil
}

// checkSuffix refuses a file that would pass for a raw disk, as everything does, and is named as
// an image of another format: it is damaged, or only an extent of one.
func checkSuffix(image, format string) error {
	suffix := strings.ToLower(strings.TrimPrefix(path.Ext(image), "."))
	named, err := formats.Lookup(suffix)
	if format != "raw" || err != nil || named.Name() == "raw" {
		return nil
	}
	return fmt.Errorf("image %s: %w: it is named as a %s image, but does not begin as one: want an intact image; where its data is in several files, the one that describes them; or another name, as disk.img, for a raw disk",
		image, block.ErrCorrupt, suffix)
}

// resolveImage opens an image that a person put into the store. This is the one place
// where formats are probed: what is found is recorded, and holds from then on.
func (s *Store) resolveImage(ctx context.Context, req CreateVolumeRequest) (*base, error) {
	name, err := imagePath(req.Source.Image)
	if err != nil {
		return nil, err
	}
	img, err := formats.Open(ctx, s.fs, name, formats.OpenOptions{Mode: vfs.ReadOnly})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("image %s: %w: %w", req.Source.Image, block.ErrNotFound, err)
	}
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", req.Source.Image, err)
	}
	if err := checkSuffix(req.Source.Image, img.Layers()[0].Format); err != nil {
		return nil, errors.Join(err, img.Close())
	}
	if req.Source.Mode == ImageCopy {
		format, err := formats.Lookup(orDefault(req.Format))
		if err != nil {
			return nil, errors.Join(err, img.Close())
		}
		return &base{format: format, content: img}, nil
	}
	defer img.Close()
	layers := chainOf(img)
	for _, l := range layers {
		if err := checkLayer(l); err != nil || ownerOf(l.File) != "" {
			return nil, fmt.Errorf("image %s stands on %s: %w: want only files under %s/", req.Source.Image, l.File, block.ErrInvalid, imagesDir)
		}
	}
	b, err := s.standOn(ctx, layers, req.Format, img.Info().SizeBytes)
	if errors.Is(err, block.ErrUnsupported) {
		return nil, fmt.Errorf("image %s: %w; use imageMode=%s", req.Source.Image, err, ImageCopy)
	}
	return b, err
}
