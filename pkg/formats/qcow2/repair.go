package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// overlaps reports whether a guest cluster lies where metadata is, or another guest cluster,
// and it is to be separated. What snapshots share is counted later.
func (k *checker) overlaps(e entry) bool {
	m := k.image
	host := e.host()
	if !k.separates || e.compressed() || m.dataFile != 0 || host == 0 || host&(m.clusterBytes-1) != 0 || host >= m.fileEnd {
		return false
	}
	cluster := host >> m.clusterBits
	return m.metadata.has(cluster) || k.counts.get(cluster) > 0
}

// copyOut gives a guest cluster that lies where something else is a place of its own, at the
// end of the file, with what it reads as now. What it was to hold may be lost already.
func (k *checker) copyOut(cluster int64, e entry) (entry, error) {
	m := k.image
	p := make([]byte, m.clusterBytes)
	// The file may end within its last cluster.
	if n, err := m.f.ReadAt(p, e.host()); n < len(p) && err != io.EOF {
		return e, fmt.Errorf("read %d bytes at %#x of %s: %w", len(p), e.host(), m.f.Name(), err)
	}
	k.corruption(true, "%v; it has a place of its own now, with the same bytes", m.badEntry(cluster, e, "where something else is"))
	place := k.newPlace()
	e.descriptor = e.descriptor&^offsetMask | uint64(place) | flagCopied
	binary.BigEndian.PutUint64(k.table[cluster&(1<<m.l2Bits-1)<<m.entryShift:], e.descriptor)
	k.changed = true
	return e, k.writePast(p, place)
}

// judgeBadTable returns an L1 entry that cannot be used as it is: as the file has it if it
// leads past the end of the file, a copy of the table if that is another entry's, one of own,
// and it is to be separated, else badTable.
func (k *checker) judgeBadTable(l1Index int64, own *clusterSet) (uint64, error) {
	m := k.image
	p := make([]byte, 8)
	if err := readFull(m.f, p, int64(m.header.l1TableOffset)+l1Index*8); err != nil {
		return 0, err
	}
	e := binary.BigEndian.Uint64(p)
	off := int64(e & offsetMask)
	switch {
	case off >= m.fileEnd:
		return e, nil
	case k.separates && off&(m.clusterBytes-1) == 0 && own.has(off>>m.clusterBits):
		return k.copyTable(l1Index, off)
	}
	return badTable, nil
}

// copyTable gives an L1 entry whose table at off is another entry's a copy of it; the guest
// clusters in it are copied, too, when they are counted.
func (k *checker) copyTable(l1Index, off int64) (uint64, error) {
	m := k.image
	k.corruption(true, "L1 entry %d: its table at %#x is another entry's, too; it has a copy now", l1Index, off)
	if err := m.tables.Read(0, off, k.table); err != nil {
		return 0, err
	}
	place := k.newPlace()
	if err := k.writePast(k.table, place); err != nil {
		return 0, err
	}
	if err := k.commit.Sync(); err != nil {
		return 0, err
	}
	copied := uint64(place) | flagCopied
	m.l1[l1Index] = copied
	return copied, k.writePast(binary.BigEndian.AppendUint64(nil, copied), int64(m.header.l1TableOffset)+l1Index*8)
}

// newPlace adds a cluster to the file, past what is in use and what is only kept, and returns
// where it is.
func (k *checker) newPlace() int64 {
	m := k.image
	place := max(m.fileEnd, (k.counts.last+1)<<m.clusterBits)
	m.fileEnd = place + m.clusterBytes
	return place
}

