package vhd_test

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
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vhd"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// qemuImg runs qemu-img in a directory and returns what it printed.
func qemuImg(t testing.TB, dir string, args ...string) string {
	t.Helper()
	return oracle(t, dir, "qemu-img", args...)
}

func oracle(t testing.TB, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(testenv.Oracle(t, name), args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// scribble writes, zeroes and discards at random, on the image and in memory.
func scribble(t testing.TB, r *rand.Rand, image *formats.Image, disk []byte, steps int) {
	t.Helper()
	for range steps {
		off := r.IntN(len(disk))
		n := min(1+r.IntN(1500<<10), len(disk)-off)
		var err error
		switch r.IntN(5) {
		case 0:
			clear(disk[off : off+n])
			err = image.WriteZeroes(int64(off), int64(n), 0)
		case 1:
			if err = image.Discard(int64(off), int64(n)); err == nil {
				_, err = image.ReadAt(disk[off:off+n], int64(off)) // zeroes, or what was there
			}
		default:
			for i := off; i < off+n; i++ {
				disk[i] = byte(r.Uint32())
			}
			_, err = image.WriteAt(disk[off:off+n], int64(off))
		}
		if err == nil && r.IntN(10) == 0 {
			err = image.Flush()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// closeAndJudge closes an image, checks it, and has QEMU compare it with disk.
func closeAndJudge(t testing.TB, dir, name string, image *formats.Image, disk []byte) {
	t.Helper()
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	image = mustOpen(t, dir, name, vfs.ReadOnly)
	result, err := engine.Check(context.Background(), image.Layers()[0], false, nil)
	if err != nil || result.Corruptions > 0 {
		t.Errorf("check: %v, %+v", err, result) // what was discarded is found again by the next opening
	}
	if !bytes.Equal(readGuest(t, image), disk) {
		t.Error("the contents differ from what was written")
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	writeFile(t, dir, "judge.raw", disk)
	qemuImg(t, dir, "compare", "-f", "vpc", "-F", "raw", name, "judge.raw")
}

func create(t testing.TB, dir string, req formats.CreateRequest) {
	t.Helper()
	d, err := vfs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	req.FS = d
	if err := (vhd.Format{}).Create(context.Background(), req); err != nil {
		t.Fatal(err)
	}
}

func TestOracle_ReadsWhatQEMUWrites(t *testing.T) {
	for _, options := range []string{"subformat=dynamic", "subformat=fixed", "subformat=dynamic,force_size=on", "subformat=fixed,force_size=on"} {
		t.Run(options, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			disk := make([]byte, 7<<20+5*512)
			for i := range disk[:1<<20] {
				disk[3<<20+i] = byte(r.Uint32())
			}
			writeFile(t, dir, "raw", disk)
			qemuImg(t, dir, "convert", "-f", "raw", "-O", "vpc", "-o", options, "raw", "a.vhd")
			image := mustOpen(t, dir, "a.vhd", vfs.ReadWrite)
			// The geometry of some sizes is of a larger disk: there, QEMU rounds up.
			if n := image.Info().SizeBytes; n < int64(len(disk)) || n > int64(len(disk))+1<<20 {
				t.Fatalf("%d bytes, want about %d", n, len(disk))
			}
			disk = append(disk, make([]byte, image.Info().SizeBytes-int64(len(disk)))...)
			if !bytes.Equal(readGuest(t, image), disk) {
				t.Error("the contents differ from what QEMU converted")
			}
			scribble(t, r, image, disk, 20)
			closeAndJudge(t, dir, "a.vhd", image, disk)
		})
	}
}

func TestOracle_QEMUReadsWhatWeWrite(t *testing.T) {
	const size = 9<<20 + 3*512
	for name, req := range map[string]formats.CreateRequest{
		"dynamic":  {},
		"4k":       {ClusterBytes: 4 << 10},
		"512k":     {ClusterBytes: 512 << 10},
		"4m":       {ClusterBytes: 4 << 20},
		"metadata": {Preallocation: formats.PreallocateMetadata},
		"falloc":   {Preallocation: formats.PreallocateFalloc},
		"full":     {Preallocation: formats.PreallocateFull},
		"fixed":    {Subformat: "fixed"},
	} {
		t.Run(name, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			req.Name, req.SizeBytes = "a.vhd", size
			create(t, dir, req)
			image := mustOpen(t, dir, req.Name, vfs.ReadWrite)
			disk := make([]byte, size)
			closeAndJudge(t, dir, req.Name, image, disk)
			image = mustOpen(t, dir, req.Name, vfs.ReadWrite)
			scribble(t, r, image, disk, 30)
			closeAndJudge(t, dir, req.Name, image, disk)

			// What QEMU writes next to it is read by us.
			pattern := bytes.Repeat([]byte{0x5a}, 1<<20)
			copy(disk[700<<10:], pattern)
			oracle(t, dir, "qemu-io", "-f", "vpc", "-c", "write -P 0x5a 700k 1M", req.Name)
			image = mustOpen(t, dir, req.Name, vfs.ReadWrite)
			scribble(t, r, image, disk, 10)
			closeAndJudge(t, dir, req.Name, image, disk)
		})
	}
}

// What grew or shrank is what QEMU says it is, whoever made the image, and goes on growing
// when QEMU writes to it.
func TestOracle_Resize(t *testing.T) {
	for _, maker := range []string{"we", "we, fixed", "qemu", "qemu, fixed"} {
		t.Run(maker, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			const size = 3133440 // 90 cylinders of 4 heads and 17 sectors
			switch maker {
			case "we":
				create(t, dir, formats.CreateRequest{Name: "a.vhd", SizeBytes: size})
			case "we, fixed":
				create(t, dir, formats.CreateRequest{Name: "a.vhd", SizeBytes: size, Subformat: "fixed"})
			case "qemu":
				qemuImg(t, dir, "create", "-q", "-f", "vpc", "a.vhd", fmt.Sprint(size))
			default:
				qemuImg(t, dir, "create", "-q", "-f", "vpc", "-o", "subformat=fixed", "a.vhd", fmt.Sprint(size))
			}
			disk := make([]byte, size)
			image := mustOpen(t, dir, "a.vhd", vfs.ReadWrite)
			scribble(t, r, image, disk, 10)
			for _, size := range []int{3<<20 + 1024, 5 << 20, 40 << 20, 21<<20 + 512, 7 << 20, 1 << 20, 2 << 20} {
				resize := image.Resize
				if size < len(disk) {
					resize = image.Shrink
				}
				if err := resize(int64(size)); err != nil {
					t.Fatalf("resize to %d: %v", size, err)
				}
				kept := copy(make([]byte, size), disk)
				disk = append(disk[:kept:kept], make([]byte, size-kept)...)
				scribble(t, r, image, disk, 10)
				closeAndJudge(t, dir, "a.vhd", image, disk)
				off := len(disk) / 3 / 512 * 512
				copy(disk[off:], bytes.Repeat([]byte{0x77}, 64<<10))
				oracle(t, dir, "qemu-io", "-f", "vpc", "-c", fmt.Sprintf("write -P 0x77 %d 64k", off), "a.vhd")
				image = mustOpen(t, dir, "a.vhd", vfs.ReadWrite)
			}
			closeAndJudge(t, dir, "a.vhd", image, disk)
		})
	}
}

// 7-Zip reads what we write: another program than QEMU, with code of its own.
func TestOracle_SevenZip(t *testing.T) {
	for _, subformat := range []string{"dynamic", "fixed"} {
		r, dir := testenv.Rand(t), t.TempDir()
		create(t, dir, formats.CreateRequest{Name: "a.vhd", SizeBytes: 5 << 20, Subformat: subformat})
		image := mustOpen(t, dir, "a.vhd", vfs.ReadWrite)
		disk := make([]byte, 5<<20)
		scribble(t, r, image, disk, 20)
		if err := image.Close(); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(testenv.Oracle(t, "7z"), "x", "-so", "-tvhd", filepath.Join(dir, "a.vhd")).Output()
		if err != nil || !bytes.Equal(out, disk) {
			t.Errorf("%s: 7z extracts %d bytes that differ from the %d written, error %v", subformat, len(out), len(disk), err)
		}
	}
}

// So does libvhdi, at least what an image says about itself, and who its parent is.
func TestOracle_LibVHDI(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, formats.CreateRequest{Name: "base.vhd", SizeBytes: 5 << 20})
	create(t, dir, formats.CreateRequest{Name: "fixed.vhd", SizeBytes: 5 << 20, Subformat: "fixed"})
	createOverlay(t, dir, "base.vhd", formats.CreateRequest{Name: "child.vhd"})
	uuid := detail(t, dir, "base.vhd", "uuid")
	for name, want := range map[string][]string{
		"base.vhd":  {"Dynamic", "5242880 bytes", uuid},
		"fixed.vhd": {"Fixed", "5242880 bytes"},
		"child.vhd": {"Differential", "5242880 bytes", uuid, "base.vhd"},
	} {
		out := oracle(t, dir, "vhdiinfo", name)
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("vhdiinfo of %s does not say %q:\n%s", name, w, out)
			}
		}
	}
}

