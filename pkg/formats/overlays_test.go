package formats_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/all"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func TestMain(m *testing.M) {
	all.Register()
	os.Exit(m.Run())
}

// overlayFormats are those whose images can stand on others of the same format.
func overlayFormats() []formats.Format {
	var found []formats.Format
	for _, f := range formats.All() {
		if slices.Contains(f.Options().ParentFormats, f.Name()) {
			found = append(found, f)
		}
	}
	return found
}

// tree is images in a file system, with what they must read as.
type tree struct {
	t      *testing.T
	fs     vfs.FS
	format formats.Format
	r      *rand.Rand
}

func (w tree) name(base string) string { return base + "." + w.format.Name() }

// create makes an image, on a parent if that is not "", and writes into some of it; under
// is what it reads as before.
func (w tree) create(name, parent string, size int, under []byte) []byte {
	w.t.Helper()
	req := formats.CreateRequest{FS: w.fs, Name: name, SizeBytes: int64(size)}
	if parent != "" {
		p := w.open(parent, vfs.ReadOnly)
		defer p.Close()
		req.Parent = &formats.Parent{Name: parent, Layer: p.Layers()[0]}
		if sub := w.format.Options().OverlaySubformats; len(sub) > 0 {
			req.Subformat = sub[0]
		}
	}
	if err := w.format.Create(context.Background(), req); err != nil {
		w.t.Fatal(err)
	}
	want := make([]byte, size)
	copy(want, under)
	img := w.open(name, vfs.ReadWrite)
	for range 12 {
		off := w.r.IntN(size)
		p := want[off:min(size, off+1+w.r.IntN(200<<10))]
		if w.r.IntN(3) == 0 {
			clear(p)
			if err := img.WriteZeroes(int64(off), int64(len(p)), 0); err != nil {
				w.t.Fatal(err)
			}
			continue
		}
		for i := range p {
			p[i] = byte(w.r.Uint32())
		}
		if _, err := img.WriteAt(p, int64(off)); err != nil {
			w.t.Fatal(err)
		}
	}
	if err := img.Close(); err != nil {
		w.t.Fatal(err)
	}
	return want
}

func (w tree) open(name string, mode vfs.Mode) *formats.Image {
	w.t.Helper()
	img, err := formats.Open(context.Background(), w.fs, name, formats.OpenOptions{Format: w.format.Name(), Mode: mode})
	if err != nil {
		w.t.Fatal(err)
	}
	return img
}

// expect checks what an image reads as, on what it stands, and its tables.
func (w tree) expect(name, parent string, want []byte) {
	w.t.Helper()
	img := w.open(name, vfs.ReadOnly)
	defer img.Close()
	got := make([]byte, img.Info().SizeBytes)
	if _, err := img.ReadAt(got, 0); err != nil {
		w.t.Fatal(err)
	}
	if len(got) < len(want) || !bytes.Equal(got[:len(want)], want) || bytes.Trim(got[len(want):], "\x00") != nil {
		w.t.Errorf("%s reads differently", name)
	}
	layer := img.Layers()[0]
	switch {
	case parent == "" && layer.Parent != nil:
		w.t.Errorf("%s stands on %s, want nothing", name, layer.Parent.Name)
	case parent != "" && (layer.Parent == nil || layer.Parent.Name != parent):
		w.t.Errorf("%s stands on %+v, want %s", name, layer.Parent, parent)
	}
	result, err := engine.Check(context.Background(), layer, false, nil)
	if err != nil || result.Corruptions > 0 { // formats without a map of free space lose some
		w.t.Errorf("check of %s: %+v, %v", name, result, err)
	}
}

// eachOverlayFormat runs a test for every format with overlays.
func eachOverlayFormat(t *testing.T, test func(w tree)) {
	for _, f := range overlayFormats() {
		t.Run(f.Name(), func(t *testing.T) {
			test(tree{t: t, fs: vfs.NewMem(), format: f, r: testenv.Rand(t)})
		})
	}
}

const treeSize = 6<<20 + 512

func TestRebase_ReadsTheSame(t *testing.T) {
	eachOverlayFormat(t, func(w tree) {
		a, b, over := w.name("a"), w.name("b"), w.name("over")
		ofA := w.create(a, "", treeSize, nil)
		w.create(b, "", treeSize-1<<20, nil)
		want := w.create(over, a, treeSize, ofA)
		for _, parent := range []string{b, a, "", b, ""} {
			err := formats.Rebase(context.Background(), w.fs, over, formats.Rebasing{
				Open: formats.OpenOptions{Format: w.format.Name()}, Parent: parent, ParentFormat: w.format.Name(),
			}, nil)
			if err != nil {
				w.t.Fatalf("rebase onto %q: %v", parent, err)
			}
			w.expect(over, parent, want)
		}
	})
}

