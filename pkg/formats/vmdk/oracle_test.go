package vmdk_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
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
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vmdk"
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

// randomDisk returns guest bytes with stretches of zeroes.
func randomDisk(r *rand.Rand, size int) []byte {
	p := make([]byte, size)
	for off := 0; off < size; {
		n := min(1+r.IntN(300<<10), size-off)
		if r.IntN(2) == 0 {
			for i := off; i < off+n; i++ {
				p[i] = byte(r.Uint32())
			}
		}
		off += n
	}
	return p
}

func writeFile(t testing.TB, dir, name string, p []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), p, 0o600); err != nil {
		t.Fatal(err)
	}
}

func mustOpen(t testing.TB, dir, name string, mode vfs.Mode) *formats.Image {
	t.Helper()
	image, err := openDir(t, dir, name, mode)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

func TestOracle_ReadsWhatQEMUWrites(t *testing.T) {
	for _, options := range []string{
		"subformat=monolithicSparse", "subformat=monolithicSparse,zeroed_grain=on", "subformat=monolithicFlat",
		"subformat=twoGbMaxExtentSparse", "subformat=twoGbMaxExtentFlat", "subformat=streamOptimized",
		"subformat=monolithicSparse,adapter_type=lsilogic,hwversion=14",
	} {
		t.Run(options, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			want := randomDisk(r, 9<<20+5*512)
			writeFile(t, dir, "raw", want)
			qemuImg(t, dir, "convert", "-f", "raw", "-O", "vmdk", "-o", options, "raw", "a.vmdk")
			image := mustOpen(t, dir, "a.vmdk", vfs.ReadOnly)
			if !bytes.Equal(readGuest(t, image), want) {
				t.Error("the contents differ from what QEMU converted")
			}
			checkClean(t, image)
			compareInfo(t, dir, "a.vmdk", image)
		})
	}
}

// compareInfo compares what an image says about itself with what qemu-img says.
func compareInfo(t testing.TB, dir, name string, image *formats.Image) {
	t.Helper()
	var info struct {
		VirtualSize int64 `json:"virtual-size"`
		ClusterSize int64 `json:"cluster-size"`
		Specific    struct {
			Data map[string]any `json:"data"`
		} `json:"format-specific"`
	}
	out := qemuImg(t, dir, "info", "--output=json", name)
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatal(err)
	}
	if image.Info().SizeBytes != info.VirtualSize || image.Info().ClusterBytes != info.ClusterSize {
		t.Errorf("size %d and clusters of %d bytes, qemu-img says %d and %d",
			image.Info().SizeBytes, image.Info().ClusterBytes, info.VirtualSize, info.ClusterSize)
	}
	for _, d := range image.Layers()[0].Codec.Describe().Details {
		if d.Name != "extents" && d.Name != "read-only-because" && fmt.Sprint(d.Value) != fmt.Sprint(jsonNumber(info.Specific.Data[d.Name])) {
			t.Errorf("%s is %v, qemu-img says %v", d.Name, d.Value, info.Specific.Data[d.Name])
		}
	}
}

// jsonNumber makes a number printable as an integer.
func jsonNumber(v any) any {
	if f, ok := v.(float64); ok {
		return int64(f)
	}
	return v
}

