package store

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"sync"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Merging makes one layer of several at the upper end of a chain that nothing else stands
// on: those that were snapshots once. The new layer is filled beside them while nobody
// writes the volume, and takes their place by one change of the record. Layers that a
// snapshot or a clone reaches stay as they are, and so does everything below them.
//
// The new file is named in the record's Merging first. Whoever wants to use the volume
// clears that, and the merger gives up; what a dead one leaves is removed by the sweep
// after somebody cleared it.

// mergeChunkBytes is how much is copied between two looks at the context.
const mergeChunkBytes = 1 << 20

// merger is one merge under way.
type merger struct {
	store  *Store
	before Record         // with Merging set
	keep   int            // layers that stay below the new one
	image  *formats.Image // the chain, locked against writers
}

// merge shortens a volume's chain, if there is something to merge and nobody uses it. It
// reports whether it did.
func (s *Store) merge(ctx context.Context, name string) (bool, error) {
	m, err := s.beginMerge(ctx, name)
	if m == nil || err != nil {
		return false, err
	}
	err = m.fillUnlessNeeded(ctx)
	if err == nil {
		err = m.commit(ctx)
	}
	err = errors.Join(err, m.image.Close())
	if err != nil {
		err = errors.Join(err, m.abandon(context.WithoutCancel(ctx)))
	}
	_, sweepErr := s.sweep(context.WithoutCancel(ctx), name)
	if errors.Is(err, context.Canceled) && ctx.Err() == nil || errors.Is(err, errNotNow) {
		return false, sweepErr // somebody needs the volume: another time
	}
	return err == nil, errors.Join(err, sweepErr)
}

var errNotNow = errors.New("the volume is needed for something else")

// beginMerge decides what to merge, and records it. It returns nil if there is nothing.
func (s *Store) beginMerge(ctx context.Context, name string) (*merger, error) {
	m := &merger{store: s}
	rec, err := s.update(ctx, name, func(rec *Record) error {
		if s.mergeUnderWay(*rec) || !rec.idle() {
			return errNotNow
		}
		keep, err := s.mergeBase(ctx, *rec)
		if err != nil {
			return err
		}
		if len(rec.Layers)-keep < 2 {
			return errNotNow
		}
		m.image, err = openChain(ctx, s.fs, rec.Layers, vfs.ReadOnly, nil)
		if err != nil {
			return err
		}
		m.keep = keep
		rec.Merging = layerFile(name, rec.NextLayer, rec.Format)
		rec.NextLayer++
		return nil
	})
	if err != nil {
		if m.image != nil {
			err = errors.Join(err, m.image.Close())
		}
		if errors.Is(err, errNotNow) || errors.Is(err, block.ErrLocked) || errors.Is(err, block.ErrNotFound) {
			return nil, nil
		}
		return nil, fmt.Errorf("merge layers of volume %s: %w", name, err)
	}
	m.before = rec
	return m, nil
}

// mergeUnderWay reports whether somebody alive is merging: he holds the new file's lock.
func (s *Store) mergeUnderWay(rec Record) bool {
	if rec.Merging == "" {
		return false
	}
	f, err := openExclusively(s.fs, rec.Merging)
	if err == nil {
		f.Close()
	}
	return errors.Is(err, block.ErrLocked)
}

// idle reports whether nobody has, or is about to have, the volume.
func (r *Record) idle() bool {
	unready := slices.ContainsFunc(r.Snapshots, func(s SnapshotRecord) bool { return !s.Ready || s.isPin() })
	return r.exists() == nil && len(r.Attachments) == 0 && !unready && r.WantSizeBytes <= r.SizeBytes
}

// mergeBase returns how many of a volume's layers must stay: up to the last one that a
// snapshot or another volume reaches, or that is an image.
func (s *Store) mergeBase(ctx context.Context, rec Record) (int, error) {
	all, err := s.records(ctx)
	if err != nil {
		return 0, err
	}
	pinned := map[string]bool{}
	for _, e := range all {
		if e.Err != nil {
			return 0, e.Err
		}
		other := e.Record
		if e.Name == rec.Name {
			other.Layers = slices.Clone(rec.Layers)
			other.Deleted = true // only what its snapshots need
		}
		for _, file := range other.neededLayers() {
			pinned[file] = true
		}
	}
	for i := len(rec.Layers) - 1; i >= 0; i-- {
		if file := rec.Layers[i].File; pinned[file] || ownerOf(file) == "" {
			return i + 1, nil
		}
	}
	return 0, nil
}

