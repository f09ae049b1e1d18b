package vmdk

import (
	"errors"
	"fmt"
	"io"
	"sort"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// image is an open VMDK: what its descriptor says, and its extents. It is the engine's
// Codec; where the engine says in its errors which image it asked about what, they are
// passed on as they are.
type image struct {
	fs     vfs.FS
	layer  *engine.Layer
	noLock bool

	descriptor     *descriptor
	descriptorAt   int64 // in file 0
	descriptorRoom int64 // how long the descriptor may become, 0 if it has its own file

	createType     string
	cid, parentCID uint32
	readOnly       string // why it is not written, whatever mode it was opened in; "" if it is
	ownersJudged   bool   // no two grain table entries refer to one grain
	sizeBytes      int64
	extents        []extent // in guest order, without gaps
}

var _ engine.Codec = (*image)(nil)

// imageOf returns the image that a codec is, nil if it is another format's.
func imageOf(c engine.Codec) *image {
	switch c := c.(type) {
	case *image:
		return c
	case streamImage:
		return c.image
	}
	return nil
}

// extent is a piece of the guest, in one file.
type extent struct {
	guestOff, guestEnd int64
	sparse             *sparse   // hosted or COWD; nil if it is of another kind
	se                 *seSparse // seSparse
	zero               bool      // nothing but zeroes, without a file
	file               int       // in Layer.Files; -1 if zero
	flatOff            int64     // flat: where it starts in the file
}

// flat reports whether the extent is a stretch of a file, without tables.
func (e *extent) flat() bool { return e.sparse == nil && e.se == nil && !e.zero }

// extentAt returns the extent that holds the guest byte at off; past the guest size, the
// last one.
func (m *image) extentAt(off int64) *extent {
	if len(m.extents) == 1 {
		return &m.extents[0]
	}
	i := sort.Search(len(m.extents)-1, func(i int) bool { return m.extents[i].guestEnd > off })
	return &m.extents[i]
}

// Geometry describes the image.
func (m *image) Geometry() engine.Geometry {
	g := engine.Geometry{
		SizeBytes: m.sizeBytes, LogicalBlockBytes: sectorBytes, ReadOnly: m.readOnly != "", ZeroState: true,
		Sequential: m.stream() != nil,
	}
	for i := range m.extents {
		switch e := &m.extents[i]; {
		case e.sparse != nil:
			g.ClusterBytes = max(g.ClusterBytes, e.sparse.grainBytes())
			g.ZeroState = g.ZeroState && e.sparse.hasZeroGrains()
		case e.se != nil:
			g.ClusterBytes = max(g.ClusterBytes, seGrainBytes)
		default:
			g.ZeroState = false
		}
	}
	return g
}

// Lookup says where guest bytes are.
func (m *image) Lookup(off, n int64) (engine.Run, error) {
	e := m.extentAt(off)
	n = min(n, m.sizeBytes-off)
	if e.sparse != nil {
		return e.sparse.lookup(off, n)
	}
	n = min(n, e.guestEnd-off)
	switch {
	case e.se != nil:
		return e.se.lookup(off, n)
	case e.zero:
		return engine.Run{State: engine.Zero, Len: n}, nil
	}
	return engine.Run{State: engine.Data, Flat: true, Len: n, File: e.file, FileOff: e.flatOff + off - e.guestOff}, nil
}

// Granule returns the grain around off; a sector in a flat extent, where nothing ever has
// to become present.
func (m *image) Granule(off int64) (start, end int64) {
	e := m.extentAt(off)
	switch {
	case e.sparse != nil:
		return e.sparse.granule(off)
	case e.se != nil:
		return e.se.granule(off)
	}
	start = off / sectorBytes * sectorBytes
	return start, start + sectorBytes
}

// ReadCompressed inflates a grain.
func (m *image) ReadCompressed(run engine.Run, p []byte) error {
	e := m.extentAt(run.GranuleOff)
	if e.sparse == nil {
		return errFlat
	}
	return e.sparse.readCompressed(run, p)
}

var errFlat = unsupported("a flat extent has no mapping")

// mapped is an extent whose grains have no fixed place: sparse or seSparse.
type mapped interface {
	// prepareSet does all of a Codec.Set within the extent that can fail.
	prepareSet(off, n int64, to engine.State, at engine.Place) error
	// applySet makes the prepared change.
	applySet() (unused []engine.Span, err error)
}

// mapped returns what maps the extent's grains; nil if nothing does.
func (e *extent) mapped() mapped {
	switch {
	case e.sparse != nil:
		return e.sparse
	case e.se != nil:
		return e.se
	}
	return nil
}

// Allocate reserves space for grains in one extent.
func (m *image) Allocate(off, n int64) (engine.Place, error) {
	e := m.extentAt(off)
	switch {
	case e.se != nil:
		return e.se.allocate(off, min(n, e.guestEnd-off))
	case e.sparse == nil:
		return engine.Place{}, errFlat
	case e.sparse.stream != nil:
		return engine.Place{}, unsupported("a %s image takes compressed grains only", typeStreamOptimized)
	}
	return e.sparse.allocate(off, n)
}

// Set changes the mapping of grains: what can fail is done for all of them first.
func (m *image) Set(off, n int64, to engine.State, at engine.Place) ([]engine.Span, error) {
	if w := m.stream(); w != nil {
		return nil, w.set(off, to, at)
	}
	if len(m.extents) == 1 && m.extents[0].sparse != nil {
		return m.setOne(m.extents[0].sparse, off, n, to, at)
	}
	// Places are in one extent, so only zeroing and discarding get past the first part.
	var parts []mapped
	for done := int64(0); done < n; {
		e := m.extentAt(off + done)
		part := n - done
		if e.sparse == nil || !e.sparse.last {
			part = min(part, e.guestEnd-off-done)
		}
		s := e.mapped()
		if s == nil {
			return nil, errFlat
		}
		if err := s.prepareSet(off+done, part, to, at); err != nil {
			return nil, err
		}
		parts = append(parts, s)
		done += part
	}
	var unused []engine.Span
	for _, s := range parts {
		spans, err := s.applySet()
		if err != nil {
			return nil, err
		}
		unused = append(unused, spans...)
	}
	return unused, nil
}

func (m *image) setOne(s *sparse, off, n int64, to engine.State, at engine.Place) ([]engine.Span, error) {
	if err := s.prepareSet(off, n, to, at); err != nil {
		return nil, err
	}
	return s.applySet()
}

// Free takes back grains.
func (m *image) Free(span engine.Span, zeroed bool) {
	for i := range m.extents {
		s := m.extents[i].sparse
		switch se := m.extents[i].se; {
		case se != nil && se.file == span.File:
			se.free(span)
			return
		case s == nil || s.file != span.File:
		case s.stream != nil:
			s.stream.giveBack(span)
			return
		default:
			s.free(span, zeroed)
			return
		}
	}
}

// Commit writes what says which space is used, then the tables, then the directories that
// name new ones, each durably before the next.
func (m *image) Commit(c *engine.Commit) error {
	if err := m.raiseFreeSectors(c); err != nil {
		return fmt.Errorf("vmdk: %w", err)
	}
	var present [1 << 8]bool
	for _, sector := range c.Sectors() {
		present[sector.Stage] = true
	}
	for stage, first := engine.Stage(0), true; stage < stages; stage++ {
		if !present[stage] {
			continue
		}
		if !first {
			if err := c.Sync(); err != nil {
				return fmt.Errorf("vmdk: %w", err)
			}
		}
		if err := c.WriteTables(stage); err != nil {
			return fmt.Errorf("vmdk: %w", err)
		}
		first = false
	}
	return nil
}

// Finish trims what was reserved ahead. Lookups may go on meanwhile, and do not notice:
// nothing refers to what goes.
func (m *image) Finish(c *engine.Commit) error {
	if w := m.stream(); w != nil {
		if err := w.finish(c); err != nil {
			return fmt.Errorf("vmdk: finish the stream %s: %w", m.layer.Name, err)
		}
		return nil
	}
	// An seSparse extent notes in its tables what has become free since the last commit.
	if err := c.CommitTables(); err != nil {
		return fmt.Errorf("vmdk: %w", err)
	}
	for i := range m.extents {
		s := m.extents[i].sparse
		if s == nil || s.space == nil {
			continue
		}
		if err := s.space.Trim(); err != nil {
			return fmt.Errorf("vmdk: %w", err)
		}
		if err := s.settleFreeSector(c); err != nil {
			return fmt.Errorf("vmdk: %w", err)
		}
	}
	return nil
}

// Identity returns the content identifier, which every writer changes, and the size.
func (m *image) Identity() []byte {
	return fmt.Appendf(nil, "vmdk %08x %d", m.cid, m.sizeBytes)
}

// Close releases nothing: the Layer closes the files.
func (m *image) Close() error { return nil }

// readFull reads all of p; a file that ends before is truncated.
func readFull(f vfs.File, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return corrupt("%s ends at %d, want %d bytes at %#x: it was truncated", f.Name(), off+int64(n), len(p), off)
	}
	return fmt.Errorf("read %d bytes at %#x of %s: %w", len(p), off, f.Name(), err)
}
