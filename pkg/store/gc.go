package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// GCResult says what a collection did.
type GCResult struct {
	RemovedVolumes []string `json:"removedVolumes"` // interrupted creations, deleted volumes
	RemovedFiles   []string `json:"removedFiles"`
	MergedVolumes  []string `json:"mergedVolumes"` // whose chains became shorter
	Problems       []string `json:"problems"`      // volumes that could not be looked after
}

// GC brings to an end what was left unfinished: it removes interrupted creations and what
// nothing needs, carries out wishes that nobody waits for any more, shortens chains of
// volumes that nobody uses, and asks the holders of others to. What somebody is at is left alone. It can run at any time,
// several at once, too.
func (s *Store) GC(ctx context.Context) (GCResult, error) {
	result := GCResult{RemovedVolumes: []string{}, RemovedFiles: []string{}, MergedVolumes: []string{}, Problems: []string{}}
	if err := s.writable(); err != nil {
		return result, err
	}
	if err := makeSpares(s.fs); err != nil {
		result.Problems = append(result.Problems, err.Error())
	}
	dirs, err := s.fs.ReadDir(volumesDir)
	if err != nil {
		return result, fmt.Errorf("list volumes: %w", err)
	}
	// Deleted volumes come last: what stood on them may have gone by then.
	for _, deleted := range []bool{false, true} {
		for _, dir := range dirs {
			if err := ctx.Err(); err != nil {
				return result, err
			}
			if !dir.IsDir() || checkVolumeName(dir.Name()) != nil {
				continue
			}
			if err := s.collect(ctx, dir.Name(), deleted, &result); err != nil {
				result.Problems = append(result.Problems, err.Error())
			}
		}
	}
	return result, nil
}

// collect looks after one volume.
func (s *Store) collect(ctx context.Context, name string, deleted bool, result *GCResult) error {
	rec, err := s.readRecord(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return s.collectUnmade(ctx, name, result)
	case err != nil:
		return err
	case rec.Deleted != deleted:
		return nil
	case !rec.Ready && !rec.Deleted:
		return s.collectUnmade(ctx, name, result)
	}
	if err := errors.Join(s.dropStalePins(ctx, rec), s.fulfilLeftWishes(ctx, rec), s.endDeadMerge(ctx, rec), s.wishMerge(ctx, rec)); err != nil {
		return err
	}
	if !rec.Deleted {
		merged, err := s.merge(ctx, name)
		if err != nil {
			return err
		}
		if merged {
			result.MergedVolumes = append(result.MergedVolumes, name)
		}
	}
	removed, err := s.sweep(ctx, name)
	result.RemovedFiles = append(result.RemovedFiles, removed...)
	if _, statErr := s.fs.Stat(volumeFile(name, recordFile)); errors.Is(statErr, fs.ErrNotExist) && rec.Deleted {
		result.RemovedVolumes = append(result.RemovedVolumes, name)
	}
	return err
}

// collectUnmade removes what a killed creation left. A living one holds the lock.
func (s *Store) collectUnmade(ctx context.Context, name string, result *GCResult) error {
	lockCtx, cancel := context.WithTimeout(ctx, gcLockWait)
	defer cancel()
	lock, err := s.locks.lock(lockCtx, volumeFile(name, volumeLock))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Unlock()
	if rec, err := s.readRecord(name); err == nil && (rec.Ready || rec.Deleted) {
		return nil
	}
	if err := s.unmake(ctx, name); err != nil {
		return err
	}
	result.RemovedVolumes = append(result.RemovedVolumes, name)
	return nil
}

// dropStalePins removes pins for clones that were finished or never will be. A pin is made
// after its clone's record, so a clone without a record is not about to come.
func (s *Store) dropStalePins(ctx context.Context, rec Record) error {
	for _, snap := range rec.Snapshots {
		clone, isPin := strings.CutPrefix(snap.Name, pinPrefix)
		if !isPin {
			continue
		}
		made, err := s.readRecord(clone)
		if err == nil && !made.Ready && !made.Deleted && made.Source.Volume == rec.Name {
			continue
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := s.dropSnapshot(ctx, rec.Name, snap.Name); err != nil {
			return err
		}
	}
	return nil
}

// fulfilLeftWishes carries out wishes whose callers went away, if nobody has the volume.
func (s *Store) fulfilLeftWishes(ctx context.Context, rec Record) error {
	if rec.Deleted || rec.serving() != "" {
		return nil
	}
	for _, snap := range rec.Snapshots {
		if snap.Ready || snap.isPin() || snap.Problem != nil {
			continue
		}
		if _, err := s.advanceSnapshot(ctx, rec.Name, snap.Name); err != nil && !errors.Is(err, block.ErrNotFound) {
			return err
		}
	}
	if rec.WantSizeBytes > rec.SizeBytes && rec.GrowProblem == nil {
		_, err := s.advanceExpansion(ctx, rec.Name)
		return err
	}
	return nil
}
