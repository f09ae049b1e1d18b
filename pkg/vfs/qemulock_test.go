package vfs_test

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// qemuFormats are those whose images QEMU opens with the full set of locks.
var qemuFormats = []string{"qcow2", "vmdk", "vdi", "vhdx"}

// newQemuImage makes an image and opens it.
func newQemuImage(t *testing.T, d *vfs.Dir, format string) vfs.File {
	t.Helper()
	qemuImg := testenv.Oracle(t, "qemu-img")
	run(t, nil, qemuImg, "create", "-q", "-f", format, d.Path("image"), "16M")
	f, err := d.Open("image", vfs.ReadWrite)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// run runs a program that must succeed, or fail and say something.
func run(t *testing.T, wantSaid []byte, program string, args ...string) {
	t.Helper()
	out, err := exec.Command(program, args...).CombinedOutput()
	switch {
	case wantSaid == nil && err != nil:
		t.Errorf("%s %q: %v\n%s", filepath.Base(program), args, err, out)
	case wantSaid != nil && (err == nil || !strings.Contains(string(out), string(wantSaid))):
		t.Errorf("%s %q: %v, want it to say %q\n%s", filepath.Base(program), args, err, wantSaid, out)
	}
}

func TestDirLock_SeenByQemu(t *testing.T) {
	refused := []byte("Failed to get")
	for _, format := range qemuFormats {
		t.Run(format, func(t *testing.T) {
			qemuImg, qemuIO := testenv.Oracle(t, "qemu-img"), testenv.Oracle(t, "qemu-io")
			d := openTempDir(t)
			f := newQemuImage(t, d, format)
			image := d.Path("image")

			must(t, f.Lock(vfs.LockWrite))
			run(t, refused, qemuImg, "info", image)
			run(t, refused, qemuIO, "-r", "-f", format, "-c", "read 0 512", image)
			run(t, refused, qemuIO, "-f", format, "-c", "write 0 512", image)
			run(t, nil, qemuImg, "info", "--force-share", image)

			must(t, f.Lock(vfs.LockRead))
			run(t, nil, qemuImg, "info", image)
			run(t, nil, qemuIO, "-r", "-f", format, "-c", "read 0 512", image)
			run(t, refused, qemuIO, "-f", format, "-c", "write 0 512", image)

			must(t, f.Unlock())
			run(t, nil, qemuIO, "-f", format, "-c", "write 0 512", image)
		})
	}
}

// QEMU's raw driver passes on what its own user shares: qemu-img lets others write while
// it reads. Its writers still see us.
func TestDirLock_SeenByQemuRaw(t *testing.T) {
	qemuIO := testenv.Oracle(t, "qemu-io")
	d := openTempDir(t)
	f := newQemuImage(t, d, "raw")
	for _, kind := range []vfs.LockKind{vfs.LockRead, vfs.LockWrite} {
		must(t, f.Lock(kind))
		run(t, []byte("Failed to get"), qemuIO, "-f", "raw", "-c", "write 0 512", d.Path("image"))
	}
}

// startQemuNBD serves the image until the test ends.
func startQemuNBD(t *testing.T, image, format string, args ...string) (stop func()) {
	t.Helper()
	dir := t.TempDir()
	ready := filepath.Join(dir, "pid") // written once the image is open; the socket is there before
	args = append(args, "-f", format, "-k", filepath.Join(dir, "socket"), "--pid-file", ready, "--persistent", image)
	cmd := exec.Command(testenv.Oracle(t, "qemu-nbd"), args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var said strings.Builder
	cmd.Stderr = &said
	must(t, cmd.Start())
	stopped := false
	stop = func() {
		if !stopped {
			cmd.Process.Kill()
			cmd.Wait()
			stopped = true
		}
	}
	t.Cleanup(stop)
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(ready); err == nil {
			return stop
		}
		if time.Now().After(deadline) {
			stop()
			t.Fatalf("qemu-nbd %q does not serve: %s", args, said.String())
		}
	}
}

func TestDirLock_SeesQemu(t *testing.T) {
	for _, format := range append([]string{"raw"}, qemuFormats...) {
		t.Run(format, func(t *testing.T) {
			d := openTempDir(t)
			f := newQemuImage(t, d, format)

			stop := startQemuNBD(t, d.Path("image"), format)
			for _, kind := range []vfs.LockKind{vfs.LockRead, vfs.LockWrite} {
				err := f.Lock(kind)
				if !errors.Is(err, block.ErrLocked) || !strings.Contains(err.Error(), d.Path("image")) || !strings.Contains(err.Error(), "for writing") {
					t.Errorf("lock for %s beside a writer: %v; want %v, the file and that it is held for writing", kind, err, block.ErrLocked)
				}
			}
			stop()
			must(t, f.Lock(vfs.LockWrite))
			must(t, f.Unlock())
			if format == "raw" {
				return // its readers let others write
			}
			stop = startQemuNBD(t, d.Path("image"), format, "--read-only")
			must(t, f.Lock(vfs.LockRead))
			err := f.Lock(vfs.LockWrite)
			if !errors.Is(err, block.ErrLocked) || !strings.Contains(err.Error(), "held for reading") {
				t.Errorf("lock for writing beside a reader: %v; want %v and that it is held for reading", err, block.ErrLocked)
			}
			stop()
			must(t, f.Lock(vfs.LockWrite))
		})
	}
}

// heldBytes lists the lock bytes on a file that anybody holds, as the kernel sees them.
func heldBytes(t *testing.T, path string) []string {
	t.Helper()
	info, err := os.Stat(path)
	must(t, err)
	inode := fmt.Sprint(":", info.Sys().(*syscall.Stat_t).Ino, " ")
	table, err := os.Open("/proc/locks")
	must(t, err)
	defer table.Close()
	var held []string
	for lines := bufio.NewScanner(table); lines.Scan(); {
		// "1: OFDLCK ADVISORY  READ -1 fe:00:1234 100 101"
		if line := lines.Text(); strings.Contains(line, inode) {
			fields := strings.Fields(line)
			held = append(held, strings.Join(append(fields[1:4:4], fields[6:]...), " "))
		}
	}
	slices.Sort(held)
	return held
}

// What we hold is, byte for byte, what QEMU holds.
func TestDirLock_SameBytesAsQemu(t *testing.T) {
	d := openTempDir(t)
	f := newQemuImage(t, d, "qcow2")
	for _, c := range []struct {
		kind vfs.LockKind
		args []string
	}{{vfs.LockRead, []string{"--read-only"}}, {vfs.LockWrite, nil}} {
		stop := startQemuNBD(t, d.Path("image"), "qcow2", c.args...)
		want := heldBytes(t, d.Path("image"))
		stop()
		must(t, f.Lock(c.kind))
		got := heldBytes(t, d.Path("image"))
		must(t, f.Unlock())
		if len(want) == 0 || !slices.Equal(got, want) {
			t.Errorf("for %s we hold\n%s\nand QEMU\n%s", c.kind, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		if left := heldBytes(t, d.Path("image")); len(left) != 0 {
			t.Errorf("after unlocking %s we hold %q", c.kind, left)
		}
	}
}

// Of two that want to write at once, at most one may.
func TestDirLock_Race(t *testing.T) {
	d := openTempDir(t)
	must(t, create(t, d, "f").Close())
	won := 0
	for range 300 {
		files := [2]vfs.File{}
		var errs [2]error
		var both sync.WaitGroup
		for i := range files {
			f, err := d.Open("f", vfs.ReadWrite)
			must(t, err)
			files[i] = f
			both.Go(func() { errs[i] = f.Lock(vfs.LockWrite) })
		}
		both.Wait()
		winners := 0
		for i, err := range errs {
			if err == nil {
				winners++
			} else if !errors.Is(err, block.ErrLocked) {
				t.Errorf("lock: %v", err)
			}
			must(t, files[i].Close())
		}
		if winners > 1 {
			t.Fatal("two hold a lock for writing")
		}
		won += winners
	}
	if won == 0 {
		t.Error("nobody ever got the lock")
	}
}

// A lock belongs to the open file: closing another one of the same file, or the end of a
// child process that inherited nothing, does not give it up.
func TestDirLock_BelongsToOpenFile(t *testing.T) {
	d := openTempDir(t)
	a := create(t, d, "f")
	defer a.Close()
	must(t, a.Lock(vfs.LockWrite))
	b, err := d.Open("f", vfs.ReadWrite)
	must(t, err)
	must(t, b.Close())
	must(t, exec.Command(testenv.Oracle(t, "true")).Run())
	c, err := d.Open("f", vfs.ReadWrite)
	must(t, err)
	defer c.Close()
	if err := c.Lock(vfs.LockRead); !errors.Is(err, block.ErrLocked) {
		t.Errorf("lock: %v, want %v", err, block.ErrLocked)
	}
}

// Close gives the lock up even while a child process that is just being started still
// has the descriptor.
func TestDirLock_CloseUnlocksCopies(t *testing.T) {
	d := openTempDir(t)
	f := create(t, d, "f")
	must(t, f.Lock(vfs.LockWrite))
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	var ours []int // all are found before any is copied: a copy may get a number in fds
	for _, fd := range fds {
		if target, _ := os.Readlink("/proc/self/fd/" + fd.Name()); target == d.Path("f") {
			number, err := strconv.Atoi(fd.Name())
			must(t, err)
			ours = append(ours, number)
		}
	}
	if len(ours) != 1 {
		t.Fatalf("found %d descriptors of the file, want 1", len(ours))
	}
	dup, err := unix.FcntlInt(uintptr(ours[0]), unix.F_DUPFD_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(dup)
	must(t, f.Close())
	g, err := d.Open("f", vfs.ReadWrite)
	must(t, err)
	defer g.Close()
	must(t, g.Lock(vfs.LockWrite))
}

// A program that locks the whole file by fcntl excludes us, too.
func TestDirLock_WholeFileLock(t *testing.T) {
	d := openTempDir(t)
	f := create(t, d, "f")
	defer f.Close()
	other, err := os.OpenFile(d.Path("f"), os.O_RDWR, 0)
	must(t, err)
	defer other.Close()
	must(t, unix.FcntlFlock(other.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}))
	if err := f.Lock(vfs.LockRead); !errors.Is(err, block.ErrLocked) {
		t.Errorf("lock: %v, want %v", err, block.ErrLocked)
	}
}
