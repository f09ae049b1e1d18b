package main

import (
	"bytes"
	"cmp"
	"context"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/all"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func TestMain(m *testing.M) {
	all.Register()
	os.Exit(m.Run())
}

// box is a directory that VirtualBox and we work on.
type box struct {
	t    *testing.T
	tree tree
	dir  string
	fs   *vfs.Dir
	rand *rand.Rand
}

func newBox(t *testing.T) *box {
	t.Helper()
	dir := os.Getenv(treeEnv)
	if dir == "" {
		t.Skip("needs VirtualBox: make oracle-virtualbox")
	}
	b := &box{t: t, tree: tree(dir), dir: t.TempDir(), rand: testenv.Rand(t)}
	fs, err := vfs.OpenDir(b.dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fs.Close() })
	b.fs = fs
	return b
}

// manage runs VBoxManage, which must succeed; names in args are made with inBox.
func (b *box) manage(args ...string) string {
	b.t.Helper()
	out, err := b.tree.manage(b.t.Context(), b.dir, args...)
	if err != nil {
		b.t.Fatal(err)
	}
	return out
}

// inBox is what VirtualBox calls a file of the box.
func inBox(name string) string { return path.Join(workDir, name) }

// rawFile writes a raw image for VirtualBox to convert.
func (b *box) rawFile(name string, content []byte) {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.dir, name), content, 0o600); err != nil {
		b.t.Fatal(err)
	}
}

// theirs makes an image with VirtualBox.
func (b *box) theirs(name, format, variant string, content []byte) {
	b.t.Helper()
	b.rawFile(name+".raw", content)
	b.manage("convertfromraw", inBox(name+".raw"), inBox(name), "--format", format, "--variant", variant)
}

// theirsOn makes an empty child of an image with VirtualBox.
func (b *box) theirsOn(name, parent, format string) {
	b.t.Helper()
	b.manage("createmedium", "disk", "--filename", inBox(name), "--diffparent", inBox(parent), "--format", format)
}

// register makes an image known to VirtualBox, which looks for a child's parent among
// those it knows.
func (b *box) register(name string) {
	b.t.Helper()
	b.manage("modifymedium", "disk", inBox(name), "--description", "a parent")
}

// rewrite makes VirtualBox give an image other contents, in place.
func (b *box) rewrite(name string, content []byte) {
	b.t.Helper()
	source := name + ".new.vdi"
	b.theirs(source, "VDI", "Standard", content)
	b.manage("clonemedium", "disk", inBox(source), inBox(name), "--existing")
}

// format makes VirtualBox write a small file system over an image, which changes few
// places of it.
func (b *box) format(name string) {
	b.t.Helper()
	b.manage("mediumio", "--disk="+inBox(name), "formatfat", "--quick")
}

// theyRead returns what VirtualBox reads from an image.
func (b *box) theyRead(name string) []byte {
	b.t.Helper()
	out := name + ".read"
	b.manage("mediumio", "--disk="+inBox(name), "cat", "--output", inBox(out))
	content, err := os.ReadFile(filepath.Join(b.dir, out))
	if err != nil {
		b.t.Fatal(err)
	}
	return content
}

// openOurs opens an image with everything it stands on; "" probes its format.
func (b *box) openOurs(name, format string, mode vfs.Mode) *formats.Image {
	b.t.Helper()
	img, err := formats.Open(b.t.Context(), b.fs, name, formats.OpenOptions{Format: format, Mode: mode})
	if err != nil {
		b.t.Fatal(err)
	}
	return img
}

// weRead returns what we read from an image, whose tables must be in order.
func (b *box) weRead(name, format string) []byte {
	b.t.Helper()
	b.check(name, format)
	img := b.openOurs(name, "", vfs.ReadOnly)
	defer img.Close()
	if got := img.Layers()[0].Format; got != format {
		b.t.Errorf("%s is taken for %s, want %s", name, got, format)
	}
	content := make([]byte, img.Info().SizeBytes)
	if _, err := img.ReadAt(content, 0); err != nil {
		b.t.Fatal(err)
	}
	return content
}

