package qcow_test

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
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/qcow"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// fuzzBases returns valid images of different kinds, each with all its files, for a fuzzer to
// damage a.qcow.
func fuzzBases(t testing.TB) []*vfs.Mem {
	t.Helper()
	overlay := newSmall(t, nil)
	if err := overlay.Rename("a.qcow", "base.qcow"); err != nil {
		t.Fatal(err)
	}
	createOverlay(t, overlay, "base.qcow", "qcow", formats.CreateRequest{Name: "a.qcow", ClusterBytes: 512})

	compressed := vfs.NewMem()
	create(t, compressed, formats.CreateRequest{Name: "a.qcow", SizeBytes: 1 << 20, ClusterBytes: 8 << 10})
	image := mustOpen(t, compressed, "a.qcow", vfs.ReadWrite)
	disk := bytes.Repeat([]byte("compress me "), 1<<20/12)
	compress(t, image, disk[:256<<10])
	mustWrite(t, image, 20<<10, disk[:10<<10])
	mustClose(t, image)

	tight := vfs.NewMem()
	create(t, tight, formats.CreateRequest{
		Name: "a.qcow", SizeBytes: 1 << 20, ClusterBytes: 512, Extra: map[string]string{"l2_bits": "6"},
	})
	return []*vfs.Mem{newSmall(t, nil), newSmall(t, map[string]string{"encrypt.format": "aes"}), overlay, compressed, tight}
}

// FuzzHeader opens whatever follows the magic number.
func FuzzHeader(f *testing.F) {
	for _, base := range fuzzBases(f) {
		f.Add(peek(f, base, "a.qcow")[:1024])
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		fsys := vfs.NewMem()
		addFile(t, fsys, "a.qcow", p)
		layer, err := qcow.Format{}.Open(formats.OpenRequest{FS: fsys, Name: "a.qcow", Secret: secret})
		if err != nil {
			return
		}
		defer layer.Close()
		if !(qcow.Format{}).Probe(p[:min(len(p), formats.ProbeBytes)], int64(len(p))) {
			t.Error("opened, but not recognised")
		}
		if g := layer.Codec.Geometry(); g.SizeBytes < 1 || g.ClusterBytes < 512 || g.ClusterBytes > 64<<10 {
			t.Errorf("opened with %+v", g)
		}
		checkDamaged(t, fsys, vfs.ReadOnly)
	})
}

// FuzzOpenReadWrite damages images and uses them. Whatever they say: nothing panics, memory
// and time stay bounded, and what was just written is read back.
func FuzzOpenReadWrite(f *testing.F) {
	bases := fuzzBases(f)
	patch := func(off uint32, value uint64) []byte {
		return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(nil, off), value)
	}
	for i := range bases {
		for seed := range uint64(4) {
			f.Add(byte(i), seed, []byte{})
		}
	}
	for _, entry := range badEntries {
		f.Add(byte(0), uint64(1), patch(smallL2, entry))
		f.Add(byte(1), uint64(2), append(patch(smallL2+8, entry), patch(smallL2+16, entry)...))
	}
	for _, c := range badTables {
		f.Add(byte(0), uint64(3), patch(smallL1+8, c.entry))
	}
	f.Add(byte(3), uint64(4), patch(atSize, 1<<20+1000))
	f.Add(byte(4), uint64(5), patch(atL1, 48))
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

// damage applies patches to a.qcow: an offset of 4 bytes and a value of 8 each.
func damage(t *testing.T, fsys *vfs.Mem, patches []byte) {
	size := len(peek(t, fsys, "a.qcow"))
	for range 64 {
		if len(patches) < 12 {
			break
		}
		off := int64(binary.BigEndian.Uint32(patches)) % int64(size)
		poke(t, fsys, "a.qcow", off, patches[4:12]...)
		patches = patches[12:]
	}
	fsys.SetCapacity(64 << 20)
}

func useDamaged(t *testing.T, fsys *vfs.Mem, r *rand.Rand) {
	checkDamaged(t, fsys, vfs.ReadOnly)
	image, err := tryOpen(fsys, "a.qcow", vfs.ReadWrite)
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
	switch r.IntN(6) {
	case 0:
		_ = image.Resize(size/512*512 + 512*r.Int64N(10000)) // may be refused
	case 1:
		_ = image.Shrink(512 * (1 + r.Int64N(size/512+1))) // may be refused
	}
	_ = image.Close() // a damaged image may fail to
	checkDamaged(t, fsys, vfs.ReadWrite)
}

// useOnce does something at random. Errors are expected; wrong data is not.
func useOnce(t *testing.T, image *formats.Image, r *rand.Rand, off, n int64) {
	p := make([]byte, n)
	switch r.IntN(9) {
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
	case 6:
		packOnce(t, image, r, off)
	default:
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		if _, err := image.WriteAt(p, off); err != nil {
			return
		}
		// Two clusters may share one place: of what was written to several, the last counts.
		start, _, _ := image.CompressedGranule(off + n - 1)
		start = max(start, off)
		expectReads(t, image, start, p[start-off:])
	}
}

// packOnce writes a compressed cluster.
func packOnce(t *testing.T, image *formats.Image, r *rand.Rand, off int64) {
	start, end, ok := image.CompressedGranule(off)
	if !ok {
		return
	}
	p := bytes.Repeat([]byte{byte(r.Uint32()), 'x'}, int(end-start))[:min(end, image.Info().SizeBytes)-start]
	packed, err := image.Pack(p, start)
	if err != nil {
		t.Errorf("pack: %v", err)
		return
	}
	if err := image.WritePacked(packed); err == nil {
		expectReads(t, image, start, p)
	}
}

func expectReads(t *testing.T, image *formats.Image, off int64, want []byte) {
	got := make([]byte, len(want))
	if _, err := image.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes at %d were written, but other bytes are read, error %v", len(want), off, err)
	}
}

// checkDamaged checks an image, and repairs it if it is opened for writing; then, whatever is
// left cannot be repaired.
func checkDamaged(t *testing.T, fsys vfs.FS, mode vfs.Mode) {
	for range 1 + int(mode) {
		layer, err := qcow.Format{}.Open(formats.OpenRequest{FS: fsys, Name: "a.qcow", Mode: mode, Secret: secret})
		if err != nil {
			return
		}
		defer layer.Close()
		result, err := engine.Check(context.Background(), layer, mode == vfs.ReadWrite, nil)
		if err != nil && !errors.Is(err, block.ErrUnsupported) && block.Errno(err) != block.Errno(block.ErrNoSpace) {
			t.Errorf("check: %v", err)
		}
		if len(result.Problems) > 200 {
			t.Errorf("%d problems are described", len(result.Problems))
		}
		layer.Close()
	}
}

// FuzzImage damages images of every kind.
func FuzzImage(f *testing.F) { formattest.Fuzz(f, factories()...) }
