package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const (
	maxRecordBytes = 1 << 20
	// A file that is replaced while an NFS client opens it can go stale under it.
	staleRetries = 5
)

// readRecord returns a volume's record as it is now, finished or not; fs.ErrNotExist if
// there is none. No lock is needed: records are replaced as a whole.
func (s *Store) readRecord(name string) (Record, error) {
	file := volumeFile(name, recordFile)
	data, err := readSmallFile(s.fs, file)
	if err != nil {
		return Record{}, fmt.Errorf("read the record of volume %s: %w", name, err)
	}
	var rec Record
	if err := json.Unmarshal(data, &rec); err != nil {
		return Record{}, fmt.Errorf("read %s: %w: %w", file, errCorruptRecord, err)
	}
	if err := rec.validate(name); err != nil {
		return Record{}, fmt.Errorf("read %s: %w", file, err)
	}
	return rec, nil
}

// errCorruptRecord is ErrCorrupt: what the record says about volumes is unknown.
var errCorruptRecord = fmt.Errorf("volume record: %w", block.ErrCorrupt)

// readSmallFile reads a file of at most maxRecordBytes.
func readSmallFile(fsys vfs.FS, name string) (data []byte, err error) {
	for range staleRetries {
		data, err = readOnce(fsys, name)
		if !errors.Is(err, syscall.ESTALE) {
			break
		}
	}
	return data, err
}

func readOnce(fsys vfs.FS, name string) ([]byte, error) {
	f, err := fsys.Open(name, vfs.ReadOnly)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > maxRecordBytes {
		return nil, fmt.Errorf("%s has %d bytes, want at most %d: %w", name, size, maxRecordBytes, errCorruptRecord)
	}
	data := make([]byte, size)
	n, err := f.ReadAt(data, 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	return data[:n], nil
}

// replaceFile puts data into a file so that a crash leaves the old contents or the new.
// temp, in the same directory, is used in between. Somebody else must see to it that
// nobody does the same at once.
func replaceFile(fsys vfs.FS, name, temp string, data []byte) error {
	if err := removeIfThere(fsys, temp); err != nil {
		return err
	}
	f, err := fsys.Create(temp)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, 0)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = fsys.Rename(temp, name)
	}
	if err != nil {
		return errors.Join(err, removeIfThere(fsys, temp))
	}
	return syncDir(fsys, path.Dir(name))
}

// writeRecord replaces a volume's record durably. The volume's lock is held.
func (s *Store) writeRecord(rec Record) error {
	if err := rec.validate(rec.Name); err != nil {
		return err
	}
	data, err := encodeRecord(rec)
	if err != nil {
		return err
	}
	if err := replaceFile(s.fs, volumeFile(rec.Name, recordFile), volumeFile(rec.Name, recordNew), data); err != nil {
		return fmt.Errorf("write the record of volume %s: %w", rec.Name, err)
	}
	return nil
}

func encodeRecord(rec Record) ([]byte, error) {
	data, err := json.MarshalIndent(rec, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("write the record of volume %s: %w", rec.Name, err)
	}
	if len(data) >= maxRecordBytes {
		return nil, fmt.Errorf("write the record of volume %s: %w: it would have %d bytes, want at most %d: delete snapshots",
			rec.Name, block.ErrUnsupported, len(data), maxRecordBytes)
	}
	return append(data, '\n'), nil
}

// update changes a volume's record under its lock. change sees the record as it is; when
// it returns an error, or changes nothing, nothing is written.
func (s *Store) update(ctx context.Context, name string, change func(rec *Record) error) (Record, error) {
	return s.updateWith(ctx, name, change, s.writeRecord)
}

func (s *Store) updateWith(ctx context.Context, name string, change func(rec *Record) error, write func(Record) error) (Record, error) {
	lock, err := s.lockVolume(ctx, name)
	if err != nil {
		return Record{}, err
	}
	defer lock.Unlock()
	rec, err := s.readRecord(name)
	if err != nil {
		return Record{}, notFound(name, err)
	}
	before, err := encodeRecord(rec)
	if err != nil {
		return Record{}, err
	}
	if err := change(&rec); err != nil {
		return rec, err
	}
	after, err := encodeRecord(rec)
	if err != nil {
		return Record{}, err
	}
	if bytes.Equal(before, after) {
		return rec, nil
	}
	return rec, write(rec)
}

