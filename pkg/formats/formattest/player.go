package formattest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// player plays steps on a rig and keeps the model of what it must hold.
type player struct {
	rig *rig
	ops int // played so far; stamps the data
	// leaky says that space was given back, or something failed or crashed: formats
	// without a map of free space may have forgotten what nothing refers to.
	leaky bool
	// interrupted, if set, is where a hook of the file system leaves what it found wrong
	// in the middle of a step.
	interrupted *error

	// mu guards m: hooks of the file system look at it in the middle of a step.
	mu       sync.Mutex
	m        *model
	inFlight []change // of the step being played
	sizes    []int64  // that the disk may have when it is opened next
	// sizeCertain: the image has the size that it says, no Resize has failed since it was
	// opened; touched: something has been changed since then.
	sizeCertain, touched bool
	flushing             bool // the step being played is a flush
	poisoned             bool // no write or flush may succeed until the image is reopened
	snapshots            []snapshot
}

// snapshot is what a layer that was pushed down must hold for ever.
type snapshot struct {
	name  string
	sizes []int64 // several after a Resize that failed
	contents
}

// newPlayer creates and opens an image on a chain of depth-1 others that have something
// in them, made by random steps.
func newPlayer(t testing.TB, f Factory, fsys vfs.FS, r *rand.Rand, depth int) *player {
	t.Helper()
	s := f.shape()
	made, err := f.makeBase(fsys, r)
	if err != nil {
		t.Fatal(err)
	}
	rig, err := newRig(f, fsys, s.size)
	if err != nil {
		t.Fatalf("create: %v", err)
	}
	p := &player{rig: rig, m: newModel(made), sizes: []int64{s.size}}
	if err := rig.open(vfs.ReadWrite); err != nil {
		t.Fatalf("open: %v", err)
	}
	if err := rig.checkBase(); err != nil {
		t.Error(err)
	}
	for range depth - 1 {
		p.play(t, newScript(r, s, mix{opWrite: 6, opZero: 2, opDiscard: 1}, 12))
		p.mustStep(t, op{kind: opPush})
	}
	return p
}

// play plays a script in which nothing may fail.
func (p *player) play(t testing.TB, script []op) {
	t.Helper()
	for i, o := range script {
		if p.skips(o) {
			continue
		}
		ioErr, wrong := p.step(o)
		if p.unsupported(o, ioErr) {
			ioErr = nil
		}
		if p.interrupted != nil {
			wrong = errors.Join(wrong, *p.interrupted)
		}
		if err := errors.Join(ioErr, wrong); err != nil {
			t.Fatalf("step %d of %d, %s (operation %06x): %v\nsteps until then:\n%s", i, len(script), o, p.ops, err, show(script, i))
		}
	}
}

func (p *player) mustStep(t testing.TB, o op) {
	t.Helper()
	p.play(t, []op{o})
}

// unsupported reports whether a step was refused as it may be: fast zeroing where there
// is none, and another size where more of a parent would show.
func (p *player) unsupported(o op, err error) bool {
	switch {
	case !errors.Is(err, block.ErrUnsupported):
		return false
	case o.kind == opZero:
		return o.flags&block.ZeroFastOnly != 0
	}
	return o.kind == opShrink && len(p.rig.names) > 1 || o.kind == opGrow && p.onLarger()
}

// onLarger reports whether the disk may stand on a larger one: it was made so, or its
// parent was growing when something failed, and then got a child of the size it had told.
func (p *player) onLarger() bool {
	if n := len(p.snapshots); n > 0 && slices.Max(p.snapshots[n-1].sizes) > p.m.size() {
		return true
	}
	return p.rig.f.onLarger()
}

// skips reports whether a step makes no sense because the disk could not be resized before.
func (p *player) skips(o op) bool {
	size := p.m.size()
	switch o.kind {
	case opGrow:
		return o.off <= size
	case opShrink:
		return o.off >= size
	}
	return o.off+o.n > size
}

// step plays one step. ioErr is what the disk answered, wrong what it should not have
// answered.
func (p *player) step(o op) (ioErr, wrong error) {
	p.ops++
	p.rig.figures().Operations.Add(1)
	switch o.kind {
	case opRead:
		return p.read(o)
	case opMap:
		return p.mapRange(o)
	case opWrite, opZero, opDiscard, opPack:
		ioErr = p.change(o)
		p.leaky = p.leaky || o.kind != opWrite || ioErr != nil
		if o.kind == opDiscard && ioErr == nil {
			p.rig.figures().Discards.Add(1)
		}
	case opFlush:
		ioErr = p.flush()
	case opReopen:
		ioErr, wrong = p.reopen()
	case opGrow, opShrink:
		ioErr, wrong = p.resize(o)
		p.leaky = p.leaky || o.kind == opShrink
		if ioErr == nil {
			p.rig.figures().Resizes.Add(1)
		}
	case opPush:
		ioErr = p.push()
	}
	return ioErr, errors.Join(wrong, p.checkPoison(o, ioErr))
}

