package vdi

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Stages of a commit: the count of blocks, by which other programs choose where the next
// one goes, must cover a block before an entry names it.
const (
	stageCount engine.Stage = 0
	stageMap   engine.Stage = 1
)

// maxViews bounds how many pages of the block map one Lookup walks: the mapping lock is
// held meanwhile.
const maxViews = 16

// image is an open VDI. It is the engine's Codec; where the engine says in its errors
// which image it asked about what, they are passed on as they are.
type image struct {
	layer *engine.Layer
	f     vfs.File

	h          header // as on disk, or as the next commit makes it
	blockShift uint
	stride     int64 // from one block to the next in the file: extra bytes, then the block
	sizeBytes  int64
	uncertain  error // why nobody knows what the file says: see writeHeader

	fileBytes  int64 // the file's length
	indexLimit int64 // entries are below it
	room       room  // what is known of the blocks in the file since Begin
	// touched is one more than the greatest index to which a block was moved: if the resize
	// failed, new blocks below it are not zeroes.
	touched int64
}

var _ engine.Codec = (*image)(nil)

func (m *image) blockBytes() int64 { return 1 << m.blockShift }

// blockOff returns where the bytes of the block with an index start in the file.
func (m *image) blockOff(index int64) int64 {
	return m.h.dataOffset() + index*m.stride + m.h.extraBytes()
}

// endOf returns the length of a file with a number of blocks.
func (m *image) endOf(blocks int64) int64 { return m.h.dataOffset() + blocks*m.stride }

// entryOff returns where the map entry of a guest block is in the file.
func (m *image) entryOff(block int64) int64 { return m.h.mapOffset() + block*entryBytes }

// Geometry describes the image.
func (m *image) Geometry() engine.Geometry {
	return engine.Geometry{
		SizeBytes: m.sizeBytes, ClusterBytes: m.blockBytes(), LogicalBlockBytes: sectorBytes, ZeroState: true,
	}
}

// Lookup says where guest bytes are. Blocks in the file keep their place for good, so they
// are flat: see the package's documentation.
func (m *image) Lookup(off, n int64) (engine.Run, error) {
	block := off >> m.blockShift
	p, err := m.layer.Tables.View(0, m.entryOff(block))
	if err != nil {
		return engine.Run{}, err
	}
	entry := binary.LittleEndian.Uint32(p)
	in := off & (m.blockBytes() - 1)
	run, step := engine.Run{State: engine.Absent}, uint32(0)
	switch {
	case entry == entryFree:
	case entry == entryZero:
		run.State = engine.Zero
	case int64(entry) >= m.indexLimit:
		return run, corrupt("block map entry %d names block %d, which lies outside %s", block, entry, m.f.Name())
	default:
		run = engine.Run{State: engine.Data, Flat: true, FileOff: m.blockOff(int64(entry)) + in}
		step = 1
		if m.stride != m.blockBytes() {
			run.Len = min(n, m.blockBytes()-in)
			return run, nil
		}
	}
	count := m.alike(block, entry, step, p, (in+n-1)>>m.blockShift+1)
	run.Len = min(n, count<<m.blockShift-in)
	return run, nil
}

// alike returns how many blocks from the first on, at most want, continue its run. p are
// the first's entry and those after it that come with it.
func (m *image) alike(block int64, first, step uint32, p []byte, want int64) int64 {
	want = min(want, m.h.blocks()-block)
	found := int64(0)
	for range maxViews {
		for ; len(p) >= entryBytes; p = p[entryBytes:] {
			if found == want || binary.LittleEndian.Uint32(p) != first+uint32(found)*step {
				return found
			}
			if step == 1 && int64(first)+found >= m.indexLimit {
				return found // whoever asks for those bytes is told
			}
			found++
		}
		if found == want {
			break
		}
		var err error
		if p, err = m.layer.Tables.View(0, m.entryOff(block+found)); err != nil {
			break
		}
	}
	return found
}

// Granule returns the block around off.
func (m *image) Granule(off int64) (start, end int64) {
	start = off >> m.blockShift << m.blockShift
	return start, start + m.blockBytes()
}

