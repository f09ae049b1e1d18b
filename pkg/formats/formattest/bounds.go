package formattest

import (
	"errors"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// testBounds asks for what a disk must refuse: nothing of it has an effect.
func testBounds(t *testing.T, f Factory) {
	r := testenv.Rand(t)
	fsys := track(vfs.NewMem())
	p := newPlayer(t, f, fsys, r, 1)
	p.play(t, f.script(r, mix{opWrite: 1}, 10))
	size := p.m.size()
	outside := []op{
		{off: size, n: 1}, {off: size - 1, n: 2}, {off: 0, n: size + 1}, {off: size + 1, n: 0}, {off: -1, n: 1}, {off: math.MaxInt64, n: 1},
	}
	for _, o := range outside {
		expectRefused(t, p.rig.img, o, block.ErrOutOfRange)
	}
	if _, err := p.rig.img.Map(0, math.MaxInt64); !errors.Is(err, block.ErrOutOfRange) {
		t.Errorf("map of everything there is: %v", err)
	}
	for _, off := range []int64{0, 1, size} { // nothing is a range, too
		for _, kind := range []opKind{opRead, opWrite, opZero, opDiscard} {
			p.mustStep(t, op{kind: kind, off: off})
		}
	}
	p.finish(t)

	if err := p.rig.open(vfs.ReadOnly); err != nil {
		t.Fatal(err)
	}
	if !p.rig.img.Info().ReadOnly {
		t.Error("opened for reading, it does not say that it is read-only")
	}
	expectRefused(t, p.rig.img, op{n: 512}, block.ErrReadOnly)
	if err := p.rig.img.Resize(size + f.shape().quantum); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("resize of a disk that is open for reading: %v", err)
	}
	if err := p.rig.img.Flush(); err != nil {
		t.Errorf("flush of a disk that is open for reading: %v", err)
	}
	if err := p.readBack(); err != nil {
		t.Error(err)
	}
	p.mustClose(t)
	if leaks := fsys.leaks(); leaks != "" {
		t.Error(leaks)
	}
}

// expectRefused asks for a range in every way that changes it, and in the others if it
// lies outside.
func expectRefused(t *testing.T, d block.Device, o op, want error) {
	t.Helper()
	got := map[string]error{"zero": d.WriteZeroes(o.off, o.n, 0), "discard": d.Discard(o.off, o.n)}
	if want == block.ErrOutOfRange {
		_, got["map"] = d.Map(o.off, o.n)
	}
	if o.n < 1<<30 {
		b := make([]byte, o.n)
		_, got["write"] = d.WriteAt(b, o.off)
		if want == block.ErrOutOfRange {
			_, got["read"] = d.ReadAt(b, o.off)
		}
	}
	for what, err := range got {
		if !errors.Is(err, want) {
			t.Errorf("%s of %d bytes at %d: %v, want %v", what, o.n, o.off, err, want)
		}
	}
}

// testGrow makes a disk larger: what was there stays, what is new is zero.
func testGrow(t *testing.T, f Factory) {
	if f.CannotGrow {
		expectNoGrowth(t, f)
		return
	}
	r := testenv.Rand(t)
	for range f.scaled(10) {
		mem := vfs.NewMem()
		p := newPlayer(t, f, mem, r, f.depths()[r.IntN(len(f.depths()))])
		s := f.shape()
		for range 4 {
			// Something at the old end, which may be in the middle of a cluster.
			end := p.m.size()
			n := 1 + r.Int64N(2*s.cluster)
			p.mustStep(t, op{kind: opWrite, off: end - n, n: n})
			p.mustStep(t, op{kind: []opKind{opFlush, opReopen, opRead}[r.IntN(3)]})
			p.mustStep(t, op{kind: opGrow, off: end + (1+r.Int64N(2*s.cluster/s.quantum))*s.quantum})
			got, err := p.rig.on(mem.Crash(r)).inspect()
			if err == nil {
				err = p.allowsAfterCrash(got)
			}
			if err != nil {
				t.Fatalf("power lost after it had grown from %d to %d bytes: %v", end, p.m.size(), err)
			}
			if err := p.readBack(); err != nil {
				t.Fatalf("grown from %d to %d bytes: %v", end, p.m.size(), err)
			}
			p.mustStep(t, op{kind: opWrite, off: end, n: p.m.size() - end})
		}
		size := p.m.size()
		for _, wrong := range []int64{size - s.quantum, 0, -1, math.MaxInt64} {
			if err := p.rig.img.Resize(wrong); err == nil || p.rig.img.Info().SizeBytes != size {
				t.Errorf("resize from %d to %d bytes: %v; now it has %d", size, wrong, err, p.rig.img.Info().SizeBytes)
			}
		}
		p.finish(t)
		p.rig.checkWithQEMU(t, p.m.live.bytes, p.leaky)
	}
}