func (b *box) check(name, format string) {
	b.t.Helper()
	layer, err := lookup(b.t, format).Open(formats.OpenRequest{FS: b.fs, Name: name, Mode: vfs.ReadOnly})
	if err != nil {
		b.t.Fatal(err)
	}
	defer layer.Close()
	result, err := engine.Check(b.t.Context(), layer, false, func(int64, int64) {})
	if err != nil || result.Corruptions > 0 {
		b.t.Errorf("check %s: %+v, %v", name, result.Problems, err)
	}
	if result.Leaks > 0 { // VirtualBox may lose space, too
		b.t.Logf("check %s: %+v", name, result.Problems)
	}
}

// ours makes an image with our formats.
func (b *box) ours(name, format, subformat string, content []byte) {
	b.t.Helper()
	b.rawFile(name+".raw", content)
	src := b.openOurs(name+".raw", "raw", vfs.ReadOnly)
	defer src.Close()
	req := formats.CreateRequest{FS: b.fs, Name: name, Subformat: subformat, SizeBytes: int64(len(content))}
	if err := formats.Convert(context.WithoutCancel(b.t.Context()), src, lookup(b.t, format), req, nil); err != nil {
		b.t.Fatal(err)
	}
}

// oursOn makes a child of an image, in which some of the contents are changed: it
// returns them.
func (b *box) oursOn(name, parent, format, subformat string, content []byte) []byte {
	b.t.Helper()
	base := b.openOurs(parent, format, vfs.ReadOnly)
	req := formats.CreateRequest{FS: b.fs, Name: name, Subformat: subformat, Parent: &formats.Parent{Name: parent, Layer: base.Layers()[0]}}
	err := lookup(b.t, format).Create(b.t.Context(), req)
	if err := cmp.Or(err, base.Close()); err != nil {
		b.t.Fatal(err)
	}
	img := b.openOurs(name, format, vfs.ReadWrite)
	content = bytes.Clone(content)
	b.change(content, func(part []byte, off int64) {
		if _, err := img.WriteAt(part, off); err != nil {
			b.t.Fatal(err)
		}
	})
	if err := img.Close(); err != nil {
		b.t.Fatal(err)
	}
	return content
}

// lookup returns a format of ours, or skips the test until there is one.
func lookup(t *testing.T, name string) formats.Format {
	t.Helper()
	f, err := formats.Lookup(name)
	if err != nil {
		t.Skip(err)
	}
	return f
}

const (
	sectorBytes = 512
	mib         = 1 << 20
)

// disk returns contents with data here and there and many zeroes, up to the last sector.
func (b *box) disk(sizeBytes int64) []byte {
	content := make([]byte, sizeBytes)
	b.change(content, func([]byte, int64) {})
	copy(content[sizeBytes-sectorBytes:], "the last sector")
	return content
}

// change changes some sectors of a disk, to data or to zeroes, and tells which.
func (b *box) change(content []byte, changed func(part []byte, off int64)) {
	sectors := int64(len(content) / sectorBytes)
	for range 24 {
		n := 1 + b.rand.Int64N(min(sectors, 1200))
		from := b.rand.Int64N(sectors - n + 1)
		part := content[from*sectorBytes : (from+n)*sectorBytes]
		clear(part)
		if b.rand.IntN(4) > 0 {
			for i := range part {
				part[i] = byte(b.rand.Uint32())
			}
		}
		changed(part, from*sectorBytes)
	}
}

// want compares contents, of which more than a few bytes cannot be shown.
func (b *box) want(what string, got, want []byte) {
	b.t.Helper()
	if len(got) != len(want) {
		b.t.Errorf("%s: %d bytes, want %d", what, len(got), len(want))
		return
	}
	for off := range want {
		if got[off] != want[off] {
			b.t.Errorf("%s: sector %d differs at byte %d", what, off/sectorBytes, off)
			return
		}
	}
}
