package vmdk_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Images of several files grow by files and shrink by them, and QEMU agrees.
func TestOracle_ResizeSplit(t *testing.T) {
	for _, subformat := range []string{"twoGbMaxExtentSparse", "twoGbMaxExtentFlat"} {
		t.Run(subformat, func(t *testing.T) {
			dir := t.TempDir()
			create(t, dir, formats.CreateRequest{Name: "a.vmdk", SizeBytes: 5<<20 + 512, Subformat: subformat})
			image := mustOpen(t, dir, "a.vmdk", vfs.ReadWrite)
			mark := func(off int64, text string) {
				t.Helper()
				if _, err := image.WriteAt([]byte(text), off); err != nil {
					t.Fatal(err)
				}
			}
			mark(5<<20, "the old end")
			for i, step := range []struct {
				size  int64
				files int
			}{{6 << 20, 1}, {3<<30 + 512, 2}, {9 << 30, 5}, {5<<30 + 1024, 3}, {1 << 30, 1}, {4 << 30, 3}} {
				var err error
				if before := image.Info().SizeBytes; step.size > before {
					err = image.Resize(step.size)
				} else {
					err = image.Shrink(step.size)
				}
				if err != nil {
					t.Fatalf("resize to %d: %v", step.size, err)
				}
				mark(step.size-9, fmt.Sprintf("%08d", i))
				if err := image.Close(); err != nil {
					t.Fatal(err)
				}
				checkSplit(t, dir, step.size, step.files)
				image = mustOpen(t, dir, "a.vmdk", vfs.ReadWrite)
				p := make([]byte, 11)
				if _, err := image.ReadAt(p, 5<<20); err != nil || string(p) != "the old end" {
					t.Errorf("at the old end is %q, %v", p, err)
				}
				if _, err := image.ReadAt(p, step.size-11); err != nil || !strings.HasSuffix(string(p), fmt.Sprintf("%08d\x00", i)) {
					t.Errorf("at the end is %q, %v", p, err)
				}
			}
			// What was cut off does not come back.
			for off := int64(1 << 30); off < 4<<30-9; off += 1 << 29 {
				e, err := image.Map(off, 4<<30-9-off)
				if err != nil || e.State == block.Data && e.Off < 4<<30-64<<10 {
					t.Errorf("at %d is %+v, %v", off, e, err)
				}
			}
			if err := image.Resize(3 << 40); !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), "at most 219") {
				t.Errorf("grow to 3 TiB: error %v, want %v with the number", err, block.ErrInvalid)
			}
		})
	}
}

// checkSplit judges an image of which QEMU knows as much as we do.
func checkSplit(t *testing.T, dir string, size int64, files int) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != files+1 {
		t.Errorf("files %v (%v), want %d and the descriptor", entries, err, files)
	}
	image := mustOpen(t, dir, "a.vmdk", vfs.ReadOnly)
	defer image.Close()
	checkSound(t, image)
	compareInfo(t, dir, "a.vmdk", image)
	if got := image.Info().SizeBytes; got != size {
		t.Errorf("size %d, want %d", got, size)
	}
	qemuImg(t, dir, "check", "-f", "vmdk", "a.vmdk")
}

// Every kind that can shrink does, and QEMU agrees.
func TestOracle_Shrink(t *testing.T) {
	for name, req := range map[string]formats.CreateRequest{
		"sparse":       {ClusterBytes: 4 << 10},
		"zeroed-grain": {Extra: map[string]string{"zeroed_grain": "on"}},
		"flat":         {Subformat: "monolithicFlat"},
		"vmfs":         {Subformat: "vmfs"},
		"cowd":         {Subformat: "vmfsSparse"},
	} {
		t.Run(name, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			req.Name, req.SizeBytes = "a.vmdk", 9<<20
			create(t, dir, req)
			disk := make([]byte, req.SizeBytes)
			image := mustOpen(t, dir, req.Name, vfs.ReadWrite)
			scribble(t, r, image, disk, 30)
			for _, size := range []int64{9<<20 - 512, 9<<20 - 4096, 5<<20 + 1536, 512, 3 << 20} {
				if size < int64(len(disk)) {
					disk = disk[:size]
					if err := image.Shrink(size); err != nil {
						t.Fatalf("shrink to %d: %v", size, err)
					}
				} else {
					if err := image.Resize(size); err != nil {
						t.Fatalf("grow to %d: %v", size, err)
					}
					disk = append(disk[:len(disk):len(disk)], make([]byte, size-int64(len(disk)))...)
				}
				scribble(t, r, image, disk, 3)
				closeAndJudge(t, dir, req.Name, image, disk)
				image = mustOpen(t, dir, req.Name, vfs.ReadOnly)
				compareInfo(t, dir, req.Name, image)
				if err := image.Close(); err != nil {
					t.Fatal(err)
				}
				image = mustOpen(t, dir, req.Name, vfs.ReadWrite)
			}
		})
	}
}

// A name that a crash has left behind is not used, and not touched.
func TestGrow_NamesTaken(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, formats.CreateRequest{Name: "a.vmdk", SizeBytes: 1 << 20, Subformat: "twoGbMaxExtentFlat"})
	writeFile(t, dir, "a-f002.vmdk", []byte("precious"))
	image := mustOpen(t, dir, "a.vmdk", vfs.ReadWrite)
	if err := image.Resize(3 << 30); err != nil {
		t.Fatal(err)
	}
	if p, err := os.ReadFile(filepath.Join(dir, "a-f002.vmdk")); err != nil || string(p) != "precious" {
		t.Errorf("what had the name is %q, %v", p, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "a-f003.vmdk")); err != nil {
		t.Error(err)
	}
}
