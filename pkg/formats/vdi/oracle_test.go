package vdi_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vdi"
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

// closeAndJudge closes an image, checks it, and has QEMU check it and compare it with disk.
func closeAndJudge(t testing.TB, dir, name string, image *formats.Image, disk []byte) {
	t.Helper()
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	image = mustOpen(t, dir, name, vfs.ReadOnly)
	result, err := engine.Check(context.Background(), image.Layers()[0], false, nil)
	if err != nil || len(result.Problems) > 0 || result.Leaks > 0 {
		t.Errorf("check: %v, %+v", err, result)
	}
	if !bytes.Equal(readGuest(t, image), disk) {
		t.Error("the contents differ from what was written")
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	if out := qemuImg(t, dir, "check", "-f", "vdi", name); !strings.Contains(out, "No errors") {
		t.Errorf("qemu-img check: %s", out)
	}
	writeFile(t, dir, "judge.raw", disk)
	qemuImg(t, dir, "compare", "-f", "vdi", "-F", "raw", name, "judge.raw")
}

func create(t testing.TB, dir string, req formats.CreateRequest) {
	t.Helper()
	d, err := vfs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	req.FS = d
	if err := (vdi.Format{}).Create(context.Background(), req); err != nil {
		t.Fatal(err)
	}
}

func TestOracle_ReadsWhatQEMUWrites(t *testing.T) {
	for _, options := range []string{"static=off", "static=on"} {
		t.Run(options, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			disk := make([]byte, 7<<20+5*512)
			for i := range disk[:1<<20] {
				disk[3<<20+i] = byte(r.Uint32())
			}
			writeFile(t, dir, "raw", disk)
			qemuImg(t, dir, "convert", "-f", "raw", "-O", "vdi", "-o", options, "raw", "a.vdi")
			image := mustOpen(t, dir, "a.vdi", vfs.ReadWrite)
			if !bytes.Equal(readGuest(t, image), disk) {
				t.Error("the contents differ from what QEMU converted")
			}
			scribble(t, r, image, disk, 20)
			closeAndJudge(t, dir, "a.vdi", image, disk)
		})
	}
}

func TestOracle_QEMUReadsWhatWeWrite(t *testing.T) {
	const size = 5<<20 + 3*512
	for name, req := range map[string]formats.CreateRequest{
		"dynamic":  {},
		"metadata": {Preallocation: formats.PreallocateMetadata},
		"falloc":   {Preallocation: formats.PreallocateFalloc},
		"full":     {Preallocation: formats.PreallocateFull},
		"static":   {Subformat: "static"},
	} {
		t.Run(name, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			req.Name, req.SizeBytes = "a.vdi", size
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
			oracle(t, dir, "qemu-io", "-f", "vdi", "-c", "write -P 0x5a 700k 1M", req.Name)
			closeAndJudge(t, dir, req.Name, mustOpen(t, dir, req.Name, vfs.ReadWrite), disk)
		})
	}
}

// What grew or shrank is what QEMU says it is, whoever made the image: QEMU leaves no room
// for a larger block map.
func TestOracle_Resize(t *testing.T) {
	for _, maker := range []string{"we", "we, static", "qemu", "qemu, static"} {
		t.Run(maker, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			const size = 3<<20 + 512
			switch maker {
			case "we":
				create(t, dir, formats.CreateRequest{Name: "a.vdi", SizeBytes: size})
			case "we, static":
				create(t, dir, formats.CreateRequest{Name: "a.vdi", SizeBytes: size, Subformat: "static"})
			case "qemu":
				qemuImg(t, dir, "create", "-q", "-f", "vdi", "a.vdi", fmt.Sprint(size))
			default:
				qemuImg(t, dir, "create", "-q", "-f", "vdi", "-o", "static=on", "a.vdi", fmt.Sprint(size))
			}
			disk := make([]byte, size)
			image := mustOpen(t, dir, "a.vdi", vfs.ReadWrite)
			scribble(t, r, image, disk, 10)
			for _, size := range []int{3<<20 + 1024, 5 << 20, 130 << 20, 20<<20 + 512, 7 << 20, 1 << 20, 2 << 20} {
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
				closeAndJudge(t, dir, "a.vdi", image, disk)
				image = mustOpen(t, dir, "a.vdi", vfs.ReadWrite)
			}
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// 7-Zip reads what we write: another program than QEMU, with code of its own.
func TestOracle_SevenZip(t *testing.T) {
	for _, subformat := range []string{"dynamic", "static"} {
		r, dir := testenv.Rand(t), t.TempDir()
		create(t, dir, formats.CreateRequest{Name: "a.vdi", SizeBytes: 5 << 20, Subformat: subformat})
		image := mustOpen(t, dir, "a.vdi", vfs.ReadWrite)
		disk := make([]byte, 5<<20)
		scribble(t, r, image, disk, 20)
		if err := image.Close(); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(testenv.Oracle(t, "7z"), "x", "-so", "-tvdi", filepath.Join(dir, "a.vdi")).Output()
		if err != nil || !bytes.Equal(out, disk) {
			t.Errorf("%s: 7z extracts %d bytes that differ from the %d written, error %v", subformat, len(out), len(disk), err)
		}
	}
}
