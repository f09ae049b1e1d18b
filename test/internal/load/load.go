// Package load writes and reads a block device at random, and knows what each of its
// blocks has to hold: after any number of pauses, restarts of what serves the device,
// growths and snapshots.
//
//   - load.go: [Model] and its workers, each of which owns a part of the device
//   - worker.go: what a worker does
//   - block.go: what a block holds
//   - cut.go: what a snapshot may hold that was taken meanwhile
package load

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// BlockBytes is the size of the blocks that are written.
const BlockBytes = 4096

// stripeBlocks is how many blocks in a row are one worker's, and the most in a request.
const stripeBlocks = 256

// Options shape a load.
type Options struct {
	// Workers is how many requests there are at once.
	Workers int
	// Pause is how long a worker waits between two requests, on average.
	Pause time.Duration
	// ID is written into every block, so that another device's are recognised.
	ID uint32
}

// Counts is what a model's workers have done.
type Counts struct {
	Requests     int64 // of all kinds
	WrittenBytes int64
	ReadBytes    int64         // and compared
	Longest      time.Duration // the longest request
}

// Model knows what a device's blocks hold. One [Run] at a time changes them.
type Model struct {
	options Options
	workers []*worker
	blocks  atomic.Int64 // of the device
}

// New returns the model of a device that is all zeroes.
func New(sizeBytes int64, rng *rand.Rand, opts Options) *Model {
	m := &Model{options: opts}
	for i := range opts.Workers {
		m.workers = append(m.workers, &worker{
			model: m, number: i, rng: rand.New(rand.NewPCG(rng.Uint64(), rng.Uint64())),
		})
	}
	m.blocks.Store(sizeBytes / BlockBytes)
	return m
}

// Grow says that the device has become larger; what is new is zeroes. It may be called
// during a run.
func (m *Model) Grow(sizeBytes int64) { m.blocks.Store(sizeBytes / BlockBytes) }

// Counts returns what was done so far.
func (m *Model) Counts() (c Counts) {
	for _, w := range m.workers {
		c.Requests += w.requests.Load()
		c.WrittenBytes += w.written.Load()
		c.ReadBytes += w.read.Load()
		c.Longest = max(c.Longest, time.Duration(w.longest.Load()))
	}
	return c
}

// Run is load on a device.
type Run struct {
	model  *Model
	stop   atomic.Bool
	wg     sync.WaitGroup
	failed chan struct{} // closed when a worker has failed
	once   sync.Once
}

// Start loads a device until the run is stopped, or a request fails.
func (m *Model) Start(path string) (*Run, error) {
	r := &Run{model: m, failed: make(chan struct{})}
	for _, w := range m.workers {
		if err := w.open(path); err != nil {
			return nil, errors.Join(err, m.closeAll())
		}
	}
	for _, w := range m.workers {
		r.wg.Go(func() {
			if w.err = w.run(&r.stop); w.err != nil {
				r.stop.Store(true)
				r.once.Do(func() { close(r.failed) })
			}
		})
	}
	return r, nil
}

// Failed is closed when a request has failed or a block held something else: Stop
// returns what it was.
func (r *Run) Failed() <-chan struct{} { return r.failed }

// Stop waits for the requests that are under way, and closes the device. It returns the
// first failure of each worker.
func (r *Run) Stop() error {
	r.stop.Store(true)
	r.wg.Wait()
	var errs []error
	for _, w := range r.model.workers {
		errs = append(errs, w.err)
	}
	return errors.Join(append(errs, r.model.closeAll())...)
}

// Verify reads a whole device, on which nothing runs, and compares.
func (m *Model) Verify(path string) error {
	var errs []error
	for _, w := range m.workers {
		if err := w.open(path); err != nil {
			return errors.Join(err, m.closeAll())
		}
		errs = append(errs, w.verifyAll())
	}
	return errors.Join(append(errs, m.closeAll())...)
}

func (m *Model) closeAll() error {
	var errs []error
	for _, w := range m.workers {
		errs = append(errs, w.close())
	}
	return errors.Join(errs...)
}

// awaitPoll is how often AwaitRequests looks.
const awaitPoll = 5 * time.Millisecond

// AwaitRequests waits until n more requests were answered. It gives up when the run has
// failed, or when none was answered for as long as limit: how long all of them may take
// depends on how slow the machine is.
func (r *Run) AwaitRequests(n int64, limit time.Duration) error {
	done, since := r.model.Counts().Requests, time.Now()
	for enough := done + n; done < enough; {
		select {
		case <-r.failed:
			return errors.New("the load has failed")
		case <-time.After(awaitPoll):
		}
		if now := r.model.Counts().Requests; now != done {
			done, since = now, time.Now()
		}
		if done < enough && time.Since(since) > limit {
			return fmt.Errorf("no request was answered for %v, and %d more are to be", limit, enough-done)
		}
	}
	return nil
}

// open opens a device for direct I/O.
func (w *worker) open(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	// Aligned, as direct I/O wants it.
	w.buf, err = unix.Mmap(-1, 0, stripeBlocks*BlockBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANONYMOUS|unix.MAP_PRIVATE)
	if err != nil {
		f.Close()
		return fmt.Errorf("memory for requests: %w", err)
	}
	w.dev = f
	return nil
}

func (w *worker) close() error {
	if w.dev == nil {
		return nil
	}
	err := errors.Join(w.dev.Close(), unix.Munmap(w.buf))
	w.dev, w.buf = nil, nil
	return err
}