func detail(t *testing.T, dir, name, what string) string {
	t.Helper()
	image := mustOpen(t, dir, name, vfs.ReadOnly)
	defer image.Close()
	for _, d := range image.Layers()[0].Codec.Describe().Details {
		if d.Name == what {
			return fmt.Sprint(d.Value)
		}
	}
	t.Fatalf("%s has no %s", name, what)
	return ""
}

// createOverlay creates an overlay on parent, which is closed again.
func createOverlay(t testing.TB, dir, parent string, req formats.CreateRequest) {
	t.Helper()
	base := mustOpen(t, dir, parent, vfs.ReadOnly)
	defer base.Close()
	req.Parent = &formats.Parent{Name: parent, Layer: base.Layers()[0]}
	create(t, dir, req)
}

func openDir(t testing.TB, dir, name string, mode vfs.Mode) (*formats.Image, error) {
	t.Helper()
	d, err := vfs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	return formats.Open(context.Background(), d, name, formats.OpenOptions{Format: "vpc", Mode: mode})
}

func mustOpen(t testing.TB, dir, name string, mode vfs.Mode) *formats.Image {
	t.Helper()
	image, err := openDir(t, dir, name, mode)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

func readGuest(t testing.TB, d block.Device) []byte {
	t.Helper()
	p := make([]byte, d.Info().SizeBytes)
	if _, err := d.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func writeFile(t testing.TB, dir, name string, p []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), p, 0o600); err != nil {
		t.Fatal(err)
	}
}
