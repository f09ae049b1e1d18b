package vhdx_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vhdx"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// newSmall returns a file system with a.vhdx, whose blocks 0 and 2 of 6 are present.
func newSmall(t testing.TB) *vfs.Mem {
	t.Helper()
	mem := vfs.NewMem()
	mustCreate(t, mem, formats.CreateRequest{Name: "a.vhdx", SizeBytes: 6 << 20, ClusterBytes: 1 << 20})
	image := mustOpen(t, mem, "a.vhdx", vfs.ReadWrite)
	for _, block := range []int64{0, 2} {
		if _, err := image.WriteAt(bytes.Repeat([]byte{byte(block + 1)}, 1<<20), block<<20); err != nil {
			t.Fatal(err)
		}
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	return mem
}

// edit changes a.vhdx and puts its checksums right.
func edit(t testing.TB, fsys vfs.FS, change func(file []byte)) {
	t.Helper()
	file := readFile(t, fsys, "a.vhdx")
	change(file)
	reseal("", file)
	writeFile(t, fsys, "a.vhdx", file)
}

func put32(off int, value uint32) func([]byte) {
	return func(file []byte) { binary.LittleEndian.PutUint32(file[off:], value) }
}

func put64(off int, value uint64) func([]byte) {
	return func(file []byte) { binary.LittleEndian.PutUint64(file[off:], value) }
}

// Offsets within a new image: of entries of its tables, and of its items.
const (
	region1    = 192<<10 + 16
	region2    = 256<<10 + 16
	metaEntry  = metadataAt + 32
	itemParams = itemsAt
	itemSize   = itemsAt + 8
	itemLogic  = itemsAt + 32
	itemPhys   = itemsAt + 40
	header1    = 64 << 10
	header2    = 128 << 10
)

// both applies a change to both copies of headers or region tables.
func both(distance int, change func(off int) func([]byte), off int) func([]byte) {
	return func(file []byte) {
		change(off)(file)
		change(off + distance)(file)
	}
}

func TestOpen_Refuses(t *testing.T) {
	for name, c := range map[string]struct {
		change func([]byte)
		want   string
		err    error
	}{
		"no identifier":     {func(f []byte) { f[0] = 'x' }, "file type identifier", block.ErrUnsupported},
		"no headers":        {func(f []byte) { f[header1], f[header2] = 'x', 'x' }, "both headers are damaged", block.ErrCorrupt},
		"version":           {both(64<<10, func(o int) func([]byte) { return put32(o, 0x20000) }, header1+64), "version 2, want 1", block.ErrUnsupported},
		"equal but differ":  {func(f []byte) { copy(f[header1+8:header1+16], f[header2+8:header2+16]); f[header1+20] ^= 1 }, "sequence number", block.ErrCorrupt},
		"log GUID, no log":  {both(64<<10, func(o int) func([]byte) { return func(f []byte) { f[o-20] = 1; put32(o, 0)(f) } }, header1+68), "a log GUID, but no log", block.ErrCorrupt},
		"log version":       {both(64<<10, func(o int) func([]byte) { return func(f []byte) { f[o-16] = 1; f[o] = 1 } }, header1+64), "log version 1", block.ErrUnsupported},
		"long log":          {both(64<<10, func(o int) func([]byte) { return func(f []byte) { f[o-20] = 1; put32(o, 1<<30)(f) } }, header1+68), "want at most", block.ErrUnsupported},
		"odd log":           {both(64<<10, func(o int) func([]byte) { return put64(o, 1<<20+4096) }, header1+72), "multiples of 1 MiB", block.ErrCorrupt},
		"log over BAT":      {both(64<<10, func(o int) func([]byte) { return put64(o, batAt) }, header1+72), "overlap", block.ErrCorrupt},
		"log past the end":  {both(64<<10, func(o int) func([]byte) { return put64(o, 1<<40) }, header1+72), "truncated", block.ErrCorrupt},
		"unknown region":    {both(64<<10, func(o int) func([]byte) { return func(f []byte) { f[o] ^= 1 } }, region1), "required and unknown", block.ErrUnsupported},
		"no regions":        {both(64<<10, func(o int) func([]byte) { return put32(o, 0) }, 192<<10+8), "missing", block.ErrCorrupt},
		"too many regions":  {both(64<<10, func(o int) func([]byte) { return put32(o, 2048) }, 192<<10+8), "both region tables", block.ErrCorrupt},
		"region twice":      {both(64<<10, func(o int) func([]byte) { return func(f []byte) { copy(f[o+32:o+48], f[o:o+16]) } }, region1), "there twice", block.ErrCorrupt},
		"region in header":  {both(64<<10, func(o int) func([]byte) { return put64(o, 0) }, region1+16), "behind the header section", block.ErrCorrupt},
		"huge region":       {both(64<<10, func(o int) func([]byte) { return put64(o, 1<<63) }, region1+16), "behind the header section", block.ErrCorrupt},
		"no metadata":       {func(f []byte) { f[metadataAt] = 'x' }, "metadata table", block.ErrCorrupt},
		"many items":        {put32(metadataAt+8, 2048<<16), "2048 entries", block.ErrCorrupt},
		"unknown item":      {func(f []byte) { f[metaEntry+32] ^= 1 }, "required and unknown", block.ErrUnsupported},
		"item outside":      {put32(metaEntry+16, 1<<20), "inside the region", block.ErrCorrupt},
		"item in the table": {put32(metaEntry+16, 0), "inside the region", block.ErrCorrupt},
		"item of 0 bytes":   {put32(metaEntry+20, 0), "has 0 bytes, want 8", block.ErrCorrupt},
		"item twice":        {func(f []byte) { copy(f[metaEntry+32:metaEntry+64], f[metaEntry:metaEntry+32]) }, "there twice", block.ErrCorrupt},
		"item is missing":   {put32(metadataAt+8, 4<<16), "is missing", block.ErrCorrupt},
		"block size 3 MiB":  {put32(itemParams, 3<<20), "block size", block.ErrCorrupt},
		"block size 0":      {put32(itemParams, 0), "block size", block.ErrCorrupt},
		"huge blocks":       {put32(itemParams, 512<<20), "block size", block.ErrCorrupt},
		"sectors of 1024":   {put32(itemLogic, 1024), "logical sector size", block.ErrCorrupt},
		"physical sectors":  {put32(itemPhys, 0), "physical sector size", block.ErrCorrupt},
		"odd size":          {put64(itemSize, 6<<20+100), "virtual disk size", block.ErrCorrupt},
		"no size":           {put64(itemSize, 0), "virtual disk size", block.ErrCorrupt},
		"huge size":         {put64(itemSize, 65<<40), "virtual disk size", block.ErrCorrupt},
		"short BAT":         {put64(itemSize, 1<<40), "the BAT has", block.ErrCorrupt},
		"no locator":        {put32(itemParams+4, 2), "no parent locator", block.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			mem := newSmall(t)
			edit(t, mem, c.change)
			layer, err := vhdx.Format{}.Open(formats.OpenRequest{FS: mem, Name: "a.vhdx"})
			if err == nil {
				layer.Close()
			}
			if !errors.Is(err, c.err) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %v that says %q", err, c.err, c.want)
			}
		})
	}
}

