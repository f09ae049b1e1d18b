package vhd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vhd"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// FuzzHeader opens files with any first sectors, whose checksums are put right. What is
// opened says something sensible.
func FuzzHeader(f *testing.F) {
	fsys := newSmall(f)
	memCreateOverlay(f, fsys, "a.vhd", "b.vhd")
	memCreate(f, fsys, formats.CreateRequest{Name: "f.vhd", SizeBytes: 512, Subformat: "fixed"})
	for _, name := range []string{"a.vhd", "b.vhd", "f.vhd"} {
		p := peek(f, fsys, name)
		f.Add(p[:min(len(p), 2048)], uint32(len(p)))
	}
	f.Add([]byte{}, uint32(0))
	f.Fuzz(func(t *testing.T, head []byte, size uint32) {
		fsys := vfs.NewMem()
		file, err := fsys.Create("a.vhd")
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if err := file.Truncate(int64(size % (16 << 20))); err != nil {
			t.Fatal(err)
		}
		head = bytes.Clone(head[:min(len(head), 4096)])
		reseal("", head)
		if _, err := file.WriteAt(head, 0); err != nil {
			t.Fatal(err)
		}
		layer, err := vhd.Format{}.Open(formats.OpenRequest{FS: fsys, Name: "a.vhd"})
		if err != nil {
			return
		}
		defer layer.Close()
		g := layer.Codec.Geometry()
		if g.SizeBytes <= 0 || g.SizeBytes%512 != 0 {
			t.Errorf("geometry %+v", g)
		}
		_, _ = layer.Codec.Lookup(g.SizeBytes-1, 1) // may be refused
		layer.Codec.Describe()
	})
}

// fuzzBases returns valid images, each with all its files, for a fuzzer to damage a.vhd.
func fuzzBases(t testing.TB) []*vfs.Mem {
	t.Helper()
	fixed, overlay, bitmaps := vfs.NewMem(), newSmall(t), newSmall(t)
	memCreate(t, fixed, formats.CreateRequest{Name: "a.vhd", SizeBytes: 1 << 20, Subformat: "fixed"})
	if err := overlay.Rename("a.vhd", "base.vhd"); err != nil {
		t.Fatal(err)
	}
	memCreateOverlay(t, overlay, "base.vhd", "a.vhd")
	image := memOpen(t, overlay, "a.vhd", vfs.ReadWrite)
	if _, err := image.WriteAt(make([]byte, 3000), 1000); err != nil {
		t.Fatal(err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	poke(t, bitmaps, "a.vhd", firstSlot, 0x5a)
	return []*vfs.Mem{newSmall(t), fixed, overlay, bitmaps}
}

// FuzzOpenReadWrite damages images and uses them. Whatever they say: nothing panics,
// memory and time stay bounded, and what was just written is read back.
func FuzzOpenReadWrite(f *testing.F) {
	bases := fuzzBases(f)
	for i := range bases {
		f.Add(byte(i), uint64(i), []byte{})
	}
	patch := func(off, value uint32) []byte {
		return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, off), value)
	}
	f.Add(byte(0), uint64(1), patch(tableOff, firstSlot/512))
	f.Add(byte(0), uint64(2), append(patch(tableOff, 1<<32-1), patch(tableOff+4, 3)...))
	f.Add(byte(0), uint64(3), patch(entriesAt, 700))
	f.Add(byte(0), uint64(4), append(patch(blockSizeAt, 512), patch(entriesAt, 73)...))
	f.Add(byte(1), uint64(5), patch(1<<20+sizeAt+4, 1000))
	f.Add(byte(2), uint64(6), patch(kindAt, 3))
	f.Add(byte(2), uint64(7), patch(locatorsAt+8, 1<<31))
	f.Add(byte(3), uint64(8), patch(kindAt, 4))
	f.Fuzz(func(t *testing.T, base byte, seed uint64, patches []byte) {
		fsys := bases[int(base)%len(bases)].Clone()
		damage(t, fsys, patches, seed%2 == 0)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		began := time.Now()
		useDamaged(t, fsys, rand.New(rand.NewPCG(seed, seed)))
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("it took %v", took)
		}
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 512<<20 {
			t.Errorf("%d MiB were allocated", n>>20)
		}
	})
}

