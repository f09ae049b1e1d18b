package formats

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const (
	// copyChunkBytes is how much is read at once: enough for several compressed grains,
	// and for one large request to a network file system.
	copyChunkBytes = 2 << 20
	// copyReaders is how many chunks are read, and inflated, at the same time.
	copyReaders = 4
	// sparseUnitBytes is the least run of zeroes worth skipping where the destination
	// has no clusters.
	sparseUnitBytes = 4096
)

// Progress is told how far long work has got, in the work's own unit; done never
// decreases. It is called from one goroutine at a time.
type Progress func(done, total int64)

// Copy writes src's contents to dst, which must be at least as large and read as zeroes
// throughout: what is zero in src is not written, so a thin image stays thin. Several
// chunks are read at the same time, but written in guest order, so that the copy of one
// image always looks the same. Nothing is flushed. When Copy fails or ctx ends, dst
// holds an unknown part.
func Copy(ctx context.Context, dst, src block.Device, progress Progress) error {
	size := src.Info().SizeBytes
	if have := dst.Info().SizeBytes; have < size {
		return fmt.Errorf("copy: the destination has %d bytes, the source %d: %w", have, size, block.ErrInvalid)
	}
	if progress == nil {
		progress = func(int64, int64) {}
	}
	ctx, cancel := context.WithCancel(ctx)
	c := &copier{src: src, dst: dst, size: size, unit: sparseUnit(dst.Info())}
	defer c.readers.Wait()
	defer cancel()
	return c.write(c.read(ctx), progress)
}

// sparseUnit is the granularity in which zeroes are looked for: writing part of a
// cluster allocates all of it.
func sparseUnit(info block.Info) int64 {
	return min(max(info.ClusterBytes, sparseUnitBytes), copyChunkBytes)
}

type copier struct {
	src, dst block.Device
	size     int64
	unit     int64
	readers  sync.WaitGroup
}

// chunk is a part of the guest's bytes on its way.
type chunk struct {
	off, n int64
	data   []byte // nil: zeroes
	err    error
	ready  chan struct{} // closed once data or err is set
}

// read delivers chunks in guest order, while up to copyReaders are being read. It ends
// after the last one, after the first with an error, or when ctx ends.
func (c *copier) read(ctx context.Context) <-chan *chunk {
	queue := make(chan *chunk, copyReaders)
	c.readers.Go(func() {
		defer close(queue)
		slots := make(chan struct{}, copyReaders)
		for off := int64(0); off < c.size; {
			part := c.plan(ctx, off)
			off += part.n
			if part.err == nil && part.data != nil {
				slots <- struct{}{}
				c.readers.Go(func() {
					_, part.err = c.src.ReadAt(part.data, part.off)
					close(part.ready)
					<-slots
				})
			} else {
				close(part.ready)
			}
			select {
			case queue <- part:
			case <-ctx.Done():
				return
			}
			if part.data == nil && part.err != nil { // of chunks with data, err is their reader's
				return
			}
		}
	})
	return queue
}

// plan describes the next chunk: a run of zeroes of any length, or data up to the next
// boundary of a chunk.
func (c *copier) plan(ctx context.Context, off int64) *chunk {
	part := &chunk{off: off, ready: make(chan struct{})}
	if part.err = ctx.Err(); part.err != nil {
		return part
	}
	extent, err := c.src.Map(off, c.size-off)
	switch {
	case err != nil:
		part.err = fmt.Errorf("map: %w", err)
	case extent.Len <= 0:
		part.err = fmt.Errorf("map: an extent of %d bytes at %d: %w", extent.Len, off, block.ErrCorrupt)
	case extent.State == block.Data:
		// Data goes in aligned chunks even where it ends early: the next extent is
		// likely to be data, too.
		part.n = min(copyChunkBytes-off%copyChunkBytes, c.size-off)
		part.data = make([]byte, part.n)
	default:
		part.n = extent.Len
	}
	return part
}

// write takes chunks in order until there are no more.
func (c *copier) write(queue <-chan *chunk, progress Progress) error {
	var done int64
	for part := range queue {
		<-part.ready
		if part.err != nil {
			return fmt.Errorf("copy at guest offset %d: %w", part.off, part.err)
		}
		if err := c.writeData(part); err != nil {
			return fmt.Errorf("copy at guest offset %d: %w", part.off, err)
		}
		done = part.off + part.n
		progress(done, c.size)
	}
	if done < c.size {
		return fmt.Errorf("copy: stopped at guest offset %d: %w", done, context.Canceled)
	}
	return nil
}

// writeData writes what is not zero in a chunk, in as few pieces as there are.
func (c *copier) writeData(part *chunk) error {
	for start := int64(0); start < int64(len(part.data)); {
		end, zero := c.run(part, start)
		if !zero {
			if _, err := c.dst.WriteAt(part.data[start:end], part.off+start); err != nil {
				return err
			}
		}
		start = end
	}
	return nil
}

// run returns the end of the run of units at start that are all zero or all not.
func (c *copier) run(part *chunk, start int64) (end int64, zero bool) {
	for end = start; end < int64(len(part.data)); {
		next := min(end+c.unit-(part.off+end)%c.unit, int64(len(part.data)))
		now := isZero(part.data[end:next])
		if end == start {
			zero = now
		} else if now != zero {
			return end, zero
		}
		end = next
	}
	return end, zero
}

// zeroPage is what isZero compares with.
var zeroPage [64 << 10]byte

func isZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeroPage))
		if !bytes.Equal(p[:n], zeroPage[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

// Convert makes a new image of a format with src's contents: it creates the image as req
// says (its SizeBytes 0 means src's, rounded up to what the format can have), copies
// into it, makes it durable and closes it. On an error nothing is left of it.
func Convert(ctx context.Context, src block.Device, to Format, req CreateRequest, progress Progress) error {
	if req.SizeBytes == 0 {
		req.SizeBytes = src.Info().SizeBytes
		if m := to.Options().SizeMultiple; m > 0 {
			req.SizeBytes = (req.SizeBytes + m - 1) / m * m
		}
	}
	if err := to.Create(ctx, req); err != nil {
		return err
	}
	files, err := fill(ctx, src, to, req, progress)
	if err != nil {
		return removeFailed(err, req, files)
	}
	return nil
}

// fill copies src into a new image and makes it durable. It returns the files that the
// image consists of, as far as it got to know them.
func fill(ctx context.Context, src block.Device, to Format, req CreateRequest, progress Progress) (files []string, err error) {
	files = []string{req.Name}
	dst, err := Open(ctx, req.FS, req.Name, OpenOptions{Format: to.Name(), Mode: vfs.ReadWrite})
	if err != nil {
		return files, err
	}
	files = nil
	for _, f := range dst.Layers()[0].Files {
		files = append(files, f.Name())
	}
	err = Copy(ctx, dst, src, progress)
	return files, errors.Join(err, dst.Close())
}

// removeFailed removes what a failed conversion made, and returns why it failed.
func removeFailed(err error, req CreateRequest, files []string) error {
	if !slices.Contains(files, req.Name) {
		files = append(files, req.Name)
	}
	for _, name := range files {
		if e := req.FS.Remove(name); e != nil && !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, fmt.Errorf("remove the unfinished %s: %w", name, e))
		}
	}
	return err
}
