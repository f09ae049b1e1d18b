package vhdx_test

import (
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
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
	file, format, size, sha256 string
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
		if len(f) >= 7 && strings.HasPrefix(f[3], "vhdx ") {
			samples = append(samples, sample{file: f[0], format: f[3], size: f[4], sha256: f[6]})
		}
	}
	if len(samples) < 2 {
		t.Fatalf("%d samples of VHDX, want at least 2", len(samples))
	}
	return samples
}

// unpack copies a sample to a.vhdx in a new directory.
func unpack(t *testing.T, file string) string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var plain io.Reader
	switch filepath.Ext(file) {
	case ".gz":
		if plain, err = gzip.NewReader(f); err != nil {
			t.Fatal(err)
		}
	case ".bz2":
		plain = bzip2.NewReader(f)
	default:
		t.Fatalf("%s: want .gz or .bz2", file)
	}
	dir := t.TempDir()
	to, err := os.Create(filepath.Join(dir, "a.vhdx"))
	if err == nil {
		_, err = io.Copy(to, plain)
	}
	if err = errors.Join(err, to.Close()); err != nil {
		t.Fatal(err)
	}
	return dir
}

func openDir(t testing.TB, dir, name string, mode vfs.Mode) *formats.Image {
	t.Helper()
	d, err := vfs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return mustOpen(t, d, name, mode)
}

// mustOpen opens an image until the test ends.
func mustOpen(t testing.TB, fsys vfs.FS, name string, mode vfs.Mode) *formats.Image {
	t.Helper()
	image, err := formats.Open(context.Background(), fsys, name, formats.OpenOptions{Format: "vhdx", Mode: mode})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { image.Close() })
	return image
}

// guestSum returns the SHA-256 of a disk that is mostly zero.
func guestSum(t testing.TB, image *formats.Image) string {
	t.Helper()
	h := sha256.New()
	zeroes := make([]byte, 1<<20)
	p := make([]byte, 1<<20)
	for off, size := int64(0), image.Info().SizeBytes; off < size; {
		e, err := image.Map(off, min(size-off, int64(len(p))))
		if err != nil {
			t.Fatal(err)
		}
		part := zeroes[:e.Len]
		if e.State == block.Data {
			part = p[:e.Len]
			if _, err := image.ReadAt(part, off); err != nil {
				t.Fatal(err)
			}
		}
		h.Write(part)
		off += e.Len
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// fully reports whether tests that take minutes are wanted: hashing the zeroes of large
// samples.
func fully() bool { return os.Getenv("IMGDISK_FULL") != "" }

// dataSum returns a SHA-256 of the 4 KiB of a disk that are not zero, with their places.
func dataSum(t testing.TB, image *formats.Image) string {
	t.Helper()
	h := sha256.New()
	p := make([]byte, 1<<20)
	zeroes := make([]byte, 4096)
	for off, size := int64(0), image.Info().SizeBytes; off < size; {
		e, err := image.Map(off, size-off)
		if err != nil {
			t.Fatal(err)
		}
		if e.State != block.Data {
			off += e.Len
			continue
		}
		part := p[:min(e.Len, int64(len(p)))]
		if _, err := image.ReadAt(part, off); err != nil {
			t.Fatal(err)
		}
		for at := 0; at < len(part); at += len(zeroes) {
			piece := part[at:min(at+len(zeroes), len(part))]
			if !bytes.Equal(piece, zeroes[:len(piece)]) {
				fmt.Fprintln(h, off+int64(at))
				h.Write(piece)
			}
		}
		off += int64(len(part))
	}
	return fmt.Sprintf("%x", h.Sum(nil))
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

// TestSamples reads images by Windows and by a QEMU that was stopped: the log of the latter
// is replayed, in memory alone.
func TestSamples(t *testing.T) {
	dir := testenv.Samples(t)
	for _, s := range readSamples(t, dir) {
		t.Run(s.file, func(t *testing.T) {
			at := unpack(t, filepath.Join(dir, s.file))
			before, err := os.ReadFile(filepath.Join(at, "a.vhdx"))
			if err != nil {
				t.Fatal(err)
			}
			image := openDir(t, at, "a.vhdx", vfs.ReadOnly)
			if size := fmt.Sprint(image.Info().SizeBytes); size != s.size {
				t.Errorf("size %s, want %s", size, s.size)
			}
			if fully() {
				if sum := guestSum(t, image); sum != s.sha256 {
					t.Errorf("contents have SHA-256 %s, want %s", sum, s.sha256)
				}
			}
			isDirty := strings.Contains(s.format, "dirty")
			if found := problems(t, image); (len(found) > 0) != isDirty {
				t.Errorf("check found %v", found)
			}
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			after, err := os.ReadFile(filepath.Join(at, "a.vhdx"))
			if err != nil || !bytes.Equal(before, after) {
				t.Errorf("reading changed the file, error %v", err)
			}
		})
	}
}

// TestSamples_Write writes to the samples, resizes them, and has QEMU judge.
func TestSamples_Write(t *testing.T) {
	dir := testenv.Samples(t)
	qemuImg := testenv.Oracle(t, "qemu-img")
	for _, s := range readSamples(t, dir) {
		t.Run(s.file, func(t *testing.T) {
			at := unpack(t, filepath.Join(dir, s.file))
			image := openDir(t, at, "a.vhdx", vfs.ReadWrite)
			r := testenv.Rand(t)
			size := image.Info().SizeBytes
			type written struct {
				off  int64
				data []byte
			}
			var all []written
			for i := range 20 {
				w := written{r.Int64N(size - 1<<20), make([]byte, 1+r.IntN(300<<10))}
				for j := range w.data {
					w.data[j] = byte(r.Uint32())
				}
				if _, err := image.WriteAt(w.data, w.off); err != nil {
					t.Fatal(err)
				}
				all = append(all, w)
				if i == 10 {
					size += 1 << 30
					if err := image.Resize(size); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			image = openDir(t, at, "a.vhdx", vfs.ReadOnly)
			for i, w := range all {
				for _, later := range all[i+1:] { // what was overwritten does not count
					if later.off < w.off+int64(len(w.data)) && w.off < later.off+int64(len(later.data)) {
						w.data = nil
						break
					}
				}
				got := make([]byte, len(w.data))
				if _, err := image.ReadAt(got, w.off); err != nil || !bytes.Equal(got, w.data) {
					t.Errorf("%d bytes at %d differ from what was written, error %v", len(w.data), w.off, err)
				}
			}
			for _, p := range problems(t, image) {
				t.Errorf("check: %s", p.Text)
			}
			run(t, at, qemuImg, "check", "-f", "vhdx", "a.vhdx")
			run(t, at, qemuImg, "convert", "-f", "vhdx", "-O", "vhdx", "a.vhdx", "b.vhdx")
			if ours, theirs := dataSum(t, image), dataSum(t, openDir(t, at, "b.vhdx", vfs.ReadOnly)); ours != theirs {
				t.Errorf("the data have SHA-256 %s, in QEMU's copy %s", ours, theirs)
			}
		})
	}
}
