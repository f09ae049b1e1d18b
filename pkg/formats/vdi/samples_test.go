package vdi_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
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
	file, size, sha256 string
}

func readSamples(t *testing.T, dir string) []sample {
	t.Helper()
	table, err := os.ReadFile(filepath.Join(dir, "SAMPLES.tsv"))
	if err != nil {
		t.Fatal(err)
	}
	var samples []sample
	for line := range strings.Lines(string(table)) {
		f := strings.Split(line, "\t")
		if len(f) >= 7 && strings.HasPrefix(f[3], "vdi ") {
			samples = append(samples, sample{file: f[0], size: f[4], sha256: f[6]})
		}
	}
	if len(samples) < 3 {
		t.Fatalf("%d samples of VDI, want at least 3", len(samples))
	}
	return samples
}

// unpackSamples puts all samples into one new directory, without their compression.
func unpackSamples(t *testing.T) (dir string, samples []sample) {
	t.Helper()
	from := testenv.Samples(t)
	dir, samples = t.TempDir(), readSamples(t, from)
	for i, s := range samples {
		data, err := exec.Command(testenv.Oracle(t, "xz"), "-dc", filepath.Join(from, s.file)).Output()
		if err != nil {
			t.Fatalf("%s: %v", s.file, err)
		}
		samples[i].file = strings.TrimSuffix(filepath.Base(s.file), ".xz")
		writeFile(t, dir, samples[i].file, data)
	}
	return dir, samples
}

// What other programs wrote reads as they say it does, the differencing image through the
// base that its UUIDs name.
func TestSamples(t *testing.T) {
	dir, samples := unpackSamples(t)
	for _, s := range samples {
		t.Run(s.file, func(t *testing.T) {
			image := mustOpen(t, dir, s.file, vfs.ReadOnly)
			if got := fmt.Sprint(image.Info().SizeBytes); got != s.size {
				t.Errorf("%s bytes, want %s", got, s.size)
			}
			if got := fmt.Sprintf("%x", sha256.Sum256(readGuest(t, image))); got != s.sha256 {
				t.Errorf("contents have SHA-256 %s, want %s", got, s.sha256)
			}
			for _, layer := range image.Layers() {
				result, err := engine.Check(context.Background(), layer, false, nil)
				if err != nil || len(result.Problems) > 0 || result.Leaks > 0 {
					t.Errorf("check of %s: %v, %+v", layer.Name, err, result)
				}
			}
			if strings.Contains(s.file, "mid") != (len(image.Layers()) == 2) {
				t.Errorf("%d layers", len(image.Layers()))
			}
		})
	}
}

// A differencing image is not opened without its parent, with two of them, or with one
// that was written to.
func TestSamples_Parent(t *testing.T) {
	dir, _ := unpackSamples(t)
	const base, child, wanted = "vdi-diff-base.vdi", "vdi-diff-mid.vdi", "d9179e45-b8c4-4e7f-8e8d-0c4bc7e17a32"
	data, err := os.ReadFile(filepath.Join(dir, base))
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what, want string) {
		t.Helper()
		_, err := openDir(t, dir, child, vfs.ReadOnly)
		if !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want one that says %q", what, err, want)
		}
	}
	writeFile(t, dir, "copy.vdi", data)
	refused("two parents", "both")
	if err := errors.Join(os.Remove(filepath.Join(dir, base)), os.Rename(filepath.Join(dir, "copy.vdi"), filepath.Join(dir, "renamed.vdi"))); err != nil {
		t.Fatal(err)
	}
	image := mustOpen(t, dir, child, vfs.ReadOnly)
	if name := image.Layers()[1].Name; name != "renamed.vdi" {
		t.Errorf("the parent is %s", name)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	image = mustOpen(t, dir, "renamed.vdi", vfs.ReadWrite)
	if _, err := image.WriteAt([]byte{1}, 0); err != nil {
		t.Fatal(err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	refused("a parent that was written to", "modification UUID")
	if err := os.Remove(filepath.Join(dir, "renamed.vdi")); err != nil {
		t.Fatal(err)
	}
	refused("no parent", wanted)
}

// Samples can be written, by us and then by QEMU, and stay sound.
func TestSamples_Write(t *testing.T) {
	dir, samples := unpackSamples(t)
	for _, s := range samples {
		if strings.Contains(s.file, "mid") {
			continue
		}
		t.Run(s.file, func(t *testing.T) {
			r := testenv.Rand(t)
			image := mustOpen(t, dir, s.file, vfs.ReadWrite)
			disk := readGuest(t, image)
			scribble(t, r, image, disk, 30)
			closeAndJudge(t, dir, s.file, image, disk)
		})
	}
}

func openDir(t testing.TB, dir, name string, mode vfs.Mode) (*formats.Image, error) {
	t.Helper()
	d, err := vfs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	return formats.Open(context.Background(), d, name, formats.OpenOptions{Format: "vdi", Mode: mode})
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
