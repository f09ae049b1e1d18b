package vhdx_test

import (
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/formattest"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vhdx"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// FuzzImage damages the two kinds that have all there is between them; each image has some
// MiB, so that trying one takes a while.
func FuzzImage(f *testing.F) { formattest.Fuzz(f, factories()[:2]...) }

// reseal puts the checksums of headers, region tables and log entries right.
func reseal(_ string, file []byte) {
	for _, at := range []int{64 << 10, 128 << 10} {
		resealAt(file, at, 4<<10)
	}
	for _, at := range []int{192 << 10, 256 << 10} {
		resealAt(file, at, 64<<10)
	}
	for at := logAt; at+4096 <= min(len(file), logAt+1<<20); at += 4096 {
		if string(file[at:at+4]) == "loge" {
			resealAt(file, at, int(min(binary.LittleEndian.Uint32(file[at+8:]), 1<<20)))
		}
	}
}

// Where a new image has what.
const (
	logAt      = 1 << 20
	metadataAt = 2 << 20
	batAt      = 3 << 20
	itemsAt    = metadataAt + 64<<10
)

func resealAt(file []byte, at, n int) {
	if n < 8 || at+n > len(file) {
		return
	}
	clear(file[at+4 : at+8])
	sum := crc32.Checksum(file[at:at+n], crc32.MakeTable(crc32.Castagnoli))
	binary.LittleEndian.PutUint32(file[at+4:], sum)
}

// dirtyImage returns an image as a loss of power leaves it, with a log to be replayed.
func dirtyImage(t testing.TB, r *rand.Rand) *vfs.Mem {
	t.Helper()
	mem := vfs.NewMem()
	mustCreate(t, mem, formats.CreateRequest{Name: "a.vhdx", SizeBytes: 6 << 20, ClusterBytes: 1 << 20})
	var dirty *vfs.Mem
	hook := func(at vfs.Op) error {
		if left := mem.Crash(r); isDirty(t, left) {
			dirty = left
		}
		return nil
	}
	image := mustOpen(t, vfs.Inject(mem, vfs.If(vfs.OfKind(vfs.OpSync), hook)), "a.vhdx", vfs.ReadWrite)
	for i := range 30 {
		scribble(t, r, image, make([]byte, 6<<20), 3)
		if err := image.Flush(); err != nil {
			t.Fatal(err)
		}
		if dirty != nil && i > 3 {
			return dirty
		}
	}
	t.Fatal("no crash left a log to be replayed")
	return nil
}

func isDirty(t testing.TB, fsys vfs.FS) bool {
	t.Helper()
	image, err := formats.Open(context.Background(), fsys, "a.vhdx", formats.OpenOptions{Format: "vhdx"})
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	for _, detail := range image.Layers()[0].Codec.Describe().Details {
		if detail.Name == "log_replay_pending" {
			return detail.Value.(bool)
		}
	}
	return false
}

// TestHostile_Log damages logs that have to be replayed, and what they replay onto. Nothing
// panics, and time and memory stay bounded.
func TestHostile_Log(t *testing.T) {
	r := testenv.Rand(t)
	dirty := dirtyImage(t, r)
	intact := readFile(t, dirty, "a.vhdx")
	extremes := []uint64{0, 1, 1 << 12, 1 << 20, 1 << 31, 1<<32 - 1, 1 << 40, 1 << 62, 1<<63 - 1, 1<<64 - 1}
	opened := 0
	for i := range 100 {
		mem := dirty.Clone()
		file := append([]byte(nil), intact...)
		for range 1 + r.IntN(3) {
			at := []int{64 << 10, logAt, logAt + 512<<10, metadataAt, batAt}[r.IntN(5)]
			at += r.IntN(128) &^ 3
			if r.IntN(2) == 0 {
				binary.LittleEndian.PutUint64(file[at:], extremes[r.IntN(len(extremes))])
			} else {
				file[at] = byte(r.Uint32())
			}
		}
		reseal("", file)
		writeFile(t, mem, "a.vhdx", file)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		began := time.Now()
		for _, mode := range []vfs.Mode{vfs.ReadOnly, vfs.ReadWrite} {
			if useDirty(t, mem, mode) {
				opened++
			}
		}
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 256<<20 || time.Since(began) > 30*time.Second {
			t.Fatalf("image %d took %d MiB and %v", i, n>>20, time.Since(began))
		}
	}
	if opened < 15 {
		t.Errorf("%d of 200 could be opened: nothing was tested", opened)
	}
}

// useDirty does what can be done with an image; errors are expected.
func useDirty(t *testing.T, fsys vfs.FS, mode vfs.Mode) (opened bool) {
	image, err := formats.Open(context.Background(), fsys, "a.vhdx", formats.OpenOptions{Format: "vhdx", Mode: mode})
	if err != nil {
		return false
	}
	p := make([]byte, min(image.Info().SizeBytes, 1<<20))
	_, _ = image.ReadAt(p, 0) // may be refused
	if _, err := image.Layers()[0].Codec.Check(context.Background(), nil, nil); err != nil && !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("check: %v", err)
	}
	if mode == vfs.ReadWrite {
		_, _ = image.WriteAt(p, 0) // may be refused
	}
	_ = image.Close() // what is damaged may fail to
	return true
}