// testShrink makes a disk smaller: what is left stays, and when it grows again, zeroes
// come back.
func testShrink(t *testing.T, f Factory) {
	r := testenv.Rand(t)
	for _, depth := range f.depths() {
		for range f.scaled(5) {
			mem := vfs.NewMem()
			p := newPlayer(t, f, mem, r, depth)
			p.play(t, f.script(r, mix{opWrite: 4, opZero: 1, opDiscard: 1}, 6))
			if !f.CanShrink {
				expectNoShrinking(t, p)
				return
			}
			for range 4 {
				p.shrinkAndGrow(t, mem, r)
			}
			p.finish(t)
			p.rig.checkWithQEMU(t, p.m.live.bytes, p.leaky)
		}
	}
}

// shrinkAndGrow shrinks, loses power, and grows again.
func (p *player) shrinkAndGrow(t *testing.T, mem *vfs.Mem, r *rand.Rand) {
	t.Helper()
	s, before := p.rig.f.shape(), p.m.size()
	s.size = before
	smaller := s.pickSmaller(r)
	if r.IntN(2) == 0 {
		p.mustStep(t, op{kind: opDiscard, off: smaller, n: before - smaller})
	}
	p.mustStep(t, op{kind: opShrink, off: smaller})
	if p.m.size() == before {
		return // refused on a parent
	}
	got, err := p.rig.on(mem.Crash(r)).inspect()
	if err == nil {
		err = p.allowsAfterCrash(got)
	}
	if err != nil {
		t.Fatalf("power lost after it had shrunk from %d to %d bytes: %v", before, smaller, err)
	}
	for _, wrong := range []int64{smaller + s.quantum, 0, -1} {
		if err := p.rig.img.Shrink(wrong); err == nil || p.rig.img.Info().SizeBytes != smaller {
			t.Errorf("shrink from %d to %d bytes: %v; now it has %d", smaller, wrong, err, p.rig.img.Info().SizeBytes)
		}
	}
	if err := p.rig.img.Resize(smaller - s.quantum); !errors.Is(err, block.ErrUnsupported) {
		t.Errorf("resize to a smaller size: %v, want %v", err, block.ErrUnsupported)
	}
	if _, err := p.rig.img.ReadAt(make([]byte, 1), smaller); !errors.Is(err, block.ErrOutOfRange) {
		t.Errorf("read past the new end: %v, want %v", err, block.ErrOutOfRange)
	}
	p.mustStep(t, op{kind: opWrite, off: smaller - 1, n: 1})
	p.mustStep(t, op{kind: []opKind{opFlush, opReopen, opRead}[r.IntN(3)]})
	if !p.rig.f.CannotGrow {
		p.mustStep(t, op{kind: opGrow, off: before})
	}
	if err := p.readBack(); err != nil {
		t.Fatalf("shrunk from %d to %d bytes and grown again: %v", before, smaller, err)
	}
}

func expectNoShrinking(t *testing.T, p *player) {
	t.Helper()
	size := p.m.size()
	err := p.rig.img.Shrink(size - p.rig.f.shape().quantum)
	if err == nil || p.rig.img.Info().SizeBytes != size {
		t.Errorf("shrink: %v, want an error; now it has %d bytes", err, p.rig.img.Info().SizeBytes)
	}
}

func expectNoGrowth(t *testing.T, f Factory) {
	p := newPlayer(t, f, vfs.NewMem(), testenv.Rand(t), 1)
	size := p.m.size()
	if err := p.rig.img.Resize(size + f.shape().quantum); !errors.Is(err, block.ErrUnsupported) {
		t.Errorf("resize: %v, want %v", err, block.ErrUnsupported)
	}
	p.finish(t)
}
