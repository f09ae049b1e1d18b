package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
)

// Who was killed before the identity was there, its last step, has left a directory that is
// still made a store of.
func TestNamedStore_InitAfterKilledInit(t *testing.T) {
	path := t.TempDir()
	dir, err := vfs.OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if _, err := store.Init(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(path, "store.json")); err != nil {
		t.Fatal(err)
	}
	if err := (namedStore{"main", path}).init(); err != nil {
		t.Errorf("made again: %v", err)
	}
}
