package hostmount

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver"
)

const mib = 1 << 20

func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// loopDevice returns an empty block device of a size that is gone after the test.
func loopDevice(t *testing.T, sizeBytes int64) string {
	t.Helper()
	testenv.Root(t)
	file := filepath.Join(t.TempDir(), "disk")
	must(t, "make", os.WriteFile(file, nil, 0o600))
	must(t, "truncate", os.Truncate(file, sizeBytes))
	return attachLoop(t, file)
}

// attachLoop returns a block device of a file that is gone after the test.
func attachLoop(t *testing.T, file string, options ...string) string {
	t.Helper()
	losetup := testenv.Oracle(t, "losetup")
	out, err := exec.Command(losetup, append(options, "--find", "--show", file)...).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command(losetup, "--detach", device).CombinedOutput(); err != nil {
			t.Errorf("losetup: %v: %s", err, out)
		}
	})
	return device
}

// mountPoint returns a directory in which nothing is mounted any more after the test.
func mountPoint(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	must(t, "mkdir", os.Mkdir(path, 0o755))
	unmountLater(t, path)
	return path
}

func unmountLater(t *testing.T, path string) {
	t.Cleanup(func() {
		for unix.Unmount(path, 0) == nil {
		}
	})
}

func mountsOf(t *testing.T, h *Host, device string) []driver.Mount {
	t.Helper()
	all, err := h.Mounts()
	must(t, "Mounts", err)
	var of []driver.Mount
	for _, m := range all {
		if m.Device == device {
			of = append(of, m)
		}
	}
	return of
}

func TestHost_FileSystems(t *testing.T) {
	for _, fsType := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			testenv.Oracle(t, "mkfs."+fsType)
			device := loopDevice(t, 300*mib)
			h := New()
			found, err := h.FileSystem(device)
			if err != nil || found != "" {
				t.Errorf("an empty device has %q, %v", found, err)
			}
			path := mountPoint(t, `a mount \ point`)
			if err := h.FormatAndMount(device, path, fsType, []string{"ro"}); err == nil {
				t.Error("an empty device was mounted read-only")
			}
			must(t, "FormatAndMount", h.FormatAndMount(device, path, fsType, []string{"nosuid"}))
			must(t, "write", os.WriteFile(filepath.Join(path, "file"), []byte("data"), 0o600))
			if found, err := h.FileSystem(device); err != nil || found != fsType {
				t.Errorf("the device has %q, %v", found, err)
			}
			if err := h.FormatAndMount(device, mountPoint(t, "other"), fsType, nil); !errors.Is(err, block.ErrBusy) {
				t.Errorf("mounted twice: %v, want ErrBusy", err)
			}
			must(t, "Grow what needs none", h.Grow(device, path))
			usage, err := h.Usage(path)
			if err != nil || usage.TotalBytes < 100*mib || usage.TotalBytes > 300*mib || usage.UsedBytes+usage.AvailableBytes > usage.TotalBytes {
				t.Errorf("usage %+v, %v", usage, err)
			}
			testBinds(t, h, device, path, fsType)
			must(t, "Unmount", h.Unmount(path))
			if left := mountsOf(t, h, device); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			must(t, "mount again", h.FormatAndMount(device, path, fsType, nil))
			if text, err := os.ReadFile(filepath.Join(path, "file")); err != nil || string(text) != "data" {
				t.Errorf("the file has %q, %v", text, err)
			}
			must(t, "Unmount", h.Unmount(path))
		})
	}
}

func testBinds(t *testing.T, h *Host, device, path, fsType string) {
	t.Helper()
	writable, readOnly, remounted := mountPoint(t, "writable"), mountPoint(t, "readOnly"), mountPoint(t, "remounted")
	must(t, "Bind", h.Bind(path, writable, false))
	must(t, "Bind read-only", h.Bind(path, readOnly, true))
	must(t, "Bind", h.Bind(path, remounted, false))
	must(t, "RemountReadOnly", h.RemountReadOnly(remounted))
	want := map[string]bool{path: false, writable: false, readOnly: true, remounted: true}
	for _, m := range mountsOf(t, h, device) {
		ro, ok := want[m.Path]
		if !ok || m.ReadOnly != ro || m.FSType != fsType {
			t.Errorf("mount %+v, read-only %t", m, ro)
		}
		delete(want, m.Path)
		var st unix.Statfs_t
		if err := unix.Statfs(m.Path, &st); err != nil || st.Flags&unix.ST_NOSUID == 0 {
			t.Errorf("%s is not nosuid any more (%v)", m.Path, err)
		}
	}
	if len(want) > 0 {
		t.Errorf("not in the mount table: %v", want)
	}
	for _, each := range []string{writable, readOnly, remounted} {
		must(t, "Unmount", h.Unmount(each))
	}
}