// ReadCompressed is never called: no run is compressed.
func (m *image) ReadCompressed(engine.Run, []byte) error {
	return unsupported("the format has no compression")
}

// Set changes the map entries of whole blocks.
func (m *image) Set(off, n int64, to engine.State, at engine.Place) ([]engine.Span, error) {
	first, count := off>>m.blockShift, (n-1)>>m.blockShift+1
	entry, step := uint32(entryFree), uint32(0)
	switch to {
	case engine.Zero:
		entry = entryZero
	case engine.Data:
		entry, step = uint32((at.Off-m.h.dataOffset())/m.stride), 1
	}
	tables := m.layer.Tables
	if err := tables.Prepare(0, m.entryOff(first), count*entryBytes); err != nil {
		return nil, err
	}
	if err := tables.Prepare(0, fieldBlocksAllocated, entryBytes); err != nil {
		return nil, err
	}
	entries := make([]byte, count*entryBytes)
	if err := tables.Read(0, m.entryOff(first), entries); err != nil {
		return nil, err
	}
	if to == engine.Data {
		if err := m.raiseCount(int64(entry) + count); err != nil {
			return nil, err
		}
	}
	var unused []engine.Span
	for p := entries; len(p) > 0; p = p[entryBytes:] {
		unused = m.appendUnused(unused, binary.LittleEndian.Uint32(p), entry)
		binary.LittleEndian.PutUint32(p, entry)
		entry += step
	}
	if err := tables.Write(stageMap, 0, m.entryOff(first), entries); err != nil {
		return nil, err
	}
	return unused, nil
}

// raiseCount has the header cover blocks up to an index.
func (m *image) raiseCount(count int64) error {
	if count <= m.h.allocated() {
		return nil
	}
	if err := m.layer.Tables.Write(stageCount, 0, fieldBlocksAllocated, binary.LittleEndian.AppendUint32(nil, uint32(count))); err != nil {
		return err
	}
	m.h.setAllocated(count)
	return nil
}

// appendUnused adds the block that an entry named, if it does not any more. What a bad
// entry names is left alone.
func (m *image) appendUnused(unused []engine.Span, was, is uint32) []engine.Span {
	if was == entryFree || was == entryZero || was == is || int64(was) >= m.indexLimit {
		return unused
	}
	return append(unused, engine.Span{Off: m.blockOff(int64(was)), Len: m.blockBytes()})
}

// Commit writes the count, then the entries that rely on it.
func (m *image) Commit(c *engine.Commit) error {
	if m.uncertain != nil {
		return fmt.Errorf("vdi: %w", m.uncertain)
	}
	for _, sector := range c.Sectors() {
		if sector.Stage != stageCount {
			continue
		}
		if err := c.WriteTables(stageCount); err != nil {
			return fmt.Errorf("vdi: %w", err)
		}
		if err := c.Sync(); err != nil {
			return fmt.Errorf("vdi: %w", err)
		}
		break
	}
	if err := c.WriteTables(stageMap); err != nil {
		return fmt.Errorf("vdi: %w", err)
	}
	return nil
}

// Identity returns the UUIDs of the image and of its contents, and its size.
func (m *image) Identity() []byte {
	return fmt.Appendf(nil, "vdi %s %s %d", m.h.uuid(fieldUUID), m.h.uuid(fieldUUIDModified), m.sizeBytes)
}

// Close releases nothing: the Layer closes the files.
func (m *image) Close() error { return nil }

// writeHeader replaces the header durably: one sector, which no crash tears. No table may
// be dirty. When that fails, it puts the old one back, because the image is used on: if
// that fails, too, nobody knows what the file says, and nothing that relies on it is
// written any more.
func (m *image) writeHeader(c *engine.Commit, h header) error {
	if m.uncertain != nil {
		return m.uncertain
	}
	defer m.layer.Tables.Forget()
	err := writeSynced(c, h[:])
	if err == nil {
		m.h = h
		return nil
	}
	if back := writeSynced(c, m.h[:]); back != nil {
		m.uncertain = errors.Join(err, back)
	}
	return err
}

func writeSynced(c *engine.Commit, p []byte) error {
	if err := c.WriteAt(0, p, 0); err != nil {
		return err
	}
	return c.Sync()
}