// rebuild makes a new refcount table and new refcount blocks from what was counted, behind
// everything else, and then has the header name them. The old ones are free from then on.
func (k *checker) rebuild() error {
	m := k.image
	if k.outside > 0 {
		k.notRebuilt = true
		k.corruption(false, "the refcounts cannot be made anew: %d entries lead past the end of the file, where the new ones would lie; was it cut off?", k.outside)
		return nil
	}
	if err := k.uncountRefcounts(); err != nil {
		return err
	}
	at := max(m.fileEnd>>m.clusterBits, k.counts.last+1)
	blocks, tableClusters := k.layOutRebuild(at)
	end := at + tableClusters + int64(len(blocks))
	if tableClusters<<m.clusterBits > maxRefTableBytes || end > maxClusterOff>>m.clusterBits {
		return fullFormat("a new refcount table", maxRefTableBytes)
	}
	for c := at; c < end; c++ {
		if err := k.counts.add(c, 1); err != nil {
			return err
		}
	}
	table := make([]uint64, tableClusters<<m.clusterBits/8)
	for i, number := range blocks {
		off := (at + tableClusters + int64(i)) << m.clusterBits
		table[number] = uint64(off)
		if err := k.commit.WriteAt(0, k.encodeBlock(number), off); err != nil {
			return err
		}
	}
	if err := k.commit.WriteAt(0, encodeEntries(table), at<<m.clusterBits); err != nil {
		return err
	}
	h := m.header.clone()
	h.refcountTableOffset, h.refcountTableClusters = uint64(at<<m.clusterBits), uint32(tableClusters)
	return m.replaceFields(k.commit, h)
}

// uncountRefcounts counts anew without the refcounts, if they were counted.
func (k *checker) uncountRefcounts() error {
	m := k.image
	if !k.counted {
		return nil
	}
	fresh := checker{ctx: k.ctx, image: m, table: make([]byte, m.clusterBytes)}
	if err := fresh.countGuest(); err != nil {
		return err
	}
	k.counts = fresh.counts
	return nil
}

// layOutRebuild returns the numbers of the refcount blocks that are needed, those of a new
// table and new blocks from cluster at on included, and how long the table is.
func (k *checker) layOutRebuild(at int64) (blocks []int64, tableClusters int64) {
	m := k.image
	used := k.counts.blocks(m.blockBits)
	tableClusters = 1
	for {
		blocks = slices.Clone(used)
		for changed := true; changed; {
			changed = false
			last := (at + tableClusters + int64(len(blocks)) - 1) >> m.blockBits
			for number := at >> m.blockBits; number <= last; number++ {
				if n := len(blocks); n == 0 || blocks[n-1] < number {
					blocks = append(blocks, number)
					changed = true
				}
			}
		}
		need := m.clusters((blocks[len(blocks)-1] + 1) * 8)
		if need <= tableClusters {
			return blocks, tableClusters
		}
		tableClusters = need
	}
}

// encodeBlock returns a refcount block as it is to be.
func (k *checker) encodeBlock(number int64) []byte {
	m := k.image
	order := uint(m.header.refcountOrder)
	p := make([]byte, m.clusterBytes)
	for i := range m.blockEntries() {
		bit := i << order
		n := min(k.counts.get(number<<m.blockBits+i), m.maxRefcount())
		if n != 0 {
			encodeRefcount(p[bit>>3:], uint(bit&7), order, n)
		}
	}
	return p
}

// finishRepair makes the repair durable, takes back the marks of damage if none is left,
// and reads the tables anew.
func (k *checker) finishRepair() error {
	m := k.image
	if err := k.commit.Sync(); err != nil {
		return err
	}
	h := m.header.clone()
	if m.bitmapsBroken != nil {
		h.autoclear &^= autoclearBitmaps
	}
	if k.result.Corruptions == 0 {
		h.incompatible &^= incompatDirty | incompatCorrupt
	}
	if h.autoclear != m.header.autoclear || h.incompatible != m.header.incompatible {
		if err := m.replaceFields(k.commit, h); err != nil {
			return err
		}
	}
	return m.reload()
}

// reload reads all tables anew, after they were changed past the cache.
func (m *image) reload() error {
	m.tables.Forget()
	size, err := m.f.Size()
	if err != nil {
		return err
	}
	m.fileEnd = m.alignUp(size)
	m.metadata, m.refTable, m.bitmapsBroken = clusterSet{}, nil, nil
	return m.readTables(size)
}

// rebuildRefcounts makes the refcounts right, before the first change of an image that was
// written to with refcounts left for later, and not closed ("Dirty bit").
func (m *image) rebuildRefcounts(c *engine.Commit) error {
	k := &checker{ctx: context.Background(), image: m, commit: c}
	if err := k.run(); err != nil {
		return err
	}
	if k.notRebuilt {
		return corrupt("the refcounts of %s cannot be made anew: entries lead past the end of the file", m.layer.Name)
	}
	return m.loadRefTable()
}
