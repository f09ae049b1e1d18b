package formats

import (
	"context"
	"fmt"
	"sync"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Difference is how two images differ first; the zero value says that they do not.
type Difference struct {
	Kind DifferenceKind
	// Off is the guest offset of the first byte, or state, that differs; of sizes, the
	// smaller one.
	Off int64
}

// DifferenceKind is in what two images differ.
type DifferenceKind string

// The kinds of difference. Allocation and sizes count only in a strict comparison.
const (
	DifferentSize       DifferenceKind = "size"
	DifferentAllocation DifferenceKind = "allocation"
	DifferentContents   DifferenceKind = "contents"
)

// CompareError is a failure to examine one of two images, as opposed to a difference.
type CompareError struct {
	Mapping bool // asking for allocation failed, else reading
	Err     error
}

// Error says what failed.
func (e *CompareError) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *CompareError) Unwrap() error { return e.Err }

// Compare finds the first difference between the guest contents of two devices. Past the
// end of the smaller one the larger must be zero. A strict comparison also wants equal
// sizes, and data where the other has data. A failure is a *CompareError, or ctx's error;
// one behind the first difference does not count.
func Compare(ctx context.Context, a, b block.Device, strict bool, progress Progress) (Difference, error) {
	sizes := [2]int64{a.Info().SizeBytes, b.Info().SizeBytes}
	if strict && sizes[0] != sizes[1] {
		return Difference{DifferentSize, min(sizes[0], sizes[1])}, nil
	}
	total := max(sizes[0], sizes[1])
	s := &search{total: total, segment: segmentBytes(total), first: verdict{off: total}, progress: progress}
	var all sync.WaitGroup
	for range copyWorkers() {
		all.Go(func() {
			c := newComparison(a, b, strict)
			for start, ok := s.next(); ok; start, ok = s.next() {
				s.examine(ctx, c, start)
			}
		})
	}
	all.Wait()
	return s.first.difference, s.first.err
}

// segmentBytes is how much one goroutine compares before it takes the next piece.
func segmentBytes(total int64) int64 {
	const least, most, pieces = 1 << 20, 64 << 20, 64
	return min(max(total/pieces, least), most) &^ (least - 1)
}

// search is what the goroutines that compare two disks share.
type search struct {
	total, segment int64
	progress       Progress

	mu     sync.Mutex
	handed int64 // segments below this guest offset have been handed out
	done   int64
	first  verdict
}

// verdict is what ended a comparison, and where.
type verdict struct {
	off        int64
	difference Difference
	err        error
}

// next hands out the next segment, as long as nothing was found before it.
func (s *search) next() (start int64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	start = s.handed
	s.handed += s.segment
	return start, start < s.first.off
}

// examine compares a segment up to the first difference or failure in it.
func (s *search) examine(ctx context.Context, c *comparison, start int64) {
	end := min(start+s.segment, s.total)
	for off := start; off < end; {
		if err := ctx.Err(); err != nil {
			s.found(verdict{off: off, err: err})
			return
		}
		n, d, err := c.step(off, end-off)
		if err != nil || d.Kind != "" {
			s.found(verdict{max(off, d.Off), d, err})
			return
		}
		off += n
		if !s.advance(off, n) {
			return
		}
	}
}

// found keeps what is nearest to the disks' beginning.
func (s *search) found(v verdict) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v.off < s.first.off {
		s.first = v
	}
}

// advance notes that n more bytes, which end at off, are equal. It reports whether those
// behind them still matter.
func (s *search) advance(off, n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done += n
	if s.progress != nil {
		s.progress(s.done, s.total)
	}
	return off < s.first.off
}

func newComparison(a, b block.Device, strict bool) *comparison {
	return &comparison{
		devices: [2]block.Device{a, b},
		sizes:   [2]int64{a.Info().SizeBytes, b.Info().SizeBytes},
		strict:  strict,
		buffers: [2][]byte{make([]byte, copyChunkBytes), make([]byte, copyChunkBytes)},
	}
}

type comparison struct {
	devices [2]block.Device
	sizes   [2]int64
	strict  bool
	buffers [2][]byte
}

// step compares the guest bytes at off, at most n, for as long as both devices have one
// state, and returns how many that were.
func (c *comparison) step(off, n int64) (int64, Difference, error) {
	var data [2]bool
	for i := range c.devices {
		if off >= c.sizes[i] {
			continue // past the end: zeroes
		}
		extent, err := c.devices[i].Map(off, min(n, c.sizes[i]-off))
		if err == nil && extent.Len <= 0 {
			err = fmt.Errorf("an extent of %d bytes: %w", extent.Len, block.ErrCorrupt)
		}
		if err != nil {
			return 0, Difference{}, &CompareError{Mapping: true, Err: fmt.Errorf("map guest offset %d: %w", off, err)}
		}
		n = min(n, extent.Len)
		data[i] = extent.State == block.Data
	}
	switch {
	case c.strict && data[0] != data[1]:
		return 0, Difference{DifferentAllocation, off}, nil
	case !data[0] && !data[1]:
		return n, Difference{}, nil
	}
	n = min(n, copyChunkBytes)
	for i := range c.devices {
		if err := c.read(i, data[i], off, n); err != nil {
			return 0, Difference{}, &CompareError{Err: fmt.Errorf("read guest offset %d: %w", off, err)}
		}
	}
	if at := firstDifference(c.buffers[0][:n], c.buffers[1][:n]); at >= 0 {
		return 0, Difference{DifferentContents, off + at}, nil
	}
	return n, Difference{}, nil
}

func (c *comparison) read(i int, data bool, off, n int64) error {
	if !data {
		clear(c.buffers[i][:n])
		return nil
	}
	_, err := c.devices[i].ReadAt(c.buffers[i][:n], off)
	return err
}

// firstDifference returns the index of the first byte in which a and b differ, or -1.
func firstDifference(a, b []byte) int64 {
	const step = 4096
	for at := 0; at < len(a); at += step {
		end := min(at+step, len(a))
		if string(a[at:end]) == string(b[at:end]) {
			continue
		}
		for i := at; i < end; i++ {
			if a[i] != b[i] {
				return int64(i)
			}
		}
	}
	return -1
}
