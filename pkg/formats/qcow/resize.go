package qcow

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// chunkBytes is how much is written at once.
const chunkBytes = 1 << 20

// Resize grows or shrinks the image.
func (m *image) Resize(c *engine.Commit, size int64) error {
	h := m.header
	h.size = uint64(size)
	err := m.checkSize(&h, size)
	switch {
	case err != nil:
	case size > m.sizeBytes:
		err = m.grow(c, h)
	case size < m.sizeBytes:
		err = m.shrink(c, h)
	}
	if err != nil {
		return fmt.Errorf("qcow: resize %s from %d to %d bytes: %w", m.layer.Name, m.sizeBytes, size, err)
	}
	return nil
}

func (m *image) checkSize(h *header, size int64) error {
	if size <= 0 || size > maxSizeBytes || size%sectorBytes != 0 {
		return invalid("want a multiple of %d from %d to %d", sectorBytes, sectorBytes, int64(maxSizeBytes))
	}
	if n := h.l1Entries(); n > maxL1Entries {
		return invalid("with clusters and level 2 tables as they are, it would take %d level 1 entries, want at most %d", n, maxL1Entries)
	}
	return nil
}

// grow prepares everything past the present end, where nothing is visible yet, and then
// switches to the new size by writing the header.
func (m *image) grow(c *engine.Commit, h header) error {
	defer m.tables.Forget()
	if err := m.clearEntries(c); err != nil {
		return err
	}
	replaced, err := m.clearTail(c)
	if err != nil {
		return err
	}
	old, err := m.growL1(c, &h)
	if err == nil {
		err = m.switchHeader(c, h)
	}
	if err != nil {
		return err
	}
	m.sizeBytes = int64(h.size)
	m.l1 = append(m.l1, make([]uint64, int(h.l1Entries())-len(m.l1))...)
	m.countTables()
	m.noteFixed()
	m.freeFixed(old)
	if replaced.Len > 0 {
		m.Free(replaced, false)
	}
	return nil
}

// clearEntries clears what the last level 2 table says past the end.
func (m *image) clearEntries(c *engine.Commit) error {
	next := m.clusters()
	if next&(m.entriesPerTable()-1) == 0 {
		return nil
	}
	table, err := m.tableAt(next >> m.tableShift)
	if table == 0 || err != nil {
		return err
	}
	rest := make([]byte, m.tableBytes()-m.entryOff(next))
	if err := m.tables.Read(0, table+m.entryOff(next), rest); err != nil {
		return err
	}
	if isZero(rest) {
		return nil
	}
	clear(rest)
	return c.WriteAt(0, rest, table+m.entryOff(next))
}

func isZero(p []byte) bool {
	return !slices.ContainsFunc(p, func(b byte) bool { return b != 0 })
}

// clearTail zeroes what the last cluster holds past the end. A compressed one is replaced
// for that by a plain one: the space that it leaves is returned, and free once the new size
// is durable.
func (m *image) clearTail(c *engine.Commit) (replaced engine.Span, err error) {
	in := m.sizeBytes & (m.clusterBytes() - 1)
	if in == 0 {
		return replaced, nil
	}
	run, err := m.Lookup(m.sizeBytes-1, 1)
	if err != nil {
		return replaced, err
	}
	switch run.State {
	case engine.Data:
		return replaced, m.clearPlainTail(c, run.FileOff+1)
	case engine.Compressed:
		return m.clearCompressedTail(c, run)
	}
	return replaced, nil
}

// clearPlainTail zeroes the rest of a cluster in which the guest ends at off in the file.
func (m *image) clearPlainTail(c *engine.Commit, off int64) error {
	start := off
	if m.cipher != nil {
		start = off &^ (sectorBytes - 1)
	}
	in := m.sizeBytes - (off - start)
	_, end := m.Granule(m.sizeBytes - 1)
	tail := make([]byte, end-in)
	if start < off {
		first := tail[:sectorBytes]
		if err := readFull(m.f, first, start); err != nil {
			return err
		}
		m.cipher.Decrypt(first, in)
		clear(first[off-start:])
	}
	if m.cipher != nil {
		m.cipher.Encrypt(tail, in)
	}
	m.fileEnd = max(m.fileEnd, start+int64(len(tail)))
	return c.WriteAt(0, tail, start)
}