// checkPoison holds the disk to its word: after a failed flush nothing succeeds.
func (p *player) checkPoison(o op, ioErr error) error {
	switch o.kind {
	case opWrite, opZero, opFlush, opPack:
		if p.poisoned && !errors.Is(ioErr, block.ErrPoisoned) {
			return fmt.Errorf("after a failed flush: %v, want %w", ioErr, block.ErrPoisoned)
		}
		p.poisoned = p.poisoned || errors.Is(ioErr, block.ErrPoisoned) || o.kind == opFlush && ioErr != nil
	}
	return nil
}

func (p *player) read(o op) (ioErr, wrong error) {
	got := bytes.Repeat([]byte{'?'}, int(o.n))
	n, err := p.rig.img.ReadAt(got, o.off)
	if err == nil && n != len(got) {
		return nil, fmt.Errorf("read %d of %d bytes without an error", n, len(got))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return err, p.m.live.settle(o.off, got[:n])
}

// change writes, zeroes or discards.
func (p *player) change(o op) error {
	if o.kind == opPack {
		start, end, ok := p.rig.img.CompressedGranule(min(o.off, p.m.size()-1))
		if !ok {
			return errors.New("the image cannot hold compressed granules")
		}
		o.off, o.n = start, min(end, p.m.size())-start
	}
	ch := p.changeOf(o)
	p.begin(ch)
	err := p.ask(o, ch)
	p.noteChange(o, ch, err)
	return err
}

// changeOf returns what the present step changes.
func (p *player) changeOf(o op) change {
	ch := change{what: fmt.Sprintf("operation %06x, %s", p.ops, o), off: o.off, n: o.n}
	switch {
	case o.kind == opPack && p.ops%4 == 0:
		ch.data = noise(p.ops, o.n)
	case o.kind == opWrite || o.kind == opPack:
		ch.data = stamp(p.ops, o.off, o.n)
	}
	return ch
}

// noteChange notes that the disk has answered.
func (p *player) noteChange(o op, ch change, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.inFlight = nil
	switch {
	case errors.Is(err, block.ErrPoisoned):
		// It did nothing. (A zeroing that is not fast enough may have done a part.)
	case err != nil || o.kind == opDiscard:
		p.m.live.allow(ch)
	default:
		p.m.live.set(ch)
	}
}

func (p *player) begin(ch change) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.inFlight = []change{p.m.begin(ch)}
	p.touched = true
}

func (p *player) ask(o op, ch change) error {
	switch o.kind {
	case opZero:
		return p.rig.img.WriteZeroes(o.off, o.n, o.flags)
	case opDiscard:
		return p.rig.img.Discard(o.off, o.n)
	case opPack:
		packed, err := p.rig.img.Pack(ch.data, o.off)
		if err != nil {
			return err
		}
		return p.rig.img.WritePacked(packed)
	}
	n, err := p.rig.img.WriteAt(ch.data, o.off)
	if err == nil && n != len(ch.data) {
		return fmt.Errorf("wrote %d of %d bytes without an error", n, len(ch.data))
	}
	return err
}

// flush flushes. What is written meanwhile, by a hook of the file system, is not covered.
func (p *player) flush() error {
	p.mu.Lock()
	covered, begun := p.m.live.clone(), len(p.m.since)
	p.flushing = true
	p.mu.Unlock()
	err := p.rig.img.Flush()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.flushing = false
	if err == nil {
		certain := p.touched && p.sizeCertain
		p.m.flushed(covered, begun, certain)
		if certain {
			p.sizes = []int64{p.m.size()}
		}
	}
	return err
}

// reopen closes the image and opens it again.
func (p *player) reopen() (ioErr, wrong error) {
	if err := p.close(); err != nil {
		ioErr = fmt.Errorf("close: %w", err)
	}
	if err := p.rig.open(vfs.ReadWrite); err != nil {
		return errors.Join(ioErr, fmt.Errorf("open: %w", err)), nil
	}
	return ioErr, p.noteOpened()
}

// noteOpened looks which of the sizes that it may have the disk has.
func (p *player) noteOpened() error {
	size := p.rig.img.Info().SizeBytes
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.checkSize(int(size)); err != nil {
		return err
	}
	p.m.shows(size)
	// A size need not be durable for having been seen, until something has been flushed.
	p.sizeCertain, p.touched = true, false
	return nil
}

// close closes the image. If that fails, what was not flushed may be lost.
func (p *player) close() error {
	err := p.rig.close()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.poisoned = false
	if err == nil {
		p.m.flushed(p.m.live.clone(), len(p.m.since), p.touched && p.sizeCertain)
	} else {
		p.m.lose()
	}
	return err
}

