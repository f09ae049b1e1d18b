package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Merging shortens the chain of a volume: layers that were the tops of
// snapshots once, and are no longer, go into the next layer above.
//
//	before   base ← 1 ← 2 (snapshot s) ← 3 ← 4 (the volume)
//	after    5 (snapshot s) ← 6 (the volume)
//
// This is how it is done while nobody uses the volume; mergelive.go has the other way.
//
// Images refer to what they stand on, so everything above the first merged layer is
// written anew, into files beside the old ones; one change of the record puts them in
// their place, and the sweep removes the old. What another volume reaches, and images,
// stay as they are, with all that is below them.
//
// The new files are named in the record's Merging first. Whoever wants to use the volume
// clears that, and the merger gives up. What a dead one leaves is removed by a sweep after
// the next collection has cleared it.

// mergeChunkBytes is how much is copied between two looks at the context.
const mergeChunkBytes = 1 << 20

// mergeGroup is layers of a chain that become one: [from, to).
type mergeGroup struct {
	from, to int
}

// merger is one merge under way.
type merger struct {
	store  *Store
	before Record       // with Merging set
	groups []mergeGroup // consecutive, up to the top; layers below the first stay
	live   bool         // see mergelive.go
	pace   *pace        // nil: as fast as it goes
	top    *formats.Image
}

// merge shortens a volume's chain, if there is something to merge and nobody uses it. It
// reports whether it did.
func (s *Store) merge(ctx context.Context, name string) (bool, error) {
	if rec, err := s.readRecord(name); err != nil || !rec.idle() || len(rec.Layers) < 2 {
		return false, nil
	}
	lock, err := s.lockMerge(ctx, name)
	if lock == nil || err != nil {
		return false, err
	}
	defer s.unlockMerge(lock, name)
	m, err := s.beginMerge(ctx, name)
	if m == nil || err != nil {
		return false, err
	}
	err = m.unlessNeeded(ctx, m.fillAll)
	if err == nil {
		err = m.commit(ctx)
	}
	err = errors.Join(err, m.top.Close())
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

// lockMerge keeps others from merging the same volume; nil if somebody does. It is taken
// before any other lock.
func (s *Store) lockMerge(ctx context.Context, name string) (*heldLock, error) {
	short, cancel := context.WithTimeout(ctx, gcLockWait)
	defer cancel()
	lock, err := s.locks.lock(short, volumeFile(name, mergeLock))
	if err != nil && ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
		return nil, nil
	}
	return lock, err
}

// unlockMerge removes the lock file, too: it is no part of a volume. A file that stays is
// harmless.
func (s *Store) unlockMerge(lock *heldLock, name string) {
	_ = removeIfThere(s.fs, volumeFile(name, mergeLock))
	lock.Unlock()
}

// beginMerge decides what to merge, and records it. It returns nil if there is nothing.
func (s *Store) beginMerge(ctx context.Context, name string) (*merger, error) {
	m := &merger{store: s}
	rec, err := s.update(ctx, name, func(rec *Record) (err error) {
		if !rec.idle() {
			return errNotNow
		}
		if err := s.settleRelink(rec); err != nil {
			return err
		}
		if m.groups, err = s.planMerge(ctx, *rec); err != nil {
			return err
		}
		if len(m.groups) == 0 {
			return errNotNow
		}
		if m.top, err = openChain(ctx, s.fs, rec.Layers, vfs.ReadOnly, nil); err != nil {
			return err
		}
		rec.nameMerged(m.groups)
		return nil
	})
	if err != nil {
		if m.top != nil {
			err = errors.Join(err, m.top.Close())
		}
		if errors.Is(err, errNotNow) || errors.Is(err, block.ErrLocked) || errors.Is(err, block.ErrNotFound) {
			return nil, nil
		}
		return nil, fmt.Errorf("merge layers of volume %s: %w", name, err)
	}
	m.before = rec
	return m, nil
}

// nameMerged records the files that groups are merged into.
func (r *Record) nameMerged(groups []mergeGroup) {
	r.Merging = nil
	for _, g := range groups {
		r.Merging = append(r.Merging, layerFile(r.Name, r.NextLayer, r.Layers[g.to-1].Format))
		r.NextLayer++
	}
}

