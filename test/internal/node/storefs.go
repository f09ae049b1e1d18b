package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// StoreFS is an ext4 file system of its own for a store, so that it can be frozen: then
// whoever writes to it waits, as with a file server that doesn't answer.
type StoreFS struct {
	Path  string // where it is mounted
	image string
}

// Requests of ioctl(2), the same for all file systems.
const (
	ioctlFreeze = 0xc0045877
	ioctlThaw   = 0xc0045878
)

// MakeStoreFS makes and mounts a file system in an existing directory.
func MakeStoreFS(ctx context.Context, dir string, sizeBytes int64) (*StoreFS, error) {
	s := &StoreFS{Path: filepath.Join(dir, "store"), image: filepath.Join(dir, "store.ext4")}
	if err := os.WriteFile(s.image, nil, 0o600); err != nil {
		return nil, err
	}
	if err := errors.Join(os.Truncate(s.image, sizeBytes), os.Mkdir(s.Path, 0o700)); err != nil {
		return nil, err
	}
	for _, args := range [][]string{
		{"mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", s.image},
		{"mount", "-t", "ext4", "-o", "loop", s.image, s.Path},
	} {
		if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%v: %w: %s", args, err, out)
		}
	}
	return s, nil
}

// Stall freezes the file system for a while.
func (s *StoreFS) Stall(ctx context.Context, d time.Duration) error {
	if err := s.ioctl(ioctlFreeze); err != nil {
		return fmt.Errorf("freeze %s: %w", s.Path, err)
	}
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
	if err := s.ioctl(ioctlThaw); err != nil {
		return fmt.Errorf("thaw %s: %w", s.Path, err)
	}
	return nil
}

func (s *StoreFS) ioctl(request uint) error {
	dir, err := os.Open(s.Path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return unix.IoctlSetInt(int(dir.Fd()), request, 0)
}

// Close unmounts the file system and removes it.
func (s *StoreFS) Close() error {
	deadline := time.Now().Add(Patience)
	err := unix.Unmount(s.Path, 0)
	for err == unix.EBUSY && time.Now().Before(deadline) { // a process may just be ending
		time.Sleep(pollInterval)
		err = unix.Unmount(s.Path, 0)
	}
	if err != nil {
		err = errors.Join(fmt.Errorf("unmount %s: %w", s.Path, err), unix.Unmount(s.Path, unix.MNT_DETACH))
	}
	return errors.Join(err, os.Remove(s.Path), os.Remove(s.image))
}
