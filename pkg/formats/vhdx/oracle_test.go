package vhdx_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vhdx"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// run runs an oracle in a directory.
func run(t testing.TB, dir, program string, args ...string) string {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", filepath.Base(program), args, err, out)
	}
	return string(out)
}

// createIn creates an image in a directory of the host.
func createIn(t testing.TB, dir string, req formats.CreateRequest) {
	t.Helper()
	d, err := vfs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	mustCreate(t, d, req)
}

func mustCreate(t testing.TB, fsys vfs.FS, req formats.CreateRequest) {
	t.Helper()
	req.FS = fsys
	if err := (vhdx.Format{}).Create(context.Background(), req); err != nil {
		t.Fatal(err)
	}
}

// scribble writes, zeroes and discards at random, and keeps disk, what the image must hold,
// up to date; what was discarded is read.
func scribble(t testing.TB, r *rand.Rand, image *formats.Image, disk []byte, count int) {
	t.Helper()
	for range count {
		off := r.Int64N(int64(len(disk)))
		n := 1 + r.Int64N(min(3<<20, int64(len(disk))-off))
		part := disk[off : off+n]
		var err error
		switch r.IntN(6) {
		case 0:
			if err = image.WriteZeroes(off, n, 0); err == nil {
				clear(part)
			}
		case 1:
			if err = image.Discard(off, n); err == nil {
				_, err = image.ReadAt(part, off)
			}
		case 2:
			err = image.Flush()
		default:
			for i := range part {
				part[i] = byte(r.Uint32())
			}
			_, err = image.WriteAt(part, off)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func readGuest(t testing.TB, image *formats.Image) []byte {
	t.Helper()
	p := make([]byte, image.Info().SizeBytes)
	// Lengths that are multiples of nothing cross every boundary somewhere.
	for off := 0; off < len(p); off += 123457 {
		part := p[off:min(off+123457, len(p))]
		if _, err := image.ReadAt(part, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// kinds are kinds of images that QEMU reads and writes.
var kinds = map[string]formats.CreateRequest{
	"dynamic":      {ClusterBytes: 1 << 20},
	"large blocks": {ClusterBytes: 8 << 20},
	"largest":      {ClusterBytes: 256 << 20},
	"long log":     {ClusterBytes: 2 << 20, Extra: map[string]string{"log_size": "4194304"}},
	"fixed":        {Subformat: "fixed", ClusterBytes: 1 << 20},
	"preallocated": {ClusterBytes: 4 << 20, Preallocation: formats.PreallocateFull},
	"sectors":      {ClusterBytes: 1 << 20, Extra: map[string]string{"physical_sector_size": "512"}},
}

// TestOracle_QEMU: what we write QEMU reads and finds no fault with; what it writes then,
// through its own log, we read.
func TestOracle_QEMU(t *testing.T) {
	qemuImg, qemuIO := testenv.Oracle(t, "qemu-img"), testenv.Oracle(t, "qemu-io")
	for name, req := range kinds {
		t.Run(name, func(t *testing.T) {
			r := testenv.Rand(t)
			dir := t.TempDir()
			disk := make([]byte, 9<<20+512*7)
			req.Name, req.SizeBytes = "a.vhdx", int64(len(disk))
			createIn(t, dir, req)
			image := openDir(t, dir, "a.vhdx", vfs.ReadWrite)
			scribble(t, r, image, disk, 20)
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			compareWithQEMU(t, qemuImg, dir, disk)

			var commands []string
			for range 10 {
				off, pattern := r.Int64N(int64(len(disk))/512-200)*512, 1+r.IntN(255)
				n := (1 + r.Int64N(200)) * 512
				commands = append(commands, "-c", fmt.Sprintf("write -P %d %d %d", pattern, off, n))
				copy(disk[off:], bytes.Repeat([]byte{byte(pattern)}, int(n)))
			}
			run(t, dir, qemuIO, append(append([]string{"-f", "vhdx"}, commands...), "a.vhdx")...)
			image = openDir(t, dir, "a.vhdx", vfs.ReadWrite)
			if !bytes.Equal(readGuest(t, image), disk) {
				t.Fatal("what QEMU wrote reads differently")
			}
			for _, p := range problems(t, image) {
				t.Errorf("check: %s", p.Text)
			}
			scribble(t, r, image, disk, 20)
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			compareWithQEMU(t, qemuImg, dir, disk)
		})
	}
}

// compareWithQEMU has QEMU check a.vhdx and compare it with disk.
func compareWithQEMU(t *testing.T, qemuImg, dir string, disk []byte) {
	t.Helper()
	if out := run(t, dir, qemuImg, "check", "-f", "vhdx", "a.vhdx"); !strings.Contains(out, "No errors") {
		t.Errorf("qemu-img check: %s", out)
	}
	if err := os.WriteFile(filepath.Join(dir, "want.raw"), disk, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, dir, qemuImg, "compare", "-f", "vhdx", "-F", "raw", "a.vhdx", "want.raw")
}

// TestOracle_QEMUCreates reads and writes what qemu-img creates.
func TestOracle_QEMUCreates(t *testing.T) {
	qemuImg := testenv.Oracle(t, "qemu-img")
	for _, options := range []string{
		"subformat=dynamic", "subformat=fixed", "subformat=fixed,block_state_zero=off", "block_state_zero=off",
		"block_size=1M", "block_size=256M,log_size=3M",
	} {
		t.Run(options, func(t *testing.T) {
			r := testenv.Rand(t)
			dir := t.TempDir()
			disk := make([]byte, 5<<20+512*3)
			for i := range disk[:3<<20] {
				disk[i] = byte(r.Uint32())
			}
			if err := os.WriteFile(filepath.Join(dir, "a.raw"), disk, 0o600); err != nil {
				t.Fatal(err)
			}
			run(t, dir, qemuImg, "convert", "-f", "raw", "-O", "vhdx", "-o", options, "a.raw", "a.vhdx")
			image := openDir(t, dir, "a.vhdx", vfs.ReadWrite)
			if got := readGuest(t, image); !bytes.Equal(got[:len(disk)], disk) {
				t.Fatal("it reads differently")
			}
			disk = append(disk, make([]byte, int(image.Info().SizeBytes)-len(disk))...)
			for _, p := range problems(t, image) {
				t.Errorf("check: %s", p.Text)
			}
			scribble(t, r, image, disk, 20)
			if err := image.Resize(image.Info().SizeBytes + 3<<20); err != nil {
				t.Fatal(err)
			}
			disk = append(disk, make([]byte, 3<<20)...)
			scribble(t, r, image, disk, 10)
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			compareWithQEMU(t, qemuImg, dir, disk)
		})
	}
}

// TestOracle_VHDI: libvhdi opens what we write, and agrees about its size and kind.
func TestOracle_VHDI(t *testing.T) {
	vhdiinfo := testenv.Oracle(t, "vhdiinfo")
	dir := t.TempDir()
	createIn(t, dir, formats.CreateRequest{Name: "dynamic.vhdx", SizeBytes: 40 << 20})
	createIn(t, dir, formats.CreateRequest{Name: "fixed.vhdx", SizeBytes: 40 << 20, Subformat: "fixed"})
	image := openDir(t, dir, "dynamic.vhdx", vfs.ReadWrite)
	scribble(t, testenv.Rand(t), image, make([]byte, 40<<20), 10)
	parent, err := image.Base()
	if err != nil {
		t.Fatal(err)
	}
	createIn(t, dir, formats.CreateRequest{Name: "child.vhdx", Parent: &formats.Parent{Name: "dynamic.vhdx", Layer: parent}})
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	var linkage string
	for _, detail := range openDir(t, dir, "child.vhdx", vfs.ReadOnly).Layers()[0].Codec.Describe().Details {
		if detail.Name == "parent_linkage" {
			linkage = strings.Trim(detail.Value.(string), "{}")
		}
	}
	if out := run(t, dir, vhdiinfo, "child.vhdx"); !strings.Contains(out, linkage) {
		t.Errorf("vhdiinfo does not know the parent as %s:\n%s", linkage, out)
	}
	for name, kind := range map[string]string{"dynamic.vhdx": "Dynamic", "fixed.vhdx": "Fixed", "child.vhdx": "Differential"} {
		out := run(t, dir, vhdiinfo, name)
		for _, want := range []string{kind, "(41943040 bytes)"} {
			if !strings.Contains(out, want) {
				t.Errorf("vhdiinfo %s does not say %q:\n%s", name, want, out)
			}
		}
	}
}

// TestOracle_VHDIReadsChains: libvhdi reads chains of differencing images, sector bitmaps
// and all, as we do.
func TestOracle_VHDIReadsChains(t *testing.T) {
	testenv.Oracle(t, "vhdiinfo") // the library's own program
	python := testenv.Oracle(t, "python3")
	script, err := filepath.Abs("testdata/libvhdi_read.py")
	if err != nil {
		t.Fatal(err)
	}
	for _, sector := range []string{"512", "4096"} {
		t.Run("sectors of "+sector, func(t *testing.T) {
			r := testenv.Rand(t)
			dir := t.TempDir()
			disk := make([]byte, 9<<20+4096*7)
			createIn(t, dir, formats.CreateRequest{
				Name: "0.vhdx", SizeBytes: int64(len(disk)), Extra: map[string]string{"logical_sector_size": sector},
			})
			names := []string{"0.vhdx"}
			for i := 1; ; i++ {
				image := openDir(t, dir, names[i-1], vfs.ReadWrite)
				scribbleFinely(t, r, image, disk)
				if i == 4 {
					if err := image.Close(); err != nil {
						t.Fatal(err)
					}
					break
				}
				names = append(names, fmt.Sprintf("%d.vhdx", i))
				parent, err := image.Base()
				if err != nil {
					t.Fatal(err)
				}
				createIn(t, dir, formats.CreateRequest{
					Name: names[i], ClusterBytes: 1 << 20 << i, Parent: &formats.Parent{Name: names[i-1], Layer: parent},
				})
				if err := image.Close(); err != nil {
					t.Fatal(err)
				}
			}
			run(t, dir, python, append([]string{script, "out.raw"}, names...)...)
			got, err := os.ReadFile(filepath.Join(dir, "out.raw"))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, disk) {
				t.Error("libvhdi reads something else")
			}
		})
	}
}

// scribbleFinely makes many small changes, and a few that are whole blocks.
func scribbleFinely(t *testing.T, r *rand.Rand, image *formats.Image, disk []byte) {
	t.Helper()
	for i := range 60 {
		n := 1 + r.Int64N(9000)
		if i%20 == 0 {
			n = 2 << 20
		}
		off := r.Int64N(int64(len(disk)) - n)
		part := disk[off : off+n]
		var err error
		if r.IntN(3) == 0 {
			clear(part)
			err = image.WriteZeroes(off, n, 0)
		} else {
			for j := range part {
				part[j] = byte(r.Uint32())
			}
			_, err = image.WriteAt(part, off)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestOracle_RebasedToNone: a differencing image that no longer stands on anything is one
// that QEMU reads.
func TestOracle_RebasedToNone(t *testing.T) {
	qemuImg := testenv.Oracle(t, "qemu-img")
	r := testenv.Rand(t)
	dir := t.TempDir()
	disk := make([]byte, 9<<20+512*7)
	createIn(t, dir, formats.CreateRequest{Name: "base.vhdx", SizeBytes: int64(len(disk))})
	image := openDir(t, dir, "base.vhdx", vfs.ReadWrite)
	scribble(t, r, image, disk, 10)
	parent, err := image.Base()
	if err != nil {
		t.Fatal(err)
	}
	createIn(t, dir, formats.CreateRequest{Name: "a.vhdx", Parent: &formats.Parent{Name: "base.vhdx", Layer: parent}})
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	image = openDir(t, dir, "a.vhdx", vfs.ReadWrite)
	scribbleFinely(t, r, image, disk)
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	d, err := vfs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	rebasing := formats.Rebasing{Open: formats.OpenOptions{Format: "vhdx"}}
	if err := formats.Rebase(context.Background(), d, "a.vhdx", rebasing, nil); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "base.vhdx")); err != nil {
		t.Fatal(err)
	}
	compareWithQEMU(t, qemuImg, dir, disk)
	image = openDir(t, dir, "a.vhdx", vfs.ReadOnly)
	if !bytes.Equal(readGuest(t, image), disk) {
		t.Error("it reads differently")
	}
	for _, p := range problems(t, image) {
		t.Errorf("check: %s", p.Text)
	}
}