// idle reports whether nobody has, or is about to have, the volume.
func (r *Record) idle() bool {
	unready := slices.ContainsFunc(r.Snapshots, func(s SnapshotRecord) bool { return !s.Ready || s.isPin() })
	return r.exists() == nil && len(r.Attachments) == 0 && !unready && r.WantSizeBytes <= r.SizeBytes
}

// planMerge returns the groups from the first one with something to merge; nil if there
// is none.
func (s *Store) planMerge(ctx context.Context, rec Record) ([]mergeGroup, error) {
	others, err := s.othersNeed(ctx, rec.Name)
	if err != nil {
		return nil, err
	}
	return groupLayers(rec, others), nil
}

// othersNeed returns the files of the layers that volumes besides one need.
func (s *Store) othersNeed(ctx context.Context, name string) (map[string]bool, error) {
	all, err := s.records(ctx)
	if err != nil {
		return nil, err
	}
	others := map[string]bool{}
	for _, e := range all {
		if e.Err != nil {
			return nil, e.Err
		}
		if e.Name == name {
			continue
		}
		for _, file := range e.Record.neededLayers() {
			others[file] = true
		}
	}
	return others, nil
}

// groupLayers is planMerge, given what other volumes need.
func groupLayers(rec Record, others map[string]bool) []mergeGroup {
	tops := map[string]bool{rec.top().File: true}
	for _, snap := range rec.Snapshots {
		tops[snap.Layer] = true
	}
	var groups []mergeGroup
	for from, i := 0, 0; i < len(rec.Layers); i++ {
		file := rec.Layers[i].File
		switch {
		case others[file] || ownerOf(file) == "":
			groups, from = nil, i+1 // it stays, and so does what is below
		case tops[file]:
			if len(groups) > 0 || i > from {
				groups = append(groups, mergeGroup{from, i + 1})
			}
			from = i + 1
		}
	}
	return groups
}

// unlessNeeded runs work, and ends it when somebody needs the volume.
func (m *merger) unlessNeeded(ctx context.Context, work func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	watching.Go(func() { m.cancelWhenNeeded(ctx, cancel) })
	return work(ctx)
}

// cancelWhenNeeded ends the merge when somebody cleared Merging, or the volume is gone.
func (m *merger) cancelWhenNeeded(ctx context.Context, cancel context.CancelFunc) {
	for sleep(ctx, m.store.opts.PollInterval) == nil {
		rec, err := m.store.readRecord(m.before.Name)
		if err != nil || !m.stillWanted(&rec) {
			cancel()
			return
		}
	}
}

// stillWanted reports whether the record is as the merge found it, as far as it matters.
func (m *merger) stillWanted(rec *Record) bool {
	return slices.Equal(rec.Merging, m.before.Merging) && slices.Equal(rec.Layers, m.before.Layers) &&
		rec.SizeBytes == m.before.SizeBytes && m.mayMerge(rec)
}

// mayMerge reports whether the volume is in a state in which its layers can be merged.
func (m *merger) mayMerge(rec *Record) bool {
	if m.live {
		return rec.steady()
	}
	return rec.idle()
}

// fillAll makes the new layers, one on the other.
func (m *merger) fillAll(ctx context.Context) error {
	chain := slices.Clone(m.before.Layers[:m.groups[0].from])
	for i, file := range m.before.Merging {
		g := m.groups[i]
		own := LayerRecord{File: file, Format: m.before.Layers[g.to-1].Format}
		if err := m.fill(ctx, g, chain, own); err != nil {
			return fmt.Errorf("merge layers of volume %s into %s: %w", m.before.Name, own.File, err)
		}
		chain = append(chain, own)
	}
	return nil
}

