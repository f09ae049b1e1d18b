package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// Refcounts ("Host cluster management"): a table names blocks, whose entries are from one
// bit to 64 bits wide. Offsets of blocks are in memory, blocks in the cache of tables.

func (m *image) blockEntries() int64 { return 1 << m.blockBits }

// maxRefcount returns what an entry can say.
func (m *image) maxRefcount() uint64 { return 1<<(1<<m.header.refcountOrder) - 1 }

// loadRefTable reads the refcount table, once.
func (m *image) loadRefTable() error {
	if m.refTable != nil {
		return nil
	}
	h := m.header
	n := int64(h.refcountTableClusters) << m.clusterBits / 8
	table, err := m.readEntries(int64(h.refcountTableOffset), n)
	if err != nil {
		return fmt.Errorf("read the refcount table: %w", err)
	}
	for i, e := range table {
		off := int64(e)
		if off == 0 {
			continue
		}
		if off < 0 || off&(m.clusterBytes-1) != 0 || off >= m.fileEnd || !m.metadata.add(off>>m.clusterBits) {
			table[i] = badTable
		}
	}
	m.refTable = table
	m.space = space{end: m.fileEnd >> m.clusterBits, unknownEnd: m.fileEnd >> m.clusterBits, fileBytes: m.fileEnd}
	return nil
}

// refBlock returns where the refcount block of a cluster is, 0 if there is none.
func (m *image) refBlock(cluster int64) (int64, error) {
	i := cluster >> m.blockBits
	if i >= int64(len(m.refTable)) {
		return 0, nil
	}
	if m.refTable[i] == badTable {
		return 0, corrupt("refcount table entry %d of %s is bad: its block lies outside the file or overlaps something else; repair the image", i, m.layer.Name)
	}
	return int64(m.refTable[i]), nil
}

// refcount returns how many references a host cluster has.
func (m *image) refcount(cluster int64) (uint64, error) {
	block, err := m.refBlock(cluster)
	if block == 0 || err != nil {
		return 0, err
	}
	order := uint(m.header.refcountOrder)
	bit := (cluster & (m.blockEntries() - 1)) << order
	p, err := m.tables.View(0, block+bit>>3)
	if err != nil {
		return 0, err
	}
	return decodeRefcount(p, uint(bit&7), order), nil
}

// decodeRefcount reads an entry that begins at a bit of p's first byte; entries of less than
// a byte begin with its least significant bits.
func decodeRefcount(p []byte, bit, order uint) uint64 {
	switch order {
	case 3:
		return uint64(p[0])
	case 4:
		return uint64(binary.BigEndian.Uint16(p))
	case 5:
		return uint64(binary.BigEndian.Uint32(p))
	case 6:
		return binary.BigEndian.Uint64(p)
	}
	return uint64(p[0]) >> bit & (1<<(1<<order) - 1)
}

func encodeRefcount(p []byte, bit, order uint, v uint64) {
	switch order {
	case 3:
		p[0] = byte(v)
	case 4:
		binary.BigEndian.PutUint16(p, uint16(v))
	case 5:
		binary.BigEndian.PutUint32(p, uint32(v))
	case 6:
		binary.BigEndian.PutUint64(p, v)
	default:
		mask := byte(1<<(1<<order)-1) << bit
		p[0] = p[0]&^mask | byte(v)<<bit
	}
}

// prepareRefcounts makes sure that setRefcounts of the clusters cannot fail afterwards.
func (m *image) prepareRefcounts(first, n int64) error {
	return m.eachBlock(first, n, func(_ int64, off, length int64, _ uint) error {
		return m.tables.Prepare(0, off, length)
	})
}

// eachBlock calls f for each refcount block of the clusters with which of them are in it
// and where their entries are: length bytes at off, beginning with a bit.
func (m *image) eachBlock(first, n int64, f func(count, off, length int64, bit uint) error) error {
	order := uint(m.header.refcountOrder)
	for n > 0 {
		in := first & (m.blockEntries() - 1)
		count := min(n, m.blockEntries()-in)
		block, err := m.refBlock(first)
		if err != nil {
			return err
		}
		if block == 0 {
			return corrupt("cluster %#x of %s has no refcount block", first<<m.clusterBits, m.layer.Name)
		}
		start, end := in<<order>>3, ((in+count)<<order+7)>>3
		if err := f(count, block+start, end-start, uint(in<<order&7)); err != nil {
			return err
		}
		first, n = first+count, n-count
	}
	return nil
}

// setRefcounts gives clusters that have refcount blocks a refcount.
func (m *image) setRefcounts(first, n int64, v uint64) error {
	order := uint(m.header.refcountOrder)
	return m.eachBlock(first, n, func(count, off, length int64, bit uint) error {
		p := make([]byte, length)
		if order < 3 {
			if err := m.tables.Read(0, off, p); err != nil {
				return err
			}
		}
		for i := range count {
			at := int64(bit) + i<<order
			encodeRefcount(p[at>>3:], uint(at&7), order, v)
		}
		return m.write(stageRefcounts, off, p)
	})
}

