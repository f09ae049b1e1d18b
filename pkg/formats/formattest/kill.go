package formattest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// testKillSweep kills the process before every single change of the two file systems, the
// image's and the redo journal's, and in the middle of writes, and opens the image again.
func testKillSweep(t *testing.T, f Factory) {
	f.counted(t, "kills", func(f *Figures) *atomic.Int64 { return &f.Kills })
	for _, depth := range f.depths()[:min(2, len(f.depths()))] {
		t.Run(fmt.Sprintf("depth=%d", depth), func(t *testing.T) { sweepKills(t, f, depth) })
	}
}

const journalName = "redo"

func sweepKills(t *testing.T, f Factory, depth int) {
	r := testenv.Rand(t)
	k := &killer{r: r, images: vfs.NewMem(), journals: vfs.NewMem()}
	hook := vfs.If(vfs.Changing, k.hook)
	images := track(vfs.Inject(k.images, hook))
	journals := track(vfs.Inject(k.journals, hook))
	images.beforeWrite, journals.beforeWrite = k.inWrite(false), k.inWrite(true)

	p := newPlayer(t, f, images, r, depth)
	p.mustClose(t)
	p.rig.journal = &engine.JournalFile{FS: journals, Name: journalName, Epoch: 1}
	if err := p.rig.open(vfs.ReadWrite); err != nil {
		t.Fatalf("open with a journal: %v", err)
	}
	script := f.script(r, mix{opWrite: 12, opZero: 4, opDiscard: 4, opFlush: 3, opReopen: 1, opGrow: 1, opPush: 1, opShrink: 1}, f.scaled(70))
	k.p, p.interrupted = p, &k.err
	p.play(t, script)
	k.p = nil
	p.finish(t)
	if leaks := images.leaks() + journals.leaks(); leaks != "" {
		t.Error(leaks)
	}
}

// killer looks at what the next process finds when the one that plays is killed.
type killer struct {
	r                *rand.Rand
	images, journals *vfs.Mem
	p                *player // nil: not now
	nested           bool    // a hook is playing steps itself
	err              error   // the first thing wrong
}

// hook is called before a change of either file system.
func (k *killer) hook(at vfs.Op) error {
	if k.p == nil || k.err != nil {
		return nil
	}
	if err := k.writeDuringFlush(at); err != nil {
		k.err = fmt.Errorf("during a flush: %w", err)
		return nil
	}
	if err := k.kill(k.images.Clone(), k.journals.Clone()); err != nil {
		k.err = fmt.Errorf("killed before %s: %w", showFSOp(at), err)
	}
	return nil
}

// writeDuringFlush changes the disk between the steps of a flush, as other goroutines do:
// mostly what was changed just before.
func (k *killer) writeDuringFlush(at vfs.Op) error {
	if !k.p.flushing || k.nested || at.Kind != vfs.OpSync {
		return nil
	}
	k.nested = true
	defer func() { k.nested = false }()
	s := k.p.rig.f.shape()
	s.size = k.p.m.size()
	for _, o := range newScript(k.r, s, mix{opWrite: 3, opZero: 1, opDiscard: 1}, k.r.IntN(3)) {
		if n := len(k.p.m.since); n > 0 && k.r.IntN(3) > 0 {
			before := k.p.m.since[n-1]
			o.off, o.n = before.off, before.n
		}
		ioErr, wrong := k.p.step(o)
		if err := errors.Join(ioErr, wrong, k.err); err != nil && !k.p.unsupported(o, ioErr) {
			return fmt.Errorf("%s: %w", o, err)
		}
	}
	return nil
}

// inWrite returns a function that is called before every write to one of the file
// systems: it kills the process when a part of the write is done.
func (k *killer) inWrite(toJournal bool) func(name string, b []byte, off int64) {
	return func(name string, b []byte, off int64) {
		sectors := (off+int64(len(b))-1)/sectorBytes - off/sectorBytes // but for the last one
		if k.p == nil || k.err != nil || sectors < 1 || k.r.IntN(3) > 0 {
			return
		}
		images, journals := k.images.Clone(), k.journals.Clone()
		written := images
		if toJournal {
			written = journals
		}
		part := (off/sectorBytes+1+k.r.Int64N(sectors))*sectorBytes - off
		err := writePart(written, name, b[:part], off)
		if err == nil {
			err = k.kill(images, journals)
		}
		if err != nil {
			k.err = fmt.Errorf("killed when %d of %d bytes at %#x of %s were written: %w", part, len(b), off, name, err)
		}
	}
}

func writePart(fsys vfs.FS, name string, b []byte, off int64) error {
	f, err := fsys.Open(name, vfs.ReadWrite)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, off)
	return errors.Join(err, f.Close())
}

