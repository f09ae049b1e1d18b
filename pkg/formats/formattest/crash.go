package formattest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// crashesPerPoint is how many different things a loss of power leaves at each operation.
const crashesPerPoint = 3

// testCrashSweep loses power before every single change of the file system that a script
// causes, and looks at what is left.
func testCrashSweep(t *testing.T, f Factory) {
	f.counted(t, "crash points", func(f *Figures) *atomic.Int64 { return &f.CrashPoints })
	f.counted(t, "images after crashes", func(f *Figures) *atomic.Int64 { return &f.Crashes })
	for _, depth := range f.depths()[:min(2, len(f.depths()))] {
		t.Run(fmt.Sprintf("depth=%d", depth), func(t *testing.T) { sweepCrashes(t, f, depth) })
	}
	t.Run("create", func(t *testing.T) { sweepCrashesOfCreate(t, f) })
}

func sweepCrashes(t *testing.T, f Factory, depth int) {
	r := testenv.Rand(t)
	mem := vfs.NewMem()
	c := &crasher{r: r, mem: mem, sample: newCrashSample(t, f, r)}
	p := newPlayer(t, f, vfs.Inject(mem, vfs.If(vfs.Changing, c.hook)), r, depth)
	p.mustStep(t, op{kind: opFlush})
	script := f.script(r, mix{opWrite: 12, opZero: 4, opDiscard: 4, opFlush: 4, opReopen: 1, opGrow: 1, opPush: 1, opShrink: 1}, f.scaled(120))
	c.p, p.interrupted = p, &c.err
	p.play(t, script)
	c.p = nil
	p.finish(t)
	c.sample.check()
}

// crasher looks at crashes of an image while a player plays on it.
type crasher struct {
	r   *rand.Rand
	mem *vfs.Mem
	p   *player // nil: not now
	err error   // the first thing wrong

	sample *crashSample
}

// hook is called before a change of the file system.
func (c *crasher) hook(at vfs.Op) error {
	if c.p == nil || c.err != nil {
		return nil
	}
	c.p.rig.figures().CrashPoints.Add(1)
	for range crashesPerPoint {
		what := "power lost before " + showFSOp(at)
		if err := c.crash(what); err != nil {
			c.err = fmt.Errorf("%s: %w", what, err)
		}
	}
	return nil
}

func showFSOp(o vfs.Op) string {
	s := fmt.Sprintf("file system operation %d, %s %s", o.N, o.Kind, o.Name)
	if o.Kind == vfs.OpWrite || o.Kind == vfs.OpPunchHole || o.Kind == vfs.OpTruncate || o.Kind == vfs.OpAllocate {
		s += fmt.Sprintf(" %#x+%#x", o.Off, o.Len)
	}
	return s
}

// crash loses power once and looks at the image, and now and then lives on with it.
func (c *crasher) crash(what string) error {
	c.p.rig.figures().Crashes.Add(1)
	mem := c.mem.Crash(c.r)
	untouched := c.p.rig.on(mem.Clone())
	fsys := track(mem)
	left := c.p.rig.on(fsys)
	got, err := left.inspect()
	if err != nil {
		return err
	}
	if err := c.p.allowsAfterCrash(got); err != nil {
		return err
	}
	if c.r.IntN(4) == 0 {
		if err := c.p.checkSnapshots(left); err != nil {
			return err
		}
	}
	c.sample.add(what, untouched, got)
	if c.r.IntN(8) == 0 {
		if err := liveOn(left, got, c.r); err != nil {
			return fmt.Errorf("when used after that: %w", err)
		}
	}
	if leaks := fsys.leaks(); leaks != "" {
		return errors.New(leaks)
	}
	return nil
}

// inspect opens an image that is not open as the next process does, reads all of it, and
// has it checked.
func (r *rig) inspect() ([]byte, error) {
	if err := r.open(vfs.ReadWrite); err != nil {
		return nil, err
	}
	got, err := r.readAll()
	if err = errors.Join(err, r.close()); err != nil {
		return nil, err
	}
	return got, r.check(true)
}

