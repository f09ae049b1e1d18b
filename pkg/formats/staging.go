package formats

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path"
	"slices"
	"sync"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Staging is a file system in which new files have temporary names until they are
// published, but are known by their final ones: an image is created, filled and closed in
// it, with the links between its files and to its parents right from the start, and appears
// only when it is complete. A process that is killed leaves files called
// ".NAME.RANDOM.partial" beside where the image would be.
//
// It is for one image at a time. Files that were there before are seen, and can be opened
// but not removed or renamed.
type Staging struct {
	vfs.FS
	replace bool

	mu     sync.Mutex
	staged []stagedFile // in the order in which they were created
}

type stagedFile struct{ name, temporary string }

// NewStaging returns a Staging over fsys. With replace, publishing replaces files that have
// the names already, else creating such a file fails with fs.ErrExist.
func NewStaging(fsys vfs.FS, replace bool) *Staging {
	return &Staging{FS: fsys, replace: replace}
}

// Create makes a new file under a temporary name.
func (s *Staging) Create(name string) (vfs.File, error) {
	if err := vfs.CheckName(name); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.find(name) >= 0 {
		return nil, &fs.PathError{Op: "create", Path: name, Err: fs.ErrExist}
	}
	if err := s.checkFree(name); err != nil {
		return nil, err
	}
	dir, base := path.Split(name)
	temporary := fmt.Sprintf("%s.%s.%08x.partial", dir, base, rand.Uint32())
	f, err := s.FS.Create(temporary)
	if err != nil {
		return nil, err
	}
	s.staged = append(s.staged, stagedFile{name, temporary})
	return &renamedFile{f, name}, nil
}

// checkFree reports whether a file may be published under a name: none has it, or one that
// may be replaced and that nobody uses.
func (s *Staging) checkFree(name string) error {
	_, err := s.FS.Stat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case !s.replace:
		return &fs.PathError{Op: "create", Path: name, Err: fs.ErrExist}
	}
	old, err := s.FS.Open(name, vfs.ReadWrite)
	if err != nil {
		return err
	}
	defer old.Close()
	if err := old.Lock(vfs.LockWrite); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("replace %s: %w", name, err)
	}
	return nil
}

// find returns the index of a staged file, or -1.
func (s *Staging) find(name string) int {
	return slices.IndexFunc(s.staged, func(f stagedFile) bool { return f.name == name })
}

// actual returns the name that a file has below.
func (s *Staging) actual(name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := s.find(name); i >= 0 {
		return s.staged[i].temporary
	}
	return name
}

// Open opens a staged file, or one that was there before.
func (s *Staging) Open(name string, mode vfs.Mode) (vfs.File, error) {
	actual := s.actual(name)
	f, err := s.FS.Open(actual, mode)
	if err != nil || actual == name {
		return f, err
	}
	return &renamedFile{f, name}, nil
}

// Stat describes a file.
func (s *Staging) Stat(name string) (fs.FileInfo, error) { return s.FS.Stat(s.actual(name)) }

// Remove removes a staged file.
func (s *Staging) Remove(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := s.find(name)
	if i < 0 {
		return s.foreign("remove", name)
	}
	err := s.FS.Remove(s.staged[i].temporary)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		s.staged = slices.Delete(s.staged, i, i+1)
	}
	return err
}

// Rename renames a staged file; another staged one of the new name is replaced.
func (s *Staging) Rename(oldName, newName string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	from, to := s.find(oldName), s.find(newName)
	if from < 0 {
		return s.foreign("rename", oldName)
	}
	if to < 0 {
		if err := s.checkFree(newName); err != nil {
			return err
		}
		s.staged[from].name = newName
		return nil
	}
	if err := s.FS.Rename(s.staged[from].temporary, s.staged[to].temporary); err != nil {
		return err
	}
	s.staged = slices.Delete(s.staged, from, from+1)
	return nil
}

// foreign refuses to change what was there before.
func (s *Staging) foreign(op, name string) error {
	if _, err := s.FS.Stat(name); err != nil {
		return err
	}
	return fmt.Errorf("%s %s, which this did not make: %w", op, name, block.ErrUnsupported)
}

// Publish gives the files their names, durably: last the one called main, without which
// nobody takes the others for an image. When it fails before that, everything is removed.
func (s *Staging) Publish(main string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := s.find(main)
	if i < 0 {
		return fmt.Errorf("publish %s: %w", main, fs.ErrNotExist)
	}
	last := s.staged[i]
	s.staged = append(slices.Delete(s.staged, i, i+1), last)
	for i, f := range s.staged {
		err := s.checkFree(f.name)
		if err == nil {
			err = s.FS.Rename(f.temporary, f.name)
		}
		if err != nil {
			return errors.Join(fmt.Errorf("publish %s: %w", f.name, err), s.withdraw(i))
		}
		s.staged[i].temporary = f.name
	}
	dir := path.Dir(main)
	s.staged = nil
	if err := s.FS.SyncDir(dir); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("publish %s: %w", main, err)
	}
	return nil
}

// Discard removes what was not published.
func (s *Staging) Discard() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.withdraw(0)
}

// withdraw removes all staged files. With replace, the first published ones have taken the
// place of others, and stay: they may be those of an image that is still there.
func (s *Staging) withdraw(published int) error {
	var errs []error
	for i, f := range s.staged {
		if i < published && s.replace {
			continue
		}
		if err := s.FS.Remove(f.temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove the unfinished %s: %w", f.name, err))
		}
	}
	s.staged = nil
	return errors.Join(errs...)
}

// renamedFile is a file that is known by another name.
type renamedFile struct {
	vfs.File
	name string
}

// Name returns the name that the file will have.
func (f *renamedFile) Name() string { return f.name }
