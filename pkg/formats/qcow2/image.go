package qcow2

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Stages of a commit, each durable before the next: see "Why crashes are harmless".
const (
	stageRefcounts engine.Stage = iota // refcount blocks
	stageRefTable                      // refcount table entries, new refcount tables
	stageHeader                        // the header, naming a new refcount table
	stageL2                            // L2 entries, new L2 tables
	stageL1                            // L1 entries
	stages
)

// Bits of L1 and L2 entries ("Cluster mapping").
const (
	flagCopied     = 1 << 63
	flagCompressed = 1 << 62
	flagZero       = 1 << 0
	offsetMask     = 1<<56 - 1<<9

	// badTable stands in an L1 table or refcount table in memory for an entry that must
	// not be followed. No valid entry looks so: offsets are multiples of a cluster.
	badTable = 1<<64 - 1

	maxClusterOff = 1 << 56 // what L2 entries can say
)

// image is an open QCOW2 image. It is the engine's Codec; where the engine says in its
// errors which image it asked about what, they are passed on as they are.
type image struct {
	layer  *engine.Layer
	tables *engine.Tables
	fs     vfs.FS
	f      vfs.File
	header *header

	clusterBits  uint
	clusterBytes int64
	l2Bits       uint  // log2 of the entries per L2 table
	entryShift   uint  // log2 of the bytes per L2 entry
	subBits      uint  // log2 of the bytes per subcluster, of a cluster without such
	extended     bool  // L2 entries have bitmaps of subclusters
	dataFile     int   // the file of guest clusters: 0, or 1 for an external data file
	sizeBytes    int64 // of the guest

	l1       []uint64 // the active L1 table
	metadata clusterSet
	fileEnd  int64 // multiple of a cluster; what is in use lies before it

	refTable  []uint64 // offsets of refcount blocks; nil until the image is changed or checked
	blockBits uint     // log2 of the entries per refcount block
	space     space
	lowering  map[int64]uint32 // references to clusters that Set gave up and Free will take back
	retired   []engine.Span    // space of tables that were replaced, for the next Set to give up
	lent      map[int64]*loan  // by host cluster: places in clusters with subclusters
	packing   packing          // where compressed data continues

	snapshots     []snapshot
	snapshotBytes int64 // of the snapshot table
	bitmaps       []bitmap
	bitmapsBroken error // the directory cannot be understood

	plan         change // scratch of Set
	headerCached bool   // the header went through Tables
	noIdentity   []byte // instead of an identity that has no room in the header
}

var (
	_ engine.Codec      = (*image)(nil)
	_ engine.Compressor = (*image)(nil)
)

// Geometry describes the image.
func (m *image) Geometry() engine.Geometry {
	return engine.Geometry{
		SizeBytes:         m.sizeBytes,
		ClusterBytes:      m.clusterBytes,
		LogicalBlockBytes: sectorBytes,
		ZeroState:         m.header.version >= 3 && !m.header.rawData(),
	}
}

// Commit writes the changed tables, stage by stage. It runs beside other methods, and uses
// nothing that they change.
func (m *image) Commit(c *engine.Commit) error {
	var changed [stages]bool
	for _, s := range c.Sectors() {
		if s.Stage >= stages {
			return corrupt("qcow2: a table sector of stage %d, want less than %d", s.Stage, stages)
		}
		changed[s.Stage] = true
	}
	for stage := range stages {
		if !changed[stage] {
			continue
		}
		if err := c.Sync(); err != nil {
			return fmt.Errorf("qcow2: %w", err)
		}
		if err := c.WriteTables(stage); err != nil {
			return fmt.Errorf("qcow2: %w", err)
		}
	}
	return nil
}

// Finish gives back what tables that were replaced took, and what was reserved ahead. Lookups
// may go on meanwhile, and do not notice: nothing refers to what goes.
func (m *image) Finish(c *engine.Commit) error {
	if m.refTable == nil {
		return nil
	}
	m.endPacking()
	for _, s := range m.retired {
		m.Free(s, false)
	}
	m.retired = nil
	if err := c.CommitTables(); err != nil {
		return fmt.Errorf("qcow2: %w", err)
	}
	if err := m.trim(); err != nil {
		return fmt.Errorf("qcow2: %w", err)
	}
	return nil
}

// Identity returns the random bytes that the last session of writing here has put into the
// header, and facts that other programs change when they do more than write guest data:
// snapshots, sizes, features. QCOW2 itself has nothing that every writer changes.
func (m *image) Identity() []byte {
	h := *m.header
	id, ok := h.extension(extIdentity)
	if !ok {
		id = m.noIdentity
	}
	// A refcount table is replaced also between two commits.
	h.refcountTableOffset, h.refcountTableClusters = 0, 0
	sum := sha256.Sum256(append(h.encode(), h.backingFile...))
	return fmt.Appendf(nil, "qcow2 %x %x", id, sum)
}

// Close releases nothing: the Layer closes the files.
func (m *image) Close() error { return nil }

// write changes table bytes, in records that a redo journal takes.
func (m *image) write(stage engine.Stage, off int64, p []byte) error {
	const most = 256 << 10
	for len(p) > 0 {
		n := min(len(p), most)
		if err := m.tables.Write(stage, 0, off, p[:n]); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (m *image) write64(stage engine.Stage, off int64, v uint64) error {
	return m.tables.Write(stage, 0, off, binary.BigEndian.AppendUint64(nil, v))
}

// clusters returns how many clusters n bytes take.
func (m *image) clusters(n int64) int64 { return (n + m.clusterBytes - 1) >> m.clusterBits }

func (m *image) alignUp(n int64) int64 { return m.clusters(n) << m.clusterBits }
