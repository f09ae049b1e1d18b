package vmdk_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vmdk"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Where things lie in an image of 4 MiB with grains of 4 KiB: two grain tables, each with
// a copy.
const (
	smallSize   = 4 << 20
	smallGrain  = 4 << 10
	rgdOff      = 21 * 512
	rgtOff      = 22 * 512
	gdOff       = 30 * 512
	gtOff       = 31 * 512
	secondTable = 4 * 512
	dataOff     = 40 * 512
)

// newSmall returns a file system with that image in a.vmdk, with data at its beginning.
func newSmall(t testing.TB) *vfs.Mem {
	t.Helper()
	fsys := vfs.NewMem()
	memCreate(t, fsys, formats.CreateRequest{Name: "a.vmdk", SizeBytes: smallSize, ClusterBytes: smallGrain})
	image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
	if _, err := image.WriteAt(smallData(), 0); err != nil {
		t.Fatal(err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	return fsys
}

// smallData is what is in grains 0 to 2.
func smallData() []byte {
	return append(bytes.Repeat([]byte{'a'}, smallGrain), bytes.Repeat([]byte{'b'}, 2*smallGrain)...)
}

func memTryOpen(fsys vfs.FS, name string, mode vfs.Mode) (*formats.Image, error) {
	return formats.Open(context.Background(), fsys, name, formats.OpenOptions{Format: "vmdk", Mode: mode})
}

func memOpen(t testing.TB, fsys vfs.FS, name string, mode vfs.Mode) *formats.Image {
	t.Helper()
	image, err := memTryOpen(fsys, name, mode)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { image.Close() })
	return image
}

func memCreate(t testing.TB, fsys vfs.FS, req formats.CreateRequest) {
	t.Helper()
	req.FS = fsys
	if err := (vmdk.Format{}).Create(context.Background(), req); err != nil {
		t.Fatal(err)
	}
}

func memCreateOverlay(t testing.TB, fsys vfs.FS, parent string, req formats.CreateRequest) {
	t.Helper()
	base, err := memTryOpen(fsys, parent, vfs.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	defer base.Close()
	req.Parent = &formats.Parent{Name: parent, Layer: base.Layers()[0]}
	memCreate(t, fsys, req)
}

// poke overwrites bytes of a file.
func poke(t testing.TB, fsys vfs.FS, name string, off int64, p ...byte) {
	t.Helper()
	f, err := fsys.Open(name, vfs.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

func poke32(t testing.TB, fsys vfs.FS, name string, off int64, v uint32) {
	t.Helper()
	poke(t, fsys, name, off, binary.LittleEndian.AppendUint32(nil, v)...)
}

func peek(t testing.TB, fsys vfs.FS, name string) []byte {
	t.Helper()
	f, err := fsys.Open(name, vfs.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, size)
	if _, err := f.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func peek32(t testing.TB, fsys vfs.FS, name string, off int64) uint32 {
	t.Helper()
	return binary.LittleEndian.Uint32(peek(t, fsys, name)[off:])
}

func addFile(t testing.TB, fsys vfs.FS, name string, p []byte) {
	t.Helper()
	f, err := fsys.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
}

// edit replaces text in an embedded descriptor, whose room is not exceeded.
func edit(t testing.TB, fsys vfs.FS, name, from, to string) {
	t.Helper()
	p := peek(t, fsys, name)
	const room = 20 * 512
	text, _, _ := strings.Cut(string(p[512:512+room]), "\x00")
	if !strings.Contains(text, from) {
		t.Fatalf("no %q in %q", from, text)
	}
	edited := make([]byte, room)
	copy(edited, strings.Replace(text, from, to, 1))
	poke(t, fsys, name, 512, edited...)
}

// checkMem checks a.vmdk, and repairs it if that is wanted.
func checkMem(t testing.TB, fsys vfs.FS, repair bool) engine.CheckResult {
	t.Helper()
	mode := vfs.ReadOnly
	if repair {
		mode = vfs.ReadWrite
	}
	layer, err := vmdk.Format{}.Open(formats.OpenRequest{FS: fsys, Name: "a.vmdk", Mode: mode})
	if err != nil {
		t.Fatal(err)
	}
	defer layer.Close()
	result, err := engine.Check(context.Background(), layer, repair, nil)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// Every kind of damage is found, and what a copy knows is repaired, without a change to
// anything that was good.
func TestCheck(t *testing.T) {
	for name, c := range map[string]struct {
		damage                   func(t *testing.T, fsys vfs.FS)
		corruptions, leaks       int64
		fixed, fixedLeaks        int64
		problem                  string
		readable                 bool // after the repair
		stillCorrupt, stillStale bool
	}{
		"nothing": {func(*testing.T, vfs.FS) {}, 0, 0, 0, 0, "", true, false, false},
		"entry past the end": {func(t *testing.T, fsys vfs.FS) {
			poke32(t, fsys, "a.vmdk", gtOff+4, 1<<30)
		}, 1, 1, 1, 0, "grain 1 of a.vmdk: its entry, sector 1073741824, lies outside", true, false, false},
		"entry in metadata": {func(t *testing.T, fsys vfs.FS) {
			poke32(t, fsys, "a.vmdk", gtOff, 25)
		}, 1, 1, 1, 0, "sector 25, lies outside the file of 32768 bytes or in its metadata", true, false, false},
		"both copies bad": {func(t *testing.T, fsys vfs.FS) {
			poke32(t, fsys, "a.vmdk", gtOff, 1<<30)
			poke32(t, fsys, "a.vmdk", rgtOff, 1<<30)
		}, 1, 1, 0, 0, "grain 0", false, true, false},
		"stale copy": {func(t *testing.T, fsys vfs.FS) {
			poke32(t, fsys, "a.vmdk", rgtOff+8, 0)
		}, 0, 0, 1, 0, "redundant copy of grain table 0 of a.vmdk differs in 1 entries", true, false, false},
		"two owners": {func(t *testing.T, fsys vfs.FS) {
			poke32(t, fsys, "a.vmdk", gtOff+400, dataOff/512)
			poke32(t, fsys, "a.vmdk", rgtOff+400, dataOff/512)
		}, 1, 0, 1, 0, "grain 100 of a.vmdk: its entry, sector 40, overlaps another grain", true, false, false},
		"overlapping by a sector": {func(t *testing.T, fsys vfs.FS) {
			poke32(t, fsys, "a.vmdk", gtOff+400, dataOff/512+1)
			poke32(t, fsys, "a.vmdk", rgtOff+400, dataOff/512+1)
		}, 1, 0, 1, 0, "grain 100 of a.vmdk: its entry, sector 41, overlaps another grain", true, false, false},
		"directory entry past the end": {func(t *testing.T, fsys vfs.FS) {
			poke32(t, fsys, "a.vmdk", gdOff, 1<<31)
		}, 1, 3, 1, 0, "grain directory entry 0 of a.vmdk", true, false, false},
		"directory entry in another table": {func(t *testing.T, fsys vfs.FS) {
			poke32(t, fsys, "a.vmdk", gdOff+4, gtOff/512+1)
		}, 2, 3, 2, 0, "grain directory entry", true, false, false},
		"copy's directory entry 0xffffffff": {func(t *testing.T, fsys vfs.FS) {
			poke32(t, fsys, "a.vmdk", rgdOff, 1<<32-1)
		}, 0, 0, 1, 0, "redundant grain directory entry 0", true, false, false},
		"directory entry lost": {func(t *testing.T, fsys vfs.FS) {
			poke32(t, fsys, "a.vmdk", gdOff, 0)
		}, 0, 3, 1, 0, "a.vmdk is 0, but its copy names a table with grains", true, false, false},
		"copy's directory entry lost": {func(t *testing.T, fsys vfs.FS) {
			poke32(t, fsys, "a.vmdk", rgdOff, 0)
		}, 0, 0, 1, 0, "redundant grain directory entry 0 of a.vmdk is 0", true, false, false},
		"empty table lost": {func(t *testing.T, fsys vfs.FS) {
			poke32(t, fsys, "a.vmdk", gdOff+4, 0)
		}, 0, 0, 0, 0, "", true, false, false},
		"copies share their tables": {func(t *testing.T, fsys vfs.FS) {
			poke32(t, fsys, "a.vmdk", rgdOff, gtOff/512)
			poke32(t, fsys, "a.vmdk", rgdOff+4, (gtOff+secondTable)/512)
		}, 0, 0, 2, 0, "redundant grain directory entry 0", true, false, false},
		"copies share their directory": {func(t *testing.T, fsys vfs.FS) {
			poke(t, fsys, "a.vmdk", 48, gdOff/512)
		}, 0, 0, 0, 0, "", true, false, false},
		"tail": {func(t *testing.T, fsys vfs.FS) {
			poke(t, fsys, "a.vmdk", 1<<20-1, 1)
		}, 0, 248, 0, 248, "nothing refers to 248 grains", true, false, false},
		"lost in the middle": {func(t *testing.T, fsys vfs.FS) {
			poke32(t, fsys, "a.vmdk", gtOff+4, 0)
			poke32(t, fsys, "a.vmdk", rgtOff+4, 0)
		}, 0, 1, 0, 0, "nothing refers to 1 grains", false, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := newSmall(t)
			c.damage(t, fsys)
			found := checkMem(t, fsys, false)
			if found.Corruptions != c.corruptions || found.Leaks != c.leaks || found.FixedProblems != 0 || found.FixedLeaks != 0 {
				t.Errorf("found %+v, want %d corruptions and %d leaks", found, c.corruptions, c.leaks)
			}
			if c.problem != "" && (len(found.Problems) == 0 || !strings.Contains(found.Problems[0].Text, c.problem)) {
				t.Errorf("problems %+v, want one that says %q", found.Problems, c.problem)
			}
			if fixed := checkMem(t, fsys, true); fixed.FixedProblems != c.fixed || fixed.FixedLeaks != c.fixedLeaks {
				t.Errorf("repaired %+v, want %d problems and %d leaks", fixed, c.fixed, c.fixedLeaks)
			}
			left := checkMem(t, fsys, false)
			if left.Corruptions > 0 != c.stillCorrupt || len(left.Problems) > 0 != (c.stillCorrupt || c.stillStale) {
				t.Errorf("left after the repair: %+v", left)
			}
			got := make([]byte, len(smallData()))
			_, err := memOpen(t, fsys, "a.vmdk", vfs.ReadOnly).ReadAt(got, 0)
			if readable := err == nil && bytes.Equal(got, smallData()); readable != c.readable {
				t.Errorf("readable: %v (%v), want %v", readable, err, c.readable)
			}
		})
	}
}

func TestCheck_Canceled(t *testing.T) {
	layer, err := vmdk.Format{}.Open(formats.OpenRequest{FS: newSmall(t), Name: "a.vmdk"})
	if err != nil {
		t.Fatal(err)
	}
	defer layer.Close()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := layer.Codec.Check(ctx, nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want %v", err, context.Canceled)
	}
}

// A bad entry harms those who ask for its grain, and nobody else.
func TestBadEntries(t *testing.T) {
	fsys := newSmall(t)
	poke32(t, fsys, "a.vmdk", gtOff+4, 1<<30)
	poke32(t, fsys, "a.vmdk", gdOff+4, 1<<30)
	image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
	p := make([]byte, smallGrain)
	if _, err := image.ReadAt(p, smallGrain); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "grain 1") {
		t.Errorf("read of a bad entry: %v", err)
	}
	if _, err := image.WriteAt(p, smallGrain); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("write to a bad entry: %v", err)
	}
	if _, err := image.ReadAt(p, 3<<20); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "grain directory entry 1") {
		t.Errorf("read of a bad table: %v", err)
	}
	if _, err := image.WriteAt(p, 3<<20); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("write to a bad table: %v", err)
	}
	if _, err := image.ReadAt(p, 2*smallGrain); err != nil || p[0] != 'b' {
		t.Errorf("read of a good entry: %v", err)
	}
}

// Images whose tables are made only when they are needed, as some writers leave them.
func TestMissingTables(t *testing.T) {
	fsys := newSmall(t)
	for _, off := range []int64{gdOff + 4, rgdOff + 4} {
		poke32(t, fsys, "a.vmdk", off, 0)
	}
	image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
	want := bytes.Repeat([]byte{'x'}, 3*smallGrain)
	const off = 3<<20 + smallGrain/2
	for range 2 {
		if _, err := image.WriteAt(want, off); err != nil {
			t.Fatal(err)
		}
		if err := image.WriteZeroes(off+smallGrain/2, smallGrain, 0); err != nil {
			t.Fatal(err)
		}
		clear(want[smallGrain/2 : 3*smallGrain/2])
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	image = memOpen(t, fsys, "a.vmdk", vfs.ReadOnly)
	got := make([]byte, len(want))
	if _, err := image.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read other bytes than were written (error %v)", err)
	}
	if gt, rgt := peek32(t, fsys, "a.vmdk", gdOff+4), peek32(t, fsys, "a.vmdk", rgdOff+4); gt == 0 || rgt == 0 || gt == rgt {
		t.Errorf("the new table is at sector %d, its copy at %d", gt, rgt)
	}
	checkSound(t, image)
}

// Redundant tables are kept equal to the primary ones.
func TestRedundantTables(t *testing.T) {
	fsys := newSmall(t)
	image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
	scribble(t, testenv.Rand(t), image, make([]byte, smallSize), 30)
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	p := peek(t, fsys, "a.vmdk")
	if !bytes.Equal(p[gtOff:gtOff+2*secondTable/2], p[rgtOff:rgtOff+2*secondTable/2]) {
		t.Error("the redundant tables differ from the primary ones")
	}
}

// Each first change after opening gives the image another CID, in place, whatever its
// length; reading gives none.
func TestBegin(t *testing.T) {
	for _, cid := range []string{"12ab34cd", "00000000", "abc", "7"} {
		t.Run(cid, func(t *testing.T) {
			fsys := newSmall(t)
			text := string(peek(t, fsys, "a.vmdk")[512:1500])
			_, rest, _ := strings.Cut(text, "\nCID=")
			now, _, _ := strings.Cut(rest, "\n")
			edit(t, fsys, "a.vmdk", "\nCID="+now, "\nCID="+cid)
			edit(t, fsys, "a.vmdk", now+"\"", "01234567"+"\"") // ddb.longContentID
			if cid == "12ab34cd" {
				edit(t, fsys, "a.vmdk", "01234567\"", cid+"\"")
			}
			before := peek(t, fsys, "a.vmdk")
			image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
			readGuest(t, image)
			if !bytes.Equal(before, peek(t, fsys, "a.vmdk")) {
				t.Error("reading changes the image")
			}
			identity := string(image.Layers()[0].Codec.Identity())
			for range 2 {
				if _, err := image.WriteAt([]byte{1}, 0); err != nil {
					t.Fatal(err)
				}
			}
			after := peek(t, fsys, "a.vmdk")
			d := image.Layers()[0].Codec.Describe().Details[0].Value.(uint32)
			want := fmt.Sprintf("\nCID=%0*x\n", len(cid), d)
			if got := string(after[512 : 512+20*512]); !strings.Contains(got, want) || want == "\nCID="+cid+"\n" {
				t.Errorf("no %q in the descriptor, or the same as before:\n%.400s", want, got)
			}
			if long := fmt.Sprintf("%08x\"", d); strings.Contains(string(after[512:1500]), long) != (cid == "12ab34cd") {
				t.Errorf("ddb.longContentID:\n%s", after[512:1500])
			}
			if identity == string(image.Layers()[0].Codec.Identity()) {
				t.Error("the identity has not changed")
			}
		})
	}
}

// A flat image whose descriptor cannot be changed in place gets a new one, and stays
// locked all the time.
func TestGrow_ReplacesDescriptor(t *testing.T) {
	fsys := vfs.NewMem()
	name := strings.Repeat("n", 200) + ".vmdk"
	memCreate(t, fsys, formats.CreateRequest{Name: name, SizeBytes: 999 * 512, Subformat: "monolithicFlat"})
	addFile(t, fsys, name+".new", []byte("left by a crash"))
	image := memOpen(t, fsys, name, vfs.ReadWrite)
	before := peek(t, fsys, name)
	if err := image.Resize(100000 * 512); err != nil {
		t.Fatal(err)
	}
	if len(before) <= 512 || len(peek(t, fsys, name)) <= len(before) {
		t.Error("the descriptor fits into a sector: this tests nothing")
	}
	if _, err := memTryOpen(fsys, name, vfs.ReadWrite); !errors.Is(err, block.ErrLocked) {
		t.Errorf("somebody else opens it: error %v, want %v", err, block.ErrLocked)
	}
	if _, err := image.WriteAt([]byte("end"), 100000*512-3); err != nil {
		t.Error(err)
	}
	if err := image.Close(); err != nil {
		t.Error(err)
	}
	left, err := fsys.ReadDir(".")
	if err != nil || len(left) != 2 {
		t.Errorf("left %v, %v", left, err)
	}
	if size := memOpen(t, fsys, name, vfs.ReadOnly).Info().SizeBytes; size != 100000*512 {
		t.Errorf("size %d, want %d", size, 100000*512)
	}
}

// What a sparse image's last grain, or a flat one's file, holds past the guest size does
// not become visible when the guest grows.
func TestGrow_ShowsZeroes(t *testing.T) {
	for _, subformat := range []string{"monolithicSparse", "monolithicFlat"} {
		fsys := vfs.NewMem()
		memCreate(t, fsys, formats.CreateRequest{Name: "a.vmdk", SizeBytes: 3 * 512, Subformat: subformat})
		image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
		if _, err := image.WriteAt([]byte("x"), 0); err != nil {
			t.Fatal(err)
		}
		if err := image.Close(); err != nil {
			t.Fatal(err)
		}
		file, from := "a-flat.vmdk", int64(3*512)
		if subformat == "monolithicSparse" {
			file, from = "a.vmdk", int64(bytes.IndexByte(peek(t, fsys, "a.vmdk")[21*512:], 'x'))+21*512+3*512
		}
		poke(t, fsys, file, from, []byte("what nobody shall see")...)
		image = memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
		if err := image.Resize(200 << 10); err != nil {
			t.Fatal(err)
		}
		want := make([]byte, 200<<10)
		want[0] = 'x'
		if !bytes.Equal(readGuest(t, image), want) {
			t.Errorf("%s: other bytes than zeroes have appeared", subformat)
		}
	}
}

// At any moment of growing, header and descriptor together say the old or the new size:
// here only the header has been written.
func TestGrow_HeaderFirst(t *testing.T) {
	for _, grown := range []int64{smallSize + 512, smallSize + smallGrain, 64 << 20} {
		fsys := newSmall(t)
		image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
		if err := image.Resize(grown); err != nil {
			t.Fatal(err)
		}
		if err := image.Close(); err != nil {
			t.Fatal(err)
		}
		edit(t, fsys, "a.vmdk", fmt.Sprintf("RW %d ", grown/512), fmt.Sprintf("RW %d ", smallSize/512))
		want := grown
		if grown < smallSize+smallGrain {
			want = smallSize
		}
		image = memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
		if size := image.Info().SizeBytes; size != want {
			t.Errorf("grown to %d: the size is %d, want %d", grown, size, want)
		}
		if !bytes.HasPrefix(readGuest(t, image), smallData()) {
			t.Error("the contents differ")
		}
		if err := image.Resize(100 << 20); err != nil {
			t.Errorf("grow again: %v", err)
		}
		checkSound(t, image)
	}
}
