package attachtest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	loadWorkers    = 8
	loadBlockBytes = 4096
	loadMaxBlocks  = 32 // per request
)

// load is verifying load: workers that write and read random blocks with O_DIRECT, each
// in a part of its own, and know what every block has to hold.
type load struct {
	stop    atomic.Bool
	workers [loadWorkers]*loadWorker
	wg      sync.WaitGroup
}

type loadWorker struct {
	dev      *os.File
	rng      *rand.Rand
	firstOff int64
	versions []uint32 // of each block; 0 = not written yet
	buf      []byte   // aligned for O_DIRECT

	requests atomic.Int64
	longest  time.Duration
	err      error
}

// startLoad loads the first sizeBytes of a device or file until stopped.
func startLoad(path string, sizeBytes int64, rng *rand.Rand) (*load, error) {
	l := &load{}
	part := sizeBytes / loadWorkers / loadBlockBytes
	for i := range l.workers {
		dev, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
		if err != nil {
			return nil, err
		}
		buf, err := unix.Mmap(-1, 0, loadBlockBytes*loadMaxBlocks, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANONYMOUS|unix.MAP_PRIVATE)
		if err != nil {
			return nil, err
		}
		l.workers[i] = &loadWorker{
			dev: dev, rng: rand.New(rand.NewPCG(rng.Uint64(), rng.Uint64())), buf: buf,
			firstOff: int64(i) * part * loadBlockBytes, versions: make([]uint32, part),
		}
	}
	for _, w := range l.workers {
		l.wg.Go(func() { w.run(&l.stop) })
	}
	return l, nil
}

// loadResult is what a load has seen.
type loadResult struct {
	Requests int64
	Longest  time.Duration // the longest request
}

// progress returns how many requests have been answered.
func (l *load) progress() (n int64) {
	for _, w := range l.workers {
		n += w.requests.Load()
	}
	return n
}

// finish stops the load, reads everything once more and compares.
func (l *load) finish() (loadResult, error) {
	l.stop.Store(true)
	l.wg.Wait()
	var r loadResult
	for _, w := range l.workers {
		if w.err == nil {
			w.err = w.verifyAll()
		}
		if w.err != nil {
			return r, w.err
		}
		r.Requests += w.requests.Load()
		r.Longest = max(r.Longest, w.longest)
		w.dev.Close()
		_ = unix.Munmap(w.buf)
	}
	return r, nil
}

func (w *loadWorker) run(stop *atomic.Bool) {
	for !stop.Load() && w.err == nil {
		first := w.rng.IntN(len(w.versions))
		n := min(1+w.rng.IntN(loadMaxBlocks), len(w.versions)-first)
		start := time.Now()
		if w.rng.IntN(3) == 0 {
			w.err = w.verify(first, n)
		} else {
			w.err = w.write(first, n)
		}
		w.longest = max(w.longest, time.Since(start))
		w.requests.Add(1)
		if w.err == nil && w.rng.IntN(200) == 0 {
			w.err = w.dev.Sync()
		}
	}
}

func (w *loadWorker) off(blockIndex int) int64 { return w.firstOff + int64(blockIndex)*loadBlockBytes }

func (w *loadWorker) write(first, n int) error {
	b := w.buf[:n*loadBlockBytes]
	for i := range n {
		fillBlock(b[i*loadBlockBytes:(i+1)*loadBlockBytes], w.off(first+i), w.versions[first+i]+1)
	}
	if _, err := w.dev.WriteAt(b, w.off(first)); err != nil {
		return err
	}
	for i := range n {
		w.versions[first+i]++
	}
	return nil
}

func (w *loadWorker) verify(first, n int) error {
	b := w.buf[:n*loadBlockBytes]
	if _, err := w.dev.ReadAt(b, w.off(first)); err != nil {
		return err
	}
	var want [loadBlockBytes]byte
	for i := range n {
		version := w.versions[first+i]
		if version == 0 {
			continue
		}
		fillBlock(want[:], w.off(first+i), version)
		if got := b[i*loadBlockBytes : (i+1)*loadBlockBytes]; !bytes.Equal(got, want[:]) {
			return fmt.Errorf("block at %d: want version %d, got one that says offset %d, version %d",
				w.off(first+i), version, binary.LittleEndian.Uint64(got), binary.LittleEndian.Uint32(got[8:]))
		}
	}
	return nil
}

func (w *loadWorker) verifyAll() error {
	for first := 0; first < len(w.versions); first += loadMaxBlocks {
		if err := w.verify(first, min(loadMaxBlocks, len(w.versions)-first)); err != nil {
			return err
		}
	}
	return nil
}

// fillBlock fills a block with what its place and version determine.
func fillBlock(b []byte, off int64, version uint32) {
	binary.LittleEndian.PutUint64(b, uint64(off))
	binary.LittleEndian.PutUint32(b[8:], version)
	x := uint64(off)*0x9e3779b97f4a7c15 + uint64(version)
	for i := 16; i+8 <= len(b); i += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(b[i:], x)
	}
	binary.LittleEndian.PutUint32(b[12:], uint32(x>>32))
}
