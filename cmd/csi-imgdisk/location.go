package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// storeFile is what makes a directory a store's root.
const storeFile = "store.json"

// location is a file that a person named: the tree it is opened in, which bounds what
// else it may refer to, and its name there.
type location struct {
	fs   *vfs.Dir
	root string // absolute
	name string
}

// path returns the file's absolute path.
func (l *location) path() string { return filepath.Join(l.root, filepath.FromSlash(l.name)) }

func (l *location) close() { l.fs.Close() }

// hostPath returns the path of a file in the tree in the way a person named one: relative
// if that was.
func (l *location) hostPath(named, name string) string {
	path := filepath.Join(l.root, filepath.FromSlash(name))
	if filepath.IsAbs(named) {
		return path
	}
	if abs, err := filepath.Abs("."); err == nil {
		if rel, err := filepath.Rel(abs, path); err == nil {
			return rel
		}
	}
	return path
}

// locate finds out where a file lies. The tree is root, or if that is "" the nearest
// directory above the file that is a store's, or else the file's own directory. The file
// need not exist, but its directory must.
func locate(path, root string) (*location, error) {
	real, err := realPath(path)
	if err != nil {
		return nil, err
	}
	if root == "" {
		root = storeRoot(filepath.Dir(real))
	} else if root, err = realPath(root); err != nil {
		return nil, err
	}
	name, err := filepath.Rel(root, real)
	if err != nil || vfs.CheckName(filepath.ToSlash(name)) != nil {
		return nil, fmt.Errorf("%s does not lie in %s, the directory given by --root", path, root)
	}
	dir, err := vfs.OpenDir(root)
	if err != nil {
		return nil, err
	}
	return &location{fs: dir, root: root, name: filepath.ToSlash(name)}, nil
}

// realPath makes a path absolute and free of links. Its last element may be missing.
func realPath(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	real, err := filepath.EvalSymlinks(abs)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return real, err
	}
	if _, err := os.Lstat(abs); err == nil {
		return "", fmt.Errorf("%s is a link to a file that does not exist", path)
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, filepath.Base(abs)), nil
}

// storeRoot returns the nearest store's directory at or above dir, or dir.
func storeRoot(dir string) string {
	for at := dir; ; at = filepath.Dir(at) {
		if info, err := os.Stat(filepath.Join(at, storeFile)); err == nil && info.Mode().IsRegular() {
			return at
		}
		if at == filepath.Dir(at) {
			return dir
		}
	}
}

// explain adds what a person can do about an image's link that leads out of the tree, or is
// refused.
func (l *location) explain(err error) error {
	if !errors.Is(err, fs.ErrInvalid) {
		return err
	}
	text := err.Error()
	switch {
	case !strings.Contains(text, "link "):
	case strings.Contains(text, "it leaves the store"):
		return fmt.Errorf("%w; an image may refer only to files in %s: --root DIR names a directory that holds them all", err, l.root)
	case strings.Contains(text, "accepted") || strings.Contains(text, "refused"):
		return fmt.Errorf("%w; if it is the link to a parent, image rebase --unsafe replaces it", err)
	}
	return err
}
