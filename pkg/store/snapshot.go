package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// How a snapshot is taken, in steps that are each recorded:
//
//  1. the wish: a SnapshotRecord that is not Ready
//  2. its Overlay is named, before the file is made
//  3. the file is made, an empty overlay on the present top
//  4. everything written is made durable, then Layers gets the overlay as its last
//     element: from here on it is the top for everybody, and the old one is frozen
//  5. who has the volume attached writes to the overlay from now on; Ready is set
//
// After a kill before step 4 the next holder removes the file and starts over at 2;
// after it, opening the volume by its record is all that is left to do.

// CreateSnapshot takes a snapshot, live if the volume is attached, and returns it once it
// is taken. The same call again returns the same snapshot. Names are unique in the store:
// ErrExists if another volume has a snapshot of that name. When ctx ends first the wish
// stays and is carried out later; the same call again waits for it, DeleteSnapshot takes
// it back. A failure takes the wish back.
func (s *Store) CreateSnapshot(ctx context.Context, volume, snapshot string) (SnapshotRecord, error) {
	if err := errors.Join(checkVolumeName(volume), checkName("snapshot", snapshot)); err != nil {
		return SnapshotRecord{}, err
	}
	return s.freeze(ctx, volume, snapshot)
}

// freeze makes the wish for a snapshot, or a pin, and waits until it is fulfilled.
func (s *Store) freeze(ctx context.Context, volume, snapshot string) (SnapshotRecord, error) {
	fail := func(err error) (SnapshotRecord, error) {
		return SnapshotRecord{}, fmt.Errorf("snapshot %s of volume %s: %w", snapshot, volume, err)
	}
	snap, err := s.wishSnapshot(ctx, volume, snapshot)
	for pause := wishPause(0); err == nil && !snap.Ready; {
		var rec Record
		if rec, err = s.advanceSnapshot(ctx, volume, snapshot); err != nil {
			break
		}
		if snap = *rec.snapshot(snapshot); snap.Ready {
			break
		}
		if err := s.awaitHolder(ctx, rec, &pause); err != nil {
			return fail(fmt.Errorf("wait for the node that has the volume to take it: %w", err))
		}
	}
	if err != nil {
		return fail(err)
	}
	return snap, nil
}

// wishSnapshot records the wish, if it is not there yet.
func (s *Store) wishSnapshot(ctx context.Context, volume, snapshot string) (snap SnapshotRecord, err error) {
	lock, err := s.lockVolume(ctx, volume)
	if err != nil {
		return snap, err
	}
	defer lock.Unlock()
	rec, err := s.readRecord(volume)
	if err != nil {
		return snap, notFound(volume, err)
	}
	if err := rec.exists(); err != nil {
		return snap, err
	}
	if have := rec.snapshot(snapshot); have != nil {
		if have.Problem != nil {
			have.Problem = nil // wished anew, tried anew
			err = s.writeRecord(rec)
		}
		return *have, err
	}
	if err := s.checkWish(rec); err != nil {
		return snap, err
	}
	snap = SnapshotRecord{Name: snapshot, Requested: now()}
	rec.Merging = nil
	rec.Snapshots = append(rec.Snapshots, snap)
	if snap.isPin() { // it is named for a clone, as no other volume's is
		return snap, s.writeRecord(rec)
	}
	// Two volumes must not both be told that the name is free.
	return snap, s.withAll(ctx, func(all *scan) error {
		if err := all.checkSnapshotName(volume, snapshot); err != nil {
			return err
		}
		err := s.writeRecord(rec)
		if err == nil {
			all.update(rec)
		}
		return err
	})
}

// checkWish refuses a wish that nobody could fulfil.
func (s *Store) checkWish(rec Record) error {
	if _, err := overlayFormat("", rec.top().Format); err != nil {
		return fmt.Errorf("%w; make the volume with another format", err)
	}
	wished := 0
	for _, snap := range rec.Snapshots {
		if !snap.Ready {
			wished++
		}
	}
	if len(rec.Layers)+wished >= s.opts.MaxChain {
		return fmt.Errorf("%w: the volume stands on %d layers, and %d is the limit: delete snapshots, and wait until their layers are merged",
			block.ErrUnsupported, len(rec.Layers)+wished, s.opts.MaxChain)
	}
	return nil
}