// A copy of a mounted file system needs its journal replayed, which takes writing: who asks
// for it read-only is told what to do.
func TestHost_UncleanReadOnly(t *testing.T) {
	for _, fsType := range []string{"ext4", "xfs"} {
		t.Run(fsType, func(t *testing.T) {
			testenv.Oracle(t, "mkfs."+fsType)
			device, h := loopDevice(t, 300*mib), New()
			path := mountPoint(t, "used")
			must(t, "FormatAndMount", h.FormatAndMount(device, path, fsType, nil))
			must(t, "write", os.WriteFile(filepath.Join(path, "file"), []byte("data"), 0o600))
			unix.Sync()
			copied := filepath.Join(t.TempDir(), "copy")
			out, err := exec.Command("dd", "if="+device, "of="+copied, "bs=1M", "conv=sparse").CombinedOutput()
			if err != nil {
				t.Fatalf("dd: %v: %s", err, out)
			}
			must(t, "Unmount", h.Unmount(path))
			readOnly := attachLoop(t, copied, "--read-only")
			err = h.FormatAndMount(readOnly, mountPoint(t, "copy"), fsType, []string{"ro"})
			if !errors.Is(err, block.ErrReadOnly) || !strings.Contains(err.Error(), "was mounted when it was snapshotted or copied") {
				t.Errorf("an unclean file system read-only: %v", err)
			}
		})
	}
}

func TestHost_BindDevice(t *testing.T) {
	device := loopDevice(t, mib)
	h := New()
	target := filepath.Join(t.TempDir(), "device")
	must(t, "make", os.WriteFile(target, nil, 0o600))
	unmountLater(t, target)
	must(t, "Bind", h.Bind(device, target, false))
	mounts := mountsOf(t, h, device)
	if len(mounts) != 1 || mounts[0] != (driver.Mount{Path: target, Device: device}) {
		t.Errorf("mounts %+v", mounts)
	}
	must(t, "Unmount", h.Unmount(target))
	if left := mountsOf(t, h, device); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestHost_UnfinishedXFS finds what mkfs.xfs leaves when it is killed.
func TestHost_UnfinishedXFS(t *testing.T) {
	mkfs := testenv.Oracle(t, "mkfs.xfs")
	device := loopDevice(t, 300*mib)
	if out, err := exec.Command(mkfs, "-q", device).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.xfs: %v: %s", err, out)
	}
	f, err := os.OpenFile(device, os.O_WRONLY|os.O_SYNC, 0)
	must(t, "open", err)
	_, err = f.WriteAt([]byte{1}, xfsInProgressOffset)
	must(t, "mark as unfinished", errors.Join(err, f.Close()))
	h := New()
	if found, err := h.FileSystem(device); err != nil || found != "" {
		t.Errorf("the device has %q, %v, want nothing", found, err)
	}
	path := mountPoint(t, "m")
	must(t, "FormatAndMount", h.FormatAndMount(device, path, "ext4", nil))
	must(t, "Unmount", h.Unmount(path))
	if found, err := h.FileSystem(device); err != nil || found != "ext4" {
		t.Errorf("the device has %q, %v", found, err)
	}
}

func TestHost_PartitionTable(t *testing.T) {
	device := loopDevice(t, 16*mib)
	mbr := make([]byte, 512)
	copy(mbr[446:], []byte{0, 0, 2, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0x10, 0, 0})
	mbr[510], mbr[511] = 0x55, 0xaa
	f, err := os.OpenFile(device, os.O_WRONLY|os.O_SYNC, 0)
	must(t, "open", err)
	_, err = f.Write(mbr)
	must(t, "write", errors.Join(err, f.Close()))
	if found, err := New().FileSystem(device); err != nil || found != driver.PartitionTable {
		t.Errorf("the device has %q, %v", found, err)
	}
}

func TestHost_NoDevice(t *testing.T) {
	h := New()
	if found, err := h.FileSystem(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Errorf("no device has %q", found)
	}
	empty := filepath.Join(t.TempDir(), "empty")
	must(t, "make", os.WriteFile(empty, nil, 0o600))
	if found, err := h.FileSystem(empty); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("a device without a size has %q, %v, want ErrInvalid", found, err)
	}
	if err := h.FormatAndMount(empty+"?", t.TempDir(), "ext4", nil); err == nil {
		t.Error("no device was mounted")
	}
}

func TestUnescape(t *testing.T) {
	for text, want := range map[string]string{
		"/plain": "/plain", `/a\040b`: "/a b", `/a\134b`: `/a\b`, `/a\011\012`: "/a\t\n", `/a\04`: `/a\04`, `/a\`: `/a\`, `/a\999`: `/a\999`,
	} {
		if got := unescape(text); got != want {
			t.Errorf("%s: got %q, want %q", text, got, want)
		}
	}
}
