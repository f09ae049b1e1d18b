package formattest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// failure is a way in which a file system fails.
type failure struct {
	name string
	// errno is what the failing operation says.
	errno syscall.Errno
	// stride is how far apart the operations are that are made to fail, one at a time.
	stride int
	// hook fails operation n, counted from 0 among those that can fail so, in this way.
	hook func(n uint64, r *rand.Rand) vfs.Hook
}

var (
	takesSpace = vfs.OfKind(vfs.OpCreate, vfs.OpWrite, vfs.OpTruncate, vfs.OpAllocate, vfs.OpPunchHole)

	failures = []failure{
		{"EIO", syscall.EIO, 1, func(n uint64, _ *rand.Rand) vfs.Hook {
			return vfs.FailNth(n, syscall.EIO)
		}},
		{"ENOSPC", syscall.ENOSPC, 1, func(n uint64, _ *rand.Rand) vfs.Hook {
			return vfs.If(takesSpace, vfs.FailNth(n, syscall.ENOSPC))
		}},
		{"partial write", syscall.EIO, 1, func(n uint64, r *rand.Rand) vfs.Hook {
			return vfs.If(vfs.OfKind(vfs.OpWrite), failPart(n, r))
		}},
		{"store gone", syscall.EIO, 3, func(n uint64, _ *rand.Rand) vfs.Hook {
			return vfs.FailFrom(n, syscall.EIO)
		}},
	}
)

// failPart fails operation n, which must be a write, when some of its sectors are written.
func failPart(n uint64, r *rand.Rand) vfs.Hook {
	seen := uint64(0)
	return func(at vfs.Op) error {
		seen++
		if seen-1 != n {
			return nil
		}
		sectors := (at.Off+at.Len-1)/sectorBytes - at.Off/sectorBytes // but for the last one
		return vfs.ShortWrite(int(r.Int64N(sectors+1)), syscall.EIO)
	}
}

// testErrorSweep plays a script again and again, each time with another operation of the
// file system failing: nothing is silent, nothing is lost, nothing stays open.
func testErrorSweep(t *testing.T, f Factory) {
	f.counted(t, "failed operations", func(f *Figures) *atomic.Int64 { return &f.InjectedErrors })
	for _, how := range failures {
		t.Run(how.name, func(t *testing.T) { sweepErrors(t, f, how) })
	}
	t.Run("create", func(t *testing.T) { sweepErrorsOfCreate(t, f) })
}

func sweepErrors(t *testing.T, f Factory, how failure) {
	r := testenv.Rand(t)
	depths := f.depths()
	mem := vfs.NewMem()
	p := newPlayer(t, f, mem, r, depths[min(1, len(depths)-1)])
	p.play(t, f.script(r, mix{opWrite: 6, opZero: 1, opDiscard: 1}, 10))
	p.mustClose(t)
	script := f.script(r, mix{opRead: 6, opWrite: 12, opZero: 4, opDiscard: 4, opMap: 2, opFlush: 4, opReopen: 2, opGrow: 1, opPush: 1, opShrink: 1}, 30)
	stride := f.stride(how.stride)
	for n := uint64(r.IntN(stride)); ; n += uint64(stride) {
		run := newFailingRun(p, mem.Clone(), how, n, r)
		err := run.play(script)
		if err != nil {
			t.Fatalf("%s, number %d (%s): %v", how.name, n, run.failed, err)
		}
		if !run.hasFailed {
			return // the script has fewer operations
		}
		run.p.rig.figures().InjectedErrors.Add(1)
	}
}

// stride returns how far apart the operations are that an error sweep fails: n, further
// where everything takes long.
func (f Factory) stride(n int) int {
	switch {
	case os.Getenv(fullVariable) != "":
		return 1
	case testing.Short():
		n *= 7
	}
	return n * max(f.Cost, 1)
}

// failingRun is one run through a script in which one operation fails.
type failingRun struct {
	how       failure
	r         *rand.Rand
	mem       *vfs.Mem
	fs        *tracker
	p         *player
	hasFailed bool
	failed    string // what has
}

func newFailingRun(p *player, mem *vfs.Mem, how failure, n uint64, r *rand.Rand) *failingRun {
	run := &failingRun{how: how, r: r, mem: mem}
	hook := how.hook(n, r)
	run.fs = track(vfs.Inject(mem, func(at vfs.Op) error {
		err := hook(at)
		if err != nil && !run.hasFailed {
			run.hasFailed, run.failed = true, showFSOp(at)
		}
		return err
	}))
	run.p = &player{
		rig: p.rig.on(run.fs), ops: p.ops, leaky: true, m: newModel(p.m.live.clone()), sizes: p.sizes, snapshots: p.snapshots,
	}
	if r.IntN(2) == 0 {
		run.p.rig.journal = &engine.JournalFile{FS: run.fs, Name: journalName, Epoch: 1}
	}
	return run
}

// play plays the script, and then looks at the disk and at what is left of it.
func (run *failingRun) play(script []op) error {
	if err := run.p.rig.open(vfs.ReadWrite); err != nil {
		if !run.hasFailed {
			return err
		}
		return run.afterwards()
	}
	for i, o := range script {
		if run.p.skips(o) {
			continue
		}
		if err := run.step(o); err != nil {
			return fmt.Errorf("step %d, %s: %w\nsteps until then:\n%s", i, o, errors.Join(err, run.p.rig.close()), show(script, i))
		}
		if run.p.rig.img == nil {
			return run.afterwards()
		}
	}
	if err := run.readBack(); err != nil {
		return errors.Join(err, run.p.rig.close())
	}
	if err := run.crash(); err != nil {
		return fmt.Errorf("power lost at the end: %w", errors.Join(err, run.p.rig.close()))
	}
	before := run.hasFailed
	if err := run.p.close(); err != nil {
		if err := run.checkError(op{kind: opReopen}, err, before); err != nil {
			return fmt.Errorf("close: %w", err)
		}
	}
	return run.afterwards()
}