func TestRebase_Unsafe(t *testing.T) {
	eachOverlayFormat(t, func(w tree) {
		a, b, over := w.name("a"), w.name("b"), w.name("over")
		ofA := w.create(a, "", treeSize, nil)
		want := w.create(over, a, treeSize, ofA)
		if err := w.fs.Rename(a, b); err != nil {
			w.t.Fatal(err)
		}
		err := formats.Rebase(context.Background(), w.fs, over, formats.Rebasing{
			Open: formats.OpenOptions{Format: w.format.Name()}, Parent: b, Unsafe: true,
		}, nil)
		if err != nil {
			w.t.Fatal(err)
		}
		w.expect(over, b, want)
	})
}

// An image whose link leads nowhere, or is refused, can be looked at and given another.
func TestRebase_BrokenLink(t *testing.T) {
	for _, format := range []string{"qcow", "qcow2", "vmdk"} {
		t.Run(format, func(t *testing.T) {
			f, err := formats.Lookup(format)
			if err != nil {
				t.Fatal(err)
			}
			w := tree{t: t, fs: vfs.NewMem(), format: f, r: testenv.Rand(t)}
			a, over := w.name("base"), w.name("over")
			want := w.create(over, a, treeSize, w.create(a, "", treeSize, nil))
			patch(t, w.fs, over, []byte(a), []byte("/"+a[1:])) // an absolute path
			if _, err := formats.Open(context.Background(), w.fs, over, formats.OpenOptions{}); !errors.Is(err, fs.ErrInvalid) {
				t.Errorf("open: %v, want %v", err, fs.ErrInvalid)
			}
			img, err := formats.Open(context.Background(), w.fs, over, formats.OpenOptions{NoParents: true})
			if err != nil {
				t.Fatal(err)
			}
			if link := img.Layers()[0].Parent; link == nil || !errors.Is(link.Broken, fs.ErrInvalid) || link.Name != "" {
				t.Errorf("opened alone, its link is %+v", link)
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			if err := formats.Rebase(context.Background(), w.fs, over, formats.Rebasing{Parent: a, Unsafe: true}, nil); err != nil {
				t.Fatal(err)
			}
			w.expect(over, a, want)
		})
	}
}

// patch replaces bytes in the first MiB of a file, wherever they are.
func patch(t *testing.T, fsys vfs.FS, name string, old, replacement []byte) {
	t.Helper()
	f, err := fsys.Open(name, vfs.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	head := make([]byte, 1<<20)
	n, err := f.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		t.Fatal(err)
	}
	if !bytes.Contains(head[:n], old) {
		t.Fatalf("%s does not say %q", name, old)
	}
	if _, err := f.WriteAt(bytes.ReplaceAll(head[:n], old, replacement), 0); err != nil {
		t.Fatal(err)
	}
}

func TestRebase_Refused(t *testing.T) {
	eachOverlayFormat(t, func(w tree) {
		base, over := w.name("base"), w.name("over")
		under := w.create(base, "", treeSize, nil)
		want := w.create(over, base, treeSize, under)
		for name, r := range map[string]formats.Rebasing{
			"onto itself": {Parent: over},
			"a loop":      {Parent: over, Open: formats.OpenOptions{}},
			"missing":     {Parent: w.name("missing")},
		} {
			target := over
			if name == "a loop" {
				target = base
			}
			if err := formats.Rebase(context.Background(), w.fs, target, r, nil); err == nil {
				w.t.Errorf("%s: done", name)
			}
		}
		w.expect(over, base, want)
	})
}

func TestCommit(t *testing.T) {
	eachOverlayFormat(t, func(w tree) {
		for _, keep := range []bool{false, true} {
			base, over := w.name(fmt.Sprint("base", keep)), w.name(fmt.Sprint("over", keep))
			under := w.create(base, "", treeSize, nil)
			want := w.create(over, base, treeSize+1<<20, under)
			done, err := formats.Commit(context.Background(), w.fs, over, formats.Committing{
				Open: formats.OpenOptions{Format: w.format.Name()}, Keep: keep,
			}, nil)
			if err != nil || done.Base != base {
				w.t.Fatalf("commit to %q: %v", done.Base, err)
			}
			w.expect(base, "", want)
			if keep {
				continue
			}
			w.expect(over, base, want)
			if done.Emptied {
				w.expectEmpty(over)
			} else if name := w.format.Name(); name != "vdi" {
				w.t.Errorf("the overlay was not emptied")
			}
		}
	})
}

func (w tree) expectEmpty(name string) {
	w.t.Helper()
	img := w.open(name, vfs.ReadOnly)
	defer img.Close()
	for off, size := int64(0), img.Info().SizeBytes; off < size; {
		extent, err := img.MapLayer(0, off, size-off)
		if err != nil || extent.State != block.Unallocated {
			w.t.Fatalf("%s still holds something: %+v, %v", name, extent, err)
		}
		off += extent.Len
	}
}

// A commit to an image further down takes what all overlays between hold.
func TestCommit_Base(t *testing.T) {
	eachOverlayFormat(t, func(w tree) {
		a, b, c, d := w.name("a"), w.name("b"), w.name("c"), w.name("d")
		ofB := w.create(b, a, treeSize, w.create(a, "", treeSize, nil))
		want := w.create(d, c, treeSize, w.create(c, b, treeSize, ofB))
		done, err := formats.Commit(context.Background(), w.fs, d, formats.Committing{
			Open: formats.OpenOptions{Format: w.format.Name()}, Base: b, Keep: true,
		}, nil)
		if err != nil || done.Base != b || done.Emptied {
			w.t.Fatalf("commit: %+v, %v", done, err)
		}
		w.expect(b, a, want)
		if _, err := formats.Commit(context.Background(), w.fs, a, formats.Committing{}, nil); !errors.Is(err, block.ErrInvalid) {
			w.t.Errorf("commit of an image that stands on nothing: %v", err)
		}
		if _, err := formats.Commit(context.Background(), w.fs, b, formats.Committing{Base: d, Keep: true}, nil); !errors.Is(err, block.ErrInvalid) {
			w.t.Errorf("commit to an image that it does not stand on: %v", err)
		}
	})
}

// Whatever the crash, the overlay reads the same afterwards, if it can be opened: where the
// link notes the parent's identity, it may have to be linked anew.
func TestCommit_CrashAtEveryStep(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	eachOverlayFormat(t, func(w tree) {
		base, over := w.name("base"), w.name("over")
		const size = 1 << 20
		mem := vfs.NewMem()
		w.fs = mem
		want := w.create(over, base, size, w.create(base, "", size, nil))
		if err := mem.SyncDir("."); err != nil {
			w.t.Fatal(err)
		}
		start := mem.Crash(w.r) // everything is durable
		relinked, crashes := 0, 0
		for n := uint64(0); ; n += 1 + n/4 {
			reached := false
			run := start.Crash(w.r)
			var after *vfs.Mem
			fsys := vfs.Inject(run, vfs.If(vfs.Changing, vfs.CrashPoint(n, func() {
				reached, after = true, run.Crash(w.r)
			})))
			_, err := formats.Commit(context.Background(), fsys, over, formats.Committing{Open: formats.OpenOptions{Format: w.format.Name()}}, nil)
			if !reached {
				if err != nil {
					w.t.Fatal(err)
				}
				break
			}
			crashes++
			w.fs = after
			if img, err := formats.Open(context.Background(), after, over, formats.OpenOptions{Format: w.format.Name()}); err == nil {
				if err := img.Close(); err != nil {
					w.t.Fatal(err)
				}
			} else {
				relinked++
				err := formats.Rebase(context.Background(), after, over, formats.Rebasing{
					Open: formats.OpenOptions{Format: w.format.Name()}, Parent: base, Unsafe: true,
				}, nil)
				if err != nil {
					w.t.Fatalf("crash %d: %v", n, err)
				}
			}
			w.expectContents(over, want, n)
		}
		w.t.Logf("%d crashes, %d times linked anew", crashes, relinked)
	})
}

func (w tree) expectContents(name string, want []byte, crash uint64) {
	w.t.Helper()
	img := w.open(name, vfs.ReadOnly)
	defer img.Close()
	got := make([]byte, len(want))
	if _, err := img.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		w.t.Fatalf("crash %d: %s reads differently: %v", crash, name, err)
	}
}