// lockVolume waits for the lock of a volume that exists.
func (s *Store) lockVolume(ctx context.Context, name string) (*heldLock, error) {
	if err := s.writable(); err != nil {
		return nil, err
	}
	// Looking first keeps a lock file from appearing where there is no volume.
	if _, err := s.fs.Stat(volumeFile(name, recordFile)); err != nil {
		return nil, notFound(name, err)
	}
	lock, err := s.locks.lock(ctx, volumeFile(name, volumeLock))
	if err != nil {
		return nil, notFound(name, err)
	}
	return lock, nil
}

// notFound makes ErrNotFound of a missing file of a volume.
func notFound(name string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("volume %s: %w", name, block.ErrNotFound)
	}
	return err
}

// validate checks what may come from a hand-edited or damaged file: everything that names
// or bounds something.
func (r *Record) validate(name string) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", errCorruptRecord, fmt.Sprintf(format, args...))
	}
	switch {
	case r.Layout != layoutVersion:
		return bad("layout is %d, this program knows %d", r.Layout, layoutVersion)
	case r.Name != name || checkVolumeName(name) != nil:
		return bad("name is %.140q in the directory of %.140q", r.Name, name)
	case r.SizeBytes < 0 || r.WantSizeBytes < 0 || r.NextLayer < 0 || r.Epoch < 0:
		return bad("a size or number is negative")
	case r.Ready && !r.Deleted && len(r.Layers) == 0:
		return bad("the volume has no layers")
	}
	for _, file := range r.Merging {
		if ownerOf(file) != r.Name {
			return bad("layers are being merged into %.300q, which is not in the volume's directory", file)
		}
	}
	layers := r.Layers
	if r.Relink != nil {
		if len(r.Relink.Layers) == 0 || len(r.Layers) == 0 || r.Relink.Layers[len(r.Relink.Layers)-1] != r.top() {
			return bad("the chain after a merge does not end with the volume's top")
		}
		layers = slices.Concat(layers, r.Relink.Layers)
	}
	for _, l := range layers {
		if err := checkLayer(l); err != nil {
			return bad("%v", err)
		}
	}
	return r.validateSnapshots(bad)
}

func (r *Record) validateSnapshots(bad func(string, ...any) error) error {
	seen := map[string]bool{}
	for _, snap := range r.Snapshots {
		plain := strings.TrimPrefix(snap.Name, pinPrefix)
		if checkVolumeName(plain) != nil || seen[snap.Name] {
			return bad("snapshot %.140q is no name, or there twice", snap.Name)
		}
		seen[snap.Name] = true
		if snap.Ready && !slices.ContainsFunc(r.Layers, func(l LayerRecord) bool { return l.File == snap.Layer }) {
			return bad("snapshot %s is on layer %.300q, which is none of the volume's", snap.Name, snap.Layer)
		}
		if snap.Overlay != "" && ownerOf(snap.Overlay) != r.Name {
			return bad("snapshot %s has the overlay %.300q, which is not in the volume's directory", snap.Name, snap.Overlay)
		}
	}
	return nil
}

// checkLayer refuses names of layers that lie outside volumes/ and images/.
func checkLayer(l LayerRecord) error {
	dir, _, _ := strings.Cut(l.File, "/")
	if vfs.CheckName(l.File) != nil || dir != imagesDir && dir != volumesDir || l.Format == "" {
		return fmt.Errorf("layer %.300q of format %.40q: want a file under %s/ or %s/ and a format", l.File, l.Format, volumesDir, imagesDir)
	}
	return nil
}

// syncDir makes names durable, where the file system can.
func syncDir(fsys vfs.FS, dir string) error {
	if err := fsys.SyncDir(dir); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}

func removeIfThere(fsys vfs.FS, name string) error {
	if err := fsys.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
