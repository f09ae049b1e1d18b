package vdi_test

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
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vdi"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// FuzzHeader opens files with any first sector. What is opened says something sensible.
func FuzzHeader(f *testing.F) {
	fsys := newSmall(f)
	memCreateOverlay(f, fsys, "a.vdi", "b.vdi")
	for _, name := range []string{"a.vdi", "b.vdi"} {
		f.Add(peek(f, fsys, name)[:512], uint32(1<<20))
	}
	f.Add([]byte{}, uint32(0))
	f.Fuzz(func(t *testing.T, head []byte, size uint32) {
		fsys := vfs.NewMem()
		file, err := fsys.Create("a.vdi")
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if err := file.Truncate(int64(size % (16 << 20))); err != nil {
			t.Fatal(err)
		}
		if _, err := file.WriteAt(head[:min(len(head), 512)], 0); err != nil {
			t.Fatal(err)
		}
		layer, err := vdi.Format{}.Open(formats.OpenRequest{FS: fsys, Name: "a.vdi"})
		if err != nil {
			return
		}
		defer layer.Close()
		g := layer.Codec.Geometry()
		if g.SizeBytes <= 0 || g.ClusterBytes < 512 || g.SizeBytes%512 != 0 {
			t.Errorf("geometry %+v", g)
		}
		_, _ = layer.Codec.Lookup(g.SizeBytes-1, 1) // may be refused
		layer.Codec.Describe()
	})
}

// fuzzBases returns valid images, each with all its files, for a fuzzer to damage a.vdi.
func fuzzBases(t testing.TB) []*vfs.Mem {
	t.Helper()
	static, overlay, extra := vfs.NewMem(), newSmall(t), vfs.NewMem()
	memCreate(t, static, formats.CreateRequest{Name: "a.vdi", SizeBytes: 1 << 20, ClusterBytes: 8192, Subformat: "static"})
	if err := overlay.Rename("a.vdi", "base.vdi"); err != nil {
		t.Fatal(err)
	}
	memCreateOverlay(t, overlay, "base.vdi", "a.vdi")
	req := formats.CreateRequest{FS: extra, Name: "a.vdi", SizeBytes: 512 << 10, ClusterBytes: 4096}
	if err := (tight{}).Create(context.Background(), req); err != nil {
		t.Fatal(err)
	}
	return []*vfs.Mem{newSmall(t), static, overlay, extra}
}

// FuzzOpenReadWrite damages images and uses them. Whatever they say: nothing panics,
// memory and time stay bounded, and what was just written is read back.
func FuzzOpenReadWrite(f *testing.F) {
	bases := fuzzBases(f)
	for i := range bases {
		f.Add(byte(i), uint64(i), []byte{})
	}
	patch := func(off, value uint32) []byte {
		return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, off), value)
	}
	f.Add(byte(0), uint64(1), patch(mapOff, 1))
	f.Add(byte(0), uint64(2), append(patch(mapOff, 0), patch(mapOff+4, 1<<32-2)...))
	f.Add(byte(0), uint64(3), patch(allocatedAt, 0))
	f.Add(byte(0), uint64(4), append(patch(blocksAt, 800), patch(sizeAt, 3<<20)...))
	f.Add(byte(1), uint64(5), patch(extraAt, 4096))
	f.Add(byte(2), uint64(6), patch(linkAt, 0))
	f.Add(byte(3), uint64(7), patch(mapOff+4*100, 3))
	f.Fuzz(func(t *testing.T, base byte, seed uint64, patches []byte) {
		fsys := bases[int(base)%len(bases)].Clone()
		damage(t, fsys, patches)
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

// damage applies patches to a.vdi: an offset and a value, of 4 bytes each.
func damage(t *testing.T, fsys *vfs.Mem, patches []byte) {
	size := len(peek(t, fsys, "a.vdi"))
	for range 64 {
		if len(patches) < 8 {
			break
		}
		off := int64(binary.LittleEndian.Uint32(patches)) % int64(size)
		poke(t, fsys, "a.vdi", off, patches[4:8]...)
		patches = patches[8:]
	}
	fsys.SetCapacity(64 << 20)
}

func useDamaged(t *testing.T, fsys *vfs.Mem, r *rand.Rand) {
	checkDamaged(t, fsys, vfs.ReadOnly)
	image, err := memTryOpen(fsys, "a.vdi", vfs.ReadWrite)
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
	layer, err := vdi.Format{}.Open(formats.OpenRequest{FS: fsys, Name: "a.vdi", Mode: mode})
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
