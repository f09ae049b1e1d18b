package vfstest

import (
	"io/fs"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func testBadNames(t *testing.T, fsys vfs.FS) {
	must(t, fsys.Mkdir("d"))
	create(t, fsys, "f", nil)
	for _, name := range []string{"", "/", "/f", "..", "../f", "d/../f", "d/..", "./f", "d//f", "d/", "f\x00g", "d/."} {
		_, openErr := fsys.Open(name, vfs.ReadOnly)
		_, createErr := fsys.Create(name)
		_, readDirErr := fsys.ReadDir(name)
		_, statErr := fsys.Stat(name)
		for op, err := range map[string]error{
			"open": openErr, "create": createErr, "readdir": readDirErr, "stat": statErr,
			"remove": fsys.Remove(name), "mkdir": fsys.Mkdir(name), "syncdir": fsys.SyncDir(name),
			"rename from": fsys.Rename(name, "g"), "rename to": fsys.Rename("f", name),
		} {
			if err == nil {
				t.Errorf("%s %q succeeded", op, name)
			}
			wantErr(t, op+" "+name, err, fs.ErrInvalid)
		}
	}
	for op, err := range map[string]error{
		"remove": fsys.Remove("."), "rename from": fsys.Rename(".", "g"), "rename to": fsys.Rename("d", "."),
	} {
		wantErr(t, op+" the root", err, fs.ErrInvalid)
	}
	wantNames(t, fsys, ".", "d", "f")
}

func testDirectories(t *testing.T, fsys vfs.FS) {
	wantNames(t, fsys, ".")
	for _, dir := range []string{"b", "a", "a/deep", "a/deep/er"} {
		must(t, fsys.Mkdir(dir))
	}
	create(t, fsys, "a/deep/file", []byte("x"))
	create(t, fsys, "a.txt", nil)
	wantNames(t, fsys, ".", "a", "a.txt", "b")
	wantNames(t, fsys, "a/deep", "er", "file")
	entries, err := fsys.ReadDir("a/deep")
	must(t, err)
	for i, isDir := range []bool{true, false} {
		info, err := entries[i].Info()
		must(t, err)
		if entries[i].IsDir() != isDir || info.IsDir() != isDir || info.Name() != entries[i].Name() {
			t.Errorf("entry %q: directory %v, info says %q, %v", entries[i].Name(), entries[i].IsDir(), info.Name(), info.Mode())
		}
	}
	if err := fsys.Remove("a"); err == nil {
		t.Error("removed a directory that is not empty")
	}
	must(t, fsys.SyncDir("a/deep"))
	for _, name := range []string{"a/deep/file", "a/deep/er", "a/deep", "a", "b", "a.txt"} {
		must(t, fsys.Remove(name))
		wantMissing(t, fsys, name)
	}
	must(t, fsys.SyncDir("."))
	wantNames(t, fsys, ".")
	wantErr(t, "remove twice", fsys.Remove("b"), fs.ErrNotExist)
	wantErr(t, "mkdir in nowhere", fsys.Mkdir("x/y"), fs.ErrNotExist)
	_, err = fsys.ReadDir("x")
	wantErr(t, "list nothing", err, fs.ErrNotExist)
	wantErr(t, "sync nothing", fsys.SyncDir("x"), fs.ErrNotExist)

	create(t, fsys, "f", nil)
	if _, err := fsys.ReadDir("f"); err == nil {
		t.Error("listed a file")
	}
	if err := fsys.SyncDir("f"); err == nil {
		t.Error("synced a file as a directory")
	}
}

func testRename(t *testing.T, fsys vfs.FS) {
	f := create(t, fsys, "new", []byte("new"))
	old := create(t, fsys, "f", []byte("old"))
	must(t, fsys.Rename("new", "f"))
	wantNames(t, fsys, ".", "f")
	wantContents(t, open(t, fsys, "f", vfs.ReadOnly), []byte("new"))
	wantContents(t, old, []byte("old")) // still open
	write(t, f, []byte("N"), 0)
	wantContents(t, open(t, fsys, "f", vfs.ReadOnly), []byte("New"))

	must(t, fsys.Rename("f", "f"))
	must(t, fsys.Mkdir("d"))
	must(t, fsys.Mkdir("d/e"))
	must(t, fsys.Rename("f", "d/e/g"))
	must(t, fsys.Rename("d/e", "e"))
	must(t, fsys.Rename("e", "d/e2"))
	wantContents(t, open(t, fsys, "d/e2/g", vfs.ReadOnly), []byte("New"))
	wantNames(t, fsys, ".", "d")
	must(t, fsys.SyncDir("d"))
	must(t, fsys.SyncDir("."))
}

func testRenameRefused(t *testing.T, fsys vfs.FS) {
	create(t, fsys, "f", []byte("kept"))
	must(t, fsys.Mkdir("d"))
	must(t, fsys.Mkdir("d/e"))
	must(t, fsys.Mkdir("empty"))
	wantErr(t, "missing", fsys.Rename("missing", "g"), fs.ErrNotExist)
	wantErr(t, "into nowhere", fsys.Rename("f", "missing/f"), fs.ErrNotExist)
	wantErr(t, "file over a directory", fsys.Rename("f", "empty"), fs.ErrExist)
	wantErr(t, "directory over a directory", fsys.Rename("d", "empty"), fs.ErrExist)
	for _, c := range [][2]string{{"d", "f"}, {"d", "d/e/d"}, {"f", "f/g"}} {
		if err := fsys.Rename(c[0], c[1]); err == nil {
			t.Errorf("renamed %s to %s", c[0], c[1])
		}
	}
	wantNames(t, fsys, ".", "d", "empty", "f")
	wantNames(t, fsys, "d", "e")
	wantContents(t, open(t, fsys, "f", vfs.ReadOnly), []byte("kept"))
}

func testRemoveOpen(t *testing.T, fsys vfs.FS) {
	f := create(t, fsys, "f", []byte("still here"))
	must(t, fsys.Remove("f"))
	wantMissing(t, fsys, "f")
	write(t, f, []byte("S"), 0)
	wantContents(t, f, []byte("Still here"))
	g := create(t, fsys, "f", []byte("another"))
	wantContents(t, g, []byte("another"))
	wantContents(t, f, []byte("Still here"))
}

func testStat(t *testing.T, fsys vfs.FS) {
	must(t, fsys.Mkdir("d"))
	create(t, fsys, "d/f", make([]byte, 1234))
	for _, c := range []struct {
		name, base string
		isDir      bool
		size       int64
	}{{"d/f", "f", false, 1234}, {"d", "d", true, 0}, {".", ".", true, 0}} {
		info, err := fsys.Stat(c.name)
		must(t, err)
		if info.Name() != c.base && c.name != "." || info.IsDir() != c.isDir || !c.isDir && info.Size() != c.size {
			t.Errorf("stat %s: %q, %v, %d bytes", c.name, info.Name(), info.Mode(), info.Size())
		}
		if info.ModTime().IsZero() {
			t.Errorf("stat %s: no time", c.name)
		}
	}
}

func testUsage(t *testing.T, fsys vfs.FS) {
	u, err := fsys.Usage()
	must(t, err)
	if u.TotalBytes <= 0 || u.FreeBytes < 0 || u.FreeBytes > u.TotalBytes {
		t.Errorf("usage %+v", u)
	}
}

// lockPair opens a file twice.
func lockPair(t *testing.T, fsys vfs.FS) (a, b vfs.File) {
	t.Helper()
	a = create(t, fsys, "f", []byte("short"))
	b = open(t, fsys, "f", vfs.ReadOnly)
	supported(t, a.Lock(vfs.LockRead))
	must(t, a.Unlock())
	return a, b
}

func testLocks(t *testing.T, fsys vfs.FS) {
	a, b := lockPair(t, fsys)
	for _, c := range []struct {
		a, b     vfs.LockKind
		conflict bool
	}{
		{vfs.LockRead, vfs.LockRead, false},
		{vfs.LockRead, vfs.LockWrite, true},
		{vfs.LockWrite, vfs.LockRead, true},
		{vfs.LockWrite, vfs.LockWrite, true},
	} {
		must(t, a.Lock(c.a))
		err := b.Lock(c.b)
		if c.conflict {
			wantErr(t, "locked for "+c.a.String()+", lock for "+c.b.String(), err, block.ErrLocked)
		} else {
			must(t, err)
		}
		must(t, b.Unlock())
		must(t, b.Unlock())
		must(t, a.Unlock())
		must(t, b.Lock(c.b)) // nothing of a's is left, and nothing of b's failure
		must(t, b.Unlock())
	}
	must(t, a.Lock(vfs.LockWrite))
	must(t, a.Close())
	must(t, b.Lock(vfs.LockWrite))
}

func testLockChange(t *testing.T, fsys vfs.FS) {
	a, b := lockPair(t, fsys)
	must(t, a.Lock(vfs.LockRead))
	must(t, b.Lock(vfs.LockRead))
	wantErr(t, "upgrade beside a reader", a.Lock(vfs.LockWrite), block.ErrLocked)

	// The failed upgrade has kept a's lock, and taken no more than that.
	wantErr(t, "upgrade beside a reader that failed to", b.Lock(vfs.LockWrite), block.ErrLocked)
	must(t, b.Unlock())
	must(t, b.Lock(vfs.LockRead))
	must(t, b.Unlock())
	wantErr(t, "write beside a reader", b.Lock(vfs.LockWrite), block.ErrLocked)

	must(t, a.Lock(vfs.LockWrite))
	must(t, a.Lock(vfs.LockWrite))
	wantErr(t, "read beside an upgraded writer", b.Lock(vfs.LockRead), block.ErrLocked)
	must(t, a.Lock(vfs.LockRead))
	must(t, b.Lock(vfs.LockRead))
}
