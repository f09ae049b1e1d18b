package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// A record changes by writing a new file, which a full store has no space for. So that a
// volume can be detached and deleted all the same, there are a few files that have their
// space already. They are used for changes that let something go, never for those that
// ask for more.
const (
	spareCount = 16
	spareBytes = 16 << 10
)

func spareFile(n int) string { return fmt.Sprintf("%s/%02d", spareDir, n) }

// makeSpares makes the spare files that are missing, as far as there is space.
func makeSpares(fsys vfs.FS) error {
	if err := fsys.Mkdir(spareDir); err != nil && !errors.Is(err, fs.ErrExist) {
		return ignoreFull(err)
	}
	for n := range spareCount {
		if _, err := fsys.Stat(spareFile(n)); err == nil {
			continue
		}
		if err := makeSpare(fsys, spareFile(n)); err != nil {
			return ignoreFull(err)
		}
	}
	return syncDir(fsys, spareDir)
}

func makeSpare(fsys vfs.FS, name string) error {
	f, err := fsys.Create(name)
	if errors.Is(err, fs.ErrExist) {
		return nil // somebody else is at it
	}
	if err != nil {
		return err
	}
	err = f.Allocate(0, spareBytes)
	if errors.Is(err, errors.ErrUnsupported) {
		_, err = f.WriteAt(make([]byte, spareBytes), 0)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, removeIfThere(fsys, name))
	}
	return nil
}

// takeSpare moves a spare file to name; false if there is none left.
func takeSpare(fsys vfs.FS, name string) (bool, error) {
	for n := range spareCount {
		err := fsys.Rename(spareFile(n), name)
		if err == nil {
			return true, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return false, err
		}
	}
	return false, nil
}

// updateAnyway is update for a change that lets something go: it works in a full store,
// too.
func (s *Store) updateAnyway(ctx context.Context, name string, change func(rec *Record) error) (Record, error) {
	return s.updateWith(ctx, name, change, s.writeRecordAnyway)
}

// writeRecordAnyway is writeRecord that takes a spare file when there is no space.
func (s *Store) writeRecordAnyway(rec Record) error {
	err := s.writeRecord(rec)
	if !isFull(err) {
		return err
	}
	data, encodeErr := encodeRecord(rec)
	if encodeErr != nil || len(data) > spareBytes {
		return err
	}
	temp := volumeFile(rec.Name, recordNew)
	ok, takeErr := takeSpare(s.fs, temp)
	if takeErr != nil || !ok {
		return errors.Join(err, takeErr)
	}
	if err := s.fillSpare(temp, data); err != nil {
		return fmt.Errorf("write the record of volume %s: %w", rec.Name, err)
	}
	if err := s.fs.Rename(temp, volumeFile(rec.Name, recordFile)); err != nil {
		return fmt.Errorf("write the record of volume %s: %w", rec.Name, err)
	}
	return syncDir(s.fs, volumeDir(rec.Name))
}

// fillSpare puts data into a file that has space for it.
func (s *Store) fillSpare(name string, data []byte) error {
	f, err := s.fs.Open(name, vfs.ReadWrite)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, 0)
	if err == nil {
		err = f.Truncate(int64(len(data)))
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// isFull reports whether err is for want of space.
func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, block.ErrNoSpace)
}

func ignoreFull(err error) error {
	if isFull(err) {
		return nil
	}
	return err
}
