package formats_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/raw"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// sparseDevice is a device in memory whose extents are units that are data or not.
type sparseDevice struct {
	block.Device // nil: what the tests do not expect to be called
	unit         int64
	cluster      int64
	readError    map[int64]error // by unit

	mu    sync.Mutex
	bytes []byte
	data  []bool // per unit
}

func newSparseDevice(size, unit, cluster int64) *sparseDevice {
	return &sparseDevice{
		unit: unit, cluster: cluster,
		bytes: make([]byte, size), data: make([]bool, (size+unit-1)/unit),
	}
}

// randomize fills some units, and leaves others unallocated or explicitly zero.
func (d *sparseDevice) randomize(r *rand.Rand) {
	for i := range d.data {
		d.data[i] = r.IntN(3) > 0
		if !d.data[i] || r.IntN(4) == 0 {
			continue // of data, some is zero all the same
		}
		start := int64(i) * d.unit
		for j := start; j < min(start+d.unit, int64(len(d.bytes))); j++ {
			d.bytes[j] = byte(r.Uint32())
		}
	}
}

func (d *sparseDevice) Info() block.Info {
	return block.Info{SizeBytes: int64(len(d.bytes)), LogicalBlockBytes: 512, ClusterBytes: d.cluster}
}

func (d *sparseDevice) Map(off, n int64) (block.Extent, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	state := func(at int64) block.State {
		if d.data[at/d.unit] {
			return block.Data
		}
		return block.Unallocated
	}
	end := off
	for end < off+n && state(end) == state(off) {
		end = (end/d.unit + 1) * d.unit
	}
	return block.Extent{Off: off, Len: min(end-off, n), State: state(off)}, nil
}

func (d *sparseDevice) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for at := off; at < off+int64(len(p)); at += d.unit {
		if err := d.readError[at/d.unit]; err != nil {
			return 0, err
		}
	}
	return copy(p, d.bytes[off:]), nil
}

func (d *sparseDevice) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for at := off; at < off+int64(len(p)); at = (at/d.unit + 1) * d.unit {
		d.data[at/d.unit] = true
	}
	return copy(d.bytes[off:], p), nil
}

func TestCopy_KeepsContentsAndHoles(t *testing.T) {
	r := testenv.Rand(t)
	for range 20 {
		size := 1 + r.Int64N(12<<20)
		src := newSparseDevice(size, 512<<r.IntN(8), 0)
		src.randomize(r)
		dst := newSparseDevice(size+r.Int64N(5000), 4096, 0)
		var last int64
		err := formats.Copy(context.Background(), dst, src, func(done, total int64) {
			if done < last || total != size {
				t.Errorf("progress went from %d to %d of %d", last, done, total)
			}
			last = done
		})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(dst.bytes[:size], src.bytes) {
			t.Fatalf("the copy of %d bytes differs", size)
		}
		if last != size {
			t.Errorf("progress ended at %d of %d", last, size)
		}
		for i, written := range dst.data {
			start, end := i*4096, min((i+1)*4096, len(dst.bytes))
			if written != (bytes.Trim(dst.bytes[start:end], "\x00") != nil) {
				t.Fatalf("unit %d: written is %v, contrary to its contents", i, written)
			}
		}
	}
}

func TestCopy_StopsAtAnError(t *testing.T) {
	broken := errors.New("broken sector")
	src := newSparseDevice(16<<20, 4096, 0)
	for i := range src.data {
		src.data[i] = true
	}
	src.readError = map[int64]error{2500: broken}
	err := formats.Copy(context.Background(), newSparseDevice(16<<20, 4096, 0), src, nil)
	if !errors.Is(err, broken) {
		t.Errorf("copy of a broken device: %v", err)
	}
	if err := formats.Copy(context.Background(), newSparseDevice(1<<20, 4096, 0), src, nil); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("copy to a smaller device: %v", err)
	}
}

