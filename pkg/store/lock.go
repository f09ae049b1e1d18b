package store

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// A lock file is locked as a whole, for writing, by one open file at a time. Locks are
// taken in the order image, volume, store; none is waited for while a later one is held.
// (A clone's volume lock is held while its source's is taken: the source exists, the
// clone does not yet, so never the other way round.)
//
// A volume's lock file vanishes with the volume. Somebody who waited for it must notice
// that what he has got is no longer the file of that name, which may exist anew: each
// lock file holds a random token, written by its first holder.
const (
	lockTokenBytes = 16
	lockRetryMin   = time.Millisecond
	lockRetryMax   = 40 * time.Millisecond
)

// locker hands out locks. Within the process a lock is passed on without polling.
type locker struct {
	fs    vfs.FS
	mu    sync.Mutex
	local map[string]chan struct{} // full while the lock is held or waited for
	left  map[string]string        // directories to remove when a lock, by its name, is given up
}

// heldLock is a lock that is held until Unlock.
type heldLock struct {
	by    *locker
	name  string
	file  vfs.File
	local chan struct{}
}

// Unlock gives the lock up; a second call does nothing.
func (l *heldLock) Unlock() {
	if l == nil || l.file == nil {
		return
	}
	_ = l.file.Close() // the lock goes with it, whatever it says
	l.file = nil
	l.by.removeLeft(l.name)
	<-l.local
}

// removeOnUnlock has an empty directory removed when the lock of this name is given up, which
// the caller holds: an NFS client keeps a removed file in it, by another name, for as long
// as it is open.
func (l *locker) removeOnUnlock(name, dir string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.left == nil {
		l.left = map[string]string{}
	}
	l.left[name] = dir
}

// removeLeft does what removeOnUnlock asked for. Whoever makes the directory's volume anew
// finds that it is gone, or keeps it by what is in it.
func (l *locker) removeLeft(name string) {
	l.mu.Lock()
	dir, ok := l.left[name]
	delete(l.left, name)
	l.mu.Unlock()
	if ok {
		_ = l.fs.Remove(dir) // an empty one that stays harms nobody, and GC tries again
	}
}

// lock waits for the lock file name, which is made if its directory exists. It returns
// fs.ErrNotExist when that does not.
func (l *locker) lock(ctx context.Context, name string) (*heldLock, error) {
	local := l.localLock(name)
	select {
	case local <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("lock %s: %w", name, ctx.Err())
	}
	wait := lockRetryMin
	for {
		f, err := l.try(name)
		if err == nil {
			return &heldLock{by: l, name: name, file: f, local: local}, nil
		}
		if !errors.Is(err, block.ErrLocked) {
			<-local
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		if err := sleep(ctx, wait); err != nil {
			<-local
			return nil, fmt.Errorf("lock %s, which another process holds: %w", name, err)
		}
		wait = min(2*wait, lockRetryMax)
	}
}

func (l *locker) localLock(name string) chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.local[name]
	if c == nil {
		c = make(chan struct{}, 1)
		l.local[name] = c
	}
	return c
}

// try returns the locked file, or ErrLocked when it should be tried again.
func (l *locker) try(name string) (vfs.File, error) {
	f, err := l.fs.Open(name, vfs.ReadWrite)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = l.fs.Create(name)
		if errors.Is(err, fs.ErrExist) {
			return nil, block.ErrLocked
		}
	}
	if err != nil {
		return nil, err
	}
	if err := f.Lock(vfs.LockWrite); err != nil {
		f.Close()
		return nil, err
	}
	if err := l.verify(name, f); err != nil {
		if isFull(err) { // it was made just now, for what cannot be made
			err = errors.Join(err, removeIfThere(l.fs, name))
		}
		f.Close()
		return nil, err
	}
	return f, nil
}

// verify makes sure that f is still what name leads to.
func (l *locker) verify(name string, f vfs.File) error {
	token, err := readToken(f)
	if err != nil {
		return err
	}
	if len(token) == 0 {
		token = make([]byte, lockTokenBytes)
		rand.Read(token)
		if _, err := f.WriteAt(token, 0); err != nil {
			return err
		}
	}
	now, err := l.fs.Open(name, vfs.ReadOnly)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s was removed: %w", name, block.ErrLocked)
	}
	if err != nil {
		return err
	}
	defer now.Close()
	other, err := readToken(now)
	if err != nil {
		return err
	}
	if !bytes.Equal(token, other) {
		return fmt.Errorf("%s was made anew: %w", name, block.ErrLocked)
	}
	return nil
}

func readToken(f vfs.File) ([]byte, error) {
	b := make([]byte, lockTokenBytes)
	n, err := f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	return b[:n], nil
}

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
