package store

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// batches is work that needs all records, under the store's lock. Reading them all takes
// long where there are many, so what is asked for while the lock is waited for is done
// together, with one reading: by the caller that came first, for the others.
type batches struct {
	mu    sync.Mutex
	queue []*job
	led   bool // somebody works, or has been told to
}

// job is one caller's work.
type job struct {
	do   func(all *scan) error
	lead chan struct{} // filled when this caller has to do what is queued
	done chan error    // filled by who has done it for this caller
}

// scan is what all records said while the store's lock was held.
type scan struct {
	entries []VolumeEntry
	needed  map[string]bool // see neededLayers
}

// withAll calls do with all records, under the store's lock: in this goroutine, or in another
// that has the lock, while this one waits. Those who do something in the same batch must not
// make what all says wrong for one another. When ctx ends, do is not called any more.
func (s *Store) withAll(ctx context.Context, do func(all *scan) error) error {
	j := s.batches.join(do)
	select {
	case err := <-j.done:
		return err
	case <-j.lead:
		return s.lead(ctx, j)
	case <-ctx.Done():
	}
	if s.batches.leave(j) {
		return fmt.Errorf("wait for the lock of the store: %w", ctx.Err())
	}
	select { // it is being done, or this caller has just been told to lead
	case err := <-j.done:
		return err
	case <-j.lead:
		return s.lead(ctx, j)
	}
}

// lead does what is queued, once it has the lock, and has the next caller lead.
func (s *Store) lead(ctx context.Context, own *job) (err error) {
	defer s.batches.passOn()
	lock, err := s.locks.lock(ctx, storeLock)
	if err != nil {
		s.batches.remove(own)
		return err
	}
	defer lock.Unlock()
	jobs := s.batches.take()
	entries, readErr := s.records(context.WithoutCancel(ctx)) // others wait for it, too
	all := &scan{entries: entries}
	for _, j := range jobs {
		jobErr := readErr
		if jobErr == nil {
			jobErr = j.do(all)
		}
		if j == own {
			err = jobErr
		} else {
			j.done <- jobErr
		}
	}
	return err
}

// join queues work. The first in an empty queue is told to lead.
func (b *batches) join(do func(all *scan) error) *job {
	j := &job{do: do, lead: make(chan struct{}, 1), done: make(chan error, 1)}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.queue = append(b.queue, j)
	if !b.led {
		b.led = true
		j.lead <- struct{}{}
	}
	return j
}

// leave takes a job back that nobody has taken, unless its caller has been told to lead.
func (b *batches) leave(j *job) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.Index(b.queue, j)
	if i < 0 || len(j.lead) > 0 {
		return false
	}
	b.queue = slices.Delete(b.queue, i, i+1)
	return true
}

// remove takes a leader's job back.
func (b *batches) remove(j *job) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.queue = slices.DeleteFunc(b.queue, func(other *job) bool { return other == j })
}

// take returns what is queued, and empties the queue.
func (b *batches) take() []*job {
	b.mu.Lock()
	defer b.mu.Unlock()
	jobs := b.queue
	b.queue = nil
	return jobs
}

// passOn has the first in the queue lead.
func (b *batches) passOn() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.led = len(b.queue) > 0
	if b.led {
		b.queue[0].lead <- struct{}{}
	}
}

// neededLayers marks: the files of all layers that a volume or a snapshot reaches, or that
// are about to become one. It fails when any record is unreadable, because nobody knows what
// that one needs.
func (c *scan) neededLayers() (map[string]bool, error) {
	if c.needed != nil {
		return c.needed, nil
	}
	needed := map[string]bool{}
	for _, e := range c.entries {
		if e.Err != nil {
			return nil, fmt.Errorf("what volume %s needs is unknown: %w", e.Name, e.Err)
		}
		for _, l := range e.Record.neededLayers() {
			needed[l] = true
		}
	}
	c.needed = needed
	return needed, nil
}

// checkSnapshotName makes sure that no volume but this one has a snapshot of that name.
func (c *scan) checkSnapshotName(volume, snapshot string) error {
	for _, e := range c.entries {
		if e.Name != volume && e.Record.snapshot(snapshot) != nil {
			return fmt.Errorf("%w: volume %s has a snapshot of that name", block.ErrExists, e.Name)
		}
	}
	return nil
}

// update notes a record that has been written, for the rest of the batch.
func (c *scan) update(rec Record) {
	for i := range c.entries {
		if c.entries[i].Name == rec.Name {
			c.entries[i].Record = rec
		}
	}
}
