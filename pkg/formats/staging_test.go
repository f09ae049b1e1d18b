package formats_test

import (
	"context"
	"errors"
	"io/fs"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// names lists the files of a file system.
func names(t *testing.T, fsys vfs.FS) []string {
	t.Helper()
	entries, err := fsys.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, e := range entries {
		found = append(found, e.Name())
	}
	return found
}

// An image of several files appears as a whole, with links between them that are right.
func TestStaging_PublishesAllFiles(t *testing.T) {
	mem := vfs.NewMem()
	f, err := formats.Lookup("vmdk")
	if err != nil {
		t.Fatal(err)
	}
	src := newSparseDevice(3<<20, 4096, 0)
	src.bytes[1<<20], src.data[1<<20/4096] = 7, true
	staging := formats.NewStaging(mem, false)
	req := formats.CreateRequest{FS: staging, Name: "disk.vmdk", Subformat: "monolithicFlat"}
	if err := formats.Convert(context.Background(), src, f, req, nil); err != nil {
		t.Fatal(err)
	}
	for _, name := range names(t, mem) {
		if !strings.HasPrefix(name, ".disk") || !strings.HasSuffix(name, ".partial") {
			t.Errorf("%s is there before it is published", name)
		}
	}
	if err := staging.Publish("disk.vmdk"); err != nil {
		t.Fatal(err)
	}
	if err := staging.Discard(); err != nil {
		t.Error(err)
	}
	if got := strings.Join(names(t, mem), " "); got != "disk-flat.vmdk disk.vmdk" {
		t.Errorf("published: %s", got)
	}
	img, err := formats.Open(context.Background(), mem, "disk.vmdk", formats.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if d, err := formats.Compare(context.Background(), src, img, false, nil); d.Kind != "" || err != nil {
		t.Errorf("it differs: %v, %v", d, err)
	}
}

func createFile(t *testing.T, fsys vfs.FS, name, content string) {
	t.Helper()
	f, err := fsys.Create(name)
	if err == nil {
		_, err = f.WriteAt([]byte(content), 0)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestStaging_LeavesNothing(t *testing.T) {
	mem := vfs.NewMem()
	createFile(t, mem, "there", "old")
	staging := formats.NewStaging(mem, false)
	createFile(t, staging, "new", "content")
	if _, err := staging.Create("there"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("create what is there: %v", err)
	}
	if _, err := staging.Create("new"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("create it again: %v", err)
	}
	for name, change := range map[string]error{
		"remove": staging.Remove("there"), "rename": staging.Rename("there", "elsewhere"),
	} {
		if !errors.Is(change, block.ErrUnsupported) {
			t.Errorf("%s of what was there: %v", name, change)
		}
	}
	if err := staging.Discard(); err != nil {
		t.Fatal(err)
	}
	if got := names(t, mem); len(got) != 1 || got[0] != "there" {
		t.Errorf("left: %v", got)
	}
}

// A format may replace one of its files by another.
func TestStaging_Rename(t *testing.T) {
	mem := vfs.NewMem()
	staging := formats.NewStaging(mem, false)
	createFile(t, staging, "disk", "old")
	createFile(t, staging, "disk.new", "new")
	if err := staging.Rename("disk.new", "disk"); err != nil {
		t.Fatal(err)
	}
	createFile(t, staging, "a", "second")
	if err := staging.Rename("a", "b"); err != nil {
		t.Fatal(err)
	}
	if info, err := staging.Stat("b"); err != nil || info.Size() != 6 {
		t.Errorf("renamed: %v, %v", info, err)
	}
	if err := staging.Publish("disk"); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(names(t, mem), " "); got != "b disk" {
		t.Errorf("published: %s", got)
	}
}

func TestStaging_Replace(t *testing.T) {
	mem := vfs.NewMem()
	createFile(t, mem, "disk", "old")
	user, err := mem.Open("disk", vfs.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	if err := user.Lock(vfs.LockRead); err != nil {
		t.Fatal(err)
	}
	staging := formats.NewStaging(mem, true)
	if _, err := staging.Create("disk"); !errors.Is(err, block.ErrLocked) {
		t.Errorf("replace a file in use: %v", err)
	}
	if err := user.Close(); err != nil {
		t.Fatal(err)
	}
	createFile(t, staging, "disk", "newer")
	if info, err := mem.Stat("disk"); err != nil || info.Size() != 3 {
		t.Errorf("the old one before: %v, %v", info, err)
	}
	if err := staging.Publish("disk"); err != nil {
		t.Fatal(err)
	}
	if info, err := mem.Stat("disk"); err != nil || info.Size() != 5 || len(names(t, mem)) != 1 {
		t.Errorf("the new one: %v, %v, %v", info, err, names(t, mem))
	}
}

// Whatever fails, there is the whole image afterwards or nothing.
func TestStaging_AnErrorAtEveryStep(t *testing.T) {
	f, err := formats.Lookup("vmdk")
	if err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	src := newSparseDevice(1<<20, 4096, 0)
	src.bytes[5000], src.data[1] = 7, true
	for n := uint64(0); ; n++ {
		mem, fail := vfs.NewMem(), vfs.FailNth(n, broken)
		var hit atomic.Bool
		fsys := vfs.Inject(mem, vfs.If(vfs.Changing, func(op vfs.Op) error {
			err := fail(op)
			hit.CompareAndSwap(false, err != nil)
			return err
		}))
		staging := formats.NewStaging(fsys, false)
		err := formats.Convert(context.Background(), src, f,
			formats.CreateRequest{FS: staging, Name: "disk.vmdk", Subformat: "monolithicFlat"}, nil)
		if err == nil {
			err = staging.Publish("disk.vmdk")
		}
		err = errors.Join(err, staging.Discard())
		if !hit.Load() {
			if err != nil || n < 5 {
				t.Fatalf("after %d steps: %v", n, err)
			}
			return
		}
		_, e := mem.Stat("disk.vmdk")
		if err == nil || e == nil && !strings.Contains(err.Error(), "publish") {
			t.Errorf("step %d: %v, and disk.vmdk: %v", n, err, e)
		}
	}
}
