package vfs_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func TestOpenDir(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, nil, 0o600))
	for _, path := range []string{filepath.Join(dir, "missing"), file} {
		if d, err := vfs.OpenDir(path); err == nil {
			t.Errorf("opened %s", d.Path("."))
		} else if !strings.Contains(err.Error(), path) {
			t.Errorf("the error does not name %s: %v", path, err)
		}
	}
	t.Chdir(dir)
	must(t, os.Mkdir("store", 0o700))
	d, err := vfs.OpenDir("store")
	must(t, err)
	defer d.Close()
	if got, want := d.Path("a/b"), filepath.Join(dir, "store", "a", "b"); got != want {
		t.Errorf("path %s, want %s", got, want)
	}
	if got, want := d.Path("."), filepath.Join(dir, "store"); got != want {
		t.Errorf("path of the root %s, want %s", got, want)
	}
}

// Messages name the host's path, so that a person finds the file.
func TestDir_ErrorsNameThePath(t *testing.T) {
	d := openTempDir(t)
	must(t, d.Mkdir("d"))
	f := create(t, d, "f")
	must(t, f.Close())
	_, openErr := d.Open("d/missing", vfs.ReadOnly)
	_, createErr := d.Create("d/missing/f")
	_, statErr := d.Stat("d/missing")
	_, readDirErr := d.ReadDir("d/missing")
	for op, err := range map[string]error{
		"open": openErr, "create": createErr, "stat": statErr, "readdir": readDirErr,
		"remove": d.Remove("d/missing"), "rename": d.Rename("d/missing", "f"), "mkdir": d.Mkdir("d/missing/e"), "syncdir": d.SyncDir("d/missing"),
	} {
		if err == nil || !strings.Contains(err.Error(), d.Path("d/missing")) {
			t.Errorf("%s: %v; want it to name %s", op, err, d.Path("d/missing"))
		}
	}
	if err := f.Sync(); err == nil || !strings.Contains(err.Error(), d.Path("f")) {
		t.Errorf("sync: %v; want it to name %s", err, d.Path("f"))
	}
}

func TestDir_LinksOutOfTheRoot(t *testing.T) {
	outside := t.TempDir()
	must(t, os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o600))
	d := openTempDir(t)
	must(t, d.Mkdir("sub"))
	up := strings.Repeat("../", 30)
	for name, target := range map[string]string{
		"absfile": filepath.Join(outside, "secret"), "absdir": outside,
		"relfile": up + filepath.Join(outside, "secret")[1:], "reldir": up + outside[1:],
		"parent": "..", "sub/grandparent": "../..", "etc": "/etc",
	} {
		must(t, os.Symlink(target, d.Path(name)))
	}
	f := create(t, d, "mine")
	must(t, f.Close())

	for _, name := range []string{
		"absfile", "relfile", "absdir/secret", "reldir/secret", "absdir", "reldir", "parent", "sub/grandparent", "etc/hostname", "absdir/new",
	} {
		_, openErr := d.Open(name, vfs.ReadOnly)
		_, openRWErr := d.Open(name, vfs.ReadWrite)
		_, statErr := d.Stat(name)
		_, readDirErr := d.ReadDir(name)
		for op, err := range map[string]error{
			"open": openErr, "open for writing": openRWErr, "stat": statErr, "readdir": readDirErr, "syncdir": d.SyncDir(name),
		} {
			if !errors.Is(err, fs.ErrInvalid) {
				t.Errorf("%s %s: %v, want %v", op, name, err, fs.ErrInvalid)
			}
		}
	}
	for _, name := range []string{"absdir/new", "reldir/new", "parent/new", "sub/grandparent/new"} {
		_, createErr := d.Create(name)
		for op, err := range map[string]error{
			"create": createErr, "mkdir": d.Mkdir(name), "rename": d.Rename("mine", name),
		} {
			if !errors.Is(err, fs.ErrInvalid) {
				t.Errorf("%s %s: %v, want %v", op, name, err, fs.ErrInvalid)
			}
		}
	}
	for op, err := range map[string]error{
		"remove": d.Remove("absdir/secret"), "rename": d.Rename("absdir/secret", "stolen"),
	} {
		if !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("%s absdir/secret: %v, want %v", op, err, fs.ErrInvalid)
		}
	}
	// A link as the last part is taken, replaced and removed as what it is.
	if _, err := d.Create("absfile"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("create over a link: %v, want %v", err, fs.ErrExist)
	}
	must(t, d.Rename("absfile", "link"))
	must(t, d.Rename("mine", "link"))
	must(t, d.Remove("relfile"))
	must(t, d.Remove("absdir"))
	entries, err := os.ReadDir(outside)
	must(t, err)
	if len(entries) != 1 {
		t.Errorf("outside the root there is now %v", entries)
	}
	if got, err := os.ReadFile(filepath.Join(outside, "secret")); err != nil || string(got) != "secret" {
		t.Errorf("outside the root the file is now %q, %v", got, err)
	}
}

