package qcow

import (
	"fmt"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/internal/aescbc"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Stages of a commit: a level 1 table must not name a level 2 table that is not there yet.
const (
	stageL2 engine.Stage = 0
	stageL1 engine.Stage = 1
)

// image is an open image, the engine's Codec. Where the engine says in its errors which
// image it asked about what, they are passed on as they are.
type image struct {
	layer  *engine.Layer
	tables *engine.Tables
	f      vfs.File
	header header
	cipher *aescbc.Cipher // nil: not encrypted

	sizeBytes    int64 // of the guest
	clusterShift uint  // log2 of the cluster size in bytes
	tableShift   uint  // log2 of the entries per level 2 table

	l1 []uint64 // file offsets of level 2 tables; 0 none, badTable
	// counted says of each countedTogether entries of l1 how many are not 0, or were not.
	counted []uint16
	// l2s are the offsets of the level 2 tables, sorted; fixed are the other metadata.
	// Neither may be taken for data.
	l2s     []int64
	fixed   []span
	fileEnd int64 // where data can be ends here

	space   *engine.Space // nil if the image cannot be written
	scraps  scraps        // free space that is not whole clusters
	packing span          // of a cluster, what compressed clusters have not taken yet
	plan    change        // scratch of Set

	// uncertain is set when a change of the header failed, and so did undoing it.
	uncertain error
}

var (
	_ engine.Codec      = (*image)(nil)
	_ engine.Compressor = (*image)(nil)
)

// span is a stretch of the file, in bytes.
type span struct{ start, end int64 }

func newImage(f vfs.File, h header, fileSize int64) *image {
	return &image{
		f: f, header: h, sizeBytes: int64(h.size),
		clusterShift: uint(h.clusterBits), tableShift: uint(h.l2Bits), fileEnd: fileSize,
	}
}

func (m *image) clusterBytes() int64    { return 1 << m.clusterShift }
func (m *image) tableBytes() int64      { return entryBytes << m.tableShift }
func (m *image) entriesPerTable() int64 { return 1 << m.tableShift }
func (m *image) clusters() int64        { return (m.sizeBytes-1)>>m.clusterShift + 1 }

// maxFileBytes returns where a file ends for what entries of compressed clusters can say.
func (m *image) maxFileBytes() int64 { return 1 << (63 - m.clusterShift) }

// wholeClusters rounds a length up.
func (m *image) wholeClusters(n int64) int64 {
	return (n + m.clusterBytes() - 1) >> m.clusterShift << m.clusterShift
}

// Geometry describes the image.
func (m *image) Geometry() engine.Geometry {
	g := engine.Geometry{SizeBytes: m.sizeBytes, ClusterBytes: m.clusterBytes(), LogicalBlockBytes: sectorBytes}
	if m.cipher != nil {
		g.Cipher = m.cipher
	}
	return g
}

// Granule returns the cluster around off.
func (m *image) Granule(off int64) (start, end int64) {
	start = off >> m.clusterShift << m.clusterShift
	return start, start + m.clusterBytes()
}

// Allocate reserves space for clusters.
func (m *image) Allocate(_, n int64) (engine.Place, error) {
	place, err := m.space.Alloc(m.wholeClusters(n), m.clusterBytes())
	if err != nil {
		return engine.Place{}, err
	}
	m.fileEnd = max(m.fileEnd, place.Off+place.Len)
	return place, nil
}

// Free takes back space, whole clusters or not.
func (m *image) Free(s engine.Span, zeroed bool) {
	if (s.Off|s.Len)&(m.clusterBytes()-1) == 0 {
		m.space.Free(s.Off, s.Len, zeroed)
		return
	}
	if whole, ok := m.scraps.add(span{s.Off, s.Off + s.Len}, m.clusterBytes()); ok {
		m.space.Free(whole.start, whole.end-whole.start, false)
	}
}

// Begin gives the header another modification time, which tells a redo journal of an
// earlier session, and whoever else remembers it, that the image is not what it was.
func (m *image) Begin(c *engine.Commit) error {
	h := m.header
	h.mtime = nextTime(h.mtime, time.Now())
	if err := m.switchHeader(c, h); err != nil {
		return fmt.Errorf("qcow: change mtime: %w", err)
	}
	return nil
}

// nextTime returns the present time, but always a later one than old, so that no value
// comes twice.
func nextTime(old uint32, now time.Time) uint32 {
	return max(uint32(now.Unix()), old+1) // past the last one it starts over
}

// switchHeader writes another header: one sector, of which a crash leaves the old or the
// new contents. What the new one refers to must have been written through c. When it fails,
// the old one is put back; if even that fails, nobody knows which one the disk has, and
// every commit from now on fails.
func (m *image) switchHeader(c *engine.Commit, h header) error {
	return m.switchFirstSector(c, h, nil)
}

// switchFirstSector is switchHeader with bytes that follow the header in its sector.
func (m *image) switchFirstSector(c *engine.Commit, h header, more []byte) error {
	defer m.tables.Forget() // the level 1 table may begin in the same sector
	old := make([]byte, headerBytes+len(more))
	if err := readFull(m.f, old, 0); err != nil {
		return err
	}
	if err := c.Sync(); err != nil {
		return err
	}
	err := writeDurably(c, append(h.encode(), more...))
	if err == nil {
		m.header = h
		return nil
	}
	if undone := writeDurably(c, old); undone != nil {
		m.uncertain = err
	}
	return err
}

func writeDurably(c *engine.Commit, p []byte) error {
	if err := c.WriteAt(0, p, 0); err != nil {
		return err
	}
	return c.Sync()
}

// Commit writes the level 2 tables, then the level 1 table that names new ones.
func (m *image) Commit(c *engine.Commit) error {
	if m.uncertain != nil {
		return fmt.Errorf("qcow: an earlier change of the header failed: %w", m.uncertain)
	}
	if err := c.WriteTables(stageL2); err != nil {
		return fmt.Errorf("qcow: %w", err)
	}
	for _, sector := range c.Sectors() {
		if sector.Stage != stageL1 {
			continue
		}
		if err := c.Sync(); err != nil {
			return fmt.Errorf("qcow: %w", err)
		}
		if err := c.WriteTables(stageL1); err != nil {
			return fmt.Errorf("qcow: %w", err)
		}
		break
	}
	return nil
}

// Finish trims what was reserved ahead. Lookups may go on meanwhile, and do not notice:
// nothing refers to what goes.
func (m *image) Finish(*engine.Commit) error {
	if err := m.space.Trim(); err != nil {
		return fmt.Errorf("qcow: %w", err)
	}
	return nil
}

// Identity returns the modification time that Begin has set, and the size. QEMU changes
// neither when it writes.
func (m *image) Identity() []byte {
	return fmt.Appendf(nil, "qcow %08x %d", m.header.mtime, m.sizeBytes)
}

// Describe returns what qemu-img would say; the parent's name is in Layer.Parent.
func (m *image) Describe() engine.Description {
	d := engine.Description{}
	if m.cipher != nil {
		d.Details = append(d.Details, engine.Detail{Name: "encrypted", Value: true})
	}
	return d
}

// Close releases nothing: the Layer closes the files.
func (m *image) Close() error { return nil }
