package raw

import (
	"context"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// codec is an open raw image: everything is present, where it always is.
type codec struct {
	file      vfs.File
	sizeBytes int64
}

var _ engine.Codec = (*codec)(nil)

func (c *codec) Geometry() engine.Geometry {
	return engine.Geometry{SizeBytes: c.sizeBytes, LogicalBlockBytes: sectorBytes}
}

func (c *codec) Lookup(off, n int64) (engine.Run, error) {
	return engine.Run{State: engine.Data, Len: min(n, c.sizeBytes-off), FileOff: off, Flat: true}, nil
}

// Granule returns a sector: nothing ever has to become present.
func (c *codec) Granule(off int64) (start, end int64) {
	start = off / sectorBytes * sectorBytes
	return start, start + sectorBytes
}

// ReadCompressed, Allocate and Set are for runs that Lookup never returns.

func (c *codec) ReadCompressed(run engine.Run, _ []byte) error {
	return c.unmapped("read a compressed granule", run.GranuleOff)
}

func (c *codec) Allocate(off, _ int64) (engine.Place, error) {
	return engine.Place{}, c.unmapped("allocate", off)
}

func (c *codec) Set(off, _ int64, _ engine.State, _ engine.Place) ([]engine.Span, error) {
	return nil, c.unmapped("change the mapping", off)
}

func (c *codec) unmapped(op string, off int64) error {
	return fmt.Errorf("raw: %s at %#x of %s: %w: a raw image has no mapping", op, off, c.file.Name(), block.ErrUnsupported)
}

func (c *codec) Free(engine.Span, bool)      {}
func (c *codec) Begin(*engine.Commit) error  { return nil }
func (c *codec) Commit(*engine.Commit) error { return nil }
func (c *codec) Finish(*engine.Commit) error { return nil }

// SetParent refuses: nothing in the file could say what it stands on.
func (c *codec) SetParent(*engine.Commit, *engine.Parent) error {
	return fmt.Errorf("raw: parent of %s: %w: a raw image stands on nothing", c.file.Name(), block.ErrUnsupported)
}

// Resize is one change of the file's length. Until it is durable, a crash leaves the old
// one, the new one, or on some file systems one between.
func (c *codec) Resize(commit *engine.Commit, size int64) error {
	if size <= 0 || size > maxSizeBytes || size%sectorBytes != 0 {
		return fmt.Errorf("raw: resize %s from %d to %d bytes: %w: want a multiple of %d, at most %d",
			c.file.Name(), c.sizeBytes, size, block.ErrInvalid, sectorBytes, int64(maxSizeBytes))
	}
	if err := commit.Truncate(0, size); err != nil {
		return fmt.Errorf("raw: %w", err)
	}
	if err := commit.Sync(); err != nil {
		return fmt.Errorf("raw: %w", err)
	}
	c.sizeBytes = size
	return nil
}

// Identity returns nothing: a raw image has none, and no tables to replay a journal to.
func (c *codec) Identity() []byte { return nil }

// Check finds a file that somebody shortened while it was open; else there is nothing
// that could be wrong.
func (c *codec) Check(_ context.Context, _ *engine.Commit, _ func(done, total int64)) (engine.CheckResult, error) {
	size, err := c.file.Size()
	if err != nil {
		return engine.CheckResult{}, fmt.Errorf("raw: size of %s: %w", c.file.Name(), err)
	}
	result := engine.CheckResult{ImageEndOffset: size}
	if size < c.sizeBytes {
		result.Corruptions = 1
		result.Problems = []engine.Problem{{
			Corrupt: true,
			Text:    fmt.Sprintf("the file is %d bytes long, but was %d when it was opened", size, c.sizeBytes),
		}}
	}
	return result, nil
}

func (c *codec) Describe() engine.Description { return engine.Description{} }

func (c *codec) Close() error { return nil }