// fillUnlessNeeded makes the new layer, and stops when somebody needs the volume.
func (m *merger) fillUnlessNeeded(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	watching.Go(func() { m.cancelWhenNeeded(ctx, cancel) })
	return m.fill(ctx)
}

// cancelWhenNeeded ends the merge when somebody cleared Merging, or the volume is gone.
func (m *merger) cancelWhenNeeded(ctx context.Context, cancel context.CancelFunc) {
	for sleep(ctx, m.store.opts.PollInterval) == nil {
		rec, err := m.store.readRecord(m.before.Name)
		if err != nil || rec.Merging != m.before.Merging || !rec.idle() {
			cancel()
			return
		}
	}
}

// fill makes the new layer.
func (m *merger) fill(ctx context.Context) (err error) {
	fsys, rec := m.store.fs, m.before
	own := LayerRecord{File: rec.Merging, Format: rec.Format}
	format, err := formats.Lookup(rec.Format)
	if err != nil {
		return err
	}
	if m.keep == 0 {
		return formats.Convert(ctx, m.image, format, formats.CreateRequest{
			FS: fsys, Name: own.File, SizeBytes: rec.SizeBytes,
			Subformat: rec.Parameters.Subformat, ClusterBytes: rec.Parameters.ClusterBytes,
		}, nil)
	}
	merged := len(rec.Layers) - m.keep
	parent := m.image.Layers()[merged]
	if err := createOverlay(ctx, fsys, own, rec.SizeBytes, rec.Parameters, parent); err != nil {
		return err
	}
	dst, err := formats.Open(ctx, fsys, own.File, formats.OpenOptions{Format: own.Format, Mode: vfs.ReadWrite, NoParents: false,
		ParentFormats: map[string]string{parent.Name: parent.Format}})
	if err != nil {
		return err
	}
	return errors.Join(copyLayers(ctx, dst, m.image, merged), dst.Close())
}

// copyLayers copies what the uppermost layers of src hold to dst, which stands on the
// same layer as they do.
func copyLayers(ctx context.Context, dst, src block.Device, layers int) error {
	size := src.Info().SizeBytes
	buf := make([]byte, mergeChunkBytes)
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		extent, err := src.Map(off, min(size-off, mergeChunkBytes))
		if err != nil {
			return err
		}
		if extent.State != block.Unallocated && extent.Depth < layers {
			if err := copyExtent(dst, src, extent, buf); err != nil {
				return fmt.Errorf("merge at guest offset %d: %w", off, err)
			}
		} else if extent.Len <= 0 {
			return fmt.Errorf("map at guest offset %d: %w: an extent of %d bytes", off, block.ErrCorrupt, extent.Len)
		}
		off += extent.Len
	}
	return nil
}

func copyExtent(dst, src block.Device, extent block.Extent, buf []byte) error {
	if extent.Len <= 0 || extent.Len > int64(len(buf)) {
		return fmt.Errorf("map: %w: an extent of %d bytes", block.ErrCorrupt, extent.Len)
	}
	if extent.State == block.Zero {
		return dst.WriteZeroes(extent.Off, extent.Len, 0)
	}
	p := buf[:extent.Len]
	if _, err := src.ReadAt(p, extent.Off); err != nil {
		return err
	}
	_, err := dst.WriteAt(p, extent.Off)
	return err
}

// commit puts the new layer in the place of those it was made of.
func (m *merger) commit(ctx context.Context) error {
	if err := syncDir(m.store.fs, path.Dir(m.before.Merging)); err != nil {
		return err
	}
	_, err := m.store.update(ctx, m.before.Name, func(rec *Record) error {
		if rec.Merging != m.before.Merging || !rec.idle() || !slices.Equal(rec.Layers, m.before.Layers) || rec.SizeBytes != m.before.SizeBytes {
			return errNotNow
		}
		// A snapshot taken and deleted meanwhile has changed Layers; a clone has too,
		// or has finished and now shows in the records.
		keep, err := m.store.mergeBase(ctx, *rec)
		if err != nil {
			return err
		}
		if keep > m.keep {
			return errNotNow
		}
		rec.Layers = append(slices.Clone(rec.Layers[:m.keep]), LayerRecord{File: rec.Merging, Format: rec.Format})
		rec.Merging = ""
		return nil
	})
	return err
}

// abandon takes back what the record says of the merge; the sweep removes the file.
func (m *merger) abandon(ctx context.Context) error {
	_, err := m.store.update(ctx, m.before.Name, func(rec *Record) error {
		if rec.Merging == m.before.Merging {
			rec.Merging = ""
		}
		return nil
	})
	if errors.Is(err, block.ErrNotFound) {
		return nil
	}
	return err
}