// damage applies patches to a.vhd, an offset and a value, of 4 bytes each, and may put the
// checksums right.
func damage(t *testing.T, fsys *vfs.Mem, patches []byte, resealed bool) {
	size := len(peek(t, fsys, "a.vhd"))
	for range 64 {
		if len(patches) < 8 {
			break
		}
		off := int64(binary.BigEndian.Uint32(patches)) % int64(size)
		poke(t, fsys, "a.vhd", off, patches[4:8]...)
		patches = patches[8:]
	}
	if resealed {
		p := peek(t, fsys, "a.vhd")
		reseal("", p)
		poke(t, fsys, "a.vhd", 0, p...)
	}
	fsys.SetCapacity(64 << 20)
}

func useDamaged(t *testing.T, fsys *vfs.Mem, r *rand.Rand) {
	checkDamaged(t, fsys, vfs.ReadOnly)
	image, err := memTryOpen(fsys, "a.vhd", vfs.ReadWrite)
	if err != nil {
		return
	}
	size := image.Info().SizeBytes
	for range 20 {
		off := r.Int64N(size)
		if r.IntN(2) == 0 {
			off = r.Int64N(min(size, 128<<10))
		}
		useOnce(t, image, r, off, min(1+r.Int64N(32<<10), size-off))
	}
	if r.IntN(4) == 0 {
		_ = image.Resize(size + 512*r.Int64N(10000)) // may be refused
	}
	if r.IntN(4) == 0 {
		_ = image.Shrink(max(size-512*r.Int64N(10000), 512)) // may be refused
	}
	_ = image.Close() // a damaged image may fail to
	checkDamaged(t, fsys, vfs.ReadWrite)
}

// useOnce does something at random. Errors are expected; wrong data is not.
func useOnce(t *testing.T, image *formats.Image, r *rand.Rand, off, n int64) {
	p := make([]byte, n)
	switch r.IntN(8) {
	case 0:
		_ = image.WriteZeroes(off, n, 0) // may be refused
	case 1:
		_ = image.Discard(off, n) // may be refused
	case 2:
		_ = image.Flush() // may have been poisoned
	case 3:
		if e, err := image.Map(off, n); err == nil && (e.Len < 1 || e.Len > n) {
			t.Errorf("Map(%d, %d) is %+v", off, n, e)
		}
	case 4, 5:
		_, _ = image.ReadAt(p, off) // may be refused
	default:
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		if _, err := image.WriteAt(p, off); err != nil {
			return
		}
		got := make([]byte, n)
		if _, err := image.ReadAt(got, off); err != nil || !bytes.Equal(got, p) {
			t.Errorf("%d bytes at %d were written, but other bytes are read, error %v", n, off, err)
		}
	}
}

// checkDamaged checks an image, and repairs it if it is opened for writing.
func checkDamaged(t *testing.T, fsys vfs.FS, mode vfs.Mode) {
	layer, err := vhd.Format{}.Open(formats.OpenRequest{FS: fsys, Name: "a.vhd", Mode: mode})
	if err != nil {
		return
	}
	defer layer.Close()
	result, err := engine.Check(context.Background(), layer, mode == vfs.ReadWrite, nil)
	if err != nil && !errors.Is(err, block.ErrReadOnly) && !errors.Is(err, block.ErrUnsupported) && block.Errno(err) != block.Errno(block.ErrNoSpace) {
		t.Errorf("check: %v", err)
	}
	if len(result.Problems) > 200 {
		t.Errorf("%d problems are described", len(result.Problems))
	}
}