func TestOpen_Accepts(t *testing.T) {
	for name, change := range map[string]func([]byte){
		"nothing":               func([]byte) {},
		"equal headers":         func(f []byte) { copy(f[header1:header1+4096], f[header2:header2+4096]) },
		"first header damaged":  func(f []byte) { f[header1] = 'x' },
		"second header damaged": func(f []byte) { f[header2] = 'x' },
		"first region table":    func(f []byte) { f[region1-16] = 'x' },
		"second region table":   func(f []byte) { f[region2-16] = 'x' },
		"optional region":       func(f []byte) { addRegion(f, 192<<10); addRegion(f, 256<<10) },
		"torn log": func(f []byte) {
			f[header1+48], f[header2+48] = 1, 1
		},
	} {
		t.Run(name, func(t *testing.T) {
			mem := newSmall(t)
			want := readAll(t, mem)
			if name == "optional region" {
				clear(want[2<<20 : 3<<20])
			}
			edit(t, mem, change)
			if got := readAll(t, mem); !bytes.Equal(got, want) {
				t.Fatal("it reads differently")
			}
			image := mustOpen(t, mem.Clone(), "a.vhdx", vfs.ReadWrite)
			scribble(t, testenv.Rand(t), image, want, 10)
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			checkAndRepair(t, mem)
		})
	}
}

// readAll returns what a.vhdx reads as.
func readAll(t testing.TB, fsys vfs.FS) []byte {
	t.Helper()
	image := mustOpen(t, fsys, "a.vhdx", vfs.ReadOnly)
	defer image.Close()
	return readGuest(t, image)
}

