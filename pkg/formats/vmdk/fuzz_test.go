package vmdk_test

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
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/formattest"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vmdk"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// fuzzBases returns valid images, each with all its files, for a fuzzer to damage a.vmdk.
func fuzzBases(t testing.TB) []*vfs.Mem {
	t.Helper()
	zeroed, overlay, flat := vfs.NewMem(), newSmall(t), vfs.NewMem()
	memCreate(t, zeroed, formats.CreateRequest{
		Name: "a.vmdk", SizeBytes: 3<<20 + 512, ClusterBytes: 4096, Extra: map[string]string{"zeroed_grain": "on"},
	})
	memCreate(t, flat, formats.CreateRequest{Name: "a.vmdk", SizeBytes: 64 << 10, Subformat: "monolithicFlat"})
	if err := overlay.Rename("a.vmdk", "base.vmdk"); err != nil {
		t.Fatal(err)
	}
	memCreateOverlay(t, overlay, "base.vmdk", formats.CreateRequest{Name: "a.vmdk", ClusterBytes: 8192})
	good := deflate(bytes.Repeat([]byte("text"), 16<<10))
	stream := newStream(t, storedGrain(0, len(good), good))
	return []*vfs.Mem{newSmall(t), zeroed, overlay, flat, stream}
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
	f.Add(byte(0), uint64(1), patch(gtOff, 1))
	f.Add(byte(0), uint64(2), append(patch(gdOff, rgtOff/512), patch(gtOff+8, dataOff/512)...))
	f.Add(byte(0), uint64(3), patch(12, 1<<30))
	f.Add(byte(1), uint64(4), patch(20, 1<<12))
	f.Add(byte(1), uint64(5), append(patch(gdOff, 0), patch(rgdOff, 0)...))
	f.Add(byte(4), uint64(6), patch(44, 1<<12))
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

// damage applies patches to a.vmdk: an offset and a value, of 4 bytes each.
func damage(t *testing.T, fsys *vfs.Mem, patches []byte) {
	size := len(peek(t, fsys, "a.vmdk"))
	for range 64 {
		if len(patches) < 8 {
			break
		}
		off := int64(binary.LittleEndian.Uint32(patches)) % int64(size)
		poke(t, fsys, "a.vmdk", off, patches[4:8]...)
		patches = patches[8:]
	}
	fsys.SetCapacity(64 << 20)
}

func useDamaged(t *testing.T, fsys *vfs.Mem, r *rand.Rand) {
	checkDamaged(t, fsys, vfs.ReadOnly)
	image, err := memTryOpen(fsys, "a.vmdk", vfs.ReadWrite)
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
	layer, err := vmdk.Format{}.Open(formats.OpenRequest{FS: fsys, Name: "a.vmdk", Mode: mode})
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

// FuzzImage damages images of every kind.
func FuzzImage(f *testing.F) { formattest.Fuzz(f, factories()...) }
