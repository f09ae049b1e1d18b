package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"syscall"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// DeleteVolume removes a volume. One that does not exist is fine. A published or attached
// one is ErrBusy. Snapshots and clones of it live on, and so does its name until they are
// gone.
func (s *Store) DeleteVolume(ctx context.Context, name string) error {
	if err := errors.Join(checkVolumeName(name), s.writable()); err != nil {
		return err
	}
	if err := s.creations.stop(ctx, name); err != nil {
		return fmt.Errorf("delete volume %s while it is being made: %w", name, err)
	}
	rec, err := s.markDeleted(ctx, name)
	if errors.Is(err, block.ErrNotFound) {
		return s.removeEmptyDir(ctx, name)
	}
	if err != nil {
		return fmt.Errorf("delete volume %s: %w", name, err)
	}
	if err := s.sweepFrom(ctx, rec); err != nil && !errors.Is(err, block.ErrCorrupt) {
		// A corrupt record of another volume keeps space from being freed, until it is
		// repaired and GC runs; the volume is gone all the same.
		return fmt.Errorf("delete volume %s: %w", name, err)
	}
	return nil
}

// markDeleted makes the record say that the volume is gone.
func (s *Store) markDeleted(ctx context.Context, name string) (Record, error) {
	if _, err := s.updateAnyway(ctx, name, func(rec *Record) error {
		rec.Merging = nil // the merger holds a lock on the image
		return nil
	}); err != nil {
		return Record{}, err
	}
	return s.updateAnyway(ctx, name, func(rec *Record) error {
		if len(rec.Attachments) > 0 {
			return fmt.Errorf("%w: it is published to node %s", block.ErrBusy, rec.nodes())
		}
		// Also when it is deleted already: who began that may have been killed, and its
		// process may hold the image a moment longer.
		if rec.Ready {
			top, err := s.excludeUsers(ctx, rec)
			if err != nil {
				return err
			}
			if top != nil {
				defer top.Close()
			}
		}
		if rec.Deleted {
			return nil
		}
		rec.Deleted = true
		rec.WantSizeBytes, rec.GrowProblem = 0, nil
		rec.Snapshots = slices.DeleteFunc(rec.Snapshots, func(snap SnapshotRecord) bool { return !snap.Ready })
		return nil
	})
}

// excludeUsers locks the top layer, so that nobody has the volume open. A server that has
// just been told to let go is waited for. A missing image has no users.
func (s *Store) excludeUsers(ctx context.Context, rec *Record) (top vfs.File, err error) {
	err = retryLocked(ctx, s.opts.HolderWait, func() error {
		top, err = openExclusively(s.fs, rec.top().File)
		return err
	})
	switch {
	case errors.Is(err, block.ErrLocked):
		return nil, fmt.Errorf("%w: its image is in use: %w", block.ErrBusy, err)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrInvalid):
		return nil, nil
	}
	return top, err
}

func openExclusively(fsys vfs.FS, name string) (vfs.File, error) {
	f, err := fsys.Open(name, vfs.ReadWrite)
	if err != nil {
		return nil, err
	}
	if err := f.Lock(vfs.LockWrite); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// sweepFrom removes what a deleted volume's end leaves unneeded: in its directory, and in
// those of deleted volumes that it stood on.
func (s *Store) sweepFrom(ctx context.Context, rec Record) error {
	dirs := []string{rec.Name}
	for _, l := range rec.Layers {
		if owner := ownerOf(l.File); owner != "" && !slices.Contains(dirs, owner) {
			dirs = append(dirs, owner)
		}
	}
	var errs []error
	for _, dir := range dirs {
		_, err := s.sweep(ctx, dir)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// removeEmptyDir removes a directory in which a creation or a deletion was killed when
// there was no record yet, or no longer.
func (s *Store) removeEmptyDir(ctx context.Context, name string) error {
	if _, err := s.fs.Stat(volumeDir(name)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	lock, err := s.locks.lock(ctx, volumeFile(name, volumeLock))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Unlock()
	if _, err := s.fs.Stat(volumeFile(name, recordFile)); !errors.Is(err, fs.ErrNotExist) {
		return err // it has come to life
	}
	return s.removeVolumeDir(name)
}

// ignoreNotEmpty returns nil when a directory was not removed because something is in it.
func ignoreNotEmpty(err error) error {
	if errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}