// clearCompressedTail replaces a compressed cluster by a plain one that is zero past the end.
// Until the end moves, both read the same.
func (m *image) clearCompressedTail(c *engine.Commit, run engine.Run) (replaced engine.Span, err error) {
	p := make([]byte, m.clusterBytes())
	if err := m.ReadCompressed(run, p); err != nil {
		return replaced, err
	}
	tail := p[m.sizeBytes-run.GranuleOff:]
	if isZero(tail) {
		return replaced, nil
	}
	clear(tail)
	if m.cipher != nil {
		m.cipher.Encrypt(p, run.GranuleOff)
	}
	place, err := m.Allocate(run.GranuleOff, m.clusterBytes())
	if err != nil {
		return replaced, err
	}
	err = c.WriteAt(0, p, place.Off)
	if err == nil {
		err = c.Sync()
	}
	if err != nil {
		m.Free(place.Span, false)
		return replaced, err
	}
	cluster := run.GranuleOff >> m.clusterShift
	entry := binary.BigEndian.AppendUint64(nil, uint64(place.Off))
	err = c.WriteAt(0, entry, int64(m.l1[cluster>>m.tableShift])+m.entryOff(cluster))
	return engine.Span{Off: run.FileOff, Len: run.CompressedLen}, err
}

// growL1 makes room for more level 1 entries, all 0: behind the present ones if there is
// space, else in a copy, whose place it enters into the header. It returns the place that
// the table leaves, if it does.
func (m *image) growL1(c *engine.Commit, h *header) (left span, err error) {
	old := span{int64(m.header.l1TableOffset), int64(m.header.l1TableOffset) + int64(len(m.l1))*entryBytes}
	need := int64(h.l1Entries()) * entryBytes
	if old.start+need <= m.l1Limit(old) {
		added := need - (old.end - old.start)
		return left, m.writeZeroes(c, old.end, added)
	}
	place, err := m.space.Alloc(m.wholeClusters(need), m.wholeClusters(need))
	if err != nil {
		return left, err
	}
	if err := m.copyL1(c, old, place.Off, place.Len); err != nil {
		m.space.Free(place.Off, place.Len, false)
		return left, err
	}
	m.fileEnd = max(m.fileEnd, place.Off+place.Len)
	h.l1TableOffset = uint64(place.Off)
	return old, nil
}

// l1Limit returns where the space for the level 1 table ends.
func (m *image) l1Limit(table span) int64 {
	end := m.reserved(table.start, table.end-table.start).end
	if at := int64(m.header.backingFileOffset); m.header.hasBacking() && at >= table.end {
		end = min(end, at)
	}
	return end
}

// copyL1 writes a copy of the level 1 table, continued with zeroes.
func (m *image) copyL1(c *engine.Commit, old span, to, length int64) error {
	for off := int64(0); off < length; off += chunkBytes {
		p := make([]byte, min(chunkBytes, length-off))
		if n := min(old.end-old.start-off, int64(len(p))); n > 0 {
			// The table in memory lacks what bad entries say: a check may want it.
			if err := m.tables.Read(0, old.start+off, p[:n]); err != nil {
				return err
			}
		}
		if err := c.WriteAt(0, p, to+off); err != nil {
			return err
		}
	}
	return nil
}

func (m *image) writeZeroes(c *engine.Commit, off, n int64) error {
	for n > 0 {
		p := make([]byte, min(chunkBytes, n))
		if err := c.WriteAt(0, p, off); err != nil {
			return err
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}

// freeFixed frees the whole clusters of metadata that are not used any more: nothing durable
// refers to them.
func (m *image) freeFixed(old span) {
	if old.start == old.end {
		return
	}
	end := m.reserved(old.start, old.end-old.start).end
	start := m.wholeClusters(old.start)
	for off := start; off+m.clusterBytes() <= end; off += m.clusterBytes() {
		if !slices.ContainsFunc(m.fixed, span{off, off + m.clusterBytes()}.overlaps) {
			m.space.Free(off, m.clusterBytes(), false)
		}
	}
}

// shrink writes the smaller size, after which nothing refers to the level 2 tables past it.
// They are empty: the engine has seen to that.
func (m *image) shrink(c *engine.Commit, h header) error {
	if err := m.switchHeader(c, h); err != nil {
		return err
	}
	m.sizeBytes = int64(h.size)
	gone := m.l1[h.l1Entries():]
	m.l1 = m.l1[:h.l1Entries():h.l1Entries()]
	m.countTables()
	for _, at := range gone {
		if at == 0 || at == badTable {
			continue
		}
		if i, found := slices.BinarySearch(m.l2s, int64(at)); found {
			m.l2s = slices.Delete(m.l2s, i, i+1)
		}
		if (int64(at)|m.tableBytes())&(m.clusterBytes()-1) == 0 {
			m.space.Free(int64(at), m.tableBytes(), false)
		}
	}
	m.noteFixed()
	return nil
}
