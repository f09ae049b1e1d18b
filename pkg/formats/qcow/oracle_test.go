package qcow_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/qcow"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// password is longer than what counts of it.
const password = "a password longer than the key"

func secret(string) ([]byte, error) { return []byte(password), nil }

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

// randomDisk returns guest bytes with stretches of zeroes, of what compresses, and of noise.
func randomDisk(r *rand.Rand, size int) []byte {
	p := make([]byte, size)
	for off := 0; off < size; {
		n := min(1+r.IntN(100<<10), size-off)
		switch r.IntN(3) {
		case 0:
			for i := off; i < off+n; i++ {
				p[i] = byte(r.Uint32())
			}
		case 1:
			for i := off; i < off+n; i++ {
				p[i] = byte(r.Uint32() & 3)
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

// inDir returns a directory of the host as a file system until the test ends.
func inDir(t testing.TB, dir string) vfs.FS {
	t.Helper()
	d, err := vfs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func tryOpen(fsys vfs.FS, name string, mode vfs.Mode) (*formats.Image, error) {
	return formats.Open(context.Background(), fsys, name, formats.OpenOptions{Format: "qcow", Mode: mode, Secret: secret})
}

func mustOpen(t testing.TB, fsys vfs.FS, name string, mode vfs.Mode) *formats.Image {
	t.Helper()
	image, err := tryOpen(fsys, name, mode)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { image.Close() })
	return image
}

func create(t testing.TB, fsys vfs.FS, req formats.CreateRequest) {
	t.Helper()
	req.FS, req.Secret = fsys, secret
	if err := (qcow.Format{}).Create(context.Background(), req); err != nil {
		t.Fatal(err)
	}
}

// createOverlay creates an overlay on parent, of whatever format, which is closed again.
func createOverlay(t testing.TB, fsys vfs.FS, parent, format string, req formats.CreateRequest) {
	t.Helper()
	f, err := formats.Lookup(format)
	if err != nil {
		t.Fatal(err)
	}
	layer, err := f.Open(formats.OpenRequest{FS: fsys, Name: parent, Secret: secret})
	if err != nil {
		t.Fatal(err)
	}
	defer layer.Close()
	req.Parent = &formats.Parent{Name: parent, Layer: layer}
	create(t, fsys, req)
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

func check(t testing.TB, layer *engine.Layer) engine.CheckResult {
	t.Helper()
	result, err := engine.Check(context.Background(), layer, false, nil)
	if err != nil {
		t.Errorf("check %s: %v", layer.Name, err)
	}
	return result
}

// checkClean fails the test unless the top layer of an image is without any problem.
func checkClean(t testing.TB, image *formats.Image) {
	t.Helper()
	for _, p := range check(t, image.Layers()[0]).Problems {
		t.Errorf("check: %s", p.Text)
	}
}

// checkSound is checkClean for images in which something was freed: what is not used again
// before the image is closed is lost.
func checkSound(t testing.TB, image *formats.Image) {
	t.Helper()
	for _, p := range check(t, image.Layers()[0]).Problems {
		if p.Corrupt {
			t.Errorf("check: %s", p.Text)
		}
	}
}

// closeAndJudge closes an image and has QEMU compare it with disk.
func closeAndJudge(t testing.TB, dir, name string, image *formats.Image, disk []byte) {
	t.Helper()
	encrypted := image.Layers()[0].Codec.Geometry().Cipher != nil
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	image = mustOpen(t, inDir(t, dir), name, vfs.ReadOnly)
	if !bytes.Equal(readGuest(t, image), disk) {
		t.Error("the contents differ from what was written")
	}
	checkSound(t, image)
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	writeFile(t, dir, "judge.raw", disk)
	if !encrypted {
		qemuImg(t, dir, "compare", "-f", "qcow", "-F", "raw", name, "judge.raw")
		return
	}
	qemuImg(t, dir, "compare", "--object", "secret,id=key,data="+password,
		"--image-opts", "driver=qcow,encrypt.format=aes,encrypt.key-secret=key,file.filename="+name,
		"driver=raw,file.filename=judge.raw")
}

// scribble writes, zeroes and discards at random, on the image and in memory.
func scribble(t testing.TB, r *rand.Rand, image *formats.Image, disk []byte, steps int) {
	t.Helper()
	for range steps {
		off := r.IntN(len(disk))
		n := min(1+r.IntN(100<<10), len(disk)-off)
		part := disk[off : off+n]
		var err error
		switch r.IntN(8) {
		case 0, 1:
			clear(part)
			err = image.WriteZeroes(int64(off), int64(n), 0)
		case 2:
			if err = image.Discard(int64(off), int64(n)); err == nil {
				_, err = image.ReadAt(part, int64(off))
			}
		default:
			for i := range part {
				part[i] = byte(r.Uint32())
			}
			_, err = image.WriteAt(part, int64(off))
		}
		if err == nil && r.IntN(10) == 0 {
			err = image.Flush()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// kinds of images by QEMU: options of its convert.
var theirs = map[string][]string{
	"plain":      nil,
	"compressed": {"-c"},
	"encrypted":  {"--object", "secret,id=key,data=" + password, "-o", "encrypt.format=aes,encrypt.key-secret=key"},
}

// convertTheirs has qemu-img make a.qcow with the contents of a disk.
func convertTheirs(t testing.TB, dir string, disk []byte, options []string) {
	t.Helper()
	writeFile(t, dir, "raw", disk)
	args := append([]string{"convert", "-f", "raw", "-O", "qcow"}, options...)
	cmd := exec.Command(testenv.Oracle(t, "qemu-img"), append(args, "raw", "a.qcow")...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err == nil {
		return
	}
	// With -c, version 7.2 ends with a compressed write of no bytes, which its qcow refuses:
	// the exit status is 1, nothing is said, and the image is good.
	if options[0] != "-c" || len(out) > 0 {
		t.Fatalf("qemu-img %q: %v\n%s", args, err, out)
	}
	qemuImg(t, dir, "compare", "-f", "raw", "-F", "qcow", "raw", "a.qcow")
}

func TestOracle_ReadsWhatQEMUWrites(t *testing.T) {
	for kind, options := range theirs {
		t.Run(kind, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			want := randomDisk(r, 5<<20+5*512)
			convertTheirs(t, dir, want, options)
			image := mustOpen(t, inDir(t, dir), "a.qcow", vfs.ReadOnly)
			if !bytes.Equal(readGuest(t, image), want) {
				t.Error("the contents differ from what QEMU converted")
			}
			checkClean(t, image)
			if n := check(t, image.Layers()[0]).Compressed; (n > 0) != (kind == "compressed") {
				t.Errorf("%d clusters are compressed", n)
			}
			compareInfo(t, dir, "a.qcow", image)
		})
	}
}

// compareInfo compares what an image says about itself with what qemu-img says.
func compareInfo(t testing.TB, dir, name string, image *formats.Image) {
	t.Helper()
	var info struct {
		VirtualSize int64  `json:"virtual-size"`
		ClusterSize int64  `json:"cluster-size"`
		Encrypted   bool   `json:"encrypted"`
		Backing     string `json:"backing-filename"`
	}
	out := qemuImg(t, dir, "info", "--output=json", name)
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatal(err)
	}
	layer := image.Layers()[0]
	ours := info
	ours.VirtualSize, ours.ClusterSize = image.Info().SizeBytes, image.Info().ClusterBytes
	ours.Encrypted, ours.Backing = false, ""
	for _, d := range layer.Codec.Describe().Details {
		ours.Encrypted = ours.Encrypted || d.Name == "encrypted" && d.Value == true
	}
	if layer.Parent != nil {
		ours.Backing = vfs.RelativeLink(name, layer.Parent.Name)
	}
	if ours != info {
		t.Errorf("ours says %+v, qemu-img %+v", ours, info)
	}
}

// TestOracle_WritesToWhatQEMUMade writes to QEMU's images, resizes them, and has it judge.
func TestOracle_WritesToWhatQEMUMade(t *testing.T) {
	for kind, options := range theirs {
		t.Run(kind, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			disk := randomDisk(r, 3<<20+5*512)
			convertTheirs(t, dir, disk, options)
			image := mustOpen(t, inDir(t, dir), "a.qcow", vfs.ReadWrite)
			scribble(t, r, image, disk, 30)
			disk = resizeRandomly(t, r, image, disk)
			scribble(t, r, image, disk, 10)
			closeAndJudge(t, dir, "a.qcow", image, disk)
		})
	}
}

// resizeRandomly shrinks and grows the image, and returns what it must hold then.
func resizeRandomly(t testing.TB, r *rand.Rand, image *formats.Image, disk []byte) []byte {
	t.Helper()
	size := 512 * (1 + r.IntN(len(disk)/512-1))
	if err := image.Shrink(int64(size)); err != nil {
		t.Fatal(err)
	}
	grown := size + 512*(1+r.IntN(10<<20/512))
	if err := image.Resize(int64(grown)); err != nil {
		t.Fatal(err)
	}
	return append(disk[:size:size], make([]byte, grown-size)...)
}

func TestOracle_QEMUReadsWhatWeWrite(t *testing.T) {
	for _, kind := range []map[string]string{nil, {"encrypt.format": "aes"}} {
		for clusterBits := 9; clusterBits <= 16; clusterBits++ {
			l2Bits := 6 + (clusterBits*5)%8
			extra := map[string]string{"l2_bits": fmt.Sprint(l2Bits)}
			for k, v := range kind {
				extra[k] = v
			}
			t.Run(fmt.Sprintf("cluster_bits=%d,l2_bits=%d,encrypted=%t", clusterBits, l2Bits, kind != nil), func(t *testing.T) {
				r, dir := testenv.Rand(t), t.TempDir()
				disk := make([]byte, 1<<20+3*512)
				fsys := inDir(t, dir)
				create(t, fsys, formats.CreateRequest{Name: "a.qcow", SizeBytes: int64(len(disk)), ClusterBytes: 1 << clusterBits, Extra: extra})
				image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
				scribble(t, r, image, disk, 20)
				disk = resizeRandomly(t, r, image, disk)
				scribble(t, r, image, disk, 10)
				closeAndJudge(t, dir, "a.qcow", image, disk)
			})
		}
	}
}

func TestOracle_QEMUReadsWhatWeCompress(t *testing.T) {
	for clusterBits := 9; clusterBits <= 16; clusterBits++ {
		t.Run(fmt.Sprintf("cluster_bits=%d", clusterBits), func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			disk := randomDisk(r, 1<<20+3*512)
			fsys := inDir(t, dir)
			create(t, fsys, formats.CreateRequest{Name: "a.qcow", SizeBytes: int64(len(disk)), ClusterBytes: 1 << clusterBits})
			image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
			compress(t, image, disk)
			if n := check(t, image.Layers()[0]).Compressed; n == 0 {
				t.Error("nothing was compressed")
			}
			scribble(t, r, image, disk, 5)
			closeAndJudge(t, dir, "a.qcow", image, disk)
		})
	}
}

// compress writes a whole disk, compressed where that saves space, and flushes.
func compress(t testing.TB, image *formats.Image, disk []byte) {
	t.Helper()
	for off := int64(0); off < int64(len(disk)); {
		_, end, ok := image.CompressedGranule(off)
		if !ok {
			t.Fatal("the image cannot hold compressed clusters")
		}
		end = min(end, int64(len(disk)))
		packed, err := image.Pack(bytes.Clone(disk[off:end]), off)
		if err == nil {
			err = image.WritePacked(packed)
		}
		if err != nil {
			t.Fatal(err)
		}
		off = end
	}
	if err := image.Flush(); err != nil {
		t.Fatal(err)
	}
}

func TestOracle_Overlays(t *testing.T) {
	for _, format := range []string{"qcow", "raw", "vmdk"} {
		t.Run("ours on "+format, func(t *testing.T) {
			r, dir := testenv.Rand(t), t.TempDir()
			disk := randomDisk(r, 2<<20+512)
			writeFile(t, dir, "raw", disk)
			qemuImg(t, dir, "convert", "-f", "raw", "-O", format, "raw", "base")
			fsys := inDir(t, dir)
			createOverlay(t, fsys, "base", format, formats.CreateRequest{Name: "a.qcow"})
			image, err := formats.Open(context.Background(), fsys, "a.qcow", formats.OpenOptions{
				Format: "qcow", Mode: vfs.ReadWrite, ParentFormats: map[string]string{"base": format},
			})
			if err != nil {
				t.Fatal(err)
			}
			scribble(t, r, image, disk, 20)
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			writeFile(t, dir, "judge.raw", disk)
			qemuImg(t, dir, "compare", "--image-opts",
				"driver=qcow,file.filename=a.qcow,backing.driver="+format+",backing.file.filename=base", "driver=raw,file.filename=judge.raw")
		})
	}
	t.Run("theirs on theirs", func(t *testing.T) {
		r, dir := testenv.Rand(t), t.TempDir()
		disk := randomDisk(r, 2<<20)
		convertTheirs(t, dir, disk, nil)
		qemuImg(t, dir, "create", "-f", "qcow", "-b", "a.qcow", "-F", "qcow", "top.qcow")
		image := mustOpen(t, inDir(t, dir), "top.qcow", vfs.ReadOnly)
		compareInfo(t, dir, "top.qcow", image)
		if err := image.Close(); err != nil {
			t.Fatal(err)
		}
		image = mustOpen(t, inDir(t, dir), "top.qcow", vfs.ReadWrite)
		scribble(t, r, image, disk, 20)
		closeAndJudge(t, dir, "top.qcow", image, disk)
	})
}

// TestOracle_Libqcow compares with a reader that has nothing to do with QEMU. It mounts what
// it reads, for which it needs root and FUSE. Clusters of 512 bytes it reads wrongly, QEMU's,
// too.
func TestOracle_Libqcow(t *testing.T) {
	testenv.Root(t)
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip(err)
	}
	for _, kind := range []string{"plain", "compressed", "encrypted"} {
		for _, clusterBytes := range []int64{4 << 10, 64 << 10} {
			t.Run(fmt.Sprintf("%s,clusters=%d", kind, clusterBytes), func(t *testing.T) {
				r, dir := testenv.Rand(t), t.TempDir()
				disk := randomDisk(r, 1<<20+512)
				fsys := inDir(t, dir)
				req := formats.CreateRequest{Name: "a.qcow", SizeBytes: int64(len(disk)), ClusterBytes: clusterBytes}
				if kind == "encrypted" {
					req.Extra = map[string]string{"encrypt.format": "aes"}
				}
				create(t, fsys, req)
				image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
				if kind == "compressed" {
					compress(t, image, disk)
				} else {
					mustWrite(t, image, 0, disk)
				}
				mustClose(t, image)
				if !bytes.Equal(libqcow(t, dir, "a.qcow"), disk) {
					t.Error("libqcow reads other bytes")
				}
			})
		}
	}
}

// libqcow returns what libqcow reads of an image.
func libqcow(t testing.TB, dir, name string) []byte {
	t.Helper()
	at := filepath.Join(t.TempDir(), "mounted")
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	oracle(t, dir, "qcowmount", "-k", fmt.Sprintf("%x", password[:16]), name, at)
	defer oracle(t, dir, "umount", at)
	p, err := os.ReadFile(filepath.Join(at, "qcow1"))
	if err != nil {
		t.Fatal(err)
	}
	return p
}