// allowsAfterCrash returns an error unless got can be what a crash now leaves.
func (p *player) allowsAfterCrash(got []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.checkSize(len(got)); err != nil {
		return err
	}
	return p.m.afterCrash(got)
}

func (p *player) checkSize(n int) error {
	for _, size := range p.sizes {
		if int64(n) == size {
			return nil
		}
	}
	if p.rig.f.Headerless && slices.Min(p.sizes) <= int64(n) && int64(n) <= slices.Max(p.sizes) {
		return nil
	}
	return fmt.Errorf("the disk has %d bytes, want one of %d", n, p.sizes)
}

// liveOn uses an image that is not open for a while: nothing that a crash left may get
// in the way.
func liveOn(left *rig, content []byte, r *rand.Rand) error {
	const firstOp = 0x800000 // tells what is written here from what was there
	p := &player{
		rig: left, ops: firstOp, leaky: true, m: newModel(contents{bytes: bytes.Clone(content)}), sizes: []int64{int64(len(content))},
	}
	if err := left.open(vfs.ReadWrite); err != nil {
		return err
	}
	s := left.f.shape()
	s.size = int64(len(content))
	script := newScript(r, s, mix{opRead: 4, opWrite: 8, opZero: 2, opDiscard: 2, opFlush: 2, opReopen: 1}, 15)
	for i, o := range script {
		ioErr, wrong := p.step(o)
		if p.unsupported(o, ioErr) {
			ioErr = nil
		}
		if err := errors.Join(ioErr, wrong); err != nil {
			return fmt.Errorf("%w\nsteps:\n%s", errors.Join(err, p.rig.close()), show(script, i))
		}
	}
	err := p.readBack()
	return errors.Join(err, left.close(), left.check(true))
}

// sweepCrashesOfCreate loses power at every change that creating an image makes: what is
// left is the image or nothing that could be mistaken for one.
func sweepCrashesOfCreate(t *testing.T, f Factory) {
	r := testenv.Rand(t)
	sample := newCrashSample(t, f, r)
	defer sample.check()
	for range f.scaled(10) {
		mem := vfs.NewMem()
		want, err := f.makeBase(mem, r)
		if err != nil {
			t.Fatal(err)
		}
		var wrong error
		hook := func(at vfs.Op) error {
			f.figures(1).CrashPoints.Add(1)
			for range crashesPerPoint {
				f.figures(1).Crashes.Add(1)
				if err := inspectHalfMade(f, mem.Crash(r), want); err != nil && wrong == nil {
					wrong = fmt.Errorf("power lost before %s: %w", showFSOp(at), err)
				}
			}
			return nil
		}
		made, err := newRig(f, vfs.Inject(mem, vfs.If(vfs.Changing, hook)), f.shape().size)
		if err := errors.Join(err, wrong); err != nil {
			t.Fatal(err)
		}
		crashed := mem.Crash(r)
		untouched := made.on(crashed.Clone())
		got, err := made.on(crashed).inspect()
		if err == nil && int64(len(got)) != f.shape().size {
			err = fmt.Errorf("it has %d bytes, want %d", len(got), f.shape().size)
		}
		if err == nil {
			err = want.check(0, got, nil)
		}
		if err != nil {
			t.Fatalf("power lost after create had returned: %v", err)
		}
		sample.add("power lost after create had returned", untouched, got)
	}
}

// inspectHalfMade returns an error if what is left of an image being created looks like
// an image but is not the one that was to be.
func inspectHalfMade(f Factory, fsys vfs.FS, want contents) error {
	left := &rig{f: f, fs: fsys, names: []string{f.fileName(0)}, made: 1}
	if err := left.open(vfs.ReadWrite); err != nil {
		return nil
	}
	got, err := left.readAll()
	if err = errors.Join(err, left.close(), left.check(true)); err != nil {
		return err
	}
	if int64(len(got)) != f.shape().size && !f.Headerless {
		return fmt.Errorf("it has %d bytes, want %d", len(got), f.shape().size)
	}
	want = want.clone()
	want.resize(int64(len(got)))
	return want.check(0, got, nil)
}
