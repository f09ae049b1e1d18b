package qcow2

import (
	"encoding/binary"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

const (
	// maxTablesPerLookup bounds how many L2 tables, or cached pages of them, one Lookup
	// walks: the mapping lock is held meanwhile.
	maxTablesPerLookup = 64

	subclusterBits        = 5
	subclustersPerCluster = 1 << subclusterBits
	allSubclusters        = 1<<subclustersPerCluster - 1
)

// entry is an L2 entry; bitmap is that of its subclusters, if it has one: allocated in the
// low half, reads as zeroes in the high one ("Extended L2 Entries").
type entry struct {
	descriptor uint64
	bitmap     uint64
}

func (e entry) compressed() bool { return e.descriptor&flagCompressed != 0 }

// host returns the offset of a standard cluster, 0 if there is none.
func (e entry) host() int64 { return int64(e.descriptor & offsetMask) }

// exclusive reports whether nothing else refers to a standard cluster.
func (e entry) exclusive() bool { return e.descriptor&flagCopied != 0 }

// entries returns the L2 entries from a guest cluster on, at least one, as far as they lie
// together, and how many they are. They are nil if there is no table.
func (m *image) entries(cluster int64) (p []byte, count int64, err error) {
	l1Index, l2Index := cluster>>m.l2Bits, cluster&(1<<m.l2Bits-1)
	count = 1<<m.l2Bits - l2Index
	table, err := m.l2Table(l1Index)
	if table == 0 || err != nil {
		return nil, count, err
	}
	p, err = m.tables.View(0, table+l2Index<<m.entryShift)
	if err != nil {
		return nil, 0, err
	}
	if int64(len(p)) > count<<m.entryShift {
		p = p[:count<<m.entryShift]
	}
	return p, int64(len(p)) >> m.entryShift, nil
}

// l2Table returns where the L2 table of an L1 entry is, 0 if there is none.
func (m *image) l2Table(l1Index int64) (int64, error) {
	e := m.l1[l1Index]
	if e == badTable {
		return 0, corrupt("L1 entry %d of %s is bad: its table lies outside the file or overlaps something else", l1Index, m.layer.Name)
	}
	return int64(e & offsetMask), nil
}

// at returns the first of some L2 entries.
func (m *image) at(p []byte) entry {
	e := entry{descriptor: binary.BigEndian.Uint64(p)}
	if m.extended {
		e.bitmap = binary.BigEndian.Uint64(p[8:])
	}
	return e
}

// Lookup says where guest bytes are.
func (m *image) Lookup(off, n int64) (engine.Run, error) {
	n = min(n, m.sizeBytes-off)
	cluster := off >> m.clusterBits
	p, count, err := m.entries(cluster)
	if err != nil {
		return engine.Run{}, err
	}
	var first entry
	if p != nil {
		first = m.at(p)
	}
	in := off & (m.clusterBytes - 1)
	if first.compressed() {
		return m.compressedRun(first, off, n)
	}
	run, err := m.runAt(cluster, first, in)
	if err != nil {
		return engine.Run{}, err
	}
	if in+run.Len == m.clusterBytes && run.Len < n {
		more, err := m.alike(cluster, first, run, p, count, (in+n-1)>>m.clusterBits)
		if err != nil {
			return engine.Run{}, err
		}
		run.Len += more << m.clusterBits
	}
	run.Len = min(run.Len, n)
	return run, nil
}

// runAt says what the entry of a cluster says of its bytes from in on: at most to the end
// of the cluster.
func (m *image) runAt(cluster int64, e entry, in int64) (engine.Run, error) {
	state, length := m.stateAt(e, in)
	if err := m.checkEntry(cluster, e, state); err != nil {
		return engine.Run{}, err
	}
	run := engine.Run{State: state, Len: length}
	if state == engine.Data {
		run.File, run.FileOff = m.dataFile, e.host()+in
		run.Flat = m.dataFile != 0
		run.Shared = !e.exclusive() && !run.Flat
	}
	return run, nil
}

// stateAt returns the state of a standard cluster's bytes from in on, and of how many.
func (m *image) stateAt(e entry, in int64) (engine.State, int64) {
	if !m.extended {
		switch {
		case e.descriptor&flagZero != 0:
			return engine.Zero, m.clusterBytes - in
		case e.descriptor == 0:
			return engine.Absent, m.clusterBytes - in
		}
		return engine.Data, m.clusterBytes - in
	}
	sub := uint(in >> m.subBits)
	state := subclusterState(e.bitmap, sub)
	end := sub + 1
	for end < subclustersPerCluster && subclusterState(e.bitmap, end) == state {
		end++
	}
	return state, int64(end)<<m.subBits - in
}

func subclusterState(bitmap uint64, sub uint) engine.State {
	switch {
	case bitmap>>sub&1 != 0:
		return engine.Data
	case bitmap>>(subclustersPerCluster+sub)&1 != 0:
		return engine.Zero
	}
	return engine.Absent
}

// checkEntry returns what is wrong with the entry of a standard cluster, of which a part is
// in a state.
func (m *image) checkEntry(cluster int64, e entry, state engine.State) error {
	if m.extended && e.bitmap&allSubclusters&(e.bitmap>>subclustersPerCluster) != 0 {
		return m.badEntry(cluster, e, "a subcluster is both allocated and zero")
	}
	if e.descriptor&flagZero != 0 && (m.extended || m.header.version < 3) {
		return m.badEntry(cluster, e, "bit 0 is set, which means nothing here")
	}
	if state != engine.Data {
		return nil
	}
	host := e.host()
	switch {
	case host&(m.clusterBytes-1) != 0:
		return m.badEntry(cluster, e, "not a multiple of the cluster size")
	case m.dataFile != 0:
		if host != cluster<<m.clusterBits {
			return m.badEntry(cluster, e, "in an external data file guest and host offsets are the same")
		}
		return nil
	case host == 0 || host >= m.fileEnd:
		return m.badEntry(cluster, e, "outside the file")
	case m.metadata.has(host >> m.clusterBits):
		return m.badEntry(cluster, e, "where metadata is")
	}
	return nil
}

func (m *image) badEntry(cluster int64, e entry, why string) error {
	return corrupt("the L2 entry of guest offset %#x in %s is %#x: %s", cluster<<m.clusterBits, m.layer.Name, e.descriptor, why)
}

// alike returns how many clusters after the given one, at most most, continue its run, which
// reaches its end. p are its entry and the count-1 next ones.
func (m *image) alike(cluster int64, first entry, run engine.Run, p []byte, count, most int64) (int64, error) {
	if run.State == engine.Data && m.dataFile == 0 {
		next := (run.FileOff + run.Len) >> m.clusterBits
		most = m.metadata.before(next, min(most, m.fileEnd>>m.clusterBits-next))
	}
	expect := first
	found := int64(0) // after the given one
	for walked := 0; ; walked++ {
		if p == nil {
			if run.State != engine.Absent {
				return found, nil
			}
			found += count
			if walked == 0 {
				found--
			}
		} else {
			if walked == 0 {
				p = p[1<<m.entryShift:]
			}
			same, ended := m.sameEntries(p, &expect, run.State, most-found)
			found += same
			if ended {
				return found, nil
			}
		}
		if found >= most || walked == maxTablesPerLookup {
			return min(found, most), nil
		}
		var err error
		if p, count, err = m.entries(cluster + 1 + found); err != nil {
			return found, nil // whoever asks for those bytes is told
		}
	}
}

// sameEntries counts the leading entries, at most most, that continue a run whose last
// entry is expect, which it moves on. ended says that another kind of entry follows.
func (m *image) sameEntries(p []byte, expect *entry, state engine.State, most int64) (n int64, ended bool) {
	for ; len(p) > 0 && n < most; p = p[1<<m.entryShift:] {
		e := m.at(p)
		if !m.continues(expect, e, state) {
			// A part of a cluster with subclusters may still continue: the next Lookup
			// says so.
			return n, true
		}
		n++
	}
	return n, false
}

// continues reports whether the whole cluster of e continues a run, and moves expect on.
func (m *image) continues(expect *entry, e entry, state engine.State) bool {
	if e.compressed() {
		return false
	}
	if m.extended {
		uniform := [...]uint64{engine.Absent: 0, engine.Zero: allSubclusters << subclustersPerCluster, engine.Data: allSubclusters}
		if e.bitmap != uniform[state] || e.descriptor&flagZero != 0 {
			return false
		}
	}
	switch {
	case state == engine.Data:
		expect.descriptor += uint64(m.clusterBytes)
		return e.descriptor == expect.descriptor
	case m.extended:
		return true
	case state == engine.Zero:
		return e.descriptor&flagZero != 0
	}
	return e.descriptor == 0
}

// Granule returns the cluster around off, or the subcluster if it can become present on its
// own: not where the cluster is compressed or others refer to it, too.
func (m *image) Granule(off int64) (start, end int64) {
	bits := m.clusterBits
	if m.extended && !m.placedAnew(off>>m.clusterBits) {
		bits = m.subBits
	}
	start = off >> bits << bits
	return start, start + 1<<bits
}

// placedAnew reports whether a cluster with subclusters can only be replaced as a whole.
func (m *image) placedAnew(cluster int64) bool {
	p, _, err := m.entries(cluster)
	if p == nil || err != nil {
		return false // whoever goes on is told
	}
	e := m.at(p)
	return e.compressed() || e.host() != 0 && !e.exclusive()
}
