package qcow

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// change is a prepared change of the entries of consecutive clusters to entry, entry+step,
// and so on. Everything that can fail has been done.
type change struct {
	cluster, count int64
	entry, step    uint64
	old            []byte        // the present entries
	tables         []tableChange // of all level 2 tables that the clusters are in
}

// tableChange is where a level 2 table is, 0 if there is none and none is needed. A new
// one is not in the level 1 table yet.
type tableChange struct {
	off   int64
	isNew bool
}

// Set changes the mapping of clusters: what can fail is done for all of them first.
func (m *image) Set(off, n int64, to engine.State, at engine.Place) ([]engine.Span, error) {
	entry, step := uint64(0), uint64(0)
	switch to {
	case engine.Data:
		entry, step = uint64(at.Off), uint64(m.clusterBytes())
	case engine.Compressed:
		entry = m.compressedEntry(at.Off, at.Len)
	case engine.Zero:
		return nil, unsupported("the format has no clusters that are zero by themselves")
	}
	if err := m.prepareSet(off, n, entry, step); err != nil {
		for _, t := range m.plan.tables {
			if t.isNew {
				m.space.Free(t.off, m.wholeClusters(m.tableBytes()), false)
			}
		}
		return nil, err
	}
	return m.applySet()
}

func (m *image) compressedEntry(off, n int64) uint64 {
	return flagCompressed | uint64(n)<<(63-m.clusterShift) | uint64(off)
}

func (m *image) prepareSet(off, n int64, entry, step uint64) error {
	p := &m.plan
	p.cluster, p.count = off>>m.clusterShift, (off+n-1)>>m.clusterShift+1-off>>m.clusterShift
	p.entry, p.step = entry, step
	p.old = slices.Grow(p.old[:0], int(p.count*entryBytes))[:p.count*entryBytes]
	p.tables = p.tables[:0]
	old := p.old
	for cluster := p.cluster; cluster < p.cluster+p.count; {
		count := m.inTable(cluster, p.cluster+p.count)
		if err := m.prepareTable(cluster, old[:count*entryBytes]); err != nil {
			return err
		}
		old = old[count*entryBytes:]
		cluster += count
	}
	return nil
}

// inTable returns how many of the clusters [cluster, end) are in one table with the first.
func (m *image) inTable(cluster, end int64) int64 {
	return min(end-cluster, m.entriesPerTable()-cluster&(m.entriesPerTable()-1))
}

// prepareTable prepares writing the entries of clusters in one table, and reads the present
// ones into old.
func (m *image) prepareTable(cluster int64, old []byte) error {
	table, err := m.tableAt(cluster >> m.tableShift)
	if err != nil {
		return err
	}
	clear(old)
	if table == 0 {
		return m.prepareNewTable(cluster >> m.tableShift)
	}
	m.plan.tables = append(m.plan.tables, tableChange{off: table})
	off := table + m.entryOff(cluster)
	if err := m.tables.Prepare(0, off, int64(len(old))); err != nil {
		return err
	}
	return m.tables.Read(0, off, old)
}

// entryOff returns where in its table the entry of a cluster is.
func (m *image) entryOff(cluster int64) int64 {
	return cluster & (m.entriesPerTable() - 1) * entryBytes
}

// prepareNewTable reserves space for level 2 table ti and prepares writing it and its entry
// in the level 1 table, unless all its entries are to stay 0.
func (m *image) prepareNewTable(ti int64) error {
	if m.plan.entry == 0 {
		m.plan.tables = append(m.plan.tables, tableChange{})
		return nil
	}
	length := m.wholeClusters(m.tableBytes())
	place, err := m.space.Alloc(length, length)
	if err != nil {
		return fmt.Errorf("add level 2 table %d: %w", ti, err)
	}
	m.plan.tables = append(m.plan.tables, tableChange{off: place.Off, isNew: true})
	if err := m.tables.Prepare(0, place.Off, m.tableBytes()); err != nil {
		return err
	}
	return m.tables.Prepare(0, m.l1EntryOff(ti), entryBytes)
}

// l1EntryOff returns where in the file level 1 entry ti is.
func (m *image) l1EntryOff(ti int64) int64 { return int64(m.header.l1TableOffset) + ti*entryBytes }

// applySet makes the prepared change and returns the space that nothing refers to any more.
func (m *image) applySet() (unused []engine.Span, err error) {
	p := &m.plan
	cluster, entries := p.cluster, p.old
	for _, t := range p.tables {
		count := m.inTable(cluster, p.cluster+p.count)
		mine := entries[:count*entryBytes]
		changed := false
		for i := range count {
			was, is := binary.BigEndian.Uint64(mine[i*entryBytes:]), p.entry
			unused = m.appendUnused(unused, cluster+i, was, is)
			changed = changed || was != is
			binary.BigEndian.PutUint64(mine[i*entryBytes:], is)
			p.entry += p.step
		}
		if changed {
			if err := m.applyTable(cluster, t, mine); err != nil {
				return nil, err
			}
		}
		entries = entries[count*entryBytes:]
		cluster += count
	}
	return unused, nil
}

// applyTable writes entries into a table. A new one is written as a whole, whatever its
// space held, and named in the level 1 table.
func (m *image) applyTable(cluster int64, t tableChange, entries []byte) error {
	at := m.entryOff(cluster)
	if !t.isNew {
		return m.tables.Write(stageL2, 0, t.off+at, entries)
	}
	whole := make([]byte, m.tableBytes())
	copy(whole[at:], entries)
	if err := m.tables.Write(stageL2, 0, t.off, whole); err != nil {
		return err
	}
	ti := cluster >> m.tableShift
	entry := binary.BigEndian.AppendUint64(nil, uint64(t.off))
	if err := m.tables.Write(stageL1, 0, m.l1EntryOff(ti), entry); err != nil {
		return err
	}
	m.l1[ti] = uint64(t.off)
	m.counted[ti/countedTogether]++
	m.noteTable(t.off)
	return nil
}

// noteTable notes that a level 2 table is at an offset.
func (m *image) noteTable(off int64) {
	i, _ := slices.BinarySearch(m.l2s, off)
	m.l2s = slices.Insert(m.l2s, i, off)
	m.fileEnd = max(m.fileEnd, off+m.tableBytes())
}

// appendUnused adds the space that an entry referred to, if it does not any more. What a
// bad entry refers to is left alone.
func (m *image) appendUnused(unused []engine.Span, cluster int64, was, is uint64) []engine.Span {
	if was == 0 || was == is {
		return unused
	}
	s := engine.Span{Off: int64(was), Len: m.clusterBytes()}
	if was&flagCompressed != 0 {
		s.Off, s.Len = m.compressedAt(was)
		if s.Len == 0 || m.room(s.Off) < s.Len {
			return unused
		}
	} else if _, ok := m.dataRoom(cluster, was); !ok {
		return unused
	}
	if n := len(unused); n > 0 && unused[n-1].Off+unused[n-1].Len == s.Off {
		unused[n-1].Len += s.Len
		return unused
	}
	return append(unused, s)
}