// addRegion adds an unknown region that is not required, in the place of block 2.
func addRegion(f []byte, table int) {
	e := f[table+16+2*32:]
	copy(e, "0123456789abcdef")
	binary.LittleEndian.PutUint64(e[16:], 5<<20)
	binary.LittleEndian.PutUint32(e[24:], 1<<20)
	binary.LittleEndian.PutUint32(f[table+8:], 3)
	binary.LittleEndian.PutUint64(f[batAt+2*8:], 0)
}

func check(t testing.TB, fsys vfs.FS, repair bool) engine.CheckResult {
	t.Helper()
	mode := vfs.ReadOnly
	if repair {
		mode = vfs.ReadWrite
	}
	layer, err := vhdx.Format{}.Open(formats.OpenRequest{FS: fsys, Name: "a.vhdx", Mode: mode})
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

// checkAndRepair repairs an image and expects nothing to be left.
func checkAndRepair(t testing.TB, fsys vfs.FS) {
	t.Helper()
	check(t, fsys, true)
	if left := check(t, fsys, false); len(left.Problems) > 0 {
		t.Errorf("after a repair: %+v", left.Problems)
	}
}

// What is damaged is found, and what can be is repaired, without a change to what is read.
func TestCheck(t *testing.T) {
	const entry = batAt
	block := func(n, state, mib uint64) func([]byte) { return put64(entry+int(n)*8, mib<<20|state) }
	for name, c := range map[string]struct {
		change             func([]byte)
		corruptions, leaks int64
		problem            string
		fixed              int64
		leaksFixed         int64
	}{
		"nothing":                {func([]byte) {}, 0, 0, "", 0, 0},
		"header":                 {func(f []byte) { f[header1] = 'x' }, 0, 0, "header 1 is damaged", 1, 0},
		"region table":           {func(f []byte) { f[region2-16] = 'x' }, 0, 0, "region table 2 is damaged", 1, 0},
		"region tables differ":   {func(f []byte) { f[region2+40] ^= 1 }, 0, 0, "region table 2 differs", 1, 0},
		"torn log":               {func(f []byte) { f[header1+48], f[header2+48] = 1, 1 }, 0, 0, "no entry in it is intact", 1, 0},
		"past the end":           {block(1, 6, 1000), 1, 0, "block 1: 1048576 bytes at 0x3e800000 lie outside", 0, 0},
		"in the log":             {block(1, 6, 1), 1, 0, "or in its metadata", 0, 0},
		"at 0":                   {block(1, 6, 0), 1, 0, "or in its metadata", 0, 0},
		"two owners":             {block(1, 6, 4), 1, 0, "is another's, too", 0, 0},
		"two owners, unmapped":   {block(1, 3, 4), 1, 0, "is another's, too", 0, 0},
		"reserved state":         {block(1, 4, 0), 1, 0, "state 4", 0, 0},
		"partially present":      {block(1, 7, 4), 1, 0, "no parent", 0, 0},
		"not present, an offset": {block(1, 0, 4), 0, 0, "state 0, but a file offset", 1, 0},
		"zero, an offset":        {block(1, 2, 4), 0, 0, "state 2, but a file offset", 1, 0},
		"unmapped":               {block(1, 3, 0), 0, 0, "", 0, 0},
		"undefined":              {block(1, 1, 0), 0, 0, "", 0, 0},
		"lost":                   {block(0, 0, 0), 0, 1, "nothing refers to 1048576 bytes", 0, 1},
		"lost at the end":        {block(2, 0, 0), 0, 1, "nothing refers to 1048576 bytes", 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			mem := newSmall(t)
			edit(t, mem, c.change)
			found := check(t, mem, false)
			if found.Corruptions != c.corruptions || found.Leaks != c.leaks || (len(found.Problems) > 0) != (c.problem != "") {
				t.Errorf("found %+v", found)
			}
			if c.problem != "" && !strings.Contains(found.Problems[0].Text, c.problem) {
				t.Errorf("found %q, want %q", found.Problems[0].Text, c.problem)
			}
			if c.corruptions > 0 {
				refusesWrites(t, mem)
			}
			var before []byte
			if c.corruptions == 0 {
				before = readAll(t, mem)
			}
			repaired := check(t, mem, true)
			if repaired.FixedProblems != c.fixed || repaired.FixedLeaks != c.leaksFixed {
				t.Errorf("repaired %+v", repaired)
			}
			if c.corruptions > 0 {
				return
			}
			if left := check(t, mem, false); len(left.Problems) > 0 {
				t.Errorf("after the repair: %+v", left.Problems)
			}
			if !bytes.Equal(readAll(t, mem), before) {
				t.Error("the repair changed what is read")
			}
		})
	}
}