// addRefBlock makes a cluster, whose refcount is 0, the refcount block with a number; its
// own refcount is in that block or in one that exists.
func (m *image) addRefBlock(number, cluster int64, zeroed bool) error {
	off := cluster << m.clusterBits
	m.refTable[number] = uint64(off)
	m.metadata.add(cluster)
	err := m.prepareRefBlock(number, cluster, zeroed)
	if err != nil {
		m.refTable[number] = 0
		m.metadata.remove(cluster)
		return fmt.Errorf("add refcount block %d: %w", number, err)
	}
	if !zeroed {
		if err := m.write(stageRefcounts, off, make([]byte, m.clusterBytes)); err != nil {
			return err
		}
	}
	if err := m.setRefcounts(cluster, 1, 1); err != nil {
		return err
	}
	return m.write64(stageRefTable, int64(m.header.refcountTableOffset)+number*8, uint64(off))
}

func (m *image) prepareRefBlock(number, cluster int64, zeroed bool) error {
	if !zeroed {
		if err := m.tables.Prepare(0, cluster<<m.clusterBits, m.clusterBytes); err != nil {
			return err
		}
	}
	if err := m.prepareRefcounts(cluster, 1); err != nil {
		return err
	}
	return m.tables.Prepare(0, int64(m.header.refcountTableOffset)+number*8, 8)
}

// growRefTable makes the refcount table large enough for a number of blocks. The new one
// lies at the end of the file, past all clusters that the old one covers, with the blocks
// that it needs for itself after it. The header names it once all that is durable.
func (m *image) growRefTable(blocks int64) error {
	covered := int64(len(m.refTable)) << m.blockBits
	at := max(m.space.end, covered)
	tableClusters, newBlocks := m.layOutRefTable(at, blocks)
	end := at + tableClusters + newBlocks
	if tableClusters<<m.clusterBits > maxRefTableBytes || end > maxClusterOff>>m.clusterBits {
		return fullFormat("the refcount table", maxRefTableBytes)
	}
	if err := m.extend(end); err != nil {
		return err
	}
	old := m.refTable
	m.refTable = make([]uint64, tableClusters<<m.clusterBits/8)
	copy(m.refTable, old)
	for i := range newBlocks {
		m.refTable[at>>m.blockBits+i] = uint64((at + tableClusters + i) << m.clusterBits)
	}
	if err := m.prepareNewRefTable(at, tableClusters, end); err != nil {
		m.refTable = old
		return fmt.Errorf("enlarge the refcount table: %w", err)
	}
	return m.useNewRefTable(at, tableClusters, end)
}

// layOutRefTable returns how many clusters a refcount table at a cluster takes that has
// entries for so many blocks and for those of itself, and how many those are.
func (m *image) layOutRefTable(at, blocks int64) (tableClusters, newBlocks int64) {
	blocks = max(blocks, int64(len(m.refTable))*3/2)
	for {
		tableClusters = m.clusters(blocks * 8)
		newBlocks = 1
		for last := int64(-1); last != newBlocks; {
			last = newBlocks
			newBlocks = (at+tableClusters+newBlocks-1)>>m.blockBits - at>>m.blockBits + 1
		}
		need := at>>m.blockBits + newBlocks
		if need <= tableClusters<<m.clusterBits/8 {
			return tableClusters, newBlocks
		}
		blocks = need
	}
}

func (m *image) prepareNewRefTable(at, tableClusters, end int64) error {
	if err := m.tables.Prepare(0, at<<m.clusterBits, tableClusters<<m.clusterBits); err != nil {
		return err
	}
	if err := m.prepareRefcounts(at, end-at); err != nil {
		return err
	}
	return m.tables.Prepare(0, 0, sectorBytes)
}

// useNewRefTable writes what has been prepared.
func (m *image) useNewRefTable(at, tableClusters, end int64) error {
	h := m.header
	m.retired = append(m.retired, engine.Span{Off: int64(h.refcountTableOffset), Len: int64(h.refcountTableClusters) << m.clusterBits})
	if gap := at - m.space.end; gap > 0 {
		m.space.add(m.space.end, gap, true)
	}
	m.space.end = end
	m.metadata.addRange(at, end-at)
	if err := m.setRefcounts(at, end-at, 1); err != nil {
		return err
	}
	if err := m.write(stageRefTable, at<<m.clusterBits, encodeEntries(m.refTable)); err != nil {
		return err
	}
	h.refcountTableOffset, h.refcountTableClusters = uint64(at<<m.clusterBits), uint32(tableClusters)
	var fields [12]byte
	binary.BigEndian.PutUint64(fields[:], h.refcountTableOffset)
	binary.BigEndian.PutUint32(fields[8:], h.refcountTableClusters)
	m.headerCached = true
	return m.tables.Write(stageHeader, 0, 48, fields[:])
}

// fullFormat says that the format can say no more, which is to its user as a full store.
func fullFormat(what string, limit int64) error {
	return fmt.Errorf("%w: %s would reach past %d bytes, the format's limit", block.ErrNoSpace, what, limit)
}

// encodeEntries returns a table of 8-byte entries as it is written.
func encodeEntries(table []uint64) []byte {
	p := make([]byte, 0, len(table)*8)
	for _, e := range table {
		p = binary.BigEndian.AppendUint64(p, e)
	}
	return p
}
