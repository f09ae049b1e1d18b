package store

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// A volume in use is merged by the process that serves it. Frozen layers are written anew
// as in merge.go; the top stays, takes in what of its own group lies below it, and then
// stands on what is new:
//
//	before   base ← 1 ← 2 (snapshot s) ← 3 ← 4 (the volume)
//	after    5 (snapshot s) ← 4 (the volume, with what 3 held)
//
// The wish comes from a collection (GC), which knows what other volumes need; the holder
// touches nothing but its own volume's directory.
//
// Requests go on meanwhile, at the store's cost only: every copy is followed by a pause as
// long as it took. The change of what the top stands on is in the image and in the record,
// so the record says first that it is coming (Relink), and whoever opens the volume after
// a kill looks at the image to see whether it came.

// wishMerge asks the holder of a volume in use to shorten its chain, if that can be.
func (s *Store) wishMerge(ctx context.Context, rec Record) error {
	if rec.serving() == "" || rec.MergeWish != nil || !rec.steady() || len(groupLayers(rec, nil)) == 0 {
		return nil
	}
	others, err := s.othersNeed(ctx, rec.Name)
	if err != nil || len(groupLayers(rec, others)) == 0 {
		return err
	}
	wish := &MergeWish{}
	for _, l := range rec.Layers {
		if others[l.File] && ownerOf(l.File) == rec.Name {
			wish.Shared = append(wish.Shared, l.File)
		}
	}
	_, err = s.update(ctx, rec.Name, func(now *Record) error {
		if slices.Equal(now.Layers, rec.Layers) {
			now.MergeWish = wish
		}
		return nil
	})
	return err
}

// groups returns what the wish asks to merge.
func (w *MergeWish) groups(rec Record) []mergeGroup {
	others := map[string]bool{}
	for _, file := range w.Shared {
		others[file] = true
	}
	return groupLayers(rec, others)
}

// mergeSometimes begins a merge if one is wished for.
func (a *Attached) mergeSometimes(ctx context.Context) {
	if time.Now().Before(a.nextMerge) || a.Record().MergeWish == nil || a.cannotMerge.Load() || !a.merging.TryLock() {
		return
	}
	a.nextMerge = time.Now().Add(a.store.opts.MergeInterval)
	a.watching.Go(func() {
		defer a.merging.Unlock()
		// What stopped it is tried again; a failure of the image is met by its users.
		if err := a.mergeLive(ctx); errors.Is(err, block.ErrUnsupported) {
			a.cannotMerge.Store(true)
		}
	})
}

// mergeLive shortens the chain that is being served. errNotNow: there is nothing to merge,
// or the volume is about to change otherwise.
func (a *Attached) mergeLive(ctx context.Context) error {
	lock, err := a.store.lockMerge(ctx, a.name)
	if lock == nil || err != nil {
		return errors.Join(err, errNotNow)
	}
	defer a.store.unlockMerge(lock, a.name)
	m, err := a.beginMerge(ctx)
	if err != nil || len(m.groups) == 0 {
		return err
	}
	err = m.unlessNeeded(ctx, func(ctx context.Context) error {
		return errors.Join(m.fillAll(ctx), a.pullGroup(ctx, m))
	})
	var removed []*engine.Layer
	if err == nil {
		removed, err = a.stepOver(ctx, m)
	}
	for _, l := range removed {
		err = errors.Join(err, l.Close())
	}
	if err != nil {
		err = errors.Join(err, m.abandon(context.WithoutCancel(ctx)))
	}
	return err
}

// beginMerge decides what to merge, and records it.
func (a *Attached) beginMerge(ctx context.Context) (*merger, error) {
	m := &merger{store: a.store, live: true, pace: &pace{}}
	rec, err := a.update(ctx, func(rec *Record) error {
		if rec.MergeWish == nil || !rec.steady() || !slices.Equal(chainOf(a.image), rec.Layers) {
			return errNotNow
		}
		if m.groups = rec.MergeWish.groups(*rec); len(m.groups) == 0 {
			rec.MergeWish = nil
			return nil
		}
		rec.nameMerged(m.groups[:len(m.groups)-1])
		return nil
	})
	m.before = rec
	return m, err
}

// steady reports whether no change of the volume's layers is under way or wished for.
func (r *Record) steady() bool {
	unready := slices.ContainsFunc(r.Snapshots, func(s SnapshotRecord) bool { return !s.Ready || s.isPin() })
	return r.exists() == nil && !unready && r.WantSizeBytes <= r.SizeBytes && r.Relink == nil
}