// refusesWrites: an image whose table is damaged is only read.
func refusesWrites(t *testing.T, fsys vfs.FS) {
	t.Helper()
	image := mustOpen(t, fsys, "a.vhdx", vfs.ReadWrite)
	defer image.Close()
	before := readFile(t, fsys, "a.vhdx")
	for _, off := range []int64{0, 4 << 20} {
		if _, err := image.WriteAt([]byte("x"), off); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("a write at %d to a damaged image: %v", off, err)
		}
	}
	if !bytes.Equal(readFile(t, fsys, "a.vhdx"), before) {
		t.Error("the file has changed")
	}
}

// A place that an unmapped block has kept is not given to another, and is free when the
// block is written to.
func TestUnmapped(t *testing.T) {
	mem := newSmall(t)
	edit(t, mem, put64(batAt, 4<<20|3)) // block 0
	image := mustOpen(t, mem, "a.vhdx", vfs.ReadWrite)
	got := make([]byte, 1<<20)
	if _, err := image.ReadAt(got, 0); err != nil || !bytes.Equal(got, make([]byte, 1<<20)) {
		t.Errorf("an unmapped block reads %x…, error %v", got[:8], err)
	}
	if _, err := image.WriteAt([]byte("x"), 5<<20); err != nil {
		t.Fatal(err)
	}
	if e, err := image.Map(5<<20, 1); err != nil || e.FileOff == 4<<20 {
		t.Errorf("another block is at %#x, error %v", e.FileOff, err)
	}
	if _, err := image.WriteAt([]byte("y"), 100); err != nil {
		t.Fatal(err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 6<<20)
	want[100] = 'y'
	copy(want[2<<20:], bytes.Repeat([]byte{3}, 1<<20))
	want[5<<20] = 'x'
	if !bytes.Equal(readAll(t, mem), want) {
		t.Error("it reads something else")
	}
	if left := check(t, mem, false); left.Corruptions > 0 {
		t.Errorf("check: %+v", left.Problems)
	}
}

// A log that is to be replayed changes nothing in the file until the image is written to,
// or repaired.
func TestDirtyLog(t *testing.T) {
	r := testenv.Rand(t)
	dirty := dirtyImage(t, r)
	file := readFile(t, dirty, "a.vhdx")
	want := readAll(t, dirty)
	for _, p := range check(t, dirty, false).Problems {
		if !strings.Contains(p.Text, "the log holds changes") && !strings.Contains(p.Text, "nothing refers to") {
			t.Errorf("check: %s", p.Text)
		}
	}
	image := mustOpen(t, dirty, "a.vhdx", vfs.ReadWrite)
	if !bytes.Equal(readGuest(t, image), want) {
		t.Error("opened for writing, it reads differently")
	}
	if err := errors.Join(image.Flush(), image.Close()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(readFile(t, dirty, "a.vhdx"), file) {
		t.Error("opening it for writing has changed the file")
	}

	repaired := dirty.Clone()
	checkAndRepair(t, repaired)
	if isDirty(t, repaired) || !bytes.Equal(readAll(t, repaired), want) {
		t.Error("a repair did not replay the log")
	}

	image = mustOpen(t, dirty, "a.vhdx", vfs.ReadWrite)
	scribble(t, r, image, want, 10)
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	if isDirty(t, dirty) || !bytes.Equal(readAll(t, dirty), want) {
		t.Error("it reads differently after it was written to")
	}
}

// An image grows past what its table can hold: the table moves, and what it leaves is used
// for blocks.
func TestResize_MovesTable(t *testing.T) {
	r := testenv.Rand(t)
	for _, subformat := range []string{"dynamic", "fixed"} {
		t.Run(subformat, func(t *testing.T) {
			mem := vfs.NewMem()
			mustCreate(t, mem, formats.CreateRequest{Name: "a.vhdx", SizeBytes: 6 << 20, ClusterBytes: 1 << 20, Subformat: subformat})
			image := mustOpen(t, mem, "a.vhdx", vfs.ReadWrite)
			disk := make([]byte, 6<<20)
			scribble(t, r, image, disk, 10)
			const size = 300 << 30
			if err := image.Resize(size); err != nil {
				t.Fatal(err)
			}
			for _, off := range []int64{7 << 20, 140 << 30, size - 5} {
				if _, err := image.WriteAt([]byte("there"), off); err != nil {
					t.Fatal(err)
				}
			}
			scribble(t, r, image, disk, 10)
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			image = mustOpen(t, mem, "a.vhdx", vfs.ReadWrite)
			got := make([]byte, len(disk))
			if _, err := image.ReadAt(got, 0); err != nil || !bytes.Equal(got, disk) {
				t.Errorf("what was there differs, error %v", err)
			}
			for _, off := range []int64{7 << 20, 140 << 30, size - 5} {
				if _, err := image.ReadAt(got[:5], off); err != nil || string(got[:5]) != "there" {
					t.Errorf("at %d is %q, error %v", off, got[:5], err)
				}
			}
			if err := image.Shrink(6 << 20); err != nil {
				t.Fatal(err)
			}
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(readAll(t, mem), disk) {
				t.Error("after it shrank it reads differently")
			}
			if n := len(readFile(t, mem, "a.vhdx")); n > 20<<20 {
				t.Errorf("after it shrank the file has %d bytes", n)
			}
			for _, p := range check(t, mem, false).Problems {
				t.Errorf("check: %s", p.Text)
			}
		})
	}
}

// A resize that moves the table fails at each of its operations, and the image is opened
// anew: what the log has by then counts, and finds all that it refers to.
func TestResize_FailsAnywhere(t *testing.T) {
	mem := newSmall(t)
	want := readAll(t, mem)
	for n, failed := uint64(0), true; failed; n++ {
		left, armed := mem.Clone(), false
		failed = false
		fail := vfs.FailNth(n, syscall.EIO)
		image := mustOpen(t, vfs.Inject(left, func(op vfs.Op) error {
			if !armed {
				return nil
			}
			err := fail(op)
			failed = failed || err != nil
			return err
		}), "a.vhdx", vfs.ReadWrite)
		armed = true
		err := image.Resize(300 << 30)
		armed = false
		_ = image.Close() // it may be poisoned
		image = mustOpen(t, left, "a.vhdx", vfs.ReadWrite)
		got := make([]byte, len(want))
		if _, readErr := image.ReadAt(got, 0); readErr != nil || !bytes.Equal(got, want) {
			t.Fatalf("resize with operation %d failing: %v; opened anew it reads differently, error %v", n, err, readErr)
		}
		if err := image.Close(); err != nil {
			t.Fatal(err)
		}
		if result := check(t, left, false); result.Corruptions > 0 {
			t.Fatalf("resize with operation %d failing: %v; then check: %+v", n, err, result.Problems)
		}
	}
}

// An image without a log gets one with its first change.
func TestNoLog(t *testing.T) {
	mem := newSmall(t)
	edit(t, mem, func(f []byte) {
		for _, h := range []int{header1, header2} {
			binary.LittleEndian.PutUint32(f[h+68:], 0)
			binary.LittleEndian.PutUint64(f[h+72:], 0)
		}
	})
	want := readAll(t, mem)
	image := mustOpen(t, mem, "a.vhdx", vfs.ReadWrite)
	scribble(t, testenv.Rand(t), image, want, 10)
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(readAll(t, mem), want) {
		t.Error("it reads differently")
	}
	for _, p := range check(t, mem, false).Problems {
		t.Errorf("check: %s", p.Text)
	}
}

// An image becomes as long as was measured when all of it is written, and a new one is as
// long as was measured for no data.
func TestMeasure(t *testing.T) {
	for name, req := range map[string]formats.CreateRequest{
		"dynamic":      {ClusterBytes: 1 << 20},
		"large blocks": {ClusterBytes: 16 << 20},
		"fixed":        {Subformat: "fixed"},
		"long log":     {Extra: map[string]string{"log_size": "3145728"}},
	} {
		t.Run(name, func(t *testing.T) {
			mem := vfs.NewMem()
			req.Name, req.SizeBytes = "a.vhdx", 9<<20+512
			for _, data := range []int64{0, req.SizeBytes} {
				want, err := vhdx.Format{}.Measure(req, data)
				if err != nil {
					t.Fatal(err)
				}
				if data == 0 {
					mustCreate(t, mem, req)
				} else {
					fillAll(t, mem)
				}
				if got := int64(len(readFile(t, mem, "a.vhdx"))); got != want {
					t.Errorf("with %d bytes of data it has %d bytes, measured were %d", data, got, want)
				}
			}
		})
	}
}

// fillAll writes to all of a.vhdx.
func fillAll(t *testing.T, fsys vfs.FS) {
	t.Helper()
	image := mustOpen(t, fsys, "a.vhdx", vfs.ReadWrite)
	if _, err := image.WriteAt(bytes.Repeat([]byte("x"), int(image.Info().SizeBytes)), 0); err != nil {
		t.Fatal(err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestCreate_Refuses(t *testing.T) {
	mem := newSmall(t)
	image := mustOpen(t, mem, "a.vhdx", vfs.ReadOnly)
	parent := &formats.Parent{Name: "a.vhdx", Layer: image.Layers()[0]}
	odd := &formats.Parent{Name: `a\b.vhdx`, Layer: image.Layers()[0]}
	for want, req := range map[string]formats.CreateRequest{
		"size 0":                {},
		"size 1000":             {SizeBytes: 1000},
		"size 70368744178176":   {SizeBytes: 64<<40 + 512},
		"multiple of the secto": {SizeBytes: 512 * 9, Extra: map[string]string{"logical_sector_size": "4096"}},
		"cluster size 524288":   {SizeBytes: 1 << 20, ClusterBytes: 512 << 10},
		"cluster size 3145728":  {SizeBytes: 1 << 20, ClusterBytes: 3 << 20},
		"cluster size 53687091": {SizeBytes: 1 << 20, ClusterBytes: 512 << 20},
		"subformat \"thin\"":    {SizeBytes: 1 << 20, Subformat: "thin"},
		"subformat \"differenc": {SizeBytes: 1 << 20, Subformat: "differencing"},
		"subformat \"fixed\"":   {Subformat: "fixed", Parent: parent},
		"would hide its parent": {Preallocation: formats.PreallocateFull, Parent: parent},
		"without backslashes":   {Parent: odd},
		"as the parent has":     {Parent: parent, Extra: map[string]string{"logical_sector_size": "4096"}},
		"preallocation \"some":  {SizeBytes: 1 << 20, Preallocation: "some"},
		"log_size 1000":         {SizeBytes: 1 << 20, Extra: map[string]string{"log_size": "1000"}},
		"log_size \"1M\"":       {SizeBytes: 1 << 20, Extra: map[string]string{"log_size": "1M"}},
		"option \"color\"":      {SizeBytes: 1 << 20, Extra: map[string]string{"color": "1"}},
	} {
		req.FS, req.Name = mem, "new.vhdx"
		err := vhdx.Format{}.Create(context.Background(), req)
		if !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: error %v, want one that says %q", req, err, want)
		}
		if _, err := mem.Stat("new.vhdx"); err == nil {
			t.Errorf("%+v: there is a file", req)
		}
	}
}

// A child is refused on a parent that was written to since, and on another image.
func TestVerifyParent(t *testing.T) {
	mem := newSmall(t)
	parent := mustOpen(t, mem, "a.vhdx", vfs.ReadOnly)
	mustCreate(t, mem, formats.CreateRequest{Name: "child.vhdx", Parent: &formats.Parent{Name: "a.vhdx", Layer: parent.Layers()[0]}})
	parent.Close()
	mustOpen(t, mem, "child.vhdx", vfs.ReadOnly).Close()
	image := mustOpen(t, mem, "a.vhdx", vfs.ReadWrite)
	if _, err := image.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := formats.Open(context.Background(), mem, "child.vhdx", formats.OpenOptions{Format: "vhdx"})
	if !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "was written to after its child was made") {
		t.Errorf("error %v", err)
	}
}

// An image whose log is too long to be used, but empty, is read.
func TestLongLog(t *testing.T) {
	mem := newSmall(t)
	want := readAll(t, mem)
	const logOffset, logLength = 8 << 20, 40 << 20
	edit(t, mem, func(f []byte) {
		for _, h := range []int{header1, header2} {
			put32(h+68, logLength)(f)
			put64(h+72, logOffset)(f)
		}
	})
	f, err := mem.Open("a.vhdx", vfs.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(logOffset+logLength), f.Close()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(readAll(t, mem), want) {
		t.Error("it reads differently")
	}
	image := mustOpen(t, mem, "a.vhdx", vfs.ReadWrite)
	if _, err := image.WriteAt([]byte("x"), 0); !errors.Is(err, block.ErrUnsupported) {
		t.Errorf("a write: %v", err)
	}
}