// advanceSnapshot looks how far a wish is, and returns the record with it. It carries it out itself when nobody has the
// volume open for writing; else that is the holder's to do.
func (s *Store) advanceSnapshot(ctx context.Context, volume, snapshot string) (Record, error) {
	var failure error
	rec, err := s.update(ctx, volume, func(rec *Record) error {
		snap := rec.snapshot(snapshot)
		switch {
		case snap == nil:
			return fmt.Errorf("the wish was taken back meanwhile: %w", block.ErrNotFound)
		case snap.Ready:
			return nil
		case snap.Problem != nil:
			failure = snap.Problem.err()
		case rec.serving() != "":
			return nil
		default:
			failure = s.snapshotOffline(ctx, rec, snap)
		}
		switch {
		case errors.Is(failure, block.ErrLocked), ctx.Err() != nil:
			failure = nil // somebody has it open: he will see the wish
		case failure != nil && !rec.holds(snap.Overlay):
			rec.dropSnapshot(snapshot) // whoever is at it finds it gone
		}
		return nil
	})
	return rec, errors.Join(err, failure)
}

// snapshotOffline takes a snapshot of a volume that nobody writes: it holds a lock for
// reading on the top meanwhile, and the volume's. It changes rec, in steps that it writes;
// the last one is the caller's to write.
func (s *Store) snapshotOffline(ctx context.Context, rec *Record, snap *SnapshotRecord) error {
	if rec.holds(snap.Overlay) {
		snap.finish()
		return nil
	}
	if err := s.settleRelink(rec); err != nil {
		return err
	}
	overlay, err := s.nameOverlay(rec, snap)
	if err != nil {
		return err
	}
	top, err := openFrozenTop(s.fs, rec.top())
	if err != nil {
		return err
	}
	defer top.Close()
	if err := createOverlay(ctx, s.fs, overlay, 0, rec.Parameters, top); err != nil {
		return err
	}
	rec.switchTo(overlay, snap)
	snap.finish()
	return nil
}

// openFrozenTop opens a top layer for reading: as long as it is open nobody writes it.
func openFrozenTop(fsys vfs.FS, l LayerRecord) (*engine.Layer, error) {
	format, err := formats.Lookup(l.Format)
	if err != nil {
		return nil, err
	}
	return format.Open(formats.OpenRequest{FS: fsys, Name: l.File, Mode: vfs.ReadOnly})
}

// nameOverlay records which file is going to be the new top, and removes what a dead
// holder may have left of it. The volume's lock is held.
func (s *Store) nameOverlay(rec *Record, snap *SnapshotRecord) (LayerRecord, error) {
	format, err := overlayFormat("", rec.top().Format)
	if err != nil {
		return LayerRecord{}, err
	}
	if snap.Overlay == "" {
		snap.Overlay = layerFile(rec.Name, rec.NextLayer, format.Name())
		rec.NextLayer++
		if err := s.writeRecord(*rec); err != nil {
			return LayerRecord{}, err
		}
	}
	return LayerRecord{File: snap.Overlay, Format: format.Name()}, s.removeLayer(snap.Overlay)
}

// switchTo makes an overlay the volume's top: step 4.
func (r *Record) switchTo(overlay LayerRecord, snap *SnapshotRecord) {
	snap.Layer, snap.SizeBytes, snap.Taken = r.top().File, r.SizeBytes, now()
	r.Layers = append(r.Layers, overlay)
}

// finish notes that the contents are frozen: step 5.
func (s *SnapshotRecord) finish() {
	s.Ready, s.Problem = true, nil
}

// settle finishes the snapshots whose overlay is the top already. Whoever calls it has
// opened the volume by its record, or knows that nobody else writes an older layer.
func (r *Record) settle() {
	for i := range r.Snapshots {
		if snap := &r.Snapshots[i]; !snap.Ready && r.holds(snap.Overlay) {
			snap.finish()
		}
	}
}

// DeleteSnapshot removes a snapshot, or takes back the wish for one. One that does not
// exist is fine. The space of its layer is free at once where nothing else stands on it,
// and else when layers are merged (see GC).
func (s *Store) DeleteSnapshot(ctx context.Context, volume, snapshot string) error {
	if err := errors.Join(checkVolumeName(volume), checkName("snapshot", snapshot)); err != nil {
		return err
	}
	return s.dropSnapshot(ctx, volume, snapshot)
}

func (s *Store) dropSnapshot(ctx context.Context, volume, snapshot string) error {
	_, err := s.updateAnyway(ctx, volume, func(rec *Record) error {
		rec.dropSnapshot(snapshot)
		return nil
	})
	if errors.Is(err, block.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("delete snapshot %s of volume %s: %w", snapshot, volume, err)
	}
	_, err = s.sweep(ctx, volume)
	return err
}
