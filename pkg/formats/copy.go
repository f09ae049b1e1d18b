package formats

import (
	"bytes"
	"context"
	"fmt"
	"runtime"
	"sync"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

const (
	// copyChunkBytes is how much is read at once: enough for several compressed grains,
	// and for one large request to a network file system.
	copyChunkBytes = 2 << 20
	// sparseUnitBytes is the least run of zeroes worth skipping where the destination
	// has no clusters.
	sparseUnitBytes = 4096
)

// copyWorkers is how many chunks are read, inflated and compressed at the same time: two
// for each processor, so that some can wait for the store while others compute.
func copyWorkers() int { return min(max(2*runtime.GOMAXPROCS(0), 4), 16) }

// Progress is told how far long work has got, in the work's own unit; done never
// decreases. It is called from one goroutine at a time.
type Progress func(done, total int64)

// Copying says how to copy; the zero value copies onto a disk of zeroes.
type Copying struct {
	// Under is what the destination reads as before anything is written, nil for
	// zeroes. Only what differs from it is written; it may be shorter than the source.
	Under block.Device
	// Compress stores compressed what becomes smaller so. The destination is an
	// [Image] of a format that can.
	Compress bool
}

// Copy writes src's contents to dst, which must read as zeroes throughout: see
// [Copying.Copy].
func Copy(ctx context.Context, dst, src block.Device, progress Progress) error {
	return Copying{}.Copy(ctx, dst, src, progress)
}

// Copy writes src's contents to dst, which must be at least as large. What dst has already
// is not written, so a thin image stays thin. Several chunks are read, compared and
// compressed at the same time. Where dst allocates as it is written, they are written in
// guest order, so that the copy of one image always looks the same. Nothing is flushed.
// When Copy fails or ctx ends, dst holds an unknown part.
func (o Copying) Copy(ctx context.Context, dst, src block.Device, progress Progress) error {
	size := src.Info().SizeBytes
	if have := dst.Info().SizeBytes; have < size {
		return fmt.Errorf("copy: the destination has %d bytes, the source %d: %w", have, size, block.ErrInvalid)
	}
	c, err := o.copier(dst, src, size)
	if err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	return c.run(ctx, progress)
}

func (o Copying) copier(dst, src block.Device, size int64) (*copier, error) {
	info := dst.Info()
	c := &copier{
		src: src, dst: dst, under: o.Under, size: size, look: src.Map,
		unit: min(max(info.ClusterBytes, sparseUnitBytes), copyChunkBytes), chunkBytes: copyChunkBytes,
		ordered: info.ClusterBytes > 0,
	}
	image, ok := dst.(*Image)
	if !o.Compress && (!ok || !image.Sequential()) {
		return c, nil
	}
	if ok {
		_, end, can := image.CompressedGranule(0)
		c.packer, c.unit, ok = image.Disk, end, can
	}
	if !ok {
		return nil, fmt.Errorf("compress: %w: the format, or this kind of it, holds no compressed data", block.ErrUnsupported)
	}
	c.chunkBytes = max(c.chunkBytes, c.unit)
	return c, nil
}

// copier copies in three steps: plan cuts the guest's bytes into chunks, several workers
// prepare chunks (and write them, if their order does not matter), and finish takes them
// in guest order, writes what has to be written in order, and says how far it is.
type copier struct {
	src, dst   block.Device
	under      block.Device // nil: zeroes
	packer     *engine.Disk // nil: nothing is compressed
	size       int64
	unit       int64 // in which bytes are compared: writing a part of a cluster allocates all of it
	chunkBytes int64 // a multiple of unit
	ordered    bool  // chunks are written in guest order
	look       func(off, n int64) (block.Extent, error)
	// held says that only what look finds to be data or zero is copied, else everything.
	held bool

	buffers chan *copyBuffers // not in use; as many as may be on their way at the same time
}

// copyBuffers hold a chunk, and what is under it.
type copyBuffers struct{ data, under []byte }

// chunk is a part of the guest's bytes on its way.
type chunk struct {
	off, n int64 // of data, n is at most chunkBytes
	skip   bool  // there is nothing to do
	zero   bool  // the source has zeroes here
	*copyBuffers
	pieces []piece
	err    error
	ready  chan struct{} // closed once pieces and err are set
}

// piece is a part of a chunk that is to be written.
type piece struct {
	off, n int64
	data   []byte        // nil: zeroes
	packed engine.Packed // instead of data, if packing is on
}

func (c *copier) run(ctx context.Context, progress Progress) error {
	ctx, cancel := context.WithCancel(ctx)
	workers := copyWorkers()
	c.buffers = make(chan *copyBuffers, 2*workers)
	for range cap(c.buffers) {
		c.buffers <- new(copyBuffers) // filled when they are first used
	}
	todo, inOrder := make(chan *chunk), make(chan *chunk, 2*workers)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	all.Go(func() {
		defer close(todo)
		defer close(inOrder)
		c.plan(ctx, todo, inOrder)
	})
	for range workers {
		all.Go(func() {
			for part := range todo {
				c.prepare(part)
			}
		})
	}
	if err := c.finish(ctx, inOrder, progress); err != nil {
		cancel()
		for range inOrder { // let plan end
		}
		return err
	}
	return nil
}

// plan hands out chunks until the last, the first that cannot be found out, or ctx's end.
func (c *copier) plan(ctx context.Context, todo, inOrder chan<- *chunk) {
	for off := int64(0); off < c.size; {
		part := c.next(off)
		// From when it is handed out on, a part is not this goroutine's.
		end, failed, work := off+part.n, part.err != nil, part.err == nil && !part.skip
		if work {
			select {
			case part.copyBuffers = <-c.buffers:
			case <-ctx.Done():
				return
			}
		} else {
			close(part.ready)
		}
		select {
		case inOrder <- part:
		case <-ctx.Done():
			return
		}
		if work {
			todo <- part
		}
		if failed {
			return
		}
		off = end
	}
}

// next describes the chunk at off: a run of zeroes, or of nothing, of any length, or data
// up to the next boundary of a chunk.
func (c *copier) next(off int64) *chunk {
	part := &chunk{off: off, ready: make(chan struct{})}
	extent, err := c.look(off, c.size-off)
	if err == nil && extent.Len <= 0 {
		err = fmt.Errorf("an extent of %d bytes: %w", extent.Len, block.ErrCorrupt)
	}
	if err != nil {
		part.err = fmt.Errorf("map: %w", err)
		return part
	}
	inChunk := min(c.chunkBytes-off%c.chunkBytes, c.size-off)
	switch {
	case c.held:
		part.n = extent.Len
		part.skip, part.zero = extent.State == block.Unallocated, extent.State == block.Zero
		if extent.State == block.Data {
			part.n = min(part.n, inChunk)
		}
	case extent.State == block.Data:
		// Data goes in aligned chunks even where it ends early: the next extent is
		// likely to be data, too.
		part.n = inChunk
	default:
		part.n = extent.Len
		if end := off + part.n; c.packer != nil && end < c.size {
			part.n = end/c.unit*c.unit - off // what is compressed must begin where a unit does
		}
		if part.zero = part.n > 0; !part.zero {
			part.n = inChunk
		}
		part.skip = part.zero && c.under == nil
	}
	return part
}

// prepare reads a chunk and finds out what of it is to be written; where order does not
// matter it writes that, too.
func (c *copier) prepare(part *chunk) {
	defer close(part.ready)
	part.err = c.examine(part)
	if part.err == nil && !c.ordered {
		part.err = c.write(part)
	}
	if part.err != nil || !c.ordered {
		c.recycle(part)
	}
}

func (c *copier) recycle(part *chunk) {
	if part.copyBuffers != nil {
		c.buffers <- part.copyBuffers
		part.copyBuffers, part.pieces = nil, nil
	}
}

func (c *copier) examine(part *chunk) error {
	if part.zero { // over something
		part.pieces = []piece{{off: part.off, n: part.n}}
		return nil
	}
	if part.data == nil {
		part.data = make([]byte, c.chunkBytes)
	}
	data := part.data[:part.n]
	if _, err := c.src.ReadAt(data, part.off); err != nil {
		return err
	}
	under, err := c.readUnder(part)
	if err != nil {
		return fmt.Errorf("what is under it: %w", err)
	}
	for start := int64(0); start < part.n; {
		end, kind := c.alike(data, under, part.off, start)
		if kind != present {
			if err := c.add(part, start, end, kind); err != nil {
				return err
			}
		}
		start = end
	}
	return nil
}

// readUnder reads what the destination has where part is to go; nil if that is zeroes.
func (c *copier) readUnder(part *chunk) ([]byte, error) {
	if c.under == nil {
		return nil, nil
	}
	n := min(part.n, c.under.Info().SizeBytes-part.off)
	if n <= 0 {
		return nil, nil
	}
	if part.under == nil {
		part.under = make([]byte, c.chunkBytes)
	}
	under := part.under[:part.n]
	clear(under[n:])
	_, err := c.under.ReadAt(under[:n], part.off)
	return under, err
}

// unitKind says what has to be done for a unit.
type unitKind int

const (
	present   unitKind = iota // the destination has it
	zeroUnit                  // it becomes zeroes
	otherUnit                 // it is written
)

// alike returns the end of the run of units at start that are of one kind. Of what is
// compressed, each unit is a run.
func (c *copier) alike(data, under []byte, off, start int64) (end int64, kind unitKind) {
	for end = start; end < int64(len(data)); {
		next := min(end+c.unit-(off+end)%c.unit, int64(len(data)))
		now := unitToWrite(data[end:next], under, end)
		if end == start {
			kind = now
		} else if now != kind || c.packer != nil && kind == otherUnit {
			return end, kind
		}
		end = next
	}
	return end, kind
}

func unitToWrite(data, under []byte, at int64) unitKind {
	switch {
	case under == nil && isZero(data):
		return present
	case under == nil:
		return otherUnit
	case bytes.Equal(data, under[at:at+int64(len(data))]):
		return present
	case isZero(data):
		return zeroUnit
	}
	return otherUnit
}

func (c *copier) add(part *chunk, start, end int64, kind unitKind) error {
	p := piece{off: part.off + start, n: end - start}
	if kind == otherUnit {
		p.data = part.data[start:end]
		if c.packer != nil {
			var err error
			if p.packed, err = c.packer.Pack(p.data, p.off); err != nil {
				return err
			}
		}
	}
	part.pieces = append(part.pieces, p)
	return nil
}

// finish takes chunks in guest order until there are no more.
func (c *copier) finish(ctx context.Context, inOrder <-chan *chunk, progress Progress) error {
	var done int64
	for part := range inOrder {
		select {
		case <-part.ready:
		case <-ctx.Done():
			return fmt.Errorf("copy: stopped at guest offset %d: %w", done, ctx.Err())
		}
		err := part.err
		if err == nil && c.ordered {
			err = c.write(part)
			c.recycle(part)
		}
		if err != nil {
			return fmt.Errorf("copy at guest offset %d: %w", part.off, err)
		}
		done = part.off + part.n
		if progress != nil {
			progress(done, c.size)
		}
	}
	if done < c.size {
		return fmt.Errorf("copy: stopped at guest offset %d: %w", done, ctx.Err())
	}
	return nil
}

func (c *copier) write(part *chunk) error {
	for _, p := range part.pieces {
		var err error
		switch {
		case p.data == nil:
			err = c.dst.WriteZeroes(p.off, p.n, 0)
		case c.packer != nil:
			err = c.packer.WritePacked(p.packed)
		default:
			_, err = c.dst.WriteAt(p.data, p.off)
		}
		if err != nil {
			return err
		}
	}
	return nil
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
