package vfs_test

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

var errInjected = errors.New("injected")

// everyOperation does each operation once on a tree with the empty directory d. It goes
// on after errors and returns them by operation, in order.
func everyOperation(fsys vfs.FS) (names []string, errs []error) {
	did := func(name string, err error) {
		names, errs = append(names, name), append(errs, err)
	}
	f, err := fsys.Create("f")
	did("create", err)
	if err == nil {
		_, err = f.WriteAt(make([]byte, 1000), 100)
		did("write", err)
		_, err = f.ReadAt(make([]byte, 10), 0)
		did("read", err)
		_, err = f.Size()
		did("size", err)
		_, err = f.AllocatedBytes()
		did("allocatedbytes", err)
		did("truncate", f.Truncate(2000))
		did("sync", f.Sync())
		did("allocate", f.Allocate(0, 5000))
		did("punchhole", f.PunchHole(100, 200))
		_, _, err = f.NextData(0)
		if err == io.EOF {
			err = nil
		}
		did("nextdata", err)
		did("lock", f.Lock(vfs.LockRead))
		did("unlock", f.Unlock())
		did("close", f.Close())
		g, err := fsys.Open("f", vfs.ReadOnly)
		did("open", err)
		if err == nil {
			did("close", g.Close())
		}
	}
	did("rename", fsys.Rename("f", "d/g"))
	_, err = fsys.Stat("d/g")
	did("stat", err)
	did("remove", fsys.Remove("d/g"))
	did("mkdir", fsys.Mkdir("d/e"))
	_, err = fsys.ReadDir("d/e")
	did("readdir", err)
	did("syncdir", fsys.SyncDir("d/e"))
	_, err = fsys.Usage()
	did("usage", err)
	did("closefs", fsys.Close())
	return names, errs
}

func newTree(t *testing.T) *vfs.Mem {
	m := vfs.NewMem()
	must(t, m.Mkdir("d"))
	must(t, m.SyncDir("."))
	return m
}

func TestInject_AsksAboutEveryOperation(t *testing.T) {
	var ops []vfs.Op
	var count atomic.Int64
	names, errs := everyOperation(vfs.Inject(newTree(t), vfs.All(vfs.Count(&count), func(op vfs.Op) error {
		ops = append(ops, op)
		return nil
	})))
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	if len(ops) != len(names) || count.Load() != int64(len(names)) {
		t.Fatalf("asked about %d operations and counted %d, did %d", len(ops), count.Load(), len(names))
	}
	want := map[vfs.OpKind]string{
		vfs.OpWrite: "f+0 100:1000", vfs.OpRead: "f+0 0:10", vfs.OpTruncate: "f+0 2000:0", vfs.OpAllocate: "f+0 0:5000",
		vfs.OpPunchHole: "f+0 100:200", vfs.OpRename: "f+3 0:0", vfs.OpMkdir: "d/e+0 0:0", vfs.OpStat: "d/g+0 0:0",
	}
	for i, op := range ops {
		if op.Kind.String() != names[i] || op.N != uint64(i) {
			t.Errorf("operation %d is %s number %d, want %s", i, op.Kind, op.N, names[i])
		}
		got := fmt.Sprintf("%s+%d %d:%d", op.Name, len(op.NewName), op.Off, op.Len)
		if w, ok := want[op.Kind]; ok && got != w {
			t.Errorf("%s has %s, want %s", op.Kind, got, w)
		}
	}
}

// What fails is not done: after each failure the tree is what it would be without.
func TestInject_FailsEveryOperation(t *testing.T) {
	names, _ := everyOperation(newTree(t))
	for i, name := range names {
		m := newTree(t)
		var before string
		snapshot := vfs.CrashPoint(uint64(i), func() { before = tree(t, m.Clone(), ".") })
		var after string
		look := vfs.CrashPoint(uint64(i)+1, func() { after = tree(t, m.Clone(), ".") })
		_, errs := everyOperation(vfs.Inject(m, vfs.All(snapshot, look, vfs.FailNth(uint64(i), errInjected))))
		if !errors.Is(errs[i], errInjected) {
			t.Errorf("operation %d, %s: %v, want %v", i, name, errs[i], errInjected)
		}
		if injected := slices.DeleteFunc(errs, func(err error) bool { return !errors.Is(err, errInjected) }); len(injected) != 1 {
			t.Errorf("operation %d, %s: %d operations failed: %v", i, name, len(injected), injected)
		}
		if name != "closefs" && before != after {
			t.Errorf("operation %d, %s, failed but made %q of %q", i, name, after, before)
		}
	}
}