// resize grows or shrinks the disk. What is past the new size may be gone at any moment
// from then on; when the disk grows again, it reads as zeroes.
func (p *player) resize(o op) (ioErr, wrong error) {
	p.mu.Lock()
	old := p.m.size()
	p.sizes = append(slices.Clone(p.sizes), o.off)
	p.mu.Unlock()
	lost := change{what: fmt.Sprintf("operation %06x, %s", p.ops, o), off: o.off, n: old - o.off}
	if o.kind == opShrink {
		p.begin(lost)
	}

	if o.kind == opShrink {
		ioErr = p.rig.img.Shrink(o.off)
	} else {
		ioErr = p.rig.img.Resize(o.off)
	}
	size := p.rig.img.Info().SizeBytes

	p.mu.Lock()
	defer p.mu.Unlock()
	p.inFlight = nil
	p.sizeCertain = ioErr == nil
	if size != o.off && (ioErr == nil || size != old) {
		return ioErr, fmt.Errorf("the disk has %d bytes, want %d; it had %d", size, o.off, old)
	}
	if o.kind == opShrink && ioErr != nil { // on disk it may have the old size, with what was there
		if size == old {
			p.m.live.allow(lost)
		}
		p.m.live.resize(size)
		return ioErr, nil
	}
	if ioErr != nil {
		p.m.shows(size)
		return ioErr, nil
	}
	p.m.durable.resize(old)
	p.m.resize(size)
	p.sizes = []int64{size}
	return ioErr, nil
}

func (p *player) push() error {
	name := p.rig.top()
	err := p.rig.push()
	if p.rig.top() == name {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.m.flushed(p.m.live.clone(), len(p.m.since), true)
	p.snapshots = append(p.snapshots, snapshot{name, p.sizes, p.m.live.clone()})
	p.sizes = []int64{p.m.size()}
	return err
}

// mapRange asks for a range's first extent, and looks whether what it says is so.
func (p *player) mapRange(o op) (ioErr, wrong error) {
	if o.n == 0 {
		return nil, nil
	}
	e, err := p.rig.img.Map(o.off, o.n)
	if err != nil {
		return err, nil
	}
	if e.Off != o.off || e.Len <= 0 || e.Len > o.n {
		return nil, fmt.Errorf("map returned %+v", e)
	}
	got := make([]byte, e.Len)
	if e.State == block.Data {
		if e.FileOff < 0 {
			return nil, nil
		}
		if err := readMapped(p.rig.fs, e, got); err != nil {
			return err, nil
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.m.live.settle(o.off, got); err != nil {
		return nil, fmt.Errorf("map returned %+v, but %w", e, err)
	}
	return nil, nil
}

// readMapped reads an extent where it says that it is.
func readMapped(fsys vfs.FS, e block.Extent, p []byte) error {
	f, err := fsys.Open(e.File, vfs.ReadOnly)
	if err != nil {
		return err
	}
	_, err = f.ReadAt(p, e.FileOff)
	if err == io.EOF { // past the end are zeroes
		err = nil
	}
	return errors.Join(err, f.Close())
}

// finish reads everything back, before and after closing, and checks all images.
func (p *player) finish(t testing.TB) {
	t.Helper()
	for _, what := range []string{"before closing", "after opening again"} {
		if err := p.readBack(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if err := errors.Join(p.reopen()); err != nil {
			t.Fatalf("reopen: %v", err)
		}
	}
	p.mustClose(t)
	if err := p.rig.check(p.leaky); err != nil {
		t.Fatal(err)
	}
	if err := p.checkSnapshots(p.rig); err != nil {
		t.Fatal(err)
	}
}

func (p *player) mustClose(t testing.TB) {
	t.Helper()
	if err := p.close(); err != nil {
		t.Fatalf("close: %v", err)
	}
}

// readBack reads the whole disk, and asks where each byte of it is.
func (p *player) readBack() error {
	size := p.rig.img.Info().SizeBytes
	if size != p.m.size() {
		return fmt.Errorf("the disk has %d bytes, want %d", size, p.m.size())
	}
	if err := errors.Join(p.read(op{n: size})); err != nil {
		return err
	}
	for off := int64(0); off < size; {
		e, err := p.rig.img.Map(off, size-off)
		if err := errors.Join(err, errors.Join(p.mapRange(op{off: off, n: size - off}))); err != nil {
			return err
		}
		off += e.Len
	}
	return nil
}

// checkSnapshots returns an error unless the layers that were pushed down hold what they
// held then, in r, where nothing is open.
func (p *player) checkSnapshots(r *rig) error {
	for _, s := range p.snapshots {
		if err := s.check(r); err != nil {
			return fmt.Errorf("snapshot %s: %w", s.name, err)
		}
	}
	return nil
}

// check opens what was the top once and compares.
func (s *snapshot) check(r *rig) error {
	at := r.on(r.fs)
	at.names = []string{s.name}
	if err := at.open(vfs.ReadOnly); err != nil {
		return err
	}
	got, err := at.readAll()
	if err = errors.Join(err, at.close()); err != nil {
		return err
	}
	if !slices.Contains(s.sizes, int64(len(got))) {
		return fmt.Errorf("%d bytes, want one of %d", len(got), s.sizes)
	}
	want := s.contents.clone()
	want.resize(int64(len(got)))
	return want.check(0, got, nil)
}
