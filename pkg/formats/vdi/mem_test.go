package vdi_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vdi"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Where things lie in an image of 10 blocks of 4 KiB, and in every header.
const (
	smallSize  = 9*4096 + 512
	smallBlock = 4096
	mapOff     = 512
	dataOff    = 4096

	signatureAt = 0x40
	versionAt   = 0x44
	kindAt      = 0x4c
	mapAt       = 0x154
	dataAt      = 0x158
	sectorAt    = 0x168
	sizeAt      = 0x170
	blockSizeAt = 0x178
	extraAt     = 0x17c
	blocksAt    = 0x180
	allocatedAt = 0x184
	uuidAt      = 0x188
	linkAt      = 0x1a8
)

// newSmall returns a file system with that image in a.vdi, with blocks 0, 1 and 2 of the
// file holding guest blocks 2, 0 and 1.
func newSmall(t testing.TB) *vfs.Mem {
	t.Helper()
	fsys := vfs.NewMem()
	memCreate(t, fsys, formats.CreateRequest{Name: "a.vdi", SizeBytes: smallSize, ClusterBytes: smallBlock})
	image := memOpen(t, fsys, "a.vdi", vfs.ReadWrite)
	for _, at := range []int64{2, 0, 1} {
		if _, err := image.WriteAt(smallData()[at*smallBlock:][:smallBlock], at*smallBlock); err != nil {
			t.Fatal(err)
		}
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	return fsys
}

// smallData is what is in the guest blocks 0 to 2.
func smallData() []byte {
	return bytes.Join([][]byte{
		bytes.Repeat([]byte{'a'}, smallBlock), bytes.Repeat([]byte{'b'}, smallBlock), bytes.Repeat([]byte{'c'}, smallBlock),
	}, nil)
}

func memTryOpen(fsys vfs.FS, name string, mode vfs.Mode) (*formats.Image, error) {
	return formats.Open(context.Background(), fsys, name, formats.OpenOptions{Format: "vdi", Mode: mode})
}

func memOpen(t testing.TB, fsys vfs.FS, name string, mode vfs.Mode) *formats.Image {
	t.Helper()
	image, err := memTryOpen(fsys, name, mode)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

func memCreate(t testing.TB, fsys vfs.FS, req formats.CreateRequest) {
	t.Helper()
	req.FS = fsys
	if err := (vdi.Format{}).Create(context.Background(), req); err != nil {
		t.Fatal(err)
	}
}

func memCreateOverlay(t testing.TB, fsys vfs.FS, parent, name string) {
	t.Helper()
	base := memOpen(t, fsys, parent, vfs.ReadOnly)
	defer base.Close()
	memCreate(t, fsys, formats.CreateRequest{
		Name: name, ClusterBytes: smallBlock, Parent: &formats.Parent{Name: parent, Layer: base.Layers()[0]},
	})
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

func TestOpen_Refuses(t *testing.T) {
	for name, c := range map[string]struct {
		field int64
		value uint32
		want  error
		text  string
	}{
		"signature":          {signatureAt, 7, block.ErrCorrupt, "signature"},
		"version 1.2":        {versionAt, 0x00010002, block.ErrUnsupported, "version 1.2"},
		"small header":       {0x48, 0x100, block.ErrCorrupt, "header size"},
		"undo image":         {kindAt, 3, block.ErrUnsupported, "undo"},
		"type 9":             {kindAt, 9, block.ErrCorrupt, "image type 9"},
		"child of nobody":    {kindAt, 4, block.ErrCorrupt, "nil"},
		"4K sectors":         {sectorAt, 4096, block.ErrUnsupported, "sector size 4096"},
		"block size":         {blockSizeAt, 5000, block.ErrUnsupported, "block size 5000"},
		"huge blocks":        {blockSizeAt, 1 << 31, block.ErrUnsupported, "block size"},
		"extra bytes":        {extraAt, 100, block.ErrUnsupported, "100 extra bytes"},
		"many extra bytes":   {extraAt, 1 << 20, block.ErrUnsupported, "extra bytes"},
		"too few blocks":     {blocksAt, 9, block.ErrCorrupt, "9 blocks of 4096"},
		"too many blocks":    {blocksAt, 1 << 30, block.ErrUnsupported, "blocks"},
		"map past the file":  {blocksAt, 1 << 20, block.ErrCorrupt, "block map"},
		"map in the header":  {mapAt, 0, block.ErrCorrupt, "in the header"},
		"map off a sector":   {mapAt, 520, block.ErrUnsupported, "multiples of 512"},
		"data in the map":    {dataAt, 512, block.ErrCorrupt, "ends at"},
		"data off a sector":  {dataAt, 5000, block.ErrUnsupported, "multiples of 512"},
		"no size":            {sizeAt, 0, block.ErrUnsupported, "disk size 0"},
		"size past all bits": {sizeAt + 4, 1 << 31, block.ErrCorrupt, "disk size"},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := newSmall(t)
			poke32(t, fsys, "a.vdi", c.field, c.value)
			_, err := memTryOpen(fsys, "a.vdi", vfs.ReadOnly)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), "a.vdi") {
				t.Errorf("opened with error %v, want %v and %q", err, c.want, c.text)
			}
		})
	}
}