// scribble writes, zeroes and discards at random, on the image and in memory.
func scribble(t testing.TB, r *rand.Rand, image *formats.Image, disk []byte, steps int) {
	t.Helper()
	for range steps {
		off := r.IntN(len(disk))
		n := min(1+r.IntN(200<<10), len(disk)-off)
		var err error
		if r.IntN(4) == 0 {
			clear(disk[off : off+n])
			err = image.WriteZeroes(int64(off), int64(n), 0)
		} else {
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

// closeAndJudge closes an image and has QEMU check it and compare it with disk.
func closeAndJudge(t testing.TB, dir, name string, image *formats.Image, disk []byte) {
	t.Helper()
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	image = mustOpen(t, dir, name, vfs.ReadOnly)
	checkSound(t, image)
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	if out := qemuImg(t, dir, "check", "-f", "vmdk", name); !strings.Contains(out, "No errors") {
		t.Errorf("qemu-img check: %s", out)
	}
	writeFile(t, dir, "judge.raw", disk)
	qemuImg(t, dir, "compare", "-f", "vmdk", "-F", "raw", name, "judge.raw")
}

func create(t testing.TB, dir string, req formats.CreateRequest) {
	t.Helper()
	d, err := vfs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	req.FS = d
	if err := (vmdk.Format{}).Create(context.Background(), req); err != nil {
		t.Fatal(err)
	}
}

// createOverlay creates an overlay on parent, which is closed again.
func createOverlay(t testing.TB, dir, parent string, req formats.CreateRequest) {
	t.Helper()
	base, err := openDir(t, dir, parent, vfs.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	defer base.Close()
	req.Parent = &formats.Parent{Name: parent, Layer: base.Layers()[0]}
	create(t, dir, req)
}

func TestOracle_QEMUReadsWhatWeWrite(t *testing.T) {
	const size = 5<<20 + 3*512
	on := map[string]string{"zeroed_grain": "on"}
	for name, req := range map[string]formats.CreateRequest{
		"default":       {},
		"4k-grains":     {ClusterBytes: 4 << 10},
		"1m-grains":     {ClusterBytes: 1 << 20},
		"zeroed-grain":  {Extra: on},
		"metadata":      {Preallocation: formats.PreallocateMetadata},
		"falloc":        {Preallocation: formats.PreallocateFalloc},
		"full":          {Preallocation: formats.PreallocateFull},
		"flat":          {Subformat: "monolithicFlat"},
		"flat-full":     {Subformat: "monolithicFlat", Preallocation: formats.PreallocateFull},
		"lsilogic-14":   {Extra: map[string]string{"adapter_type": "lsilogic", "hwversion": "14"}},
		"split":         {Subformat: "twoGbMaxExtentSparse"},
		"split-grains":  {Subformat: "twoGbMaxExtentSparse", ClusterBytes: 16 << 10, Extra: on},
		"split-flat":    {Subformat: "twoGbMaxExtentFlat"},
		"vmfs":          {Subformat: "vmfs"},
		"vmfs-falloc":   {Subformat: "vmfs", Preallocation: formats.PreallocateFalloc},
		"cowd":          {Subformat: "vmfsSparse"},
		"cowd-64k":      {Subformat: "vmfsSparse", ClusterBytes: 64 << 10},
		"cowd-full":     {Subformat: "vmfsSparse", ClusterBytes: 4 << 10, Preallocation: formats.PreallocateFull},
		"geometry":      {Extra: map[string]string{"geometry": "12/34/56", "toolsversion": "2147483647"}},
		"in-a-long-dir": {Name: strings.Repeat("d", 200) + ".vmdk"},
	} {
		t.Run(name, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			req.SizeBytes = size
			if req.Name == "" {
				req.Name = "a.vmdk"
			}
			create(t, dir, req)
			if out := qemuImg(t, dir, "check", "-f", "vmdk", req.Name); !strings.Contains(out, "No errors") {
				t.Errorf("qemu-img check of a new image: %s", out)
			}
			image := mustOpen(t, dir, req.Name, vfs.ReadWrite)
			disk := make([]byte, size)
			if !bytes.Equal(readGuest(t, image), disk) {
				t.Error("a new image is not all zeroes")
			}
			scribble(t, r, image, disk, 40)
			closeAndJudge(t, dir, req.Name, image, disk)
			compareInfo(t, dir, req.Name, mustOpen(t, dir, req.Name, vfs.ReadOnly))
		})
	}
}

// QEMU follows the links of our overlays, and writes to them what we read.
func TestOracle_Chain(t *testing.T) {
	r, dir := testenv.Rand(t), t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	const size = 3 << 20
	create(t, dir, formats.CreateRequest{Name: "base.vmdk", SizeBytes: size})
	disk := make([]byte, size)
	image := mustOpen(t, dir, "base.vmdk", vfs.ReadWrite)
	scribble(t, r, image, disk, 10)
	closeAndJudge(t, dir, "base.vmdk", image, disk)

	createOverlay(t, dir, "base.vmdk", formats.CreateRequest{Name: "sub/middle.vmdk", ClusterBytes: 8 << 10})
	image = mustOpen(t, dir, "sub/middle.vmdk", vfs.ReadWrite)
	scribble(t, r, image, disk, 10)
	closeAndJudge(t, dir, "sub/middle.vmdk", image, disk)

	qemuImg(t, dir, "create", "-q", "-f", "vmdk", "-b", "sub/middle.vmdk", "-F", "vmdk", "top.vmdk")
	pattern := bytes.Repeat([]byte{0x5a}, 100<<10)
	copy(disk[777<<10:], pattern)
	oracle(t, dir, "qemu-io", "-f", "vmdk", "-c", "write -P 0x5a 777k 100k", "top.vmdk")
	image = mustOpen(t, dir, "top.vmdk", vfs.ReadWrite)
	if n := len(image.Layers()); n != 3 {
		t.Errorf("%d layers, want 3", n)
	}
	if !bytes.Equal(readGuest(t, image), disk) {
		t.Error("a chain whose top QEMU wrote has other contents")
	}
	scribble(t, r, image, disk, 10)
	closeAndJudge(t, dir, "top.vmdk", image, disk)
}

// A parent that was written to after its child was made is refused, by us and by QEMU,
// whoever wrote.
func TestOracle_ParentChanged(t *testing.T) {
	for _, writer := range []string{"we", "qemu"} {
		t.Run(writer, func(t *testing.T) {
			dir := t.TempDir()
			create(t, dir, formats.CreateRequest{Name: "base.vmdk", SizeBytes: 1 << 20})
			createOverlay(t, dir, "base.vmdk", formats.CreateRequest{Name: "top.vmdk"})
			before := cid(t, dir, "base.vmdk")
			if writer == "qemu" {
				oracle(t, dir, "qemu-io", "-f", "vmdk", "-c", "write 0 64k", "base.vmdk")
			} else {
				image := mustOpen(t, dir, "base.vmdk", vfs.ReadWrite)
				scribble(t, testenv.Rand(t), image, make([]byte, 1<<20), 1)
				if err := image.Close(); err != nil {
					t.Fatal(err)
				}
			}
			after := cid(t, dir, "base.vmdk")
			_, err := openDir(t, dir, "top.vmdk", vfs.ReadOnly)
			if !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), before) || !strings.Contains(err.Error(), after) {
				t.Errorf("opened with error %v, want one that names %s and %s", err, before, after)
			}
			if out, err := exec.Command("qemu-io", "-f", "vmdk", "-c", "read 0 4k", filepath.Join(dir, "top.vmdk")).CombinedOutput(); err == nil {
				t.Errorf("QEMU reads the overlay of a changed parent: %s", out)
			}
		})
	}
}

// cid returns an image's content identifier, in 8 digits.
func cid(t testing.TB, dir, name string) string {
	t.Helper()
	image, err := openDir(t, dir, name, vfs.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	return fmt.Sprintf("%08x", image.Layers()[0].Codec.Describe().Details[0].Value)
}

// Extents of a split image: runs end where extents do, and the last grain of one is
// followed by another's first.
func TestOracle_WriteSplit(t *testing.T) {
	for _, subformat := range []string{"twoGbMaxExtentSparse", "twoGbMaxExtentFlat"} {
		t.Run(subformat, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			const edge = 2 << 30
			qemuImg(t, dir, "create", "-q", "-f", "vmdk", "-o", "subformat="+subformat, "a.vmdk", fmt.Sprint(edge+5<<20+512))
			image := mustOpen(t, dir, "a.vmdk", vfs.ReadWrite)
			want := make([]byte, 3<<20)
			for i := range want {
				want[i] = byte(r.Uint32())
			}
			off := int64(edge - 1<<20 - 333)
			if _, err := image.WriteAt(want, off); err != nil {
				t.Fatal(err)
			}
			clear(want[500<<10 : 2<<20])
			if err := image.WriteZeroes(off+500<<10, 2<<20-500<<10, 0); err != nil {
				t.Fatal(err)
			}
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			image = mustOpen(t, dir, "a.vmdk", vfs.ReadOnly)
			got := make([]byte, len(want))
			if _, err := image.ReadAt(got, off); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Error("the contents differ from what was written")
			}
			checkSound(t, image)
			qemuImg(t, dir, "check", "-f", "vmdk", "a.vmdk")
			qemuImg(t, dir, "convert", "-f", "vmdk", "-O", "raw", "a.vmdk", "a.raw")
			f, err := os.Open(filepath.Join(dir, "a.raw"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.ReadAt(got, off); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Error("QEMU reads other contents than were written")
			}
		})
	}
}

// What grew is what QEMU says it is, and has the old contents and zeroes.
func TestOracle_Grow(t *testing.T) {
	for name, req := range map[string]formats.CreateRequest{
		"sparse":       {ClusterBytes: 4 << 10},
		"zeroed-grain": {Extra: map[string]string{"zeroed_grain": "on"}},
		"flat":         {Subformat: "monolithicFlat"},
		"long-name":    {Name: strings.Repeat("n", 100) + ".vmdk", ClusterBytes: 4 << 10},
		"long-flat":    {Name: strings.Repeat("n", 150) + ".vmdk", Subformat: "monolithicFlat"},
	} {
		t.Run(name, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			req.SizeBytes = 900<<10 + 512
			if req.Name == "" {
				req.Name = "a.vmdk"
			}
			create(t, dir, req)
			disk := make([]byte, req.SizeBytes)
			image := mustOpen(t, dir, req.Name, vfs.ReadWrite)
			scribble(t, r, image, disk, 10)
			for _, size := range []int64{900<<10 + 1024, 1 << 20, 5<<20 + 1536, 99 << 20} {
				if err := image.Resize(size); err != nil {
					t.Fatalf("grow to %d: %v", size, err)
				}
				disk = append(disk, make([]byte, size-int64(len(disk)))...)
				scribble(t, r, image, disk, 10)
				closeAndJudge(t, dir, req.Name, image, disk)
				image = mustOpen(t, dir, req.Name, vfs.ReadWrite)
			}
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			compareInfo(t, dir, req.Name, mustOpen(t, dir, req.Name, vfs.ReadOnly))
		})
	}
}