// step plays a step, which may fail only if there is a reason.
func (run *failingRun) step(o op) error {
	before := run.hasFailed
	ioErr, wrong := run.p.step(o)
	if wrong != nil {
		return wrong
	}
	if run.p.rig.img == nil && !run.gone() {
		if err := run.p.rig.open(vfs.ReadWrite); err != nil {
			return fmt.Errorf("open once more: %w", err)
		}
		if err := run.p.noteOpened(); err != nil {
			return err
		}
	}
	if ioErr == nil || run.p.unsupported(o, ioErr) {
		return nil
	}
	return run.checkError(o, ioErr, before)
}

// checkError returns an error unless a step that failed had a reason; before says that
// the operation that was to fail had failed when the step began.
func (run *failingRun) checkError(o op, ioErr error, before bool) error {
	switch {
	case run.excused(ioErr):
		return nil
	case run.hasFailed && !before:
		return run.checkReason(o, ioErr)
	}
	return fmt.Errorf("without a reason: %w", ioErr)
}

// gone reports whether nothing works any more.
func (run *failingRun) gone() bool { return run.hasFailed && run.how.name == "store gone" }

// excused reports whether an error is one that follows from an earlier one.
func (run *failingRun) excused(err error) bool {
	return errors.Is(err, block.ErrPoisoned) || run.gone()
}

// checkReason returns an error unless a step's error says what had failed.
func (run *failingRun) checkReason(o op, err error) error {
	if !errors.Is(err, run.how.errno) {
		return fmt.Errorf("the error does not say why (%w): %w", run.how.errno, err)
	}
	if errno := block.Errno(err); o.kind == opWrite && errno != run.how.errno && !errors.Is(err, block.ErrPoisoned) {
		return fmt.Errorf("the guest is told %v, want %v: %w", errno, run.how.errno, err)
	}
	return nil
}

// readBack reads everything, as far as anything can be read.
func (run *failingRun) readBack() error {
	before := run.hasFailed
	err := run.p.readBack()
	if err != nil && run.hasFailed && !before {
		err = run.p.readBack()
	}
	if run.gone() {
		return nil
	}
	return err
}

// crash loses power while the image is still open.
func (run *failingRun) crash() error {
	got, err := run.p.rig.on(run.mem.Crash(run.r)).inspect()
	if err != nil {
		return err
	}
	return run.p.allowsAfterCrash(got)
}

// afterwards looks at what is left when the image has been closed, with a file system
// that works again.
func (run *failingRun) afterwards() error {
	if leaks := run.fs.leaks(); leaks != "" {
		return errors.New(leaks)
	}
	p, rig := run.p, run.p.rig.on(run.mem)
	p.rig = rig
	if err := rig.open(vfs.ReadWrite); err != nil {
		return fmt.Errorf("open afterwards: %w", err)
	}
	err := p.noteOpened()
	if err == nil {
		err = p.readBack()
	}
	if err = errors.Join(err, rig.close()); err != nil {
		return fmt.Errorf("afterwards: %w", err)
	}
	if err := rig.check(true); err != nil {
		return err
	}
	return p.checkSnapshots(rig)
}

// sweepErrorsOfCreate fails each operation of creating an image, and of an overlay: when
// Create fails, nothing is left, and nothing is open.
func sweepErrorsOfCreate(t *testing.T, f Factory) {
	r := testenv.Rand(t)
	for _, how := range failures[:3] {
		for n := uint64(0); ; n++ {
			mem := vfs.NewMem()
			want, err := f.makeBase(mem, r)
			if err != nil {
				t.Fatal(err)
			}
			before, err := readFiles(mem)
			if err != nil {
				t.Fatal(err)
			}
			failed := false
			hook := how.hook(n, r)
			fsys := track(vfs.Inject(mem, func(at vfs.Op) error {
				err := hook(at)
				failed = failed || err != nil
				return err
			}))
			made, err := newRig(f, fsys, f.shape().size)
			if err := checkFailedCreate(mem, made, err, how, want, len(before)); err != nil {
				t.Fatalf("%s, number %d: %v", how.name, n, err)
			}
			if leaks := fsys.leaks(); leaks != "" {
				t.Fatalf("%s, number %d: %s", how.name, n, leaks)
			}
			if !failed {
				break
			}
			f.figures(1).InjectedErrors.Add(1)
		}
	}
}

// checkFailedCreate returns an error unless an image was made that holds want, or err
// says why not and only the files before are there.
func checkFailedCreate(mem *vfs.Mem, made *rig, err error, how failure, want contents, before int) error {
	if err == nil {
		got, err := made.on(mem).inspect()
		if err != nil {
			return err
		}
		return want.check(0, got, nil)
	}
	if !errors.Is(err, how.errno) {
		return fmt.Errorf("the error does not say why (%w): %w", how.errno, err)
	}
	left, readErr := mem.ReadDir(".")
	if len(left) > before {
		return fmt.Errorf("a failed create left %v", left)
	}
	return readErr
}