func TestInject_FailFrom(t *testing.T) {
	m := newTree(t)
	_, errs := everyOperation(vfs.Inject(m, vfs.FailFrom(2, errInjected)))
	for i, err := range errs {
		if (i >= 2) != errors.Is(err, errInjected) {
			t.Errorf("operation %d: %v", i, err)
		}
	}
}

// A failed close releases the file even so.
func TestInject_FailedCloseReleases(t *testing.T) {
	m := vfs.NewMem()
	fsys := vfs.Inject(m, vfs.If(vfs.OfKind(vfs.OpClose), vfs.FailNth(0, errInjected)))
	f := create(t, fsys, "f")
	must(t, f.Lock(vfs.LockWrite))
	if err := f.Close(); !errors.Is(err, errInjected) {
		t.Errorf("close: %v", err)
	}
	g, err := m.Open("f", vfs.ReadWrite)
	must(t, err)
	must(t, g.Lock(vfs.LockWrite))
}

func TestInject_ShortWrite(t *testing.T) {
	for _, c := range []struct {
		sectors int
		off, n  int64
		want    string
	}{
		{0, 0, 4 * sector, ""},
		{1, 0, 4 * sector, "b"},
		{3, 0, 4 * sector, "bbb"},
		{4, 0, 4 * sector, "bbb(b)511"},
		{9, 0, 4 * sector, "bbb(b)511"},
		{1, sector + 10, 4 * sector, ".(.b)"},
		{2, sector + 10, 4 * sector, ".(.b)b"},
		{0, sector + 10, 4 * sector, ""},
	} {
		m := vfs.NewMem()
		f := create(t, vfs.Inject(m, vfs.If(vfs.OfKind(vfs.OpWrite, vfs.OpSync), func(vfs.Op) error {
			return vfs.ShortWrite(c.sectors, syscall.ENOSPC)
		})), "f")
		n, err := f.WriteAt([]byte(strings.Repeat("b", int(c.n))), c.off)
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%+v: %v, want ENOSPC", c, err)
		}
		left := readAll(t, m, "f")
		got := strings.ReplaceAll(letters(left), "b511", "(b)511")
		if got != c.want || int64(n) != max(int64(len(left))-c.off, 0) {
			t.Errorf("%+v: wrote %d bytes and left %s", c, n, got)
		}
		if err := f.Sync(); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("sync: %v, want ENOSPC", err)
		}
	}
}

// The way it is meant to be used: crash before every change, and look at what is left. A
// record replaced by write, sync, rename and sync is old or new, never lost or torn.
func TestInject_CrashSweep(t *testing.T) {
	r := testenv.Rand(t)
	replace := func(fsys vfs.FS) error {
		f, err := fsys.Create("new")
		if err != nil {
			return err
		}
		_, err = f.WriteAt([]byte(strings.Repeat("b", 3*sector)), 0)
		return errors.Join(err, f.Sync(), f.Close(), fsys.Rename("new", "record"), fsys.SyncDir("."))
	}
	crashes, news := 0, 0
	for n := uint64(0); ; n++ {
		m := vfs.NewMem()
		f := create(t, m, "record")
		fill(t, f, 'a', 0, 2)
		must(t, errors.Join(f.Sync(), f.Close(), m.SyncDir(".")))
		reached := false
		look := vfs.CrashPoint(n, func() {
			reached = true
			for range 50 {
				crashes++
				switch got := letters(readAll(t, m.Crash(r), "record")); got {
				case "aa":
				case "bbb":
					news++
				default:
					t.Errorf("a crash before change %d left the record %s", n, got)
				}
			}
		})
		must(t, replace(vfs.Inject(m, vfs.If(vfs.Changing, look))))
		if !reached {
			break
		}
	}
	if crashes != 5*50 || news == 0 || news == crashes {
		t.Errorf("%d crashes, %d of which found the new record", crashes, news)
	}
}

func TestOpKind_String(t *testing.T) {
	if got := vfs.OpClose.String(); got != "close" {
		t.Errorf("%q", got)
	}
	if got := (vfs.OpClose + 1).String(); got != "invalid" {
		t.Errorf("%q: an operation has no name", got)
	}
}