func TestDir_LinksWithinTheRoot(t *testing.T) {
	d := openTempDir(t)
	must(t, d.Mkdir("d"))
	f := create(t, d, "d/f")
	defer f.Close()
	fill(t, f, 'a', 0, 1)
	must(t, os.Symlink("d/f", d.Path("l")))
	must(t, os.Symlink("../d", d.Path("d/self")))
	for _, name := range []string{"l", "d/self/f", "d/self/self/f"} {
		if got := letters(readAll(t, d, name)); got != "a" {
			t.Errorf("%s holds %s", name, got)
		}
	}
	must(t, os.Symlink("loop", d.Path("loop")))
	if _, err := d.Open("loop", vfs.ReadOnly); err == nil {
		t.Error("opened a link to itself")
	}
}

// Special files are refused at once: opening a fifo must not wait for its other end.
func TestDir_SpecialFiles(t *testing.T) {
	d := openTempDir(t)
	must(t, unix.Mkfifo(d.Path("fifo"), 0o600))
	must(t, os.Symlink("fifo", d.Path("tofifo")))
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(socket)
	t.Chdir(d.Path("."))
	must(t, unix.Bind(socket, &unix.SockaddrUnix{Name: "socket"}))
	names := []string{"fifo", "tofifo", "socket"}
	if unix.Mknod(d.Path("null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))) == nil {
		names = append(names, "null")
	}
	done := make(chan bool)
	go func() {
		defer close(done)
		for _, name := range names {
			for _, mode := range []vfs.Mode{vfs.ReadOnly, vfs.ReadWrite} {
				if f, err := d.Open(name, mode); !errors.Is(err, fs.ErrInvalid) {
					t.Errorf("open %s: %v, %v; want %v", name, f, err, fs.ErrInvalid)
				}
			}
			if _, err := d.ReadDir(name); err == nil {
				t.Errorf("listed %s", name)
			}
			if _, err := d.Create(name); !errors.Is(err, fs.ErrExist) {
				t.Errorf("create %s: %v", name, err)
			}
		}
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatal("opening a special file blocks")
	}
}

// Somebody who swaps a file for a fifo all the time makes Open fail at worst.
func TestDir_OpenWhileSwapped(t *testing.T) {
	d := openTempDir(t)
	must(t, os.WriteFile(d.Path("file"), nil, 0o600))
	must(t, unix.Mkfifo(d.Path("fifo"), 0o600))
	must(t, os.WriteFile(d.Path("x"), nil, 0o600))
	stop, stopped := make(chan bool), make(chan bool)
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
			}
			unix.Renameat2(unix.AT_FDCWD, d.Path("x"), unix.AT_FDCWD, d.Path("fifo"), unix.RENAME_EXCHANGE)
		}
	}()
	opened, refused := 0, 0
	for deadline := time.Now().Add(300 * time.Millisecond); time.Now().Before(deadline); {
		f, err := d.Open("x", vfs.ReadOnly)
		switch {
		case err == nil:
			opened++
			if _, err := f.ReadAt(make([]byte, 1), 0); err == nil || errors.Is(err, syscall.ESPIPE) {
				t.Errorf("what was opened is no file: %v", err)
			}
			must(t, f.Close())
		case errors.Is(err, fs.ErrInvalid):
			refused++
		default:
			t.Fatalf("open: %v", err)
		}
	}
	close(stop)
	<-stopped
	if opened == 0 || refused == 0 {
		t.Skipf("the race did not happen: opened %d times, refused %d times", opened, refused)
	}
}

