package qcow2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/qcow2"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func memOpen(fsys vfs.FS, name string, mode vfs.Mode) (*formats.Image, error) {
	return formats.Open(context.Background(), fsys, name, formats.OpenOptions{Format: "qcow2", Mode: mode})
}

func memCreate(t testing.TB, fsys vfs.FS, format formats.Format, req formats.CreateRequest) {
	t.Helper()
	req.FS = fsys
	if err := format.Create(context.Background(), req); err != nil {
		t.Fatal(err)
	}
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
	p, err := io.ReadAll(io.NewSectionReader(f, 0, size))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

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

// fuzzBases returns file systems with a.qcow2, of several kinds.
func fuzzBases(t testing.TB) []*vfs.Mem {
	t.Helper()
	var bases []*vfs.Mem
	for _, extra := range []map[string]string{
		{"cluster_size": "4k"},
		{"cluster_size": "512", "refcount_bits": "64"},
		{"cluster_size": "16k", "extended_l2": "on"},
		{"cluster_size": "4k", "compression_type": "zstd", "refcount_bits": "4"},
		{"cluster_size": "4k", "compat": "0.10"},
		{"cluster_size": "4k", "data_file": "a.data"},
	} {
		fsys := vfs.NewMem()
		memCreate(t, fsys, qcow2.Format{}, formats.CreateRequest{Name: "a.qcow2", SizeBytes: 1<<20 + 512, Extra: extra})
		fillForFuzz(t, fsys)
		bases = append(bases, fsys)
	}
	fsys := vfs.NewMem()
	memCreate(t, fsys, snapshotted{}, formats.CreateRequest{Name: "a.qcow2", SizeBytes: 128<<10 + 512, ClusterBytes: 2 << 10})
	fillForFuzz(t, fsys)
	return append(bases, fsys)
}

// fillForFuzz writes a little of everything.
func fillForFuzz(t testing.TB, fsys vfs.FS) {
	t.Helper()
	image, err := memOpen(fsys, "a.qcow2", vfs.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(
		second(image.WriteAt(bytes.Repeat([]byte("data"), 3<<10), 0)),
		image.WriteZeroes(4<<10, 4<<10, 0),
		second(image.WriteAt(bytes.Repeat([]byte("more"), 3<<10), 50<<10)),
	)
	start, end, ok := image.CompressedGranule(100 << 10)
	if ok {
		packed, packErr := image.Pack(bytes.Repeat([]byte("zz"), int(end-start)/2), start)
		err = errors.Join(err, packErr, image.WritePacked(packed))
	}
	if err := errors.Join(err, image.Close()); err != nil {
		t.Fatal(err)
	}
}

func second(_ int, err error) error { return err }

// FuzzHeader gives the first cluster any contents: opening gives an image or an error.
func FuzzHeader(f *testing.F) {
	bases := fuzzBases(f)
	for i, fsys := range bases {
		head := peek(f, fsys, "a.qcow2")
		f.Add(byte(i), head[:min(len(head), 1024)])
	}
	f.Fuzz(func(t *testing.T, base byte, head []byte) {
		fsys := bases[int(base)%len(bases)].Clone()
		poke(t, fsys, "a.qcow2", 0, head[:min(len(head), 4096)]...)
		bounded(t, func() {
			image, err := memOpen(fsys, "a.qcow2", vfs.ReadOnly)
			if err != nil {
				return
			}
			image.Layers()[0].Codec.Describe()
			_, _ = image.ReadAt(make([]byte, min(image.Info().SizeBytes, 1<<20)), 0) // may be refused
			if err := image.Close(); err != nil {
				t.Error(err)
			}
		})
	})
}

// bounded fails the test if f takes long or much memory.
func bounded(t *testing.T, f func()) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	began := time.Now()
	f()
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 768<<20 {
		t.Errorf("%d MiB were allocated", n>>20)
	}
}

// FuzzOpen damages images and uses them. Whatever they say: nothing panics, memory and time
// stay bounded.
func FuzzOpen(f *testing.F) {
	bases := fuzzBases(f)
	patch := func(off, value uint32) []byte {
		return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, off), value)
	}
	for i, fsys := range bases {
		p := peek(f, fsys, "a.qcow2")
		be := binary.BigEndian
		l1, table := be.Uint64(p[40:]), be.Uint64(p[48:])
		l2, block := be.Uint64(p[l1:])&(1<<56-1), be.Uint64(p[table:])
		f.Add(byte(i), uint64(i), []byte{})
		f.Add(byte(i), uint64(i), patch(uint32(l1+4), uint32(block)))
		f.Add(byte(i), uint64(i), patch(uint32(table+4), uint32(l2)))
		f.Add(byte(i), uint64(i), patch(uint32(l2+4), uint32(l2)))
		f.Add(byte(i), uint64(i), append(patch(uint32(l2+8), 1<<30|0xffff), patch(uint32(l2+12), uint32(block))...))
		f.Add(byte(i), uint64(i), append(patch(uint32(block), 0xffffffff), patch(76, 1)...))
		f.Add(byte(i), uint64(i), patch(uint32(block), 0))
		f.Add(byte(i), uint64(i), patch(36, 1<<22))
		f.Add(byte(i), uint64(i), patch(56, 1<<11))
	}
	f.Fuzz(func(t *testing.T, base byte, seed uint64, patches []byte) {
		fsys := bases[int(base)%len(bases)].Clone()
		damage(t, fsys, patches)
		bounded(t, func() { useDamaged(t, fsys, rand.New(rand.NewPCG(seed, seed))) })
	})
}

// damage applies patches to a.qcow2: an offset and a value, of 4 bytes each.
func damage(t *testing.T, fsys *vfs.Mem, patches []byte) {
	size := len(peek(t, fsys, "a.qcow2"))
	for range 64 {
		if len(patches) < 8 {
			break
		}
		off := int64(binary.BigEndian.Uint32(patches)) % int64(size)
		poke(t, fsys, "a.qcow2", off, patches[4:8]...)
		patches = patches[8:]
	}
	fsys.SetCapacity(64 << 20)
}

func useDamaged(t *testing.T, fsys *vfs.Mem, r *rand.Rand) {
	checkDamaged(t, fsys, vfs.ReadOnly)
	image, err := memOpen(fsys, "a.qcow2", vfs.ReadWrite)
	if err != nil {
		return
	}
	size := image.Info().SizeBytes
	for range 20 {
		if size == 0 {
			break
		}
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
		// Two guest clusters may have the same place: what was written need not be there.
		_, _ = image.WriteAt(p, off)
	}
}

// checkDamaged checks an image, and repairs it if it is opened for writing.
func checkDamaged(t *testing.T, fsys vfs.FS, mode vfs.Mode) {
	layer, err := qcow2.Format{}.Open(formats.OpenRequest{FS: fsys, Name: "a.qcow2", Mode: mode})
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
