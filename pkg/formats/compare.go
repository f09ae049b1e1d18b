package formats

import (
	"context"
	"fmt"

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
// sizes, and data where the other has data. A failure is a *CompareError, or ctx's error.
func Compare(ctx context.Context, a, b block.Device, strict bool, progress Progress) (Difference, error) {
	c := newComparison(a, b, strict)
	if strict && c.sizes[0] != c.sizes[1] {
		return Difference{DifferentSize, min(c.sizes[0], c.sizes[1])}, nil
	}
	if progress == nil {
		progress = func(int64, int64) {}
	}
	total := max(c.sizes[0], c.sizes[1])
	for off := int64(0); off < total; {
		if err := ctx.Err(); err != nil {
			return Difference{}, err
		}
		n, d, err := c.step(off, total-off)
		if err != nil || d.Kind != "" {
			return d, err
		}
		off += n
		progress(off, total)
	}
	return Difference{}, nil
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
