package qcow2

import (
	"encoding/binary"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// Allocate reserves host clusters for guest clusters, or says where the cluster is that
// subclusters belong to. In an external data file, every guest cluster has its place.
func (m *image) Allocate(off, n int64) (engine.Place, error) {
	switch {
	case m.dataFile != 0:
		return engine.Place{Span: engine.Span{File: m.dataFile, Off: off, Len: n}}, nil
	case m.extended:
		return m.allocateSubclusters(off, n)
	}
	got, err := m.take(m.clusters(n), 1)
	if err != nil {
		return engine.Place{}, err
	}
	return engine.Place{
		Span:   engine.Span{Off: got.first << m.clusterBits, Len: got.count << m.clusterBits},
		Zeroed: got.zeroed,
	}, nil
}

// change is a prepared Set: everything that can fail has been done.
type change struct {
	tables  []tableChange
	entries []byte // the new entries of all tables
	// unused begins with given spans of tables that were replaced before.
	unused []engine.Span
	given  int
}

// tableChange is the change of entries in one L2 table.
type tableChange struct {
	l1Index    int64
	off        int64 // of the table
	at         int64 // of the first changed entry in it
	start, end int   // the new entries in change.entries
	isNew      bool  // nothing refers to it yet
	fresh      bool  // new, and known to be zero
	content    []byte
}

// Set changes the mapping of guest clusters, or of subclusters.
func (m *image) Set(off, n int64, to engine.State, at engine.Place) ([]engine.Span, error) {
	p := &m.plan
	p.tables, p.entries = p.tables[:0], p.entries[:0]
	p.unused, p.given = m.retired, len(m.retired) // what replaces them is durable when this change is
	m.retired = nil
	if err := m.planSet(off, n, to, at); err != nil {
		m.abandon()
		return nil, err
	}
	if err := m.applySet(); err != nil {
		return nil, err
	}
	if m.extended && to == engine.Data && m.dataFile == 0 {
		m.settleLoans(at.Span)
	}
	return p.unused, nil
}

// abandon gives up what a plan has reserved.
func (m *image) abandon() {
	for i := range m.plan.tables {
		if t := &m.plan.tables[i]; t.isNew {
			m.giveUp(t.off>>m.clusterBits, 1)
		}
	}
	p := &m.plan
	for _, s := range p.unused[p.given:] {
		m.lowered(s.Off>>m.clusterBits, s.Len>>m.clusterBits, s.Shared)
	}
	m.retired = append(m.retired, p.unused[:p.given]...)
}

// planSet prepares the change, table by table.
func (m *image) planSet(off, n int64, to engine.State, at engine.Place) error {
	end := off + n
	for off < end {
		cluster := off >> m.clusterBits
		l2Index := cluster & (1<<m.l2Bits - 1)
		tableEnd := (cluster - l2Index + 1<<m.l2Bits) << m.clusterBits
		partEnd := min(end, tableEnd)
		if err := m.planTable(off, partEnd-off, to, at); err != nil {
			return err
		}
		at.Off += partEnd - off
		off = partEnd
	}
	return nil
}

// planTable prepares the change of entries that are in one table.
func (m *image) planTable(off, n int64, to engine.State, at engine.Place) error {
	p := &m.plan
	first, last := off>>m.clusterBits, (off+n-1)>>m.clusterBits
	l1Index := first >> m.l2Bits
	table, err := m.l2Table(l1Index)
	if err != nil {
		return err
	}
	t := tableChange{
		l1Index: l1Index, off: table, at: (first & (1<<m.l2Bits - 1)) << m.entryShift,
		start: len(p.entries), end: len(p.entries) + int(last-first+1)<<m.entryShift,
	}
	p.entries = slices.Grow(p.entries, t.end-t.start)[:t.end]
	entries := p.entries[t.start:t.end]
	clear(entries)
	if table != 0 {
		if err := m.tables.Read(0, table+t.at, entries); err != nil {
			return err
		}
	}
	changed, err := m.planEntries(entries, off, n, to, at)
	if err != nil {
		return err
	}
	if !changed {
		return nil
	}
	return m.planWrites(t)
}

// planEntries replaces the entries of [off, off+n), and notes what nothing refers to then.
func (m *image) planEntries(entries []byte, off, n int64, to engine.State, at engine.Place) (changed bool, err error) {
	for end := off + n; off < end; {
		in := off & (m.clusterBytes - 1)
		part := min(end-off, m.clusterBytes-in)
		was := m.at(entries)
		is := m.changed(was, in, part, to, at)
		if is != was {
			changed = true
			binary.BigEndian.PutUint64(entries, is.descriptor)
			if m.extended {
				binary.BigEndian.PutUint64(entries[8:], is.bitmap)
			}
			if err := m.release(was, is); err != nil {
				return false, err
			}
		}
		entries = entries[1<<m.entryShift:]
		off, at.Off = off+part, at.Off+part
	}
	return changed, nil
}

// changed returns the entry of a cluster of which length bytes from in on change. at is
// where these are, if anywhere.
func (m *image) changed(was entry, in, length int64, to engine.State, at engine.Place) entry {
	switch {
	case to == engine.Compressed:
		return entry{descriptor: m.compressedDescriptor(at.Off, at.Len)}
	case m.extended:
		return m.changedSubclusters(was, in, length, to, at.Off-in)
	case to == engine.Data:
		return entry{descriptor: uint64(at.Off) | flagCopied}
	case to == engine.Absent:
		return entry{}
	case was.descriptor&flagZero != 0 && !was.compressed():
		return was // it may have a place, which is kept
	}
	return entry{descriptor: flagZero}
}

func (m *image) compressedDescriptor(off, n int64) uint64 {
	more := (off+n-1)/sectorBytes - off/sectorBytes
	return flagCompressed | uint64(more)<<m.sectorShift() | uint64(off)
}

// changedSubclusters is changed for clusters with subclusters; host is where the cluster is.
func (m *image) changedSubclusters(was entry, in, length int64, to engine.State, host int64) entry {
	first, end := in>>m.subBits, (in+length+1<<m.subBits-1)>>m.subBits
	mask := uint64(1)<<(end-first) - 1
	mask <<= first
	if was.compressed() {
		was = entry{} // it is replaced as a whole
	}
	is := was
	is.bitmap &^= mask | mask<<subclustersPerCluster
	switch to {
	case engine.Data:
		is.descriptor = uint64(host) | flagCopied
		is.bitmap |= mask
	case engine.Zero:
		is.bitmap |= mask << subclustersPerCluster
	}
	if is.bitmap&allSubclusters == 0 && (m.dataFile != 0 || m.lent[is.host()>>m.clusterBits] == nil) {
		is.descriptor = 0
	}
	return is
}

// release notes that an entry's space loses a reference, if the new entry has none to it.
// What a bad entry refers to is left alone.
func (m *image) release(was, is entry) error {
	if was.compressed() {
		off, n := m.compressedPlace(was)
		for c := off >> m.clusterBits; c <= (off+n-1)>>m.clusterBits; c++ {
			if err := m.releaseCluster(c); err != nil {
				return err
			}
		}
		return nil
	}
	host := was.host()
	if host == 0 || m.dataFile != 0 || !is.compressed() && is.host() == host || host&(m.clusterBytes-1) != 0 {
		return nil
	}
	return m.releaseCluster(host >> m.clusterBits)
}

func (m *image) releaseCluster(cluster int64) error {
	if cluster<<m.clusterBits >= m.fileEnd || m.metadata.has(cluster) {
		return nil
	}
	count, err := m.refcount(cluster)
	if err != nil || count == 0 {
		return err
	}
	m.giveReference(cluster, count)
	return nil
}

// giveReference adds a cluster that loses one of its references to what is unused.
func (m *image) giveReference(cluster int64, count uint64) {
	p := &m.plan
	s := engine.Span{Off: cluster << m.clusterBits, Len: m.clusterBytes, Shared: count > uint64(m.lowering[cluster])+1}
	if s.Shared {
		m.lowering[cluster]++
	} else {
		m.leavePacked(cluster) // what would be added here would go with the rest
	}
	if n := len(p.unused); n > p.given {
		if last := &p.unused[n-1]; last.Off+last.Len == s.Off && last.Shared == s.Shared {
			last.Len += s.Len
			return
		}
	}
	p.unused = append(p.unused, s)
}

// planWrites prepares writing the changed entries of a table: into it, if it is there and
// only the active L1 table refers to it, otherwise into a new one.
func (m *image) planWrites(t tableChange) error {
	if t.off != 0 && m.l1[t.l1Index]&flagCopied != 0 {
		m.plan.tables = append(m.plan.tables, t)
		return m.tables.Prepare(0, t.off+t.at, int64(t.end-t.start))
	}
	old := t.off
	got, err := m.take(1, 1)
	if err != nil {
		return err
	}
	t.off, t.isNew, t.fresh = got.first<<m.clusterBits, true, got.fresh && old == 0
	m.plan.tables = append(m.plan.tables, t)
	this := &m.plan.tables[len(m.plan.tables)-1]
	at, n := t.at, int64(t.end-t.start)
	if !t.fresh {
		at, n = 0, m.clusterBytes
		this.content = make([]byte, m.clusterBytes)
	}
	if old != 0 {
		if err := m.tables.Read(0, old, this.content); err != nil {
			return err
		}
		count, err := m.refcount(old >> m.clusterBits)
		if err != nil {
			return err
		}
		if count > 0 {
			m.giveReference(old>>m.clusterBits, count)
		}
	}
	if err := m.tables.Prepare(0, t.off+at, n); err != nil {
		return err
	}
	return m.tables.Prepare(0, int64(m.header.l1TableOffset)+t.l1Index*8, 8)
}

// applySet makes the prepared change.
func (m *image) applySet() error {
	for i := range m.plan.tables {
		t := &m.plan.tables[i]
		entries := m.plan.entries[t.start:t.end]
		at := t.at
		if t.content != nil {
			copy(t.content[t.at:], entries)
			entries, at = t.content, 0
		}
		if err := m.write(stageL2, t.off+at, entries); err != nil {
			return err
		}
		if !t.isNew {
			continue
		}
		m.metadata.add(t.off >> m.clusterBits)
		m.l1[t.l1Index] = uint64(t.off) | flagCopied
		if err := m.write64(stageL1, int64(m.header.l1TableOffset)+t.l1Index*8, m.l1[t.l1Index]); err != nil {
			return err
		}
	}
	return nil
}
