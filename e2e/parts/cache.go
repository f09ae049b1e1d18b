package parts

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	// keptFor is how long a part stays that nobody has asked for.
	keptFor = 7 * 24 * time.Hour

	// unfinished is in the names of directories in which something is being made.
	unfinished = ".unfinished-"
)

// cache is a directory of directories, each of which has what was made from one key.
type cache struct {
	dir  string
	log  io.Writer
	lock *os.File
}

// openCache waits until no other process makes something in dir.
func openCache(ctx context.Context, dir string, log io.Writer) (*cache, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for waited := false; ; waited = true {
		err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return &cache{dir: dir, log: log, lock: lock}, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			lock.Close()
			return nil, fmt.Errorf("lock %s: %w", lock.Name(), err)
		}
		if !waited {
			fmt.Fprintf(log, "parts: waiting for another process that builds in %s\n", dir)
		}
		select {
		case <-ctx.Done():
			lock.Close()
			return nil, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// close removes what nobody has asked for during keptFor, and what was never finished.
func (c *cache) close() error {
	defer c.lock.Close()
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil || !entry.IsDir() {
			continue // gone, or not of ours
		}
		old := strings.Contains(entry.Name(), "-key-") && time.Since(info.ModTime()) > keptFor
		if old || strings.Contains(entry.Name(), unfinished) {
			if err := os.RemoveAll(filepath.Join(c.dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// get returns the directory of what has a name and a key, after calling build to fill it if it
// is not there. The directory is at its place only once build has returned. Several goroutines
// may call get for different names.
func (c *cache) get(ctx context.Context, name string, k *key, build func(ctx context.Context, dir string) error) (string, error) {
	if k.err != nil {
		return "", fmt.Errorf("%s: what it is made of: %w", name, k.err)
	}
	final := filepath.Join(c.dir, name+"-key-"+k.sum())
	now := time.Now()
	if err := os.Chtimes(final, now, now); err == nil {
		return final, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	dir, err := os.MkdirTemp(c.dir, name+unfinished)
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	fmt.Fprintf(c.log, "parts: making %s\n", name)
	if err := build(ctx, dir); err != nil {
		return "", fmt.Errorf("make %s: %w", name, err)
	}
	if err := errors.Join(os.Chmod(dir, 0o755), os.Rename(dir, final)); err != nil {
		return "", err
	}
	fmt.Fprintf(c.log, "parts: made %s in %.0f s\n", name, time.Since(now).Seconds())
	return final, nil
}

// key is a digest of all that a part is made of. The first error stays in it.
type key struct {
	hash hash.Hash
	err  error
}

func newKey() *key { return &key{hash: sha256.New()} }

func (k *key) sum() string { return hex.EncodeToString(k.hash.Sum(nil))[:16] }

// text adds strings.
func (k *key) text(texts ...string) *key {
	for _, t := range texts {
		fmt.Fprintf(k.hash, "%q\n", t)
	}
	return k
}

// files adds files' contents.
func (k *key) files(paths ...string) *key {
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			k.err = errors.Join(k.err, err)
		}
		k.text(filepath.Base(path), string(data))
	}
	return k
}

// sources adds all files below directories but Go's tests and test data.
func (k *key) sources(dirs ...string) *key {
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case entry.IsDir() && entry.Name() == "testdata":
				return fs.SkipDir
			case entry.IsDir() || strings.HasSuffix(path, "_test.go"):
				return nil
			}
			name, err := filepath.Rel(dir, path)
			k.text(name).files(path)
			return err
		})
		k.err = errors.Join(k.err, err)
	}
	return k
}
