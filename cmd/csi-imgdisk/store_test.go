package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/all"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
)

// newStore makes a store with a volume "v" that has a snapshot, and a clone of that.
func newStore(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	ok(t, "store", "init", dir)
	all.Register()
	ctx := context.Background()
	err := withStore(ctx, dir, store.Options{}, func(s *openedStore) error {
		if _, err := s.CreateVolume(ctx, store.CreateVolumeRequest{Name: "v", SizeBytes: 16 << 20}); err != nil {
			return err
		}
		if _, err := s.CreateSnapshot(ctx, "v", "s"); err != nil {
			return err
		}
		_, err := s.CreateVolume(ctx, store.CreateVolumeRequest{Name: "w", Source: store.Source{Snapshot: "v@s"}})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestStore_ListTreeCheck(t *testing.T) {
	dir := newStore(t)
	rows := decode[[]volumeRow](t, ok(t, "store", "list", "-o", "json", dir))
	if len(rows) != 2 || rows[0].Name != "v" || rows[0].SizeBytes != 16<<20 || strings.Join(rows[0].Snapshots, " ") != "s" || rows[1].State != "ready" {
		t.Errorf("list: %+v", rows)
	}
	tree := decode[store.TreeData](t, ok(t, "store", "tree", "-o", "json", dir))
	if len(tree.Roots) != 1 || len(tree.Roots[0].Children) != 2 {
		t.Errorf("tree: %+v", tree)
	}
	for _, args := range [][]string{{"store", "list", dir}, {"store", "tree", dir}} {
		out := ok(t, args...)
		if !strings.Contains(out, "qcow2") || !strings.Contains(out, "w") {
			t.Errorf("%v: %s", args, out)
		}
	}
	if out := ok(t, "store", "check", dir); !strings.Contains(out, "2 volumes, 3 layers, 0 problems") {
		t.Errorf("check: %s", out)
	}
	// An image in a store may stand on another volume's: its root is the store.
	info := decode[imageInfo](t, ok(t, "image", "info", "-o", "json", filepath.Join(dir, "volumes", "w", "w.qcow2")))
	if info.BackingFilename != "../v/v.qcow2" {
		t.Errorf("the clone stands on %q", info.BackingFilename)
	}
}

func TestStore_CheckFindsAndRepairs(t *testing.T) {
	dir := newStore(t)
	orphan := filepath.Join(dir, "volumes", "v", "v-000009.qcow2")
	ok(t, "image", "create", orphan, "16M")
	r := run(t, "store", "check", dir)
	if r.code != checkLeaks || !strings.Contains(r.stdout, "v-000009.qcow2") {
		t.Errorf("check with an orphan: code %d, %s%s", r.code, r.stdout, r.stderr)
	}
	if _, err := os.Stat(orphan); err != nil {
		t.Errorf("check without --repair removes an orphan: %v", err)
	}
	ok(t, "store", "check", "--repair", dir)
	if _, err := os.Stat(orphan); err == nil {
		t.Error("check --repair leaves an orphan")
	}

	layer := filepath.Join(dir, "volumes", "w", "w.qcow2")
	if err := os.Remove(layer); err != nil {
		t.Fatal(err)
	}
	if r := run(t, "store", "check", dir); r.code != checkCorrupt || !strings.Contains(r.stdout, "w.qcow2") {
		t.Errorf("check with a missing layer: code %d, %s%s", r.code, r.stdout, r.stderr)
	}
}

func TestStore_GC(t *testing.T) {
	dir := newStore(t)
	ctx := context.Background()
	if out := ok(t, "store", "gc", dir); !strings.Contains(out, "0 files removed") {
		t.Errorf("gc of a store without garbage: %s", out)
	}
	err := withStore(ctx, dir, store.Options{}, func(s *openedStore) error { return s.DeleteVolume(ctx, "w") })
	if err != nil {
		t.Fatal(err)
	}
	result := decode[store.GCResult](t, ok(t, "store", "gc", "-o", "json", dir))
	if len(result.Problems) > 0 {
		t.Errorf("gc: %+v", result)
	}
	rows := decode[[]volumeRow](t, ok(t, "store", "list", "-o", "json", dir))
	if len(rows) != 1 {
		t.Errorf("after gc: %+v", rows)
	}
}
