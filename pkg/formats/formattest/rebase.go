package formattest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// testRebase pulls up what parents hold and lets the top image stand on something else,
// down to nothing. What is read never changes, whatever fails or loses power meanwhile.
func testRebase(t *testing.T, f Factory) {
	if f.Overlay == nil {
		t.Skip("images of this kind stand on nothing")
	}
	if !f.CanRebase {
		expectNoRebase(t, f)
		return
	}
	t.Run("crashes", func(t *testing.T) {
		f.counted(t, "crash points", func(f *Figures) *atomic.Int64 { return &f.CrashPoints })
		for range f.scaled(5) {
			crashRebase(t, f)
		}
	})
	t.Run("errors", func(t *testing.T) {
		f.counted(t, "failed operations", func(f *Figures) *atomic.Int64 { return &f.InjectedErrors })
		failRebase(t, f)
	})
}

// rebase pulls all that the parents but the lowest keep ones hold, and lets the open image
// stand on those. It returns what the image is to say about its parent, "" for none.
func (r *rig) rebase(keep int) (parent string, err error) {
	layers := r.img.Layers()
	below := layers[len(layers)-keep:]
	if last := len(layers) - keep - 1; last > 0 {
		if _, err := r.img.Pull(0, r.img.Info().SizeBytes, last); err != nil {
			return "", fmt.Errorf("pull: %w", err)
		}
	}
	var to *engine.Parent
	if keep > 0 {
		to = &engine.Parent{Name: below[0].Name, Layer: below[0]}
		parent = to.Name
	}
	removed, err := r.img.SetParent(to, below)
	if err != nil {
		return parent, fmt.Errorf("set parent: %w", err)
	}
	for _, l := range removed {
		err = errors.Join(err, l.Close())
	}
	return parent, err
}

// checkParent returns an error unless the open image stands on the named one, "" for none.
func (r *rig) checkParent(want string) error {
	got := ""
	if link := r.img.Layers()[0].Parent; link != nil {
		got = link.Name
	}
	if got != want {
		return fmt.Errorf("%s stands on %q, want %q", r.top(), got, want)
	}
	return nil
}

// expectParent opens the image to see what it stands on.
func (r *rig) expectParent(want string) error {
	if err := r.open(vfs.ReadOnly); err != nil {
		return err
	}
	return errors.Join(r.checkParent(want), r.close())
}

// rebasing returns a player whose image, open, stands on several others.
func rebasing(t *testing.T, f Factory, fsys vfs.FS, r *rand.Rand) *player {
	t.Helper()
	p := newPlayer(t, f, fsys, r, 3)
	p.play(t, f.script(r, mix{opWrite: 3, opZero: 1, opDiscard: 1}, 6))
	p.mustStep(t, op{kind: opReopen})
	p.mustStep(t, op{kind: opRead, n: p.m.size()})
	p.mustStep(t, op{kind: opFlush})
	return p
}

// crashRebase loses power at every change that rebasing makes.
func crashRebase(t *testing.T, f Factory) {
	r := testenv.Rand(t)
	mem := vfs.NewMem()
	var p *player // nil: not now
	var wrong error
	fsys := track(vfs.Inject(mem, vfs.If(vfs.Changing, func(at vfs.Op) error {
		if p == nil || wrong != nil {
			return nil
		}
		f.figures(3).CrashPoints.Add(1)
		for range crashesPerPoint {
			f.figures(3).Crashes.Add(1)
			got, err := p.rig.on(mem.Crash(r)).inspect()
			if err == nil {
				err = p.allowsAfterCrash(got)
			}
			if err != nil {
				wrong = fmt.Errorf("power lost before %s: %w", showFSOp(at), err)
				return nil
			}
		}
		return nil
	})))
	player := rebasing(t, f, fsys, r)
	for keep := len(player.rig.names) - 2; keep >= 0; keep-- {
		p = player
		parent, err := player.rig.rebase(keep)
		p = nil
		if err = errors.Join(err, wrong, player.readBack()); err != nil {
			t.Fatalf("rebase to %q: %v", parent, err)
		}
		player.mustStep(t, op{kind: opReopen})
		if err := errors.Join(player.readBack(), player.rig.checkParent(parent)); err != nil {
			t.Fatalf("opened again after a rebase to %q: %v", parent, err)
		}
		player.play(t, f.script(r, mix{opWrite: 3, opRead: 3, opDiscard: 1}, 5))
		player.mustStep(t, op{kind: opReopen})
		player.mustStep(t, op{kind: opRead, n: player.m.size()})
		player.mustStep(t, op{kind: opFlush})
	}
	player.leaky = true
	player.finish(t)
	player.rig.checkWithQEMU(t, player.m.live.bytes, true)
	if leaks := fsys.leaks(); leaks != "" {
		t.Error(leaks)
	}
}

// failRebase fails each operation of rebasing to nothing.
func failRebase(t *testing.T, f Factory) {
	r := testenv.Rand(t)
	mem := vfs.NewMem()
	p := rebasing(t, f, mem, r)
	p.mustClose(t)
	want := bytes.Clone(p.m.live.bytes)
	for n := uint64(0); ; n += uint64(1 + r.IntN(2*f.stride(1)-1)) {
		left := mem.Clone()
		failed, armed := "", false
		fail := vfs.FailNth(n, syscall.EIO)
		fsys := track(vfs.Inject(left, func(at vfs.Op) error {
			if !armed {
				return nil
			}
			err := fail(at)
			if err != nil {
				failed = showFSOp(at)
			}
			return err
		}))
		rig := p.rig.on(fsys)
		if err := rig.open(vfs.ReadWrite); err != nil {
			t.Fatal(err)
		}
		armed = true
		_, err := rig.rebase(0)
		armed = false
		// What was only looked up ahead may be looked up again.
		if err != nil && (failed == "" || !errors.Is(err, syscall.EIO)) {
			t.Fatalf("rebase with %q failing: %v", failed, err)
		}
		if got, readErr := rig.readAll(); readErr != nil || !bytes.Equal(got, want) {
			t.Fatalf("after %v it reads other bytes, or none: %v", err, readErr)
		}
		rig.close() // it may have been poisoned, which was told
		if leaks := fsys.leaks(); leaks != "" {
			t.Fatalf("%s failed: %s", failed, leaks)
		}
		if err == nil {
			err = p.rig.on(left).expectParent("")
		} else {
			err = nil
		}
		got, inspectErr := p.rig.on(left).inspect()
		if err = errors.Join(err, inspectErr); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%q failed, and opened again it reads other bytes, or none: %v", failed, err)
		}
		if failed == "" {
			return
		}
		f.figures(3).InjectedErrors.Add(1)
	}
}

func expectNoRebase(t *testing.T, f Factory) {
	p := rebasing(t, f, vfs.NewMem(), testenv.Rand(t))
	if _, err := p.rig.rebase(0); !errors.Is(err, block.ErrUnsupported) {
		t.Errorf("rebase: %v, want %v", err, block.ErrUnsupported)
	}
	p.leaky = true
	p.finish(t)
}
