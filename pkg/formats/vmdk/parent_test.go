package vmdk_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vmdk"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const (
	uuidA = "b75cb268-b7a5-47db-ba37-434d072f7480"
	uuidB = "0c4f8b32-16a5-4d0b-9d3e-5c1f64f1b0aa"
	uuidC = "aaaaaaaa-16a5-4d0b-9d3e-5c1f64f1b0aa"
)

// virtualBoxChain returns a base and a child in Snapshots as VirtualBox links them: by
// UUIDs only.
func virtualBoxChain(t *testing.T) *vfs.Mem {
	t.Helper()
	fsys := newSmall(t)
	if err := fsys.Mkdir("Snapshots"); err != nil {
		t.Fatal(err)
	}
	memCreate(t, fsys, formats.CreateRequest{Name: "Snapshots/{child}.vmdk", SizeBytes: smallSize, ClusterBytes: smallGrain})
	setDDB(t, fsys, "a.vmdk", "uuid.image", uuidA)
	setDDB(t, fsys, "a.vmdk", "uuid.modification", uuidB)
	setDDB(t, fsys, "Snapshots/{child}.vmdk", "uuid.parent", strings.ToUpper(uuidA))
	setDDB(t, fsys, "Snapshots/{child}.vmdk", "uuid.parentmodification", uuidB)
	return fsys
}

// setDDB gives a line of an embedded descriptor another value of the same length.
func setDDB(t *testing.T, fsys vfs.FS, name, key, value string) {
	t.Helper()
	line := "ddb." + key + " = \""
	_, rest, ok := strings.Cut(string(peek(t, fsys, name)[512:21*512]), line)
	if !ok {
		t.Fatalf("no %s in %s", key, name)
	}
	old, _, _ := strings.Cut(rest, "\"")
	edit(t, fsys, name, line+old, line+value)
}

func TestParent_VirtualBox(t *testing.T) {
	const child = "Snapshots/{child}.vmdk"
	for name, c := range map[string]struct {
		change  func(t *testing.T, fsys vfs.FS)
		message string // "": it opens
		is      error
	}{
		"above": {func(*testing.T, vfs.FS) {}, "", nil},
		"beside": {func(t *testing.T, fsys vfs.FS) {
			if err := fsys.Rename("a.vmdk", "Snapshots/base.VMDK"); err != nil {
				t.Fatal(err)
			}
		}, "", nil},
		"missing": {func(t *testing.T, fsys vfs.FS) {
			if err := fsys.Remove("a.vmdk"); err != nil {
				t.Fatal(err)
			}
		}, "which is not beside it", block.ErrUnsupported},
		"twice": {func(t *testing.T, fsys vfs.FS) {
			addFile(t, fsys, "b.vmdk", peek(t, fsys, "a.vmdk"))
		}, "a.vmdk, b.vmdk all have it", block.ErrCorrupt},
		"written since": {func(t *testing.T, fsys vfs.FS) {
			setDDB(t, fsys, "a.vmdk", "uuid.modification", uuidC)
		}, "was written to after its child was made", block.ErrCorrupt},
		"other programs' files": {func(t *testing.T, fsys vfs.FS) {
			addFile(t, fsys, "b.vmdk", []byte("not an image"))
			addFile(t, fsys, "c.vmdk", nil)
			addFile(t, fsys, "d.vmdk", append([]byte("KDMV"), bytes.Repeat([]byte{255}, 600)...))
		}, "", nil},
		"no UUID": {func(t *testing.T, fsys vfs.FS) {
			setDDB(t, fsys, child, "uuid.parent", "the one from last week")
		}, "want a UUID", block.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := virtualBoxChain(t)
			c.change(t, fsys)
			image, err := memTryOpen(fsys, child, vfs.ReadWrite)
			if c.message != "" {
				if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.message) {
					t.Errorf("error %v, want %v that says %q", err, c.is, c.message)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer image.Close()
			if !bytes.HasPrefix(readGuest(t, image), smallData()) {
				t.Error("the parent's data is not there")
			}
		})
	}
}

// A first write gives an image other identifiers in VirtualBox's eyes, too.
func TestParent_VirtualBoxSeesWrites(t *testing.T) {
	fsys := virtualBoxChain(t)
	image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
	if _, err := image.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := memTryOpen(fsys, "Snapshots/{child}.vmdk", vfs.ReadOnly); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("a child whose parent was written to opens with error %v, want %v", err, block.ErrCorrupt)
	}
}

// bases returns a file system with bases of the same contents, and top.vmdk on the first.
func bases(t *testing.T, overlay formats.CreateRequest) *vfs.Mem {
	t.Helper()
	fsys := newSmall(t)
	if err := fsys.Mkdir("a long directory name"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"b.vmdk", "a long directory name/" + strings.Repeat("c", 60) + ".vmdk"} {
		memCreate(t, fsys, formats.CreateRequest{Name: name, SizeBytes: smallSize})
		image := memOpen(t, fsys, name, vfs.ReadWrite)
		if _, err := image.WriteAt(smallData(), 0); err != nil {
			t.Fatal(err)
		}
		if err := image.Close(); err != nil {
			t.Fatal(err)
		}
	}
	overlay.Name = "top.vmdk"
	memCreateOverlay(t, fsys, "a.vmdk", overlay)
	return fsys
}

