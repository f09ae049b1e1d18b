package storemount

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver"
)

// Status is a directory on tmpfs in which the process that mounts stores says, for others
// on the node, which are not mounted and why: a file named for each. It is safe for
// concurrent use for different stores.
type Status string

// Set says why a store is not mounted; nil: it is.
func (d Status) Set(store string, problem error) error {
	path := filepath.Join(string(d), store)
	if problem == nil {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("say that store %s is mounted: %w", store, err)
		}
		return nil
	}
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return fmt.Errorf("say that store %s is not mounted: %w", store, err)
	}
	// A store's name does not begin with a dot.
	tmp := filepath.Join(string(d), "."+store)
	err := os.WriteFile(tmp, []byte(problem.Error()), 0o600)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return fmt.Errorf("say that store %s is not mounted: %w", store, err)
	}
	return nil
}

// Get returns nil if a store is mounted, or is none that has to be, or an error that wraps
// driver.ErrUnavailable and says why it is not.
func (d Status) Get(store string) error {
	text, err := os.ReadFile(filepath.Join(string(d), store))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("is store %s mounted: %w", store, err)
	}
	return fmt.Errorf("store %s is %w on this node: %s", store, driver.ErrUnavailable, text)
}