// Open waits for a lease to be given back, as file servers on this host hold them.
func TestDir_OpenLeasedFile(t *testing.T) {
	d := openTempDir(t)
	must(t, os.WriteFile(d.Path("f"), nil, 0o600))
	holder, err := os.OpenFile(d.Path("f"), os.O_RDWR, 0)
	must(t, err)
	defer holder.Close()
	fd := holder.Fd()
	if _, err := unix.FcntlInt(fd, unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		t.Skipf("no leases here: %v", err)
	}
	const held = 100 * time.Millisecond
	time.AfterFunc(held, func() { unix.FcntlInt(fd, unix.F_SETLEASE, unix.F_UNLCK) })
	start := time.Now()
	f, err := d.Open("f", vfs.ReadWrite)
	must(t, err)
	defer f.Close()
	if took := time.Since(start); took < held/2 {
		t.Errorf("the lease was not in the way: opened after %v", took)
	}
}

func TestDir_ReadWriteDoNotAllocate(t *testing.T) {
	f := create(t, openTempDir(t), "f")
	defer f.Close()
	p := bytes.Repeat([]byte{'a'}, 4096)
	if n := testing.AllocsPerRun(200, func() { f.WriteAt(p, 8192) }); n != 0 {
		t.Errorf("WriteAt allocates %v times", n)
	}
	if n := testing.AllocsPerRun(200, func() { f.ReadAt(p, 8192) }); n != 0 {
		t.Errorf("ReadAt allocates %v times", n)
	}
}

// mountTmpfs gives a small file system of its own.
func mountTmpfs(t *testing.T, bytes string) *vfs.Dir {
	t.Helper()
	testenv.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("vfs-test", dir, "tmpfs", 0, "size="+bytes); err != nil {
		t.Skipf("no tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	d, err := vfs.OpenDir(dir)
	must(t, err)
	t.Cleanup(func() { d.Close() })
	return d
}

func TestDir_FullStore(t *testing.T) {
	d := mountTmpfs(t, "1m")
	f := create(t, d, "f")
	defer f.Close()
	p := make([]byte, 2<<20)
	n, err := f.WriteAt(p, 0)
	if block.Errno(err) != syscall.ENOSPC || n >= len(p) {
		t.Errorf("write: %d, %v; want ENOSPC", n, err)
	}
	if err := f.Allocate(0, 2<<20); block.Errno(err) != syscall.ENOSPC {
		t.Errorf("allocate: %v; want ENOSPC", err)
	}
	u, err := d.Usage()
	must(t, err)
	if u.TotalBytes != 1<<20 || u.FreeBytes > 64<<10 {
		t.Errorf("usage %+v", u)
	}
	must(t, f.PunchHole(0, 512<<10))
	if u, err = d.Usage(); err != nil || u.FreeBytes < 512<<10 {
		t.Errorf("usage after a punch %+v, %v", u, err)
	}
}

func TestDir_ReadOnlyStore(t *testing.T) {
	d := mountTmpfs(t, "1m")
	must(t, create(t, d, "f").Close())
	if err := unix.Mount("", d.Path("."), "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Skipf("remount: %v", err)
	}
	_, openErr := d.Open("f", vfs.ReadWrite)
	_, createErr := d.Create("g")
	for op, err := range map[string]error{"open": openErr, "create": createErr, "remove": d.Remove("f"), "mkdir": d.Mkdir("d")} {
		if !errors.Is(err, syscall.EROFS) || block.Errno(err) != syscall.EPERM {
			t.Errorf("%s: %v; want EROFS", op, err)
		}
	}
	f, err := d.Open("f", vfs.ReadOnly)
	must(t, err)
	must(t, f.Close())
}
