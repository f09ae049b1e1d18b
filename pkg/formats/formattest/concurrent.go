package formattest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// testConcurrent uses an image from several goroutines: on ranges that do not overlap but
// share clusters, while it is flushed, killed and loses power; and on the same range.
func testConcurrent(t *testing.T, f Factory) {
	for _, depth := range f.depths()[:min(2, len(f.depths()))] {
		t.Run(fmt.Sprintf("depth=%d", depth), func(t *testing.T) { playCrowd(t, f, depth) })
	}
	t.Run("same range", func(t *testing.T) { writeSameRange(t, f) })
}

const (
	crowdSize = 4
	// A disk is dealt out to the crowd in stretches of this many clusters: in every other
	// one each sector belongs to somebody else, and the next is one goroutine's.
	stretchClusters = 2
)

// crowd are goroutines that use one image at the same time, each on bytes of its own.
type crowd struct {
	rig *rig
	s   shape
	mem *vfs.Mem // that the image and its journal are in

	mu      sync.Mutex
	live    contents     // with every change that has returned
	durable contents     // with every change that had returned when the last flush began
	all     []change     // begun, in order; a change's place here is its number
	since   map[int]bool // numbers of those not known to be durable
	pending map[int]bool // numbers of those that have not returned
	err     error        // the first thing wrong

	looking sync.Mutex // one look at a time
	r       *rand.Rand // guarded by looking
	looks   int        // still to take
}

func playCrowd(t *testing.T, f Factory, depth int) {
	f.counted(t, "kills of a crowd", func(f *Figures) *atomic.Int64 { return &f.Kills })
	f.counted(t, "crash points of a crowd", func(f *Figures) *atomic.Int64 { return &f.CrashPoints })
	r := testenv.Rand(t)
	mem := vfs.NewMem()
	p := newPlayer(t, f, mem, r, depth)
	p.play(t, f.script(r, mix{opWrite: 4, opDiscard: 1}, 10))
	p.mustClose(t)

	c := &crowd{
		s: f.shape(), mem: mem, live: p.m.live.clone(), durable: p.m.live.clone(),
		since: map[int]bool{}, pending: map[int]bool{}, r: rand.New(rand.NewPCG(r.Uint64(), r.Uint64())), looks: f.scaled(200),
	}
	c.rig = p.rig.on(vfs.Inject(mem, vfs.If(vfs.Changing, c.hook)))
	c.rig.journal = &engine.JournalFile{FS: c.rig.fs, Name: journalName, Epoch: 1}
	if err := c.rig.open(vfs.ReadWrite); err != nil {
		t.Fatal(err)
	}
	c.play(r, f.scaled(600))
	if c.err == nil {
		c.err = c.readBack()
	}
	if err := errors.Join(c.err, c.rig.close()); err != nil {
		t.Fatal(err)
	}
	left := c.rig.on(mem)
	got, err := left.inspect()
	if err == nil && len(got) != len(c.live.bytes) {
		err = fmt.Errorf("the disk has %d bytes, want %d", len(got), len(c.live.bytes))
	}
	if err == nil {
		err = c.live.settle(0, got)
	}
	if err != nil {
		t.Fatalf("afterwards: %v", err)
	}
	left.checkWithQEMU(t, got, true)
}

// play lets everybody do count steps, while somebody flushes, and somebody grows the disk
// and pushes overlays.
func (c *crowd) play(r *rand.Rand, count int) {
	var workers, others sync.WaitGroup
	stop := make(chan bool)
	for who := range crowdSize {
		own := rand.New(rand.NewPCG(r.Uint64(), r.Uint64()))
		workers.Go(func() {
			for range count {
				if !c.step(own, who) {
					return
				}
			}
		})
	}
	again := func(do func()) {
		others.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					do()
				}
			}
		})
	}
	again(c.flush)
	changes := 8
	again(func() {
		if changes--; changes >= 0 {
			c.changeShape()
		}
		time.Sleep(time.Millisecond)
	})
	workers.Wait()
	close(stop)
	others.Wait()
}

