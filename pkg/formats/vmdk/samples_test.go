package vmdk_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// sample is a row of the table of samples.
type sample struct {
	file, format, size, expect, sha256 string
}

func readSamples(t *testing.T, dir string) []sample {
	t.Helper()
	table, err := os.ReadFile(filepath.Join(dir, "SAMPLES.tsv"))
	if err != nil {
		t.Fatal(err)
	}
	var samples []sample
	for _, line := range strings.Split(string(table), "\n") {
		f := strings.Split(line, "\t")
		if len(f) >= 7 && strings.HasPrefix(f[3], "vmdk ") {
			samples = append(samples, sample{file: f[0], format: f[3], size: f[4], expect: f[5], sha256: f[6]})
		}
	}
	if len(samples) < 10 {
		t.Fatalf("%d samples of VMDK, want at least 10", len(samples))
	}
	return samples
}

// unpack copies the files of a directory, without their compression, to where they can be
// opened.
func unpack(t *testing.T, dir string) string {
	t.Helper()
	to := t.TempDir()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		plain, packed := strings.CutSuffix(e.Name(), ".xz")
		name, zipped := strings.CutSuffix(plain, ".gz")
		if !strings.HasSuffix(name, ".vmdk") {
			continue
		}
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err == nil && packed {
			data, err = exec.Command(testenv.Oracle(t, "xz"), "-dc", filepath.Join(dir, e.Name())).Output()
		}
		if err == nil && zipped {
			data, err = gunzip(data)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), data, 0o600)
		}
		if err != nil {
			t.Fatalf("%s: %v", e.Name(), err)
		}
	}
	return to
}

func gunzip(p []byte) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(p))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}

// TestSamples reads images by VMware, VirtualBox, QEMU, FreeBSD and others.
func TestSamples(t *testing.T) {
	dir := testenv.Samples(t)
	for _, s := range readSamples(t, dir) {
		t.Run(s.file, func(t *testing.T) {
			files := unpack(t, filepath.Join(dir, filepath.Dir(s.file)))
			name := strings.TrimSuffix(strings.TrimSuffix(filepath.Base(s.file), ".xz"), ".gz")
			image, err := openDir(t, files, name, vfs.ReadOnly)
			if s.expect == "refuse" {
				if !errors.Is(err, block.ErrUnsupported) {
					t.Fatalf("opened with error %v, want one that says it is not supported", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if size := fmt.Sprint(image.Info().SizeBytes); size != s.size {
				t.Errorf("size %s, want %s", size, s.size)
			}
			if sum := fmt.Sprintf("%x", sha256.Sum256(readGuest(t, image))); sum != s.sha256 {
				t.Errorf("contents have SHA-256 %s, want %s", sum, s.sha256)
			}
			checkClean(t, image)
		})
	}
}

// openDir opens an image in a directory of the host until the test ends.
func openDir(t testing.TB, dir, name string, mode vfs.Mode) (*formats.Image, error) {
	t.Helper()
	d, err := vfs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	image, err := formats.Open(context.Background(), d, name, formats.OpenOptions{Format: "vmdk", Mode: mode})
	if err == nil {
		t.Cleanup(func() { image.Close() })
	}
	return image, err
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

// checkClean fails the test unless every layer of an image is without any problem.
func checkClean(t testing.TB, image *formats.Image) {
	t.Helper()
	for _, p := range problems(t, image) {
		t.Errorf("check: %s", p.Text)
	}
}

// checkSound is checkClean for images in which something was zeroed or discarded: what is
// freed and not used again before the image is closed is lost.
func checkSound(t testing.TB, image *formats.Image) {
	t.Helper()
	for _, p := range problems(t, image) {
		if !strings.Contains(p.Text, "nothing refers to") {
			t.Errorf("check: %s", p.Text)
		}
	}
}

func problems(t testing.TB, image *formats.Image) (all []engine.Problem) {
	t.Helper()
	for _, layer := range image.Layers() {
		result, err := layer.Codec.Check(context.Background(), nil, nil)
		if err != nil {
			t.Errorf("check %s: %v", layer.Name, err)
		}
		all = append(all, result.Problems...)
	}
	return all
}

// TestSamples_Write writes to the images that can be written, grows them, and has QEMU
// judge.
func TestSamples_Write(t *testing.T) {
	dir := testenv.Samples(t)
	for _, s := range readSamples(t, dir) {
		if s.expect != "content" || strings.Contains(s.format, "streamOptimized") {
			continue
		}
		t.Run(s.file, func(t *testing.T) {
			r := testenv.Rand(t)
			files := unpack(t, filepath.Join(dir, filepath.Dir(s.file)))
			name := strings.TrimSuffix(filepath.Base(s.file), ".xz")
			image := mustOpen(t, files, name, vfs.ReadWrite)
			disk := readGuest(t, image)
			scribble(t, r, image, disk, 30)
			if !strings.Contains(s.format, "twoGb") && !strings.Contains(s.format, "seSparse") {
				const more = 3<<20 + 512
				if err := image.Resize(int64(len(disk)) + more); err != nil {
					t.Fatal(err)
				}
				disk = append(disk, make([]byte, more)...)
				scribble(t, r, image, disk, 10)
			}
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			image = mustOpen(t, files, name, vfs.ReadOnly)
			if !bytes.Equal(readGuest(t, image), disk) {
				t.Error("the contents differ from what was written")
			}
			checkSound(t, image)
			if out := qemuImg(t, files, "check", "-f", "vmdk", name); !strings.Contains(out, "No errors") {
				t.Errorf("qemu-img check: %s", out)
			}
			qemuImg(t, files, "convert", "-f", "vmdk", "-O", "raw", name, "qemu.raw")
			raw, err := os.ReadFile(filepath.Join(files, "qemu.raw"))
			if err != nil {
				t.Fatal(err)
			}
			if len(raw) != len(disk) || !bytes.Equal(raw[:len(disk)], disk) {
				t.Error("QEMU reads other contents")
			}
		})
	}
}
