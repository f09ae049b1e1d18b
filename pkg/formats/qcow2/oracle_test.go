package qcow2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/qcow2"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// qemuImg runs qemu-img in a directory and returns what it printed.
func qemuImg(t testing.TB, dir string, args ...string) string {
	t.Helper()
	return oracle(t, dir, "qemu-img", args...)
}

func qemuIO(t testing.TB, dir, name string, commands ...string) {
	t.Helper()
	args := []string{"-f", "qcow2"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	oracle(t, dir, "qemu-io", append(args, name)...)
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

// mustBeClean has qemu-img check an image: no errors, and no leaks.
func mustBeClean(t testing.TB, dir, name string) {
	t.Helper()
	if out := qemuImg(t, dir, "check", "-f", "qcow2", name); !strings.Contains(out, "No errors") {
		t.Errorf("qemu-img check: %s", out)
	}
}

// randomDisk returns guest bytes with stretches of zeroes, and of what compresses.
func randomDisk(r *rand.Rand, size int) []byte {
	p := make([]byte, size)
	for off := 0; off < size; {
		n := min(1+r.IntN(300<<10), size-off)
		switch r.IntN(4) {
		case 0:
			for i := off; i < off+n; i++ {
				p[i] = byte(r.Uint32())
			}
		case 1:
			for i := off; i < off+n; i++ {
				p[i] = "a compressible line\n"[i%20]
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

func openDir(t testing.TB, dir, name string, mode vfs.Mode) (*formats.Image, error) {
	t.Helper()
	d, err := vfs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return formats.Open(context.Background(), d, name, formats.OpenOptions{Format: "qcow2", Mode: mode})
}

func mustOpen(t testing.TB, dir, name string, mode vfs.Mode) *formats.Image {
	t.Helper()
	image, err := openDir(t, dir, name, mode)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

func mustClose(t testing.TB, image *formats.Image) {
	t.Helper()
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
}

func create(t testing.TB, dir string, req formats.CreateRequest) {
	t.Helper()
	d, err := vfs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	req.FS = d
	if err := (qcow2.Format{}).Create(context.Background(), req); err != nil {
		t.Fatal(err)
	}
}

// createOverlay creates an overlay on parent, which is closed again.
func createOverlay(t testing.TB, dir, parent, format string, req formats.CreateRequest) {
	t.Helper()
	d, err := vfs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	base, err := formats.Open(context.Background(), d, parent, formats.OpenOptions{Format: format})
	if err != nil {
		t.Fatal(err)
	}
	defer base.Close()
	req.Parent = &formats.Parent{Name: parent, Layer: base.Layers()[0]}
	create(t, dir, req)
}

func readGuest(t testing.TB, image *formats.Image) []byte {
	t.Helper()
	p := make([]byte, image.Info().SizeBytes)
	if _, err := image.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// checkWith checks an image, and repairs it if repair is set.
func checkWith(t testing.TB, dir, name string, repair bool) engine.CheckResult {
	t.Helper()
	d, err := vfs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	mode := vfs.ReadOnly
	if repair {
		mode = vfs.ReadWrite
	}
	layer, err := qcow2.Format{}.Open(formats.OpenRequest{FS: d, Name: name, Mode: mode})
	if err != nil {
		t.Fatal(err)
	}
	result, err := engine.Check(context.Background(), layer, repair, nil)
	if err := errors.Join(err, layer.Close()); err != nil {
		t.Fatal(err)
	}
	return result
}

// scribble changes an image and what it should hold.
func scribble(t testing.TB, r *rand.Rand, image *formats.Image, disk []byte, steps int) {
	t.Helper()
	for range steps {
		off := r.IntN(len(disk))
		n := min(1+r.IntN(100<<10), len(disk)-off)
		var err error
		switch r.IntN(5) {
		case 0:
			clear(disk[off : off+n])
			err = image.WriteZeroes(int64(off), int64(n), 0)
		case 1:
			err = image.Discard(int64(off), int64(n))
			if _, err := image.ReadAt(disk[off:off+n], int64(off)); err != nil {
				t.Fatal(err)
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

// closeAndJudge closes an image, checks it, has QEMU check it and compare it with disk.
func closeAndJudge(t testing.TB, dir, name string, image *formats.Image, disk []byte) {
	t.Helper()
	mustClose(t, image)
	judge(t, dir, name, disk)
}

func judge(t testing.TB, dir, name string, disk []byte) {
	t.Helper()
	if result := checkWith(t, dir, name, false); result.Corruptions+result.Leaks > 0 {
		t.Errorf("check: %+v", result)
	}
	mustBeClean(t, dir, name)
	writeFile(t, dir, "judge.raw", disk)
	qemuImg(t, dir, "compare", "-f", "qcow2", "-F", "raw", name, "judge.raw")
}

var qemuOptions = []string{
	"compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=4k,refcount_bits=1", "cluster_size=2M", "refcount_bits=2", "refcount_bits=4",
	"refcount_bits=8", "refcount_bits=32", "refcount_bits=64", "lazy_refcounts=on", "extended_l2=on", "extended_l2=on,cluster_size=16k",
	"compression_type=zstd", "preallocation=metadata", "preallocation=falloc", "preallocation=full", "preallocation=metadata,extended_l2=on",
	"cluster_size=512,refcount_bits=64", "data_file=guest.data", "data_file=guest.data,data_file_raw=on",
}

func TestOracle_ReadsAndWritesWhatQEMUMade(t *testing.T) {
	for _, options := range qemuOptions {
		t.Run(options, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			disk := randomDisk(r, 5<<20+5*512)
			writeFile(t, dir, "raw", disk)
			qemuImg(t, dir, "convert", "-f", "raw", "-O", "qcow2", "-o", options, "raw", "a.qcow2")
			image := mustOpen(t, dir, "a.qcow2", vfs.ReadOnly)
			if !bytes.Equal(readGuest(t, image), disk) {
				t.Error("the contents differ from what QEMU converted")
			}
			mustClose(t, image)
			compareInfo(t, dir, "a.qcow2")
			if result := checkWith(t, dir, "a.qcow2", false); result.Corruptions+result.Leaks > 0 {
				t.Errorf("check: %+v", result)
			}
			image = mustOpen(t, dir, "a.qcow2", vfs.ReadWrite)
			scribble(t, r, image, disk, 40)
			closeAndJudge(t, dir, "a.qcow2", image, disk)
			if strings.Contains(options, "data_file_raw") {
				if data, err := os.ReadFile(filepath.Join(dir, "guest.data")); err != nil || !bytes.Equal(data[:min(len(data), len(disk))], disk) {
					t.Errorf("the raw data file of %d bytes differs from the disk of %d, error %v", len(data), len(disk), err)
				}
			}
		})
	}
}

func TestOracle_ReadsCompressed(t *testing.T) {
	for _, options := range []string{"compression_type=zlib", "compression_type=zstd", "compat=0.10", "cluster_size=512", "cluster_size=2M", "refcount_bits=1", "extended_l2=on"} {
		t.Run(options, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			disk := randomDisk(r, 4<<20+5*512)
			writeFile(t, dir, "raw", disk)
			qemuImg(t, dir, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "raw", "a.qcow2")
			if result := checkWith(t, dir, "a.qcow2", false); result.Corruptions+result.Leaks > 0 || result.Compressed == 0 {
				t.Errorf("check: %+v", result)
			}
			image := mustOpen(t, dir, "a.qcow2", vfs.ReadWrite)
			if !bytes.Equal(readGuest(t, image), disk) {
				t.Error("the contents differ from what QEMU converted")
			}
			scribble(t, r, image, disk, 40)
			closeAndJudge(t, dir, "a.qcow2", image, disk)
		})
	}
}

// compareInfo compares what an image says about itself with what qemu-img says.
func compareInfo(t testing.TB, dir, name string) {
	t.Helper()
	image := mustOpen(t, dir, name, vfs.ReadOnly)
	defer image.Close()
	var info struct {
		VirtualSize int64 `json:"virtual-size"`
		ClusterSize int64 `json:"cluster-size"`
		Specific    struct {
			Data map[string]any `json:"data"`
		} `json:"format-specific"`
		Snapshots []map[string]any `json:"snapshots"`
	}
	if err := json.Unmarshal([]byte(qemuImg(t, dir, "info", "--output=json", "-f", "qcow2", name)), &info); err != nil {
		t.Fatal(err)
	}
	if got := image.Info(); got.SizeBytes != info.VirtualSize || got.ClusterBytes != info.ClusterSize {
		t.Errorf("size %d and clusters of %d bytes, QEMU says %d and %d", got.SizeBytes, got.ClusterBytes, info.VirtualSize, info.ClusterSize)
	}
	want := info.Specific.Data
	if len(info.Snapshots) > 0 {
		want["snapshots"] = info.Snapshots
	}
	ours := map[string]any{}
	for _, d := range image.Layers()[0].Codec.Describe().Details {
		ours[d.Name] = d.Value
	}
	if diff := cmp.Diff(throughJSON(t, want), throughJSON(t, ours)); diff != "" {
		t.Errorf("what QEMU says (-) and what we say (+):\n%s", diff)
	}
}

func throughJSON(t testing.TB, v any) (out any) {
	t.Helper()
	p, err := json.Marshal(v)
	if err == nil {
		err = json.Unmarshal(p, &out)
	}
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestOracle_QEMUReadsWhatWeCreate(t *testing.T) {
	const size = 5<<20 + 3*512
	for options, req := range map[string]formats.CreateRequest{
		"":                                      {},
		"compat=0.10":                           {},
		"512-byte clusters":                     {ClusterBytes: 512},
		"2M clusters":                           {ClusterBytes: 2 << 20},
		"refcount_bits=64,cluster_size=512":     {},
		"refcount_bits=1":                       {ClusterBytes: 4 << 10},
		"refcount_bits=2":                       {},
		"refcount_bits=4":                       {},
		"refcount_bits=8":                       {},
		"refcount_bits=32":                      {},
		"lazy_refcounts=on":                     {},
		"extended_l2=on":                        {},
		"extended_l2=on,cluster_size=16k":       {},
		"compression_type=zstd":                 {},
		"data_file=d.data":                      {},
		"data_file=e.data,data_file_raw=on":     {},
		"metadata":                              {Preallocation: formats.PreallocateMetadata},
		"metadata,extended_l2=on":               {Preallocation: formats.PreallocateMetadata},
		"metadata,cluster_size=512":             {Preallocation: formats.PreallocateMetadata},
		"falloc":                                {Preallocation: formats.PreallocateFalloc},
		"full":                                  {Preallocation: formats.PreallocateFull},
		"full,refcount_bits=4,cluster_size=512": {Preallocation: formats.PreallocateFull},
	} {
		t.Run(options, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			req.Name, req.SizeBytes, req.Extra = "a.qcow2", size, map[string]string{}
			for _, option := range strings.Split(options, ",") {
				if name, value, ok := strings.Cut(option, "="); ok {
					req.Extra[name] = value
				}
			}
			create(t, dir, req)
			mustBeClean(t, dir, req.Name)
			image := mustOpen(t, dir, req.Name, vfs.ReadWrite)
			disk := make([]byte, size)
			if !bytes.Equal(readGuest(t, image), disk) {
				t.Error("a new image is not all zeroes")
			}
			scribble(t, r, image, disk, 60)
			closeAndJudge(t, dir, req.Name, image, disk)
			compareInfo(t, dir, req.Name)
			image = mustOpen(t, dir, req.Name, vfs.ReadWrite)
			scribble(t, r, image, disk, 20)
			closeAndJudge(t, dir, req.Name, image, disk)
			qemuIO(t, dir, req.Name, "write -P 0x5a 777k 100k", "write -z 1M 512k")
			image = mustOpen(t, dir, req.Name, vfs.ReadWrite)
			copy(disk[777<<10:], bytes.Repeat([]byte{0x5a}, 100<<10))
			clear(disk[1<<20 : 1<<20+512<<10])
			if !bytes.Equal(readGuest(t, image), disk) {
				t.Error("reads as something else than QEMU wrote")
			}
			scribble(t, r, image, disk, 20)
			closeAndJudge(t, dir, req.Name, image, disk)
		})
	}
}

// Snapshots that QEMU made stay what they were, whatever is written; QEMU goes back to them.
func TestOracle_Snapshots(t *testing.T) {
	for _, options := range []string{"compat=1.1", "compat=0.10", "cluster_size=512,refcount_bits=4", "extended_l2=on,cluster_size=16k", "compression_type=zstd,refcount_bits=32"} {
		t.Run(options, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			disk := randomDisk(r, 3<<20+5*512)
			writeFile(t, dir, "raw", disk)
			args := []string{"convert", "-f", "raw", "-O", "qcow2", "-o", options}
			if !strings.Contains(options, "refcount_bits=4") && r.IntN(2) == 0 { // more than 15 would share a cluster
				args = append(args, "-c")
			}
			qemuImg(t, dir, append(args, "raw", "a.qcow2")...)
			kept := map[string][]byte{}
			for i := range 3 {
				name := fmt.Sprintf("snapshot %d", i)
				qemuImg(t, dir, "snapshot", "-c", name, "a.qcow2")
				kept[name] = bytes.Clone(disk)
				compareInfo(t, dir, "a.qcow2")
				image := mustOpen(t, dir, "a.qcow2", vfs.ReadWrite)
				scribble(t, r, image, disk, 25)
				closeAndJudge(t, dir, "a.qcow2", image, disk)
			}
			for name, want := range kept {
				qemuImg(t, dir, "snapshot", "-a", name, "a.qcow2")
				judge(t, dir, "a.qcow2", want)
			}
			qemuImg(t, dir, "snapshot", "-d", "snapshot 1", "a.qcow2")
			image := mustOpen(t, dir, "a.qcow2", vfs.ReadWrite)
			disk = readGuest(t, image)
			scribble(t, r, image, disk, 25)
			closeAndJudge(t, dir, "a.qcow2", image, disk)
		})
	}
}

// Bitmaps that track changes are not to be trusted after we have written; others are as
// good as before. QEMU finds neither damaged nor lost.
func TestOracle_Bitmaps(t *testing.T) {
	r, dir := testenv.Rand(t), t.TempDir()
	qemuImg(t, dir, "create", "-q", "-f", "qcow2", "a.qcow2", "5M")
	qemuImg(t, dir, "bitmap", "--add", "a.qcow2", "enabled")
	qemuIO(t, dir, "a.qcow2", "write 1M 1M")
	qemuImg(t, dir, "bitmap", "--add", "--disable", "-g", "32k", "a.qcow2", "disabled")
	compareInfo(t, dir, "a.qcow2")
	image := mustOpen(t, dir, "a.qcow2", vfs.ReadOnly)
	disk := readGuest(t, image)
	mustClose(t, image)
	if flags := bitmapFlags(t, dir); flags != "disabled: enabled:auto" {
		t.Errorf("after reading, QEMU says of the bitmaps %q", flags)
	}
	image = mustOpen(t, dir, "a.qcow2", vfs.ReadWrite)
	scribble(t, r, image, disk, 20)
	closeAndJudge(t, dir, "a.qcow2", image, disk)
	if flags := bitmapFlags(t, dir); flags != "disabled: enabled:in-use,auto" {
		t.Errorf("after writing, QEMU says of the bitmaps %q", flags)
	}
	image = mustOpen(t, dir, "a.qcow2", vfs.ReadWrite)
	if err := image.Resize(6 << 20); err != nil {
		t.Fatal(err)
	}
	closeAndJudge(t, dir, "a.qcow2", image, append(disk, make([]byte, 1<<20)...))
	if flags := bitmapFlags(t, dir); flags != "disabled:in-use enabled:in-use,auto" {
		t.Errorf("after growing, QEMU says of the bitmaps %q", flags)
	}
}

// bitmapFlags returns what QEMU says of the bitmaps of a.qcow2, sorted by name.
func bitmapFlags(t testing.TB, dir string) string {
	t.Helper()
	var info struct {
		Specific struct {
			Data struct {
				Bitmaps []struct {
					Name  string
					Flags []string
				}
			}
		} `json:"format-specific"`
	}
	if err := json.Unmarshal([]byte(qemuImg(t, dir, "info", "--output=json", "a.qcow2")), &info); err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, b := range info.Specific.Data.Bitmaps {
		all = append(all, b.Name+":"+strings.Join(b.Flags, ","))
	}
	if len(all) == 2 && all[0] > all[1] {
		all[0], all[1] = all[1], all[0]
	}
	return strings.Join(all, " ")
}

// An image that QEMU left with refcounts for later is made right before it is written to.
func TestOracle_DirtyImage(t *testing.T) {
	r, dir := testenv.Rand(t), t.TempDir()
	qemuImg(t, dir, "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4k", "a.qcow2", "3M")
	cmd := exec.Command(testenv.Oracle(t, "qemu-io"), "-f", "qcow2", "-c", "write -P 7 100k 700k", "-c", "flush", "-c", "abort", "a.qcow2")
	cmd.Dir = dir
	_ = cmd.Run() // it aborts
	if result := checkWith(t, dir, "a.qcow2", false); result.Corruptions == 0 {
		t.Fatal("the image is not dirty: nothing is tested")
	}
	disk := make([]byte, 3<<20)
	copy(disk[100<<10:], bytes.Repeat([]byte{7}, 700<<10))
	image := mustOpen(t, dir, "a.qcow2", vfs.ReadWrite)
	if !bytes.Equal(readGuest(t, image), disk) {
		t.Error("a dirty image reads as something else than was written")
	}
	scribble(t, r, image, disk, 30)
	closeAndJudge(t, dir, "a.qcow2", image, disk)
}

// What grew or shrank is what QEMU says it is, and has the old contents and zeroes.
func TestOracle_Resize(t *testing.T) {
	for name, req := range map[string]formats.CreateRequest{
		"default":     {},
		"512":         {ClusterBytes: 512},
		"v2":          {ClusterBytes: 4 << 10, Extra: map[string]string{"compat": "0.10"}},
		"64-bit":      {ClusterBytes: 512, Extra: map[string]string{"refcount_bits": "64"}},
		"extended_l2": {ClusterBytes: 16 << 10, Extra: map[string]string{"extended_l2": "on"}},
		"data file":   {ClusterBytes: 4 << 10, Extra: map[string]string{"data_file": "d"}},
		"raw file":    {ClusterBytes: 4 << 10, Extra: map[string]string{"data_file": "d", "data_file_raw": "on"}},
	} {
		t.Run(name, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			req.Name, req.SizeBytes = "a.qcow2", 900<<10+512
			create(t, dir, req)
			disk := make([]byte, req.SizeBytes)
			image := mustOpen(t, dir, req.Name, vfs.ReadWrite)
			scribble(t, r, image, disk, 20)
			for _, size := range []int64{900<<10 + 1024, 1 << 20, 500<<10 + 512, 9<<20 + 1536, 2 << 20, 60 << 20} {
				var err error
				if size < int64(len(disk)) {
					err = image.Shrink(size)
				} else {
					err = image.Resize(size)
				}
				if err != nil {
					t.Fatalf("resize to %d: %v", size, err)
				}
				disk = append(disk[:min(size, int64(len(disk)))], make([]byte, max(0, size-int64(len(disk))))...)
				if !bytes.Equal(readGuest(t, image), disk) {
					t.Errorf("resized to %d bytes, it has other contents", size)
				}
				scribble(t, r, image, disk, 20)
				closeAndJudge(t, dir, req.Name, image, disk)
				image = mustOpen(t, dir, req.Name, vfs.ReadWrite)
			}
			closeAndJudge(t, dir, req.Name, image, disk)
		})
	}
}

// QEMU follows the links of our overlays, on bases of several formats, and rebases what we
// read.
func TestOracle_Overlays(t *testing.T) {
	r, dir := testenv.Rand(t), t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	disk := randomDisk(r, 3<<20)
	writeFile(t, dir, "base.raw", disk)
	createOverlay(t, dir, "base.raw", "raw", formats.CreateRequest{Name: "sub/middle.qcow2", ClusterBytes: 8 << 10})
	image := mustOpen(t, dir, "sub/middle.qcow2", vfs.ReadWrite)
	scribble(t, r, image, disk, 20)
	closeAndJudge(t, dir, "sub/middle.qcow2", image, disk)
	long := strings.Repeat("n", 200) + ".qcow2"
	createOverlay(t, dir, "sub/middle.qcow2", "qcow2", formats.CreateRequest{
		Name: long, ClusterBytes: 32 << 10, Extra: map[string]string{"extended_l2": "on"}, SizeBytes: 4 << 20,
	})
	disk = append(disk, make([]byte, 1<<20)...)
	image = mustOpen(t, dir, long, vfs.ReadWrite)
	scribble(t, r, image, disk, 20)
	closeAndJudge(t, dir, long, image, disk)
	qemuImg(t, dir, "create", "-q", "-f", "qcow2", "-b", long, "-F", "qcow2", "top.qcow2")
	qemuIO(t, dir, "top.qcow2", "write -P 0x5a 777k 100k")
	copy(disk[777<<10:], bytes.Repeat([]byte{0x5a}, 100<<10))
	image = mustOpen(t, dir, "top.qcow2", vfs.ReadWrite)
	if n := len(image.Layers()); n != 4 {
		t.Errorf("%d layers, want 4", n)
	}
	scribble(t, r, image, disk, 20)
	closeAndJudge(t, dir, "top.qcow2", image, disk)
	qemuImg(t, dir, "rebase", "-F", "qcow2", "-b", "sub/middle.qcow2", "top.qcow2")
	image = mustOpen(t, dir, "top.qcow2", vfs.ReadWrite)
	scribble(t, r, image, disk, 20)
	closeAndJudge(t, dir, "top.qcow2", image, disk)
}

// QEMU reads what we compress, beside what is not.
func TestOracle_WeCompress(t *testing.T) {
	for _, extra := range []map[string]string{
		{}, {"compression_type": "zstd"}, {"compat": "0.10"}, {"cluster_size": "512"}, {"cluster_size": "2M"}, {"refcount_bits": "1"}, {"refcount_bits": "2", "cluster_size": "4k"},
	} {
		t.Run(fmt.Sprint(extra), func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			disk := randomDisk(r, 5<<20+512)
			create(t, dir, formats.CreateRequest{Name: "a.qcow2", SizeBytes: int64(len(disk)), Extra: extra})
			image := mustOpen(t, dir, "a.qcow2", vfs.ReadWrite)
			for off := int64(0); off < int64(len(disk)); {
				start, end, ok := image.CompressedGranule(off)
				if !ok || start != off {
					t.Fatalf("granule at %d is [%d, %d), %v", off, start, end, ok)
				}
				end = min(end, int64(len(disk)))
				packed, err := image.Pack(bytes.Clone(disk[start:end]), off)
				if err == nil {
					err = image.WritePacked(packed)
				}
				if err != nil {
					t.Fatal(err)
				}
				off = end
			}
			closeAndJudge(t, dir, "a.qcow2", image, disk)
			if result := checkWith(t, dir, "a.qcow2", false); result.Compressed == 0 {
				t.Errorf("nothing is compressed: %+v", result)
			}
			image = mustOpen(t, dir, "a.qcow2", vfs.ReadWrite)
			scribble(t, r, image, disk, 40)
			closeAndJudge(t, dir, "a.qcow2", image, disk)
		})
	}
}

// Refcounts that are wrong, and marks in L1 and L2 tables, are made right by a repair.
func TestOracle_Repair(t *testing.T) {
	be := binary.BigEndian
	for name, damage := range map[string]func(p []byte, r *rand.Rand){
		"refcounts are random": func(p []byte, r *rand.Rand) {
			block := be.Uint64(p[be.Uint64(p[48:]):])
			for i := range uint64(600) {
				be.PutUint16(p[block+2*i:], uint16(r.IntN(3)))
			}
		},
		"no refcount block": func(p []byte, _ *rand.Rand) { be.PutUint64(p[be.Uint64(p[48:]):], 0) },
		"refcount block outside the file": func(p []byte, _ *rand.Rand) {
			be.PutUint64(p[be.Uint64(p[48:]):], 1<<50)
		},
		"refcount block is the L1 table": func(p []byte, _ *rand.Rand) {
			be.PutUint64(p[be.Uint64(p[48:]):], be.Uint64(p[40:]))
		},
		"refcount block at odd place": func(p []byte, _ *rand.Rand) {
			be.PutUint64(p[be.Uint64(p[48:]):], 12345)
		},
		"marks": func(p []byte, r *rand.Rand) {
			l1 := be.Uint64(p[40:])
			for i := range uint64(be.Uint32(p[36:])) {
				p[l1+8*i] &= 0x7f
				l2 := be.Uint64(p[l1+8*i:]) & (1<<56 - 1)
				for j := range uint64(512) {
					if l2 != 0 && r.IntN(2) == 0 && be.Uint64(p[l2+8*j:])&(1<<62) == 0 {
						p[l2+8*j] &= 0x7f
					}
				}
			}
		},
		"two owners": func(p []byte, _ *rand.Rand) {
			l2 := be.Uint64(p[be.Uint64(p[40:]):]) & (1<<56 - 1)
			copy(p[l2+8:l2+16], p[l2:l2+8])
		},
		"two owners, and marks": func(p []byte, _ *rand.Rand) {
			l2 := be.Uint64(p[be.Uint64(p[40:]):]) & (1<<56 - 1)
			copy(p[l2+8:l2+16], p[l2:l2+8])
			for j := range uint64(512) {
				p[l2+8*j] &= 0x7f
			}
		},
		"two owners, and no refcount block": func(p []byte, _ *rand.Rand) {
			l2 := be.Uint64(p[be.Uint64(p[40:]):]) & (1<<56 - 1)
			copy(p[l2+8:l2+16], p[l2:l2+8])
			be.PutUint64(p[be.Uint64(p[48:]):], 0)
		},
		"data where metadata is": func(p []byte, _ *rand.Rand) {
			l2 := be.Uint64(p[be.Uint64(p[40:]):]) & (1<<56 - 1)
			be.PutUint64(p[l2+8:], be.Uint64(p[be.Uint64(p[48:]):])|1<<63)
			be.PutUint64(p[l2+16:], l2|1<<63)
			be.PutUint64(p[l2+24:], 1<<63|be.Uint64(p[48:]))
		},
		"two L1 entries for one table": func(p []byte, _ *rand.Rand) {
			l1 := be.Uint64(p[40:])
			copy(p[l1+8:l1+16], p[l1:l1+8])
		},
		"corrupt bit": func(p []byte, _ *rand.Rand) { p[79] |= 2 },
	} {
		t.Run(name, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			create(t, dir, formats.CreateRequest{Name: "a.qcow2", SizeBytes: 3 << 20, ClusterBytes: 4 << 10})
			image := mustOpen(t, dir, "a.qcow2", vfs.ReadWrite)
			disk := make([]byte, 3<<20)
			for i := range disk {
				disk[i] = byte(r.Uint32())
			}
			if _, err := image.WriteAt(disk, 0); err != nil {
				t.Fatal(err)
			}
			mustClose(t, image)
			path := filepath.Join(dir, "a.qcow2")
			p, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			damage(p, r)
			writeFile(t, dir, "a.qcow2", p)
			switch name {
			case "two owners", "two owners, and marks", "two owners, and no refcount block":
				copy(disk[4<<10:8<<10], disk[:4<<10])
			case "two L1 entries for one table": // of 2 MiB each
				copy(disk[2<<20:], disk[:1<<20])
			}
			if name == "corrupt bit" {
				refuseToWrite(t, dir)
			} else if result := checkWith(t, dir, "a.qcow2", false); result.Corruptions == 0 {
				t.Fatalf("check finds nothing: %+v", result)
			}
			if result := checkWith(t, dir, "a.qcow2", true); result.Corruptions > 0 {
				t.Errorf("repair: %+v", result)
			}
			if name == "data where metadata is" { // those clusters are lost, and no others
				image = mustOpen(t, dir, "a.qcow2", vfs.ReadOnly)
				copy(disk[4<<10:16<<10], readGuest(t, image)[4<<10:])
				mustClose(t, image)
			}
			judge(t, dir, "a.qcow2", disk)
			image = mustOpen(t, dir, "a.qcow2", vfs.ReadWrite)
			scribble(t, r, image, disk, 20)
			closeAndJudge(t, dir, "a.qcow2", image, disk)
		})
	}
}

func refuseToWrite(t testing.TB, dir string) {
	t.Helper()
	image := mustOpen(t, dir, "a.qcow2", vfs.ReadWrite)
	if _, err := image.WriteAt([]byte{1}, 0); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("writing to an image marked as corrupt: %v, want %v", err, block.ErrCorrupt)
	}
	if err := image.Close(); err != nil {
		t.Error(err)
	}
}