// changeShape pushes an overlay, or resizes the disk. Nobody looks meanwhile: which image
// is the top is for the store to say.
func (c *crowd) changeShape() {
	c.looking.Lock()
	defer c.looking.Unlock()
	f := c.rig.f
	if f.Overlay != nil && c.r.IntN(3) > 0 {
		if err := c.rig.push(); err != nil {
			c.fail("push: %w", err)
		}
		return
	}
	size := c.rig.img.Info().SizeBytes
	switch {
	case f.CannotGrow || f.onLarger():
		return
	case f.CanShrink && size > c.s.size && c.r.IntN(2) == 0: // nobody uses what has been added
		err := c.rig.img.Shrink(size - c.s.quantum)
		if errors.Is(err, block.ErrUnsupported) && len(c.rig.names) > 1 {
			return
		}
		if err != nil {
			c.fail("shrink from %d bytes: %w", size, err)
			return
		}
		size -= c.s.quantum
	case size+c.s.quantum <= c.s.maxGrow:
		size += c.s.quantum
		if err := c.rig.img.Resize(size); err != nil {
			c.fail("grow to %d bytes: %w", size, err)
			return
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.live.resize(size)
}

// fail notes the first thing wrong; everybody stops.
func (c *crowd) fail(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = fmt.Errorf(format, args...)
	}
}

// pickOwn returns a random range that belongs to a goroutine alone.
func (c *crowd) pickOwn(r *rand.Rand, who int64) (off, n int64) {
	const sector = 512
	stretch := stretchClusters * c.s.cluster
	stretches := c.s.size / stretch
	i := r.Int64N(stretches)
	if i%2 == 0 {
		off = i*stretch + (r.Int64N(stretch/sector/crowdSize)*crowdSize+who)*sector
		return off, sector
	}
	for i/2%crowdSize != who {
		i -= 2
		if i < 0 {
			return who * sector, sector
		}
	}
	off = r.Int64N(stretch)
	if r.IntN(2) == 0 {
		off = off / c.s.cluster * c.s.cluster
		return i*stretch + off, c.s.cluster
	}
	return i*stretch + off, 1 + r.Int64N(stretch-off)
}

// step does one thing, and reports whether to go on.
func (c *crowd) step(r *rand.Rand, who int) bool {
	o := op{kind: mix{opRead: 3, opWrite: 8, opZero: 2, opDiscard: 2, opMap: 1}.pick(r)}
	o.off, o.n = c.pickOwn(r, int64(who))
	switch o.kind {
	case opRead:
		c.read(o)
	case opMap:
		if _, err := c.rig.img.Map(o.off, o.n); err != nil {
			c.fail("%s: %w", o, err)
		}
	default:
		c.change(o)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err == nil
}

func (c *crowd) read(o op) {
	got := make([]byte, o.n)
	if _, err := c.rig.img.ReadAt(got, o.off); err != nil {
		c.fail("%s: %w", o, err)
		return
	}
	c.mu.Lock()
	err := c.live.settle(o.off, got)
	c.mu.Unlock()
	if err != nil {
		c.fail("%s: %w", o, err)
	}
}

func (c *crowd) change(o op) {
	number, ch := c.begin(o)
	asked := player{rig: c.rig}
	if err := asked.ask(o, ch); err != nil {
		c.fail("%s: %w", o, err)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, number)
	if o.kind == opDiscard {
		c.live.allow(ch)
	} else {
		c.live.set(ch)
	}
}

// begin notes a change that is about to be made.
func (c *crowd) begin(o op) (number int, ch change) {
	const firstOp = 0x400000 // tells what is written here from what was there
	c.mu.Lock()
	defer c.mu.Unlock()
	number = len(c.all)
	ch = change{what: fmt.Sprintf("operation %06x, %s", firstOp+number, o), off: o.off, n: o.n}
	if o.kind == opWrite {
		ch.data = stamp(firstOp+number, o.off, o.n)
	}
	c.all = append(c.all, ch)
	c.since[number], c.pending[number] = true, true
	return number, ch
}

func (c *crowd) flush() {
	c.mu.Lock()
	covered := c.live.clone()
	var numbers []int
	for number := range c.since {
		if !c.pending[number] {
			numbers = append(numbers, number)
		}
	}
	c.mu.Unlock()

	if err := c.rig.img.Flush(); err != nil {
		c.fail("flush: %w", err)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.durable = covered
	for _, number := range numbers {
		delete(c.since, number)
	}
}

func (c *crowd) readBack() error {
	got, err := c.rig.readAll()
	if err != nil {
		return err
	}
	return c.live.settle(0, got)
}

// hook is called before a change of the file system. Now and then it looks what a kill or
// a loss of power at this moment would leave, while the others go on.
func (c *crowd) hook(at vfs.Op) error {
	if !c.looking.TryLock() {
		return nil
	}
	defer c.looking.Unlock()
	if c.looks == 0 || c.r.IntN(4) > 0 {
		return nil
	}
	c.looks--
	look, what := c.lookAfterKill, "killed"
	if c.r.IntN(2) == 0 {
		look, what = c.lookAfterCrash, "power lost"
	}
	if err := look(); err != nil {
		c.fail("%s about %s: %w", what, showFSOp(at), err)
	}
	return nil
}

// lookAfterKill looks what the next process finds: what had returned before the kill, and
// any part of what had not, or was begun while we looked.
func (c *crowd) lookAfterKill() error {
	c.rig.figures().Kills.Add(1)
	c.mu.Lock()
	returned, inFlight, begun := c.live.clone(), c.numbered(c.pending), len(c.all)
	c.mu.Unlock()
	killed := c.mem.Clone()
	inFlight = append(inFlight, c.begunAfter(begun)...)

	look := func(left *vfs.Mem) error {
		got, err := c.next(left).inspect()
		if err != nil {
			return err
		}
		returned.resize(int64(len(got)))
		return returned.check(0, got, inFlight)
	}
	if c.r.IntN(3) > 0 {
		return look(killed)
	}
	// The next process is killed, too, at every point of its start.
	var killedAgain []*vfs.Mem
	second := c.next(vfs.Inject(killed, vfs.If(vfs.Changing, func(vfs.Op) error {
		killedAgain = append(killedAgain, killed.Clone())
		return nil
	})))
	if err := errors.Join(second.open(vfs.ReadWrite), second.close()); err != nil {
		return err
	}
	for i, left := range killedAgain {
		c.rig.figures().Kills.Add(1)
		if err := look(left); err != nil {
			return fmt.Errorf("and killed again before change %d of %d of the next process: %w", i, len(killedAgain), err)
		}
	}
	return nil
}

// next returns the rig of the next process.
func (c *crowd) next(fsys vfs.FS) *rig {
	r := c.rig.on(fsys)
	r.journal = &engine.JournalFile{FS: fsys, Name: journalName, Epoch: 1}
	return r
}

// lookAfterCrash looks what a loss of power leaves: what had returned when the last flush
// that succeeded was called, and any part of what came later.
func (c *crowd) lookAfterCrash() error {
	c.rig.figures().CrashPoints.Add(1)
	c.rig.figures().Crashes.Add(1)
	c.mu.Lock()
	durable, later, begun := c.durable.clone(), c.numbered(c.since), len(c.all)
	c.mu.Unlock()
	got, err := c.rig.on(c.mem.Crash(c.r)).inspect()
	if err != nil {
		return err
	}
	durable.resize(int64(len(got)))
	return durable.check(0, got, append(later, c.begunAfter(begun)...))
}

// numbered returns the changes with some numbers.
func (c *crowd) numbered(numbers map[int]bool) []change {
	var list []change
	for number := range numbers {
		list = append(list, c.all[number])
	}
	return list
}

// begunAfter returns the changes from a number on.
func (c *crowd) begunAfter(number int) []change {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.all[number:])
}

// writeSameRange has several goroutines write to the same range at once: every byte is as
// one of them has written it, and as one of them for ever.
func writeSameRange(t *testing.T, f Factory) {
	r := testenv.Rand(t)
	mem := vfs.NewMem()
	p := newPlayer(t, f, mem, r, f.depths()[len(f.depths())-1])
	s := f.shape()
	for round := range f.scaled(60) {
		off, n := s.pickRange(r)
		before := p.m.live.clone()
		var changes []change
		for range crowdSize {
			p.ops++
			changes = append(changes, p.changeOf(op{kind: []opKind{opWrite, opWrite, opWrite, opZero}[r.IntN(4)], off: off, n: n}))
		}
		if err := atOnce(p.rig.img, changes, before); err != nil {
			t.Fatalf("round %d, %d bytes at %#x: %v", round, n, off, err)
		}
		p.m.live.set(changes[0])
		for _, ch := range changes[1:] {
			p.m.live.allow(ch)
		}
		p.mustStep(t, op{kind: opRead, off: off, n: n})
		p.mustStep(t, op{kind: []opKind{opFlush, opReopen, opRead}[r.IntN(3)], n: s.size})
	}
	p.leaky = true
	p.finish(t)
}

// atOnce makes changes at the same time, and reads meanwhile.
func atOnce(d block.Device, changes []change, before contents) error {
	errs := make([]error, len(changes)+1)
	var wg sync.WaitGroup
	for i, ch := range changes {
		wg.Go(func() {
			if ch.data == nil {
				errs[i] = d.WriteZeroes(ch.off, ch.n, 0)
			} else {
				_, errs[i] = d.WriteAt(ch.data, ch.off)
			}
		})
	}
	wg.Go(func() {
		got := bytes.Repeat([]byte{'?'}, int(changes[0].n))
		if _, err := d.ReadAt(got, changes[0].off); err != nil {
			errs[len(changes)] = err
			return
		}
		errs[len(changes)] = before.check(changes[0].off, got, changes)
	})
	wg.Wait()
	return errors.Join(errs...)
}