// kill looks at what the next process finds in one of several ways.
func (k *killer) kill(images, journals *vfs.Mem) error {
	k.p.rig.figures().Kills.Add(1)
	var err error
	switch way := k.r.IntN(10); {
	case way < 4:
		err = k.reopen(images, journals)
	case way < 6:
		err = k.killAgain(images, journals)
	case way < 8:
		err = k.flushAndCrash(images, journals)
	case way < 9:
		err = k.withoutJournal(images)
	default:
		err = k.outdatedJournal(images, journals)
	}
	return err
}

// next returns the rig of the next process.
func (k *killer) next(images, journals vfs.FS) *rig {
	r := k.p.rig.on(images)
	if journals != nil {
		journal := *k.p.rig.journal
		journal.FS = journals
		r.journal = &journal
	}
	return r
}

// reopen: every write that had returned reads back.
func (k *killer) reopen(images, journals *vfs.Mem) error {
	tracked := track(images)
	left := k.next(tracked, journals)
	got, err := left.inspect()
	if err == nil {
		err = k.p.allowsAfterKill(got)
	}
	if err == nil && k.r.IntN(4) == 0 {
		err = k.p.checkSnapshots(left)
	}
	if err == nil && k.r.IntN(8) == 0 {
		err = liveOn(left, got, k.r)
	}
	if leaks := tracked.leaks(); err == nil && leaks != "" {
		err = errors.New(leaks)
	}
	return err
}

// allowsAfterKill returns an error unless got can be what a kill now leaves.
func (p *player) allowsAfterKill(got []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.checkSize(len(got)); err != nil {
		return err
	}
	return p.m.afterKill(got, p.inFlight)
}

// killAgain: so does it when the next process is killed at any point of its start, also
// in the middle of the replay.
func (k *killer) killAgain(images, journals *vfs.Mem) error {
	type state struct{ images, journals *vfs.Mem }
	var states []state
	hook := vfs.If(vfs.Changing, func(vfs.Op) error {
		states = append(states, state{images.Clone(), journals.Clone()})
		return nil
	})
	second := k.next(vfs.Inject(images, hook), vfs.Inject(journals, hook))
	if err := errors.Join(second.open(vfs.ReadWrite), second.close()); err != nil {
		return err
	}
	for i, s := range states {
		k.p.rig.figures().Kills.Add(1)
		if err := k.reopen(s.images, s.journals); err != nil {
			return fmt.Errorf("and killed again before change %d of %d of the next process: %w", i, len(states), err)
		}
	}
	return nil
}

// flushAndCrash: a flush makes durable what the killed process had written.
func (k *killer) flushAndCrash(images, journals *vfs.Mem) error {
	left := k.next(images, journals)
	if err := left.open(vfs.ReadWrite); err != nil {
		return err
	}
	before, err := left.readAll()
	if err == nil {
		err = k.p.allowsAfterKill(before)
	}
	if err == nil {
		err = left.img.Flush()
	}
	crashed := images.Crash(k.r)
	if err = errors.Join(err, left.close()); err != nil {
		return err
	}
	// Power loss takes the journal with it.
	got, err := k.next(crashed, vfs.NewMem()).inspect()
	if err != nil {
		return fmt.Errorf("power lost after a flush: %w", err)
	}
	want := contents{bytes: before}
	if err := want.check(0, got, nil); err != nil {
		return fmt.Errorf("power lost after a flush by the next process: %w", err)
	}
	return nil
}

// withoutJournal: without the journal, what was flushed is there.
func (k *killer) withoutJournal(images *vfs.Mem) error {
	got, err := k.next(images, nil).inspect()
	if err == nil {
		err = k.p.allowsAfterCrash(got)
	}
	if err != nil {
		return fmt.Errorf("opened without the journal: %w", err)
	}
	return nil
}

// outdatedJournal: a journal is not replayed onto an image that somebody has changed, or
// when it is of another attachment.
func (k *killer) outdatedJournal(images, journals *vfs.Mem) error {
	other := k.next(images, nil)
	got, err := other.inspect()
	if err != nil {
		return err
	}
	if k.r.IntN(2) == 0 {
		other.journal = &engine.JournalFile{FS: journals, Name: journalName, Epoch: 2}
	} else {
		mark := change{n: int64(len(got)), data: stamp(0xffffff, 0, int64(len(got)))}
		if err := other.overwrite(mark); err != nil {
			return err
		}
		got = mark.data
		other.journal = k.next(images, journals).journal
	}
	again, err := other.inspect()
	want := contents{bytes: got}
	if err == nil {
		err = want.check(0, again, nil)
	}
	if err != nil {
		return fmt.Errorf("opened with an outdated journal (epoch %d): %w", other.journal.Epoch, err)
	}
	return nil
}

// overwrite writes to an image that is not open.
func (r *rig) overwrite(ch change) error {
	if err := r.open(vfs.ReadWrite); err != nil {
		return err
	}
	_, err := r.img.WriteAt(ch.data, ch.off)
	return errors.Join(err, r.close())
}
