package main

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/all"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/formattest"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func TestMain(m *testing.M) {
	all.Register()
	os.Exit(m.Run())
}

// kind is a kind of image that Create makes.
type kind struct {
	format    formats.Format
	subformat string
}

// bases returns the kinds of images that stand on nothing.
func bases() []kind {
	var list []kind
	for _, f := range formats.All() {
		subformats := f.Options().Subformats
		if len(subformats) == 0 {
			subformats = []string{""}
		}
		for _, subformat := range subformats {
			list = append(list, kind{f, subformat})
		}
	}
	return list
}

func (k kind) String() string {
	if k.subformat == "" {
		return k.format.Name()
	}
	return k.format.Name() + "/" + k.subformat
}

// figures are what the report counts for the kind.
func (k kind) figures() *formattest.Figures {
	return formattest.FiguresOf(formattest.Kind{Format: k.format.Name(), Subformat: k.subformat})
}

// fileName returns a name with the ending that other people's tools expect.
func (k kind) fileName() string {
	if k.format.Name() == "vpc" {
		return "x.vhd"
	}
	return "x." + k.format.Name()
}

// workDir is a directory on the host, as a path and as a file system.
type workDir struct {
	path string
	fs   *vfs.Dir
}

func newWorkDir(t *testing.T) workDir {
	t.Helper()
	path := t.TempDir()
	fsys, err := vfs.OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fsys.Close() })
	return workDir{path, fsys}
}

func (d workDir) join(name string) string { return filepath.Join(d.path, name) }

// randomDisk returns guest bytes with stretches of data, of text that compresses, and of
// zeroes.
func randomDisk(r *rand.Rand, size int64) []byte {
	p := make([]byte, size)
	for off := int64(0); off < size; {
		n := min(1+r.Int64N(200<<10), size-off)
		switch r.IntN(4) {
		case 0, 1: // zeroes
		case 2:
			copy(p[off:off+n], bytes.Repeat([]byte("conformance "), int(n)/12))
		case 3:
			for i := off; i < off+n; i++ {
				p[i] = byte(r.Uint32())
			}
		}
		off += n
	}
	return p
}

// writeRaw writes a raw image that holds p.
func (d workDir) writeRaw(t *testing.T, name string, p []byte) string {
	t.Helper()
	if err := os.WriteFile(d.join(name), p, 0o600); err != nil {
		t.Fatal(err)
	}
	return d.join(name)
}

// open opens an image; its format is found out if f is nil.
func (d workDir) open(t *testing.T, name string, f formats.Format, mode vfs.Mode, secret formats.Secret) *formats.Image {
	t.Helper()
	opts := formats.OpenOptions{Mode: mode, Secret: secret}
	if f != nil {
		opts.Format = f.Name()
	}
	img, err := formats.Open(context.Background(), d.fs, name, opts)
	if err != nil {
		t.Fatalf("open %s: %v", name, err)
	}
	return img
}

// readAll reads a whole disk.
func readAll(t *testing.T, d block.Device) []byte {
	t.Helper()
	p := make([]byte, d.Info().SizeBytes)
	if _, err := d.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// checkOurs has our check look at an image: it must find it sound, without leaks.
func (d workDir) checkOurs(t *testing.T, k kind, name string, leaksAllowed bool, secret formats.Secret) {
	t.Helper()
	layer, err := k.format.Open(formats.OpenRequest{FS: d.fs, Name: name, Mode: vfs.ReadOnly, Secret: secret})
	if err != nil {
		t.Fatal(err)
	}
	defer layer.Close()
	result, err := engine.Check(context.Background(), layer, false, func(done, total int64) {})
	if err != nil && !errors.Is(err, block.ErrUnsupported) {
		t.Fatalf("check %s: %v", name, err)
	}
	if result.Corruptions > 0 || result.Leaks > 0 && !leaksAllowed {
		t.Errorf("check %s: %d corruptions, %d leaks: %+v", name, result.Corruptions, result.Leaks, result.Problems)
	}
}

// Exit codes of qemu-img check.
const (
	qemuLeaks       = 3
	qemuUnsupported = 63 // for formats that it has no check for
)

// checkTheirs has qemu-img check an image.
func (d workDir) checkTheirs(t *testing.T, k kind, name string, leaksAllowed bool) {
	t.Helper()
	cmd := exec.Command(testenv.Oracle(t, "qemu-img"), "check", "-f", k.format.Name(), name)
	cmd.Dir = d.path // where QEMU looks for data files
	out, err := cmd.CombinedOutput()
	switch code := cmd.ProcessState.ExitCode(); {
	case err == nil:
		k.figures().OracleChecks.Add(1)
	case code == qemuLeaks && leaksAllowed, code == qemuUnsupported:
	default:
		t.Errorf("qemu-img check %s: %v\n%s", name, err, out)
	}
}

// compareTheirs has qemu-img compare an image with a raw file.
func (d workDir) compareTheirs(t *testing.T, k kind, name, raw string) {
	t.Helper()
	cmd := exec.Command(testenv.Oracle(t, "qemu-img"), "compare", "-f", k.format.Name(), "-F", "raw", name, raw)
	cmd.Dir = d.path
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("qemu-img compare %s: %v\n%s", name, err, out)
		return
	}
	k.figures().ReadByOthers.Add(1)
}

// run runs another program, which must succeed.
func run(t *testing.T, dir, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(testenv.Oracle(t, name), args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return out
}