// fill makes one new layer, which stands on below and holds what a group holds.
func (m *merger) fill(ctx context.Context, g mergeGroup, below []LayerRecord, own LayerRecord) error {
	fsys := m.store.fs
	src, err := openChain(ctx, fsys, m.before.Layers[:g.to], vfs.ReadOnly, nil)
	if err != nil {
		return err
	}
	defer src.Close()
	size := src.Info().SizeBytes
	if len(below) == 0 {
		err = createBase(ctx, fsys, own, size, m.before.Parameters)
	} else {
		err = m.createOn(ctx, below, own, size)
	}
	if err != nil {
		return err
	}
	dst, err := openChain(ctx, fsys, append(slices.Clone(below), own), vfs.ReadWrite, nil)
	if err != nil {
		return err
	}
	paced := m.pace.device(ctx, src)
	if len(below) == 0 {
		err = formats.Copy(ctx, dst, paced, nil)
	} else {
		err = copyLayers(ctx, dst, paced, g.to-g.from)
	}
	return errors.Join(err, dst.Close())
}

// createOn makes an empty overlay on the top of a chain.
func (m *merger) createOn(ctx context.Context, below []LayerRecord, own LayerRecord, size int64) error {
	parent, err := openLayer(ctx, m.store.fs, below[len(below)-1])
	if err != nil {
		return err
	}
	defer parent.Close()
	return createOverlay(ctx, m.store.fs, own, size, m.before.Parameters, parent)
}

// copyLayers copies what the uppermost layers of src hold to dst, which stands on
// something that reads like what is below them.
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
		if extent.Off != off || extent.Len <= 0 || extent.Len > mergeChunkBytes {
			return fmt.Errorf("map at guest offset %d: %w: an extent of %d bytes at %d", off, block.ErrCorrupt, extent.Len, extent.Off)
		}
		if extent.State != block.Unallocated && extent.Depth < layers {
			if err := copyExtent(dst, src, extent, buf); err != nil {
				return fmt.Errorf("guest offset %d: %w", off, err)
			}
		}
		off += extent.Len
	}
	return nil
}

func copyExtent(dst, src block.Device, extent block.Extent, buf []byte) error {
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

// commit puts the new layers in the place of those they were made of.
func (m *merger) commit(ctx context.Context) error {
	_, err := m.store.update(ctx, m.before.Name, func(rec *Record) error {
		if !m.stillWanted(rec) {
			return errNotNow
		}
		rec.relink(m.after())
		return nil
	})
	return err
}

// after returns what the volume stands on when all groups but those without a new file,
// which is the top's of a live merge, are replaced.
func (m *merger) after() Relink {
	r := Relink{Layers: slices.Clone(m.before.Layers[:m.groups[0].from]), Replaced: map[string]string{}}
	for i, g := range m.groups {
		own := m.before.Layers[g.to-1]
		if i < len(m.before.Merging) {
			r.Replaced[own.File] = m.before.Merging[i]
			own.File = m.before.Merging[i]
		}
		r.Layers = append(r.Layers, own)
	}
	return r
}

// relink puts a merged chain in the place of the old one.
func (r *Record) relink(to Relink) {
	for k := range r.Snapshots {
		snap := &r.Snapshots[k]
		if file := to.Replaced[snap.Layer]; file != "" {
			snap.Layer = file
		}
		snap.Overlay = "" // which one it switched to no longer means anything
	}
	r.Layers, r.Merging, r.MergeWish, r.Relink = to.Layers, nil, nil, nil
}

// abandon takes back what the record says of the merge; the sweep removes the files.
func (m *merger) abandon(ctx context.Context) error {
	_, err := m.store.updateAnyway(ctx, m.before.Name, func(rec *Record) error {
		if slices.Equal(rec.Merging, m.before.Merging) {
			rec.Merging = nil
		}
		return nil
	})
	if errors.Is(err, block.ErrNotFound) {
		return nil
	}
	return err
}

// endDeadMerge forgets a merge whose process died, so that the sweep removes its files.
func (s *Store) endDeadMerge(ctx context.Context, rec Record) error {
	if len(rec.Merging) == 0 || rec.Deleted {
		return nil
	}
	lock, err := s.lockMerge(ctx, rec.Name)
	if lock == nil || err != nil {
		return err
	}
	defer s.unlockMerge(lock, rec.Name)
	_, err = s.update(ctx, rec.Name, func(rec *Record) error {
		rec.Merging = nil
		return nil
	})
	return err
}

// gcLockWait is how long a collection waits for a lock before it goes on to the next.
const gcLockWait = 100 * time.Millisecond