// The parent of every kind of overlay changes, to a longer name, a shorter one, to none and
// back, and a crash at any write leaves the old or the new one.
func TestSetParent(t *testing.T) {
	long := "a long directory name/" + strings.Repeat("c", 60) + ".vmdk"
	for _, subformat := range []string{"monolithicSparse", "twoGbMaxExtentSparse", "vmfsSparse"} {
		t.Run(subformat, func(t *testing.T) {
			fsys := bases(t, formats.CreateRequest{Subformat: subformat})
			for _, parent := range []string{"b.vmdk", long, "", "a.vmdk", long, "b.vmdk", ""} {
				before := parentOf(t, fsys)
				for n := uint64(0); ; n++ {
					reached := false
					mem := fsys.Clone()
					crash := func() {
						reached = true
						if now := parentOf(t, mem.Clone()); now != before && now != parent {
							t.Errorf("killed at write %d: the parent is %q, was %q, becomes %q", n, now, before, parent)
						}
					}
					if err := setParent(t, vfs.Inject(mem, vfs.If(vfs.Changing, vfs.CrashPoint(n, crash))), parent); err != nil {
						t.Fatal(err)
					}
					if !reached {
						fsys = mem
						break
					}
				}
				if now := parentOf(t, fsys); now != parent {
					t.Errorf("the parent is %q, want %q", now, parent)
				}
			}
		})
	}
}

// parentOf returns what top.vmdk stands on; the chain opens.
func parentOf(t *testing.T, fsys vfs.FS) string {
	t.Helper()
	image, err := memTryOpen(fsys, "top.vmdk", vfs.ReadOnly)
	if err != nil {
		t.Error(err)
		return "?"
	}
	defer image.Close()
	layers := image.Layers()
	if len(layers) == 1 {
		return ""
	}
	if !bytes.HasPrefix(readGuest(t, image), smallData()) {
		t.Errorf("on %s, it reads as something else", layers[1].Name)
	}
	return layers[1].Name
}

// setParent gives top.vmdk another parent; "" is none.
func setParent(t *testing.T, fsys vfs.FS, name string) (err error) {
	t.Helper()
	image := memOpen(t, fsys, "top.vmdk", vfs.ReadWrite)
	defer image.Close()
	var parent *engine.Parent
	var below []*engine.Layer
	if name != "" {
		layer, err := vmdk.Format{}.Open(formats.OpenRequest{FS: fsys, Name: name})
		if err != nil {
			t.Fatal(err)
		}
		parent, below = &engine.Parent{Name: name, Layer: layer}, []*engine.Layer{layer}
	}
	removed, err := image.SetParent(parent, below)
	if err != nil {
		removed = below
	}
	for _, layer := range removed {
		err = errors.Join(err, layer.Close())
	}
	return err
}

// Descriptors of others are changed where one write can do it, and refused elsewhere.
func TestSetParent_Foreign(t *testing.T) {
	hint := func(n int) string { return strings.Repeat("x", n) + ".vmdk" }
	for name, c := range map[string]struct {
		text string // %s is the CID and the hint
		want error
	}{
		"blanks to spare":  {"# Disk DescriptorFile\nversion=1\n%s\n# Extent description\n" + strings.Repeat("\n", 200) + "%s", nil},
		"CRLF":             {"# Disk DescriptorFile\r\nversion=1\r\n%s\r\n# Extent description\r\n%s", nil},
		"short":            {"version=1\n%s%s", nil},
		"over two sectors": {"# Disk DescriptorFile\nversion=1\n# " + strings.Repeat("comment", 50) + "\n%s%sddb.x = \"" + strings.Repeat("y", 700) + "\"\n", block.ErrUnsupported},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := bases(t, formats.CreateRequest{})
			if err := fsys.Rename("b.vmdk", hint(60)); err != nil {
				t.Fatal(err)
			}
			base := memOpen(t, fsys, "a.vmdk", vfs.ReadOnly)
			cid := base.Layers()[0].Codec.Describe().Details[0].Value
			head := fmt.Sprintf("CID=00000001\nparentCID=%08x\ncreateType=\"monolithicSparse\"\nparentFileNameHint=\"a.vmdk\"\n", cid)
			text := fmt.Sprintf(c.text, head, "RW 8192 SPARSE \"top.vmdk\"\nddb.adapterType = \"ide\"\n")
			poke(t, fsys, "top.vmdk", 512, append([]byte(text), make([]byte, 20*512-len(text))...)...)
			if err := base.Close(); err != nil {
				t.Fatal(err)
			}
			err := setParent(t, fsys, hint(60))
			if !errors.Is(err, c.want) {
				t.Fatalf("error %v, want %v", err, c.want)
			}
			if want := map[bool]string{true: hint(60), false: "a.vmdk"}[c.want == nil]; parentOf(t, fsys) != want {
				t.Errorf("the parent is %s, want %s", parentOf(t, fsys), want)
			}
			if c.want == nil && !strings.Contains(string(peek(t, fsys, "top.vmdk")[512:21*512]), "ddb.adapterType = \"ide\"") {
				t.Error("the rest of the descriptor has changed")
			}
		})
	}
}

// Flat images stand on nothing.
func TestSetParent_Flat(t *testing.T) {
	fsys := newSmall(t)
	memCreate(t, fsys, formats.CreateRequest{Name: "flat.vmdk", SizeBytes: smallSize, Subformat: "monolithicFlat"})
	base := memOpen(t, fsys, "a.vmdk", vfs.ReadOnly)
	flat, err := vmdk.Format{}.Open(formats.OpenRequest{FS: fsys, Name: "flat.vmdk", Mode: vfs.ReadWrite})
	if err != nil {
		t.Fatal(err)
	}
	defer flat.Close()
	parent := &engine.Parent{Name: "a.vmdk", Layer: base.Layers()[0]}
	if err := flat.Codec.SetParent(nil, parent); !errors.Is(err, block.ErrUnsupported) || !strings.Contains(err.Error(), "stands on nothing") {
		t.Errorf("error %v, want %v", err, block.ErrUnsupported)
	}
}
