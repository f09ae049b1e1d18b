package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Volume returns a volume's record; ErrNotFound if there is none.
func (s *Store) Volume(ctx context.Context, name string) (Record, error) {
	if err := errors.Join(ctx.Err(), checkVolumeName(name)); err != nil {
		return Record{}, err
	}
	rec, err := s.readRecord(name)
	if err != nil {
		return Record{}, notFound(name, err)
	}
	return rec, rec.exists()
}

// exists returns nil for a volume that is there for its users, else ErrNotFound.
func (r *Record) exists() error {
	switch {
	case r.Deleted:
		return fmt.Errorf("volume %s was deleted: %w", r.Name, block.ErrNotFound)
	case !r.Ready:
		return fmt.Errorf("volume %s is still being made: %w", r.Name, block.ErrNotFound)
	}
	return nil
}

// VolumeEntry is a volume in a list.
type VolumeEntry struct {
	Name   string
	Record Record
	Err    error // why the record cannot be read; Record is empty then
}

// Volumes lists all volumes, sorted by name. An unreadable record hides no others.
func (s *Store) Volumes(ctx context.Context) ([]VolumeEntry, error) {
	all, err := s.records(ctx)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(e VolumeEntry) bool { return e.Err == nil && e.Record.exists() != nil }), nil
}

// recordReaders is how many records are read at the same time: on a network's store, reading
// one is mostly waiting.
const recordReaders = 16

// records lists all records, also of volumes that are being made or are deleted.
func (s *Store) records(ctx context.Context) ([]VolumeEntry, error) {
	dirs, err := s.fs.ReadDir(volumesDir)
	if err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	var list []VolumeEntry
	for _, dir := range dirs {
		if dir.IsDir() && checkVolumeName(dir.Name()) == nil { // others are not ours: Check reports them
			list = append(list, VolumeEntry{Name: dir.Name()})
		}
	}
	var readers sync.WaitGroup
	var next atomic.Int64
	for range min(recordReaders, (len(list)+recordReaders-1)/recordReaders) { // one, if there are few
		readers.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(list)) && ctx.Err() == nil; i = next.Add(1) - 1 {
				list[i].Record, list[i].Err = s.readRecord(list[i].Name)
			}
		})
	}
	readers.Wait()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(list, func(e VolumeEntry) bool {
		return errors.Is(e.Err, fs.ErrNotExist) // just being made, or just gone
	}), nil
}

// SnapshotEntry is a snapshot in a list.
type SnapshotEntry struct {
	Volume string
	SnapshotRecord
}

// Snapshots lists the snapshots of all volumes, those of deleted volumes too, sorted by
// volume and name. Wishes that are not fulfilled yet are listed as not Ready. Volumes
// whose record is unreadable are left out: Volumes reports them.
func (s *Store) Snapshots(ctx context.Context) ([]SnapshotEntry, error) {
	all, err := s.records(ctx)
	if err != nil {
		return nil, err
	}
	var list []SnapshotEntry
	for _, e := range all {
		for _, snap := range e.Record.Snapshots {
			if !snap.isPin() {
				list = append(list, SnapshotEntry{Volume: e.Name, SnapshotRecord: snap})
			}
		}
	}
	slices.SortFunc(list, func(a, b SnapshotEntry) int {
		if c := strings.Compare(a.Volume, b.Volume); c != 0 {
			return c
		}
		return strings.Compare(a.Name, b.Name)
	})
	return list, nil
}

// Snapshot returns one snapshot, ready or not; ErrNotFound if there is none.
func (s *Store) Snapshot(ctx context.Context, volume, snapshot string) (SnapshotRecord, error) {
	if err := errors.Join(ctx.Err(), checkVolumeName(volume), checkName("snapshot", snapshot)); err != nil {
		return SnapshotRecord{}, err
	}
	rec, err := s.readRecord(volume)
	if err != nil {
		return SnapshotRecord{}, notFound(volume, err)
	}
	snap := rec.snapshot(snapshot)
	if snap == nil {
		return SnapshotRecord{}, fmt.Errorf("snapshot %s of volume %s: %w", snapshot, volume, block.ErrNotFound)
	}
	return *snap, nil
}

// isPin reports whether the snapshot only holds a layer for a clone in the making.
func (s *SnapshotRecord) isPin() bool { return strings.HasPrefix(s.Name, pinPrefix) }

// snapshot returns the volume's snapshot of a name, or nil.
func (r *Record) snapshot(name string) *SnapshotRecord {
	for i := range r.Snapshots {
		if r.Snapshots[i].Name == name {
			return &r.Snapshots[i]
		}
	}
	return nil
}

// dropSnapshot removes a snapshot from the record.
func (r *Record) dropSnapshot(name string) {
	r.Snapshots = slices.DeleteFunc(r.Snapshots, func(s SnapshotRecord) bool { return s.Name == name })
}

// chainTo returns the layers from the base to file; nil if it is none of them.
func (r *Record) chainTo(file string) []LayerRecord {
	for i, l := range r.Layers {
		if l.File == file {
			return slices.Clone(r.Layers[:i+1])
		}
	}
	return nil
}

// top returns the layer that is written.
func (r *Record) top() LayerRecord { return r.Layers[len(r.Layers)-1] }

// holds reports whether a layer of that file is in the volume's chain.
func (r *Record) holds(file string) bool { return r.chainTo(file) != nil }
