package load

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Cut is what a device may have held at one moment between BeginCut and End. Since a
// worker makes a request only after its last was answered, the requests of a worker that
// a snapshot holds are all up to some number, and none after it.
type Cut struct {
	model   *Model
	blocks  int64
	workers []workerCut
}

type workerCut struct {
	least   uint64          // the request that was answered when the cut began: it must be in
	states  []state         // when the cut began
	history map[int][]state // of blocks that changed since: as they were, and what became of them
}

// BeginCut begins to note what the device may hold. It is called during a run, before a
// snapshot is asked for. A model has one cut at a time.
func (m *Model) BeginCut() *Cut {
	c := &Cut{model: m, blocks: m.blocks.Load()}
	for _, w := range m.workers {
		w.mu.Lock()
		w.history = map[int][]state{}
		for i, was := range w.pending.were { // it may be in or not
			i += w.pending.first
			w.history[i] = []state{was, w.states[i]}
		}
		c.workers = append(c.workers, workerCut{least: w.completed, states: slices.Clone(w.states)})
		w.mu.Unlock()
	}
	return c
}

// End ends the noting: the snapshot has been taken.
func (c *Cut) End() {
	for i, w := range c.model.workers {
		w.mu.Lock()
		c.workers[i].history, w.history = w.history, nil
		w.mu.Unlock()
	}
}

// Verify reads a device, on which nothing runs, that should be as at one moment of the
// cut.
func (c *Cut) Verify(path string) error {
	dev, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer dev.Close()
	buf, err := unix.Mmap(-1, 0, stripeBlocks*BlockBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANONYMOUS|unix.MAP_PRIVATE)
	if err != nil {
		return fmt.Errorf("memory for requests: %w", err)
	}
	defer func() { _ = unix.Munmap(buf) }()
	var errs []error
	for i, w := range c.model.workers {
		// One of its own: the model's may be running.
		reader := &worker{model: c.model, number: w.number, dev: dev, buf: buf}
		if err := c.workers[i].verify(reader); err != nil {
			errs = append(errs, fmt.Errorf("%s, worker %d: %w", path, i, err))
		}
	}
	return errors.Join(errs...)
}

// found is what a block that changed during the cut was found to hold.
type found struct {
	seq    uint64
	zeroes bool
}

func (f found) is(s state) bool {
	return f.zeroes && s.kind == zeroes || !f.zeroes && s.kind == data && s.seq == f.seq
}

func (c *workerCut) verify(r *worker) error {
	changed := map[int]found{}
	last := c.least // the last request that is in
	for first := 0; first < len(c.states); first += stripeBlocks {
		b := r.buf[:min(stripeBlocks, len(c.states)-first)*BlockBytes]
		if _, err := r.dev.ReadAt(b, r.off(first)); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", len(b), r.off(first), err)
		}
		for i := first; len(b) > 0; i, b = i+1, b[BlockBytes:] {
			got, off := b[:BlockBytes], r.off(i)
			if c.history[i] == nil {
				if !r.holds(got, off, c.states[i]) {
					return fmt.Errorf("block at %d, which did not change: want %v, got %s", off, c.states[i], describe(got))
				}
				continue
			}
			seq, ok := r.seqOf(got, off)
			if !ok {
				return fmt.Errorf("block at %d: want one of %v, got %s", off, c.history[i], describe(got))
			}
			changed[i] = found{seq, seq == 0}
			last = max(last, seq)
		}
	}
	for _, i := range slices.Sorted(maps.Keys(changed)) {
		if err := allowed(c.history[i], changed[i], last); err != nil {
			return fmt.Errorf("block at %d: %w", r.off(i), err)
		}
	}
	return nil
}

// allowed checks a block against what became of it, when the last request that is in the
// snapshot has a number.
func allowed(history []state, got found, last uint64) error {
	want, before := history[0], history[0]
	for _, s := range history {
		switch {
		case s.kind == anything:
			return nil
		case s.seq <= last:
			want, before = s, want
		case s.kind == zeroes && got.is(s):
			return nil // the last that is in may have left zeroes only, which don't tell
		}
	}
	// The last request may be in with some of its blocks: the kernel splits long ones.
	if got.is(want) || want.seq == last && got.is(before) {
		return nil
	}
	return fmt.Errorf("want %v, the last of %v up to request %d, got that of request %d", want, history, last, got.seq)
}
