package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// sweep removes the files of a volume's directory that nothing needs, and the directory
// of a deleted volume once it holds nothing that is needed. What is needed is computed
// from all records while the store's lock keeps new ones from referring to what is being
// removed. It returns the files it removed.
func (s *Store) sweep(ctx context.Context, name string) (removed []string, err error) {
	lock, err := s.lockVolume(ctx, name)
	if errors.Is(err, block.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer lock.Unlock()
	rec, err := s.readRecord(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // somebody was faster
	}
	if err != nil {
		return nil, err
	}
	if tidy, err := s.isTidy(rec); tidy || err != nil {
		return nil, err
	}
	err = s.withAll(ctx, func(all *scan) error {
		removed, err = s.sweepLocked(rec, all)
		return err
	})
	return removed, err
}

// isTidy reports that a volume needs all that is in its directory itself, which is seen
// without the other records.
func (s *Store) isTidy(rec Record) (bool, error) {
	if rec.Deleted {
		return false, nil
	}
	needed := map[string]bool{}
	for _, l := range rec.neededLayers() {
		needed[l] = true
	}
	unneeded, _, err := s.unneededFiles(rec.Name, needed)
	return len(unneeded) == 0, err
}

// sweepLocked is sweep for who holds both locks.
func (s *Store) sweepLocked(rec Record, all *scan) (removed []string, err error) {
	name := rec.Name
	needed, err := all.neededLayers()
	if err != nil {
		return nil, fmt.Errorf("remove what nothing needs of volume %s: %w", name, err)
	}
	unneeded, keeps, err := s.unneededFiles(name, needed)
	if err != nil {
		return nil, err
	}
	for _, file := range unneeded {
		inUse, err := s.inUse(file)
		if err != nil {
			return removed, err
		}
		if inUse {
			keeps = true // by a reader of a deleted snapshot: a later sweep gets it
			continue
		}
		if err := removeIfThere(s.fs, file); err != nil {
			return removed, err
		}
		removed = append(removed, file)
	}
	if rec.Deleted && !keeps {
		return removed, s.removeVolumeDir(name)
	}
	if len(removed) > 0 {
		err = syncDir(s.fs, volumeDir(name))
	}
	return removed, err
}

// inUse reports whether somebody has a file open in a way that locks it.
func (s *Store) inUse(file string) (bool, error) {
	f, err := openExclusively(s.fs, file)
	switch {
	case err == nil:
		return false, f.Close()
	case errors.Is(err, block.ErrLocked):
		return true, nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrInvalid):
		return false, nil
	}
	return false, err
}

// neededLayers returns the files of the layers that the record keeps alive.
func (r *Record) neededLayers() []string {
	var files []string
	add := func(chain []LayerRecord) {
		for _, l := range chain {
			files = append(files, l.File)
		}
	}
	if !r.Deleted {
		add(r.Layers)
		files = append(files, r.Merging...)
		if r.Relink != nil {
			add(r.Relink.Layers)
		}
	}
	for _, snap := range r.Snapshots {
		if snap.Layer != "" {
			add(r.chainTo(snap.Layer))
		}
		if snap.Overlay != "" && !r.Deleted {
			files = append(files, snap.Overlay)
		}
	}
	return files
}

// unneededFiles lists the files of layers in a volume's directory that nothing needs;
// keeps says that something there is needed. Files that are no layer's stay: people may
// have put them there.
func (s *Store) unneededFiles(name string, needed map[string]bool) (unneeded []string, keeps bool, err error) {
	stems := map[string]bool{}
	for file := range needed {
		if ownerOf(file) != name {
			continue
		}
		if stem, ok := layerStem(name, path.Base(file)); ok {
			stems[stem] = true
		}
	}
	entries, err := s.fs.ReadDir(volumeDir(name))
	if err != nil {
		return nil, false, err
	}
	for _, entry := range entries {
		stem, ok := layerStem(name, entry.Name())
		switch {
		case !ok || isStoreFile(entry.Name()) || entry.IsDir():
		case stems[stem]:
			keeps = true
		default:
			unneeded = append(unneeded, volumeFile(name, entry.Name()))
		}
	}
	return unneeded, keeps || len(stems) > 0, nil
}

// isStoreFile reports whether a file in a volume's directory is the store's own. A volume
// may be called "volume" or "merge", so that its layers' names look similar.
func isStoreFile(name string) bool {
	return slices.Contains([]string{recordFile, recordNew, volumeLock, mergeLock}, name)
}

// removeLayer removes all files of a layer, if there are any. Nothing refers to it.
func (s *Store) removeLayer(file string) error {
	volume := ownerOf(file)
	want, _ := layerStem(volume, path.Base(file))
	entries, err := s.fs.ReadDir(volumeDir(volume))
	if err != nil {
		return err
	}
	for _, entry := range entries {
		stem, ok := layerStem(volume, entry.Name())
		if !ok || stem != want || isStoreFile(entry.Name()) {
			continue
		}
		if err := removeIfThere(s.fs, volumeFile(volume, entry.Name())); err != nil {
			return err
		}
	}
	return nil
}

// removeVolumeDir removes a volume's record and directory. No layer is left in it; that
// is durable before the record goes, because without it nobody would look for them.
func (s *Store) removeVolumeDir(name string) error {
	if err := syncDir(s.fs, volumeDir(name)); err != nil {
		return err
	}
	for _, file := range []string{recordNew, recordFile, mergeLock, volumeLock} {
		if err := removeIfThere(s.fs, volumeFile(name, file)); err != nil {
			return err
		}
	}
	// Somebody's own file, or a volume just being made anew, keeps the directory.
	entries, err := s.fs.ReadDir(volumeDir(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && len(entries) > 0 {
		// Or it is an NFS client, which keeps the lock's file until the caller unlocks it.
		s.locks.removeOnUnlock(volumeFile(name, volumeLock), volumeDir(name))
		return nil
	}
	if err != nil {
		return err
	}
	if err := s.fs.Remove(volumeDir(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		// Some clients don't list the lock's file.
		s.locks.removeOnUnlock(volumeFile(name, volumeLock), volumeDir(name))
		return ignoreNotEmpty(err)
	}
	return syncDir(s.fs, volumesDir)
}