func TestCopy_Canceled(t *testing.T) {
	src := newSparseDevice(32<<20, 4096, 0)
	for i := range src.data {
		src.data[i] = true
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	err := formats.Copy(ctx, newSparseDevice(32<<20, 4096, 0), src, func(int64, int64) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("canceled copy: %v", err)
	}
}

func TestConvert_LeavesNothingAfterAFailure(t *testing.T) {
	broken := errors.New("broken sector")
	src := newSparseDevice(4<<20, 4096, 0)
	src.data[700], src.readError = true, map[int64]error{700: broken}
	m := vfs.NewMem()
	err := formats.Convert(context.Background(), src, raw.Format{}, formats.CreateRequest{FS: m, Name: "a.raw"}, nil)
	if !errors.Is(err, broken) {
		t.Errorf("convert of a broken device: %v", err)
	}
	if _, err := m.Stat("a.raw"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the unfinished image is still there: %v", err)
	}
	src.readError = nil
	src.bytes[700*4096] = 7
	if err := formats.Convert(context.Background(), src, raw.Format{}, formats.CreateRequest{FS: m, Name: "a.raw"}, nil); err != nil {
		t.Fatal(err)
	}
	img, err := formats.Open(context.Background(), m, "a.raw", formats.OpenOptions{Format: "raw"})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if d, err := formats.Compare(context.Background(), src, img, false, nil); d.Kind != "" || err != nil {
		t.Errorf("the conversion differs: %v, %v", d, err)
	}
}

func TestCompare(t *testing.T) {
	const size = 5 << 20
	make2 := func() (a, b *sparseDevice) {
		a, b = newSparseDevice(size, 4096, 0), newSparseDevice(size, 65536, 0)
		a.randomize(rand.New(rand.NewPCG(1, 1)))
		b.bytes = slices.Clone(a.bytes)
		for i := range b.data {
			b.data[i] = true
		}
		return a, b
	}
	check := func(name string, a, b *sparseDevice, strict bool, want formats.Difference) {
		t.Helper()
		for _, pair := range [][2]*sparseDevice{{a, b}, {b, a}} {
			got, err := formats.Compare(context.Background(), pair[0], pair[1], strict, nil)
			if err != nil || got != want {
				t.Errorf("%s: %+v, %v; want %+v", name, got, err, want)
			}
		}
	}
	a, b := make2()
	check("equal contents", a, b, false, formats.Difference{})
	check("equal to itself, strictly", a, a, true, formats.Difference{})
	hole := int64(slices.Index(a.data, false)) * 4096
	check("allocation, strictly", a, b, true, formats.Difference{Kind: formats.DifferentAllocation, Off: hole})
	b.bytes[3333333] ^= 1
	check("one bit", a, b, false, formats.Difference{Kind: formats.DifferentContents, Off: 3333333})

	a, _ = make2()
	longer := newSparseDevice(size+70000, 4096, 0)
	copy(longer.bytes, a.bytes)
	copy(longer.data, a.data)
	check("longer by zeroes", a, longer, false, formats.Difference{})
	check("longer by zeroes, strictly", a, longer, true, formats.Difference{Kind: formats.DifferentSize, Off: size})
	longer.bytes[size+5000], longer.data[(size+5000)/4096] = 1, true
	check("longer by data", a, longer, false, formats.Difference{Kind: formats.DifferentContents, Off: size + 5000})
}

// Of many differences and failures, that nearest to the beginning counts.
func TestCompare_First(t *testing.T) {
	const size, page = 20 << 20, 4096
	r := testenv.Rand(t)
	for range 10 {
		a, b := newSparseDevice(size, page, 0), newSparseDevice(size, page, 0)
		for i := range a.data {
			a.data[i], b.data[i] = true, true
		}
		first := int64(size)
		for range 1 + r.IntN(6) {
			off := r.Int64N(size)
			b.bytes[off] = 1
			first = min(first, off)
		}
		a.readError = map[int64]error{}
		if r.IntN(2) == 0 {
			a.readError[(first/page+600)%(size/page)] = errors.New("broken sector") // in another read
		}
		var last int64
		d, err := formats.Compare(context.Background(), a, b, false, func(done, total int64) {
			if done < last || total != size {
				t.Errorf("progress went from %d to %d of %d", last, done, total)
			}
			last = done
		})
		broken := int64(size)
		for unit := range a.readError {
			broken = unit * page
		}
		switch {
		case broken < first && (err == nil || d.Kind != ""):
			t.Errorf("broken at %d, different at %d: %+v, %v", broken, first, d, err)
		case broken > first && (err != nil || d != formats.Difference{Kind: formats.DifferentContents, Off: first}):
			t.Errorf("different at %d, broken at %d: %+v, %v", first, broken, d, err)
		}
	}
}

func TestCompare_SaysWhatFailed(t *testing.T) {
	broken := errors.New("broken sector")
	a := newSparseDevice(1<<20, 4096, 0)
	a.data[7], a.readError = true, map[int64]error{7: broken}
	_, err := formats.Compare(context.Background(), a, newSparseDevice(1<<20, 4096, 0), false, nil)
	var failed *formats.CompareError
	if !errors.As(err, &failed) || failed.Mapping || !errors.Is(err, broken) {
		t.Errorf("compare with a broken device: %v", err)
	}
}