// pullGroup copies what lies between the top and the last layer that stays below it into
// the top.
func (a *Attached) pullGroup(ctx context.Context, m *merger) error {
	top := m.groups[len(m.groups)-1]
	last := top.to - top.from - 1
	if last == 0 {
		return nil
	}
	for off := int64(0); off < m.before.SizeBytes; {
		n := min(mergeChunkBytes, m.before.SizeBytes-off)
		began := time.Now()
		copied, err := a.image.Pull(off, n, last)
		if err != nil {
			return err
		}
		if copied > 0 {
			err = m.pace.rest(ctx, time.Since(began))
		}
		if err = errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		off += n
	}
	return a.image.Flush()
}

// stepOver lets the top stand on the merged layers, in the record and in the image, and
// returns the layers that nobody needs open any more.
func (a *Attached) stepOver(ctx context.Context, m *merger) (removed []*engine.Layer, err error) {
	after := m.after()
	below, fresh, err := a.openBelow(ctx, m, after.Layers[:len(after.Layers)-1])
	if err != nil {
		return fresh, err
	}
	switched := false
	_, err = a.update(ctx, func(rec *Record) error {
		if !m.stillWanted(rec) {
			return errNotNow
		}
		rec.Relink = &after
		if err := a.store.writeRecord(*rec); err != nil {
			return err
		}
		var parent *engine.Parent
		if len(below) > 0 {
			parent = &engine.Parent{Name: below[0].Name, Layer: below[0]}
		}
		if removed, err = a.image.SetParent(parent, below); err != nil {
			rec.Relink = nil
			return errors.Join(err, a.store.writeRecordAnyway(*rec))
		}
		switched = true
		rec.relink(after)
		return nil
	})
	if !switched {
		removed = fresh
	}
	return removed, err
}

// openBelow returns what the top is to stand on, its parent first: layers that stay, and
// fresh ones, opened here.
func (a *Attached) openBelow(ctx context.Context, m *merger, chain []LayerRecord) (below, fresh []*engine.Layer, err error) {
	present := a.image.Layers()
	slices.Reverse(present)
	below = present[:m.groups[0].from]
	fsys := fencedFS{a.store.fs, &a.fence}
	for _, own := range chain[len(below):] {
		l, err := openLayer(ctx, fsys, own)
		if err != nil {
			return nil, fresh, err
		}
		fresh = append(fresh, l)
		below = append(below, l)
	}
	below = slices.Clone(below)
	slices.Reverse(below)
	return below, fresh, nil
}

// adoptRelink ends a change of what the top stands on as the image says.
func (r *Record) adoptRelink(chain []LayerRecord) {
	switch {
	case r.Relink == nil:
	case slices.Equal(chain, r.Relink.Layers):
		r.relink(*r.Relink)
	default:
		r.Relink = nil
	}
}

// settleRelink ends a change of what a volume's top stands on that a dead holder began: the
// image's own link tells whether it was made. ErrLocked: somebody has the top open.
func (s *Store) settleRelink(rec *Record) error {
	if rec.Relink == nil {
		return nil
	}
	layer, err := openFrozenTop(s.fs, rec.top())
	if err != nil {
		return err
	}
	defer func() { _ = layer.Close() }() // it was only read
	parent := ""
	if layer.Parent != nil {
		parent = layer.Parent.Name
	}
	below := ""
	if n := len(rec.Relink.Layers); n > 1 {
		below = rec.Relink.Layers[n-2].File
	}
	if parent == below {
		rec.relink(*rec.Relink)
		return nil
	}
	rec.Relink = nil
	return nil
}

// pace slows copying down: it rests after each piece for as long as the piece took, so
// that it takes no more than half of what the store can do. A nil pace does not rest.
type pace struct{}

func (p *pace) rest(ctx context.Context, took time.Duration) error {
	if p == nil || took <= 0 {
		return ctx.Err()
	}
	return sleep(ctx, min(took, time.Second))
}

// device slows reads of a device down.
func (p *pace) device(ctx context.Context, d *formats.Image) block.Device {
	if p == nil {
		return d
	}
	return pacedDevice{d, ctx, p}
}

type pacedDevice struct {
	block.Device
	ctx context.Context
	*pace
}

func (d pacedDevice) ReadAt(p []byte, off int64) (int, error) {
	began := time.Now()
	n, err := d.Device.ReadAt(p, off)
	return n, errors.Join(err, d.rest(d.ctx, time.Since(began)))
}
