package qcow2

import (
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// Resize gives the guest another size.
func (m *image) Resize(c *engine.Commit, size int64) error {
	if err := m.resize(c, size); err != nil {
		return fmt.Errorf("qcow2: %w", err)
	}
	return nil
}

func (m *image) resize(c *engine.Commit, size int64) error {
	h := m.header
	switch {
	case size < 0 || size > maxSizeBytes || size%sectorBytes != 0:
		return invalid("size %d, want a multiple of %d, at most %d", size, sectorBytes, int64(maxSizeBytes))
	case h.l1Entries(size)*8 > maxL1Bytes:
		return invalid("size %d, want at most %d with clusters of %d bytes", size, int64(maxL1Bytes/8)<<(m.l2Bits+m.clusterBits), m.clusterBytes)
	case len(m.snapshots) > 0 && h.version < 3:
		return unsupported("an image of version 2 with snapshots, which do not say what size the disk had")
	}
	// What was freed since the last commit, and what follows here, must not be lost when
	// the journal starts anew.
	if err := c.CommitTables(); err != nil {
		return err
	}
	if m.dataFile != 0 {
		if err := m.resizeDataFile(c, size); err != nil {
			return err
		}
	}
	if size > m.sizeBytes {
		return m.grow(c, size)
	}
	return m.shrink(c, size)
}

// resizeDataFile gives the external data file the guest's size: what lies past a smaller
// one must not come back, and a raw one says how large the disk is.
func (m *image) resizeDataFile(c *engine.Commit, size int64) error {
	f := m.layer.Files[m.dataFile]
	have, err := f.Size()
	if err != nil {
		return fmt.Errorf("size of %s: %w", f.Name(), err)
	}
	if end := min(size, m.sizeBytes); have > end {
		if err := c.Truncate(m.dataFile, end); err != nil {
			return err
		}
	}
	if err := c.Truncate(m.dataFile, size); err != nil {
		return err
	}
	return c.Sync()
}

func (m *image) grow(c *engine.Commit, size int64) error {
	if err := m.clearTail(c); err != nil {
		return err
	}
	l1Size := m.header.l1Entries(size)
	if l1Size > int64(m.header.l1Size) {
		return m.growL1(c, size, l1Size)
	}
	return m.changeSize(c, size, m.header.clone())
}

// clearTail zeroes what the last cluster holds past the guest size: it is about to become
// visible. Readers of compressed clusters get zeroes there by whoever made them.
func (m *image) clearTail(c *engine.Commit) error {
	in := m.sizeBytes & (m.clusterBytes - 1)
	if in == 0 || m.dataFile != 0 {
		return nil
	}
	cluster := m.sizeBytes >> m.clusterBits
	p, _, err := m.entries(cluster)
	if p == nil || err != nil {
		return err
	}
	e := m.at(p)
	for e.host() != 0 && !e.compressed() && e.exclusive() && in < m.clusterBytes {
		state, n := m.stateAt(e, in)
		if err := m.checkEntry(cluster, e, state); err != nil {
			return err
		}
		if state == engine.Data {
			if err := c.WriteAt(0, make([]byte, n), e.host()+in); err != nil {
				return err
			}
		}
		in += n
	}
	return nil
}

// changeSize switches to another size, and to what else h says.
func (m *image) changeSize(c *engine.Commit, size int64, h *header) error {
	if err := m.outdateBitmaps(c, h, true); err != nil {
		return err
	}
	h.size = uint64(size)
	if err := m.replaceFields(c, h); err != nil {
		return err
	}
	m.sizeBytes = size
	return nil
}

// growL1 writes a larger L1 table to where nothing is, and then has the header name it.
func (m *image) growL1(c *engine.Commit, size, l1Size int64) error {
	l1Size = min(max(l1Size, int64(m.header.l1Size)*3/2), maxL1Bytes/8)
	n := m.clusters(l1Size * 8)
	got, err := m.take(n, n)
	if err != nil {
		return fmt.Errorf("enlarge the L1 table: %w", err)
	}
	undo := func(err error) error {
		m.giveUp(got.first, n)
		return fmt.Errorf("enlarge the L1 table: %w", err)
	}
	l1 := make([]uint64, n<<m.clusterBits/8)
	on, err := m.readEntries(int64(m.header.l1TableOffset), int64(m.header.l1Size))
	if err != nil {
		return undo(err)
	}
	copy(l1, on)
	at := got.first << m.clusterBits
	if err := c.WriteAt(0, encodeEntries(l1), at); err != nil {
		return undo(err)
	}
	if err := c.CommitTables(); err != nil { // its refcount
		return undo(err)
	}
	h := m.header.clone()
	old, oldClusters := int64(h.l1TableOffset)>>m.clusterBits, m.clusters(int64(h.l1Size)*8)
	h.l1TableOffset, h.l1Size = uint64(at), uint32(l1Size)
	if err := m.changeSize(c, size, h); err != nil {
		return err // the header names one or the other
	}
	m.l1 = append(m.l1, make([]uint64, l1Size-int64(len(m.l1)))...)
	m.metadata.addRange(got.first, n)
	m.giveUp(old, oldClusters)
	if err := c.CommitTables(); err != nil {
		return err
	}
	// The new table may be where another was that is in the cache.
	m.tables.Forget()
	return nil
}

// shrink cuts the guest size, and gives up the L2 tables past it, which have become empty.
func (m *image) shrink(c *engine.Commit, size int64) error {
	if err := m.changeSize(c, size, m.header.clone()); err != nil {
		return err
	}
	var gone []uint64
	for i := m.header.l1Entries(size); i < int64(len(m.l1)); i++ {
		e := m.l1[i]
		if e == 0 || e == badTable {
			continue
		}
		if err := m.write64(stageL1, int64(m.header.l1TableOffset)+i*8, 0); err != nil {
			return err
		}
		m.l1[i] = 0
		gone = append(gone, e)
	}
	if err := c.CommitTables(); err != nil {
		return err
	}
	for _, e := range gone {
		m.giveUp(int64(e&offsetMask)>>m.clusterBits, 1)
	}
	if err := c.CommitTables(); err != nil {
		return err
	}
	// What tables were there is in the cache, and means nothing any more.
	m.tables.Forget()
	return nil
}
