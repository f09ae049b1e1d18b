package load

import (
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// worker makes one request after the other to every so-manieth stripe of a device.
type worker struct {
	model  *Model
	number int
	rng    *rand.Rand
	states []state // of its blocks
	seq    uint64  // of its last request that changed something

	dev  *os.File
	buf  []byte
	want [BlockBytes]byte
	err  error // of the run; for who has waited for its end

	requests, written, read, longest atomic.Int64

	// What may be read while the worker runs.
	mu        sync.Mutex
	completed uint64          // like seq, of those that were answered
	pending   pending         // what the request under way changes
	history   map[int][]state // see Cut; nil while none is being recorded
}

// pending is what blocks were before the request that is under way.
type pending struct {
	first int
	were  []state
}

// count returns how many of a device's blocks are the worker's.
func (w *worker) count() int {
	all, round := int(w.model.blocks.Load()), len(w.model.workers)*stripeBlocks
	rest := all%round - w.number*stripeBlocks
	return all/round*stripeBlocks + min(max(rest, 0), stripeBlocks)
}

// off returns where one of the worker's blocks lies.
func (w *worker) off(i int) int64 {
	stripe := i/stripeBlocks*len(w.model.workers) + w.number
	return int64(stripe*stripeBlocks+i%stripeBlocks) * BlockBytes
}

// adopt makes room for blocks by which the device has grown.
func (w *worker) adopt() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n := w.count(); n > len(w.states) {
		w.states = append(w.states, make([]state, n-len(w.states))...)
	}
}

func (w *worker) run(stop *atomic.Bool) error {
	for !stop.Load() {
		w.adopt()
		start := time.Now()
		if err := w.request(); err != nil {
			return fmt.Errorf("%s, worker %d, after %v: %w", w.dev.Name(), w.number, time.Since(start).Round(time.Millisecond), err)
		}
		w.longest.Store(max(w.longest.Load(), int64(time.Since(start))))
		w.requests.Add(1)
		if pause := w.model.options.Pause; pause > 0 {
			time.Sleep(time.Duration(w.rng.Int64N(2 * int64(pause))))
		}
	}
	return nil
}

// request makes one request, of one kind or another.
func (w *worker) request() error {
	first := w.rng.IntN(len(w.states))
	n := w.length(first)
	switch p := w.rng.IntN(100); {
	case p < 55:
		return w.change(first, n, data)
	case p < 85:
		return w.verify(first, n)
	case p < 90:
		return w.change(first, n, zeroes)
	case p < 93:
		return w.change(first, n, anything)
	default:
		return w.dev.Sync()
	}
}

// length draws a request's length in blocks, short ones more often, that stays in its
// stripe.
func (w *worker) length(first int) int {
	most := min(stripeBlocks-first%stripeBlocks, len(w.states)-first)
	return min(1+w.rng.IntN(1<<w.rng.IntN(9)), most)
}

// change writes, zeroes or discards blocks.
func (w *worker) change(first, n int, to kind) error {
	w.seq++
	w.issue(first, n, state{w.seq, to})
	off, length := w.off(first), n*BlockBytes
	if err := w.carryOut(off, length, to); err != nil {
		return fmt.Errorf("%s %d bytes at %d: %w", verbs[to], length, off, err)
	}
	w.written.Add(int64(length))
	w.mu.Lock()
	w.completed, w.pending.were = w.seq, w.pending.were[:0]
	w.mu.Unlock()
	return nil
}

var verbs = map[kind]string{zeroes: "zero", data: "write", anything: "discard"}

func (w *worker) carryOut(off int64, length int, to kind) error {
	if to == data {
		b := w.buf[:length]
		for i := 0; i < length; i += BlockBytes {
			w.fill(b[i:i+BlockBytes], off+int64(i), w.seq)
		}
		_, err := w.dev.WriteAt(b, off)
		return err
	}
	request := uintptr(unix.BLKZEROOUT)
	if to == anything {
		request = unix.BLKDISCARD
	}
	span := [2]uint64{uint64(off), uint64(length)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, w.dev.Fd(), request, uintptr(unsafe.Pointer(&span))); errno != 0 && errno != unix.EOPNOTSUPP {
		return errno
	}
	return nil
}

// issue notes what blocks are about to become.
func (w *worker) issue(first, n int, s state) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pending = pending{first, append(w.pending.were[:0], w.states[first:first+n]...)}
	for i := first; i < first+n; i++ {
		if w.history != nil {
			if w.history[i] == nil {
				w.history[i] = []state{w.states[i]}
			}
			w.history[i] = append(w.history[i], s)
		}
		w.states[i] = s
	}
}

// verify reads blocks and compares.
func (w *worker) verify(first, n int) error {
	b, off := w.buf[:n*BlockBytes], w.off(first)
	if _, err := w.dev.ReadAt(b, off); err != nil {
		return fmt.Errorf("read %d bytes at %d: %w", len(b), off, err)
	}
	w.read.Add(int64(len(b)))
	for i := range n {
		got, off := b[i*BlockBytes:(i+1)*BlockBytes], w.off(first+i)
		if s := w.states[first+i]; !w.holds(got, off, s) {
			return fmt.Errorf("block at %d: want %v, got %s", off, s, describe(got))
		}
	}
	return nil
}

func (w *worker) verifyAll() error {
	w.adopt()
	for first := 0; first < len(w.states); first += stripeBlocks {
		if err := w.verify(first, min(stripeBlocks, len(w.states)-first)); err != nil {
			return fmt.Errorf("%s, worker %d: %w", w.dev.Name(), w.number, err)
		}
	}
	return nil
}