func TestOpen_Truncated(t *testing.T) {
	fsys := newSmall(t)
	whole := peek(t, fsys, "a.vdi")
	for _, length := range []int64{0, 511, 512, mapOff + 39} {
		if err := truncate(fsys, "a.vdi", length); err != nil {
			t.Fatal(err)
		}
		if _, err := memTryOpen(fsys, "a.vdi", vfs.ReadOnly); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "truncated") {
			t.Errorf("cut to %d of %d bytes: %v", length, len(whole), err)
		}
		poke(t, fsys, "a.vdi", 0, whole...)
	}
	// Where blocks are missing, others are read all the same, and nothing is written.
	if err := truncate(fsys, "a.vdi", dataOff+2*smallBlock); err != nil {
		t.Fatal(err)
	}
	image := memOpen(t, fsys, "a.vdi", vfs.ReadWrite)
	defer image.Close()
	p := make([]byte, smallBlock)
	if _, err := image.ReadAt(p, 0); err != nil || p[0] != 'a' {
		t.Errorf("read of a block that is there: %q, %v", p[0], err)
	}
	if _, err := image.ReadAt(p, smallBlock); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("read of a block that is not: %v", err)
	}
	if _, err := image.WriteAt(p, 5*smallBlock); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "repaired") {
		t.Errorf("write: %v", err)
	}
}