// Overlays stand on every kind of image that can be read, which stays as it is.
func TestOracle_OverlayOnForeignBase(t *testing.T) {
	for _, subformat := range []string{"streamOptimized", "monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse"} {
		t.Run(subformat, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			disk := randomDisk(r, 3<<20+3*512)
			writeFile(t, dir, "raw", disk)
			qemuImg(t, dir, "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat="+subformat, "raw", "base.vmdk")
			before, err := os.ReadFile(filepath.Join(dir, "base.vmdk"))
			if err != nil {
				t.Fatal(err)
			}
			createOverlay(t, dir, "base.vmdk", formats.CreateRequest{Name: "a.vmdk", ClusterBytes: 32 << 10})
			image := mustOpen(t, dir, "a.vmdk", vfs.ReadWrite)
			if !bytes.Equal(readGuest(t, image), disk) {
				t.Error("a new overlay reads as something else than its base")
			}
			scribble(t, r, image, disk, 20)
			closeAndJudge(t, dir, "a.vmdk", image, disk)
			if after, err := os.ReadFile(filepath.Join(dir, "base.vmdk")); err != nil || !bytes.Equal(before, after) {
				t.Errorf("the base has changed (error %v)", err)
			}
		})
	}
}

// 7-Zip reads what we write: another program than QEMU, with code of its own.
func TestOracle_SevenZip(t *testing.T) {
	for name, req := range map[string]formats.CreateRequest{
		"sparse":       {},
		"small-grains": {ClusterBytes: 4 << 10},
		"flat":         {Subformat: "monolithicFlat"},
		"full":         {Preallocation: formats.PreallocateFull},
		"split":        {Subformat: "twoGbMaxExtentSparse"},
		"split-flat":   {Subformat: "twoGbMaxExtentFlat"},
		"vmfs":         {Subformat: "vmfs"},
	} {
		t.Run(name, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			req.Name, req.SizeBytes = "a.vmdk", 2<<20
			create(t, dir, req)
			image := mustOpen(t, dir, "a.vmdk", vfs.ReadWrite)
			disk := make([]byte, req.SizeBytes)
			scribble(t, r, image, disk, 20)
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(testenv.Oracle(t, "7z"), "x", "-so", "-tvmdk", "a.vmdk")
			cmd.Dir = dir
			if out, err := cmd.Output(); err != nil || !bytes.Equal(out, disk) {
				t.Errorf("7z extracts %d bytes that differ from the %d written, error %v", len(out), len(disk), err)
			}
		})
	}
}
