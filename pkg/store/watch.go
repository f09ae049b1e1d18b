package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// watch looks at the record until ctx ends or the volume is lost, and carries out the
// wishes in it. A store that does not answer is waited for: the device stands still as
// well, and nobody else can have got the volume without the record.
func (a *Attached) watch(ctx context.Context) {
	for a.use.wait(ctx, a.store.opts.PollInterval) == nil {
		rec, err := a.store.readRecord(a.name)
		if err != nil {
			err = notFound(a.name, err)
			if errors.Is(err, block.ErrNotFound) {
				a.lose(err)
				return
			}
			continue
		}
		if err := a.allowed(&rec); err != nil {
			a.lose(err)
			return
		}
		a.saw(rec)
		if !a.opts.ReadOnly {
			a.fulfil(ctx, rec)
			a.mergeSometimes(ctx)
		}
	}
}

// fulfil carries out the wishes of a record. A failure is recorded for whoever waits, and
// that wish is left alone until it is made again.
func (a *Attached) fulfil(ctx context.Context, rec Record) {
	for _, snap := range rec.Snapshots {
		if snap.Ready || snap.Problem != nil || ctx.Err() != nil {
			continue
		}
		if err := a.snapshot(ctx, snap.Name); err != nil && ctx.Err() == nil {
			a.report(ctx, func(rec *Record) {
				if s := rec.snapshot(snap.Name); s != nil && !s.Ready {
					s.Problem = newProblem(err)
				}
			})
		}
	}
	if rec.WantSizeBytes > rec.SizeBytes && rec.GrowProblem == nil && ctx.Err() == nil {
		if err := a.grow(ctx); err != nil && ctx.Err() == nil {
			a.report(ctx, func(rec *Record) {
				if rec.WantSizeBytes > rec.SizeBytes {
					rec.GrowProblem = newProblem(err)
				}
			})
		}
	}
}

// report records a problem. When that fails, too, the wish is tried again.
func (a *Attached) report(ctx context.Context, note func(rec *Record)) {
	_, _ = a.store.updateAnyway(ctx, a.name, func(rec *Record) error {
		if err := a.allowed(rec); err != nil {
			return err
		}
		note(rec)
		return nil
	})
}

// update changes the record, as long as the volume is still this holder's.
func (a *Attached) update(ctx context.Context, change func(rec *Record) error) (Record, error) {
	rec, err := a.store.update(ctx, a.name, func(rec *Record) error {
		if err := a.allowed(rec); err != nil {
			return err
		}
		rec.adoptRelink(chainOf(a.image))
		return change(rec)
	})
	if err == nil {
		a.saw(rec)
	}
	return rec, err
}

// grow grows the open image to the size in the record.
func (a *Attached) grow(ctx context.Context) error {
	// The image grows without the record's lock: that can take a while, and the wish
	// can only become larger meanwhile.
	want := a.Record().WantSizeBytes
	size, err := growImage(a.image, want)
	if err != nil {
		return err
	}
	_, err = a.update(ctx, func(rec *Record) error {
		if rec.WantSizeBytes > size {
			rec.SizeBytes = size
			return nil
		}
		rec.grown(size)
		return nil
	})
	return err
}

// snapshot takes a live snapshot: see snapshot.go for the steps. Everything that takes
// time is done before requests are held up.
func (a *Attached) snapshot(ctx context.Context, name string) error {
	var overlay LayerRecord
	rec, err := a.update(ctx, func(rec *Record) (err error) {
		snap := rec.snapshot(name)
		if snap == nil || snap.Ready || rec.holds(snap.Overlay) {
			rec.settle()
			return nil
		}
		overlay, err = a.store.nameOverlay(rec, snap)
		return err
	})
	if err != nil || overlay.File == "" {
		return err
	}
	top, err := a.makeOverlay(ctx, overlay, rec)
	if err != nil {
		return err
	}
	if err := a.flushMost(); err != nil {
		return errors.Join(err, top.Close())
	}
	return a.switchTo(ctx, name, overlay, top)
}