func truncate(fsys vfs.FS, name string, size int64) error {
	f, err := fsys.Open(name, vfs.ReadWrite)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// A size that is no multiple of a sector counts as one that is, as it does for QEMU.
func TestOpen_OddSize(t *testing.T) {
	fsys := newSmall(t)
	poke32(t, fsys, "a.vdi", sizeAt, smallSize-100)
	image := memOpen(t, fsys, "a.vdi", vfs.ReadWrite)
	if got := image.Info().SizeBytes; got != smallSize {
		t.Errorf("%d bytes, want %d", got, smallSize)
	}
	if _, err := image.WriteAt([]byte("end"), smallSize-3); err != nil {
		t.Fatal(err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	if got := peek32(t, fsys, "a.vdi", sizeAt); got != smallSize-100 {
		t.Errorf("the size is %d now, want it to stay", got)
	}
}

// Each session that changes an image gives its contents another UUID, others do not.
func TestBegin_ChangesModificationUUID(t *testing.T) {
	fsys := newSmall(t)
	ids := func() [2]string {
		p := peek(t, fsys, "a.vdi")
		return [2]string{string(p[uuidAt : uuidAt+16]), string(p[uuidAt+16 : uuidAt+32])}
	}
	before := ids()
	image := memOpen(t, fsys, "a.vdi", vfs.ReadWrite)
	if _, err := image.ReadAt(make([]byte, 100), 0); err != nil {
		t.Fatal(err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	if ids() != before {
		t.Error("reading has changed a UUID")
	}
	image = memOpen(t, fsys, "a.vdi", vfs.ReadWrite)
	if _, err := image.WriteAt([]byte{1}, 0); err != nil {
		t.Fatal(err)
	}
	if after := ids(); after[0] != before[0] || after[1] == before[1] {
		t.Error("writing has changed the image's UUID, or not its contents'")
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
}

// A parent is found in another directory by the link in the comment, and after it was
// renamed by its UUID; a comment of somebody's own is left alone.
func TestParent_Found(t *testing.T) {
	fsys := newSmall(t)
	for _, dir := range []string{"images", "volume"} {
		if err := fsys.Mkdir(dir); err != nil {
			t.Fatal(err)
		}
	}
	rename := func(from, to string) {
		t.Helper()
		if err := fsys.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	rename("a.vdi", "images/a.vdi")
	memCreateOverlay(t, fsys, "images/a.vdi", "volume/b.vdi")
	expect := func(parent string) {
		t.Helper()
		image := memOpen(t, fsys, "volume/b.vdi", vfs.ReadOnly)
		defer image.Close()
		if got := image.Layers()[1].Name; got != parent {
			t.Errorf("the parent is %s, want %s", got, parent)
		}
		p := make([]byte, len(smallData()))
		if _, err := image.ReadAt(p, 0); err != nil || !bytes.Equal(p, smallData()) {
			t.Errorf("other bytes are read than the parent's, error %v", err)
		}
	}
	expect("images/a.vdi")
	rename("images/a.vdi", "volume/renamed")
	expect("volume/renamed")
	rename("volume/renamed", "elsewhere.vdi")
	if _, err := memTryOpen(fsys, "volume/b.vdi", vfs.ReadOnly); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "UUID") {
		t.Errorf("without a parent: %v", err)
	}
}

// A comment that leads out of the store, or to the image itself, is not followed.
func TestParent_HostileComment(t *testing.T) {
	for _, link := range []string{"../../etc/passwd", "/etc/passwd", "b.vdi", "json:{}", "a.vdi\x00"} {
		fsys := newSmall(t)
		memCreateOverlay(t, fsys, "a.vdi", "b.vdi")
		poke(t, fsys, "b.vdi", 0x54, append([]byte("parent: "+link), make([]byte, 40)...)...)
		image := memOpen(t, fsys, "b.vdi", vfs.ReadOnly)
		if got := image.Layers()[1].Name; got != "a.vdi" {
			t.Errorf("%q: the parent is %s", link, got)
		}
		if err := image.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// An image that stands on itself, or on an overlay on itself, is refused.
func TestParent_Loop(t *testing.T) {
	fsys := newSmall(t)
	memCreateOverlay(t, fsys, "a.vdi", "b.vdi")
	b := peek(t, fsys, "b.vdi")
	poke32(t, fsys, "a.vdi", kindAt, 4)
	poke(t, fsys, "a.vdi", linkAt, b[uuidAt:uuidAt+32]...)
	if _, err := memTryOpen(fsys, "b.vdi", vfs.ReadOnly); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "itself") {
		t.Errorf("a loop of two: %v", err)
	}
	if err := fsys.Remove("b.vdi"); err != nil {
		t.Fatal(err)
	}
	a := peek(t, fsys, "a.vdi")
	poke(t, fsys, "a.vdi", linkAt, a[uuidAt:uuidAt+32]...)
	if _, err := memTryOpen(fsys, "a.vdi", vfs.ReadOnly); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("a loop of one: %v", err)
	}
}

func TestCreate_Refuses(t *testing.T) {
	fsys := newSmall(t)
	base := memOpen(t, fsys, "a.vdi", vfs.ReadOnly)
	defer base.Close()
	parent := &formats.Parent{Name: "a.vdi", Layer: base.Layers()[0]}
	for name, req := range map[string]formats.CreateRequest{
		"no size":             {},
		"odd size":            {SizeBytes: 1000},
		"huge":                {SizeBytes: 1 << 60},
		"subformat":           {SizeBytes: 512, Subformat: "undo"},
		"cluster size":        {SizeBytes: 512, ClusterBytes: 5000},
		"preallocation":       {SizeBytes: 512, Preallocation: "some"},
		"static child":        {Subformat: "static", Parent: parent},
		"preallocated child":  {Preallocation: formats.PreallocateFull, Parent: parent},
		"an option":           {SizeBytes: 512, Extra: map[string]string{"x": "y"}},
		"name that is in use": {SizeBytes: 512, Name: "a.vdi"},
	} {
		if req.Name == "" {
			req.Name = "new.vdi"
		}
		req.FS = fsys
		err := (vdi.Format{}).Create(context.Background(), req)
		if err == nil || !errors.Is(err, block.ErrInvalid) && !errors.Is(err, fs.ErrExist) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := fsys.Stat("new.vdi"); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("%s: a failed create has left a file: %v", name, err)
		}
	}
}

// What Measure says is how long a file becomes.
func TestMeasure(t *testing.T) {
	for name, req := range map[string]formats.CreateRequest{
		"dynamic":  {ClusterBytes: 8192},
		"static":   {ClusterBytes: 8192, Subformat: "static"},
		"metadata": {Preallocation: formats.PreallocateMetadata, ClusterBytes: 64 << 10},
	} {
		const size, data = 1 << 20, 5 * 64 << 10
		fsys := vfs.NewMem()
		req.Name, req.SizeBytes = "a.vdi", size
		memCreate(t, fsys, req)
		image := memOpen(t, fsys, "a.vdi", vfs.ReadWrite)
		if _, err := image.WriteAt(make([]byte, data), size-data); err != nil {
			t.Fatal(err)
		}
		if err := image.Close(); err != nil {
			t.Fatal(err)
		}
		want, err := vdi.Format{}.Measure(req, data)
		if got := int64(len(peek(t, fsys, "a.vdi"))); err != nil || got != want {
			t.Errorf("%s: %d bytes, measured were %d, %v", name, got, want, err)
		}
	}
}

// check checks an image, and repairs it if it is opened for writing.
func check(t testing.TB, fsys vfs.FS, mode vfs.Mode) engine.CheckResult {
	t.Helper()
	layer, err := vdi.Format{}.Open(formats.OpenRequest{FS: fsys, Name: "a.vdi", Mode: mode})
	if err != nil {
		t.Fatal(err)
	}
	defer layer.Close()
	result, err := engine.Check(context.Background(), layer, mode == vfs.ReadWrite, func(done, total int64) {
		if done > total {
			t.Errorf("%d of %d done", done, total)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// expectRepaired checks what is wrong with an image, repairs it, and expects nothing to be
// wrong then, and the guest's contents to be want.
func expectRepaired(t *testing.T, fsys vfs.FS, corruptions, leaks int64, problem string, want []byte) {
	t.Helper()
	found := check(t, fsys, vfs.ReadOnly)
	if found.Corruptions != corruptions || found.Leaks != leaks || !strings.Contains(found.Problems[0].Text, problem) {
		t.Errorf("a check finds %+v, want %d corruptions, %d leaks, and %q", found, corruptions, leaks, problem)
	}
	repaired := check(t, fsys, vfs.ReadWrite)
	if repaired.Corruptions != 0 || repaired.Leaks != 0 || repaired.FixedLeaks != leaks || repaired.FixedProblems == 0 {
		t.Errorf("a repair says %+v", repaired)
	}
	if after := check(t, fsys, vfs.ReadOnly); len(after.Problems) > 0 || after.Leaks > 0 {
		t.Errorf("after the repair: %+v", after)
	}
	image := memOpen(t, fsys, "a.vdi", vfs.ReadWrite)
	got := make([]byte, len(want))
	if _, err := image.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("after the repair, other bytes are read, error %v", err)
	}
	if _, err := image.WriteAt([]byte("w"), smallSize-1); err != nil {
		t.Errorf("write after the repair: %v", err)
	}
	if err := image.Close(); err != nil {
		t.Error(err)
	}
}

func TestCheck_Count(t *testing.T) {
	for _, count := range []uint32{0, 1, 4, 1000} {
		fsys := newSmall(t)
		poke32(t, fsys, "a.vdi", allocatedAt, count)
		expectRepaired(t, fsys, 0, 0, "counts", smallData())
		if got := peek32(t, fsys, "a.vdi", allocatedAt); got != 4 {
			t.Errorf("the count is %d after the repair and a write, want 4", got)
		}
	}
}

func TestCheck_SharedBlock(t *testing.T) {
	fsys := newSmall(t)
	poke32(t, fsys, "a.vdi", mapOff+4*3, 1) // guest block 3 shares guest block 0's
	poke32(t, fsys, "a.vdi", mapOff+4*4, 1)
	image := memOpen(t, fsys, "a.vdi", vfs.ReadWrite)
	if _, err := image.WriteAt([]byte{1}, 0); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("write to a damaged image: %v", err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	a := smallData()[:smallBlock]
	expectRepaired(t, fsys, 2, 0, "another entry", append(append(smallData(), a...), a...))
}

// Blocks that nothing refers to go, at the end of the file and before others.
func TestCheck_Leaks(t *testing.T) {
	fsys := newSmall(t)
	poke32(t, fsys, "a.vdi", mapOff+4*2, 1<<32-1) // block 0 of the file is guest block 2's
	poke(t, fsys, "a.vdi", dataOff+3*smallBlock, make([]byte, 2*smallBlock)...)
	want := smallData()
	clear(want[2*smallBlock:])
	expectRepaired(t, fsys, 0, 3, "counts 3", want)
	if got := len(peek(t, fsys, "a.vdi")); got != dataOff+3*smallBlock {
		t.Errorf("%d bytes after the repair and a write, want three blocks", got)
	}
}

// What is lost cannot be repaired; what is there is left where it is.
func TestCheck_EntryOutside(t *testing.T) {
	fsys := newSmall(t)
	poke32(t, fsys, "a.vdi", mapOff+4*5, 77)
	before := peek(t, fsys, "a.vdi")
	for _, mode := range []vfs.Mode{vfs.ReadOnly, vfs.ReadWrite} {
		result := check(t, fsys, mode)
		if result.Corruptions != 1 || !strings.Contains(result.Problems[0].Text, "77") {
			t.Errorf("check: %+v", result)
		}
	}
	if !bytes.Equal(before, peek(t, fsys, "a.vdi")) {
		t.Error("the repair has changed something")
	}
}

// Indexes beyond the number of blocks, as a failed resize may leave them.
func TestCheck_IndexBeyondBlocks(t *testing.T) {
	fsys := newSmall(t)
	p := peek(t, fsys, "a.vdi")
	poke(t, fsys, "a.vdi", dataOff+12*smallBlock, p[dataOff+smallBlock:][:smallBlock]...)
	poke32(t, fsys, "a.vdi", mapOff, 12)
	poke32(t, fsys, "a.vdi", allocatedAt, 13)
	expectRepaired(t, fsys, 0, 10, "counts 13", smallData())
}

// A map whose entries all name one block, or that leave very many blocks out, takes no
// memory for each.
func TestCheck_HugeMaps(t *testing.T) {
	const blocks = 1 << 22
	for name, last := range map[string]uint32{"one block, but the first entry": 0, "one at the end": blocks - 1} {
		fsys := vfs.NewMem()
		memCreate(t, fsys, formats.CreateRequest{Name: "a.vdi", SizeBytes: 4096})
		const end = (512 + 4*blocks + 1<<20) >> 20 << 20
		poke32(t, fsys, "a.vdi", dataAt, end)
		poke32(t, fsys, "a.vdi", blocksAt, blocks)
		poke32(t, fsys, "a.vdi", blockSizeAt, 512)
		if last != 0 {
			poke(t, fsys, "a.vdi", mapOff, bytes.Repeat([]byte{0xff}, 4*blocks)...)
			poke32(t, fsys, "a.vdi", mapOff, last)
		}
		if err := truncate(fsys, "a.vdi", end+512*blocks); err != nil {
			t.Fatal(err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		result := check(t, fsys, vfs.ReadOnly)
		if last == 0 && result.Corruptions != blocks-2 || last != 0 && result.Leaks != blocks-1 {
			t.Errorf("%s: %d corruptions, %d leaks", name, result.Corruptions, result.Leaks)
		}
		image := memOpen(t, fsys, "a.vdi", vfs.ReadWrite)
		if _, err := image.WriteAt([]byte{1}, 0); (err == nil) != (last != 0) {
			t.Errorf("%s: write: %v", name, err)
		}
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 160<<20 {
			t.Errorf("%s: %d MiB were allocated", name, n>>20)
		}
		if err := image.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestGrow_Failed: a block that was copied for a larger block map, which then could not be
// written, does not show in blocks that are written first afterwards.
func TestGrow_Failed(t *testing.T) {
	mem := vfs.NewMem()
	const blockBytes, blocks = 4096, 128 // as many as the map has room for
	req := formats.CreateRequest{FS: mem, Name: "a.vdi", SizeBytes: blocks * blockBytes, ClusterBytes: blockBytes}
	if err := (tight{}).Create(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	full := false
	fsys := vfs.Inject(mem, func(at vfs.Op) error {
		if full && at.Kind == vfs.OpWrite && at.Off == 0x200 { // the map, with where the block has gone
			return syscall.ENOSPC
		}
		return nil
	})
	img := memOpen(t, fsys, "a.vdi", vfs.ReadWrite)
	old := bytes.Repeat([]byte{0xaa}, blockBytes)
	if _, err := img.WriteAt(old, 0); err != nil {
		t.Fatal(err)
	}
	if err := img.Flush(); err != nil {
		t.Fatal(err)
	}
	full = true
	if err := img.Resize(2 * blocks * blockBytes); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("grown without space: %v, want ENOSPC", err)
	}
	full = false
	want := make([]byte, blockBytes)
	copy(want[512:], "new")
	if _, err := img.WriteAt(want[512:1024], 7*blockBytes+512); err != nil {
		t.Fatal(err)
	}
	for at, want := range map[int64][]byte{0: old, 7 * blockBytes: want} {
		got := make([]byte, blockBytes)
		if _, err := img.ReadAt(got, at); err != nil || !bytes.Equal(got, want) {
			t.Errorf("the block at %#x has %q…, %v; want %q…", at, got[:8], err, want[:8])
		}
	}
}