func readFile(t testing.TB, fsys vfs.FS, name string) []byte {
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

func writeFile(t testing.TB, fsys vfs.FS, name string, p []byte) {
	t.Helper()
	f, err := fsys.Open(name, vfs.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
}

// FuzzMetadata puts bytes into the headers, region tables, metadata and table of an image
// without contents, and opens and checks it.
func FuzzMetadata(f *testing.F) {
	mem := vfs.NewMem()
	mustCreate(f, mem, formats.CreateRequest{Name: "parent.vhdx", SizeBytes: 6 << 20})
	parent := mustOpen(f, mem, "parent.vhdx", vfs.ReadOnly)
	mustCreate(f, mem, formats.CreateRequest{Name: "a.vhdx", Parent: &formats.Parent{Name: "parent.vhdx", Layer: parent.Layers()[0]}})
	intact := readFile(f, mem, "a.vhdx")
	parent.Close()
	f.Add([]byte{})
	for _, at := range []int{header1 + 48, header1 + 64, header1 + 72, region1, region1 + 16, metadataAt + 8, metaEntry, metaEntry + 16,
		itemParams, itemSize, itemLogic, itemsAt + 48, itemsAt + 64, itemsAt + 68, batAt, batAt + 8*4096} {
		for _, value := range []uint64{0, 1, 6, 7, 1 << 20, 4<<20 | 7, 1 << 31, 1<<63 - 1, 1<<64 - 1} {
			patch := binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint32(nil, uint32(at)), value)
			f.Add(patch)
		}
	}
	f.Fuzz(func(t *testing.T, patches []byte) {
		const patchBytes = 12
		file := append([]byte(nil), intact...)
		for ; len(patches) >= patchBytes; patches = patches[patchBytes:] {
			at := int(binary.LittleEndian.Uint32(patches)) % (len(file) - 8)
			copy(file[at:], patches[4:patchBytes])
		}
		reseal("", file)
		mem := vfs.NewMem()
		f, err := mem.Create("a.vhdx")
		if err == nil {
			_, err = f.WriteAt(file, 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		layer, err := vhdx.Format{}.Open(formats.OpenRequest{FS: mem, Name: "a.vhdx", Mode: vfs.ReadWrite})
		if err != nil {
			return
		}
		defer layer.Close()
		size := layer.Codec.Geometry().SizeBytes
		for _, off := range []int64{0, size / 2, size - 1} {
			run, err := layer.Codec.Lookup(off, size-off)
			if err == nil && (run.Len < 1 || run.Len > size-off) {
				t.Errorf("Lookup(%d, %d) is %+v", off, size-off, run)
			}
			if start, end := layer.Codec.Granule(off); start > off || end <= off {
				t.Errorf("Granule(%d) is %d to %d", off, start, end)
			}
		}
		layer.Codec.Describe()
		if _, err := engine.Check(context.Background(), layer, true, nil); err != nil && !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("check: %v", err)
		}
	})
}