// flushMost flushes until that is quick, so that little is left to flush while requests
// stand still. A guest that writes faster than the store can take has to wait longer.
func (a *Attached) flushMost() error {
	const tries, quick = 4, 5 * time.Millisecond
	for range tries {
		began := time.Now()
		if err := a.image.Flush(); err != nil {
			return err
		}
		if time.Since(began) < quick {
			break
		}
	}
	return nil
}

// makeOverlay makes an empty overlay on the present top and opens it for writing. The top
// is looked at through a second, unlocked opening: the open one is being written.
func (a *Attached) makeOverlay(ctx context.Context, overlay LayerRecord, rec Record) (*engine.Layer, error) {
	fsys := fencedFS{a.store.fs, &a.fence}
	parentFormat, err := formats.Lookup(rec.top().Format)
	if err != nil {
		return nil, err
	}
	parent, err := parentFormat.Open(formats.OpenRequest{FS: fsys, Name: rec.top().File, Mode: vfs.ReadOnly, NoLock: true})
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	if err := createOverlay(ctx, fsys, overlay, 0, rec.Parameters, parent); err != nil {
		return nil, err
	}
	format, err := formats.Lookup(overlay.Format)
	if err != nil {
		return nil, err
	}
	return format.Open(formats.OpenRequest{FS: fsys, Name: overlay.File, Mode: vfs.ReadWrite})
}

// switchTo makes an overlay the top that is written, in the record and in the device.
func (a *Attached) switchTo(ctx context.Context, name string, overlay LayerRecord, top *engine.Layer) error {
	pushed := false
	_, err := a.update(ctx, func(rec *Record) error {
		snap := rec.snapshot(name)
		if snap == nil || snap.Overlay != overlay.File {
			return errTakenBack
		}
		a.gate.Lock()
		defer a.gate.Unlock()
		var err error
		if top, err = a.fitOverlay(ctx, overlay, *rec, top); err != nil {
			return err
		}
		if err := a.image.Flush(); err != nil {
			return err
		}
		before := *rec
		before.Snapshots = append([]SnapshotRecord(nil), rec.Snapshots...)
		rec.switchTo(overlay, snap)
		if err := a.commitSwitch(before, *rec, top); err != nil {
			return err
		}
		pushed = true
		snap.finish()
		return nil
	})
	if !pushed {
		if top != nil {
			err = errors.Join(err, top.Close())
		}
		if errors.Is(err, errTakenBack) {
			return a.store.removeLayer(overlay.File)
		}
	}
	return err
}

var errTakenBack = errors.New("the wish for the snapshot was taken back")

// commitSwitch records the new top, and then makes the device write to it. Nothing is
// written between the two, so a kill there loses nothing: the old top holds everything,
// durably, and the next holder goes on with the new one.
func (a *Attached) commitSwitch(before, after Record, top *engine.Layer) error {
	err := a.store.writeRecord(after)
	if err == nil {
		err = a.image.Push(top)
		if a.image.Layers()[0] == top {
			// Switched; only the old layer's lock or surplus may not be in order,
			// which its next user finds out.
			return nil
		}
	}
	if err == nil {
		return nil
	}
	// The record may name the new top, while the device writes to the old one. One of
	// them has to give in.
	if undo := a.store.writeRecordAnyway(before); undo != nil {
		err = fmt.Errorf("the store cannot say which layer is the top: %w", errors.Join(err, undo))
		a.lose(err)
	}
	return err
}

// fitOverlay makes sure that the overlay belongs to the top as it is now. The first write
// since the top was opened changes its identity; when that happened after the overlay
// was made, it is made anew, now that requests stand still.
func (a *Attached) fitOverlay(ctx context.Context, overlay LayerRecord, rec Record, top *engine.Layer) (*engine.Layer, error) {
	old := a.image.Layers()[0]
	if top.Parent == nil || top.Parent.Verify == nil || top.Parent.Verify(old) == nil {
		return top, nil
	}
	if err := top.Close(); err != nil {
		return nil, err
	}
	if err := a.store.removeLayer(overlay.File); err != nil {
		return nil, err
	}
	return a.makeOverlay(ctx, overlay, rec)
}
