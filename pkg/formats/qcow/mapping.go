package qcow

import (
	"encoding/binary"
	"slices"
	"sort"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

const (
	entryBytes = 8

	// flagCompressed is set in level 2 entries of compressed clusters. Their length is
	// in the cluster_bits bits below it, their offset in the others.
	flagCompressed = 1 << 63

	// badTable stands in the level 1 table in memory for an entry that must not be
	// followed.
	badTable = 1<<64 - 1

	// maxTablesPerLookup bounds how many level 2 tables one Lookup walks, and
	// maxMissingSteps in how many steps it skips missing ones: the mapping lock is held
	// meanwhile.
	maxTablesPerLookup = 64
	maxMissingSteps    = 4 << 10

	// countedTogether is how many level 1 entries are skipped at once if all are 0.
	countedTogether = 1 << 10
)

// judgeTables puts badTable in place of level 1 entries whose tables lie outside the file,
// across sectors, or overlap other tables or the header, and notes where metadata is. The
// image still opens: what the other tables hold is good, and a check can say more.
func (m *image) judgeTables() {
	m.countTables()
	tables := 0
	for _, n := range m.counted {
		tables += int(n)
	}
	m.l2s = make([]int64, 0, tables)
	for i, at := range m.l1 {
		if at == 0 {
			continue
		}
		if at%sectorBytes != 0 || at > uint64(m.fileEnd) || uint64(m.tableBytes()) > uint64(m.fileEnd)-at {
			m.l1[i] = badTable
			continue
		}
		m.l2s = append(m.l2s, int64(at))
	}
	m.l2s = sorted(m.l2s)
	m.noteFixed()
	bad := m.overlappingTables()
	if len(bad) == 0 {
		return
	}
	isBad := func(at int64) bool {
		_, found := slices.BinarySearch(bad, at)
		return found
	}
	for i, at := range m.l1 {
		if at != 0 && at != badTable && isBad(int64(at)) {
			m.l1[i] = badTable
		}
	}
	// Data may be where they are said to be.
	m.l2s = slices.DeleteFunc(m.l2s, isBad)
	m.noteFixed()
}

// overlappingTables returns which of the sorted tables overlap each other or what is fixed,
// sorted.
func (m *image) overlappingTables() (bad []int64) {
	for i, at := range m.l2s {
		table := span{at, at + m.tableBytes()}
		if i > 0 && at < m.l2s[i-1]+m.tableBytes() || i+1 < len(m.l2s) && m.l2s[i+1] < table.end ||
			slices.ContainsFunc(m.fixed, table.overlaps) {
			bad = append(bad, at)
		}
	}
	return bad
}

func (a span) overlaps(b span) bool { return a.start < b.end && b.start < a.end }

// noteFixed notes where header, level 1 table and backing file name are.
func (m *image) noteFixed() {
	h := &m.header
	m.fixed = []span{
		{0, sectorBytes},
		m.reserved(int64(h.l1TableOffset), int64(h.l1Entries())*entryBytes),
	}
	if h.hasBacking() && h.backingFileOffset+uint64(h.backingFileSize) > sectorBytes {
		m.fixed = append(m.fixed, m.reserved(int64(h.backingFileOffset), int64(h.backingFileSize)))
	}
}

// reserved returns what belongs to metadata that are not level 2 tables: the rest of their
// last cluster, which no writer uses for anything else, is theirs to grow into; but if a
// table does lie there, only the rest of the sector.
func (m *image) reserved(off, n int64) span {
	s := span{off &^ (sectorBytes - 1), m.wholeClusters(off + n)}
	sectorEnd := (off + n + sectorBytes - 1) &^ (sectorBytes - 1)
	i := sort.Search(len(m.l2s), func(i int) bool { return m.l2s[i]+m.tableBytes() > sectorEnd })
	if i < len(m.l2s) && m.l2s[i] < s.end {
		s.end = sectorEnd
	}
	return s
}

// room returns how many bytes of data can lie from a file offset on, up to the end of the
// file or the next metadata; 0 if none.
func (m *image) room(off int64) int64 {
	end := m.fileEnd
	for _, f := range m.fixed {
		if off < f.end {
			end = min(end, max(f.start, off))
		}
	}
	i := sort.Search(len(m.l2s), func(i int) bool { return m.l2s[i]+m.tableBytes() > off })
	if i < len(m.l2s) {
		end = min(end, max(m.l2s[i], off))
	}
	return max(end-off, 0)
}

// tableAt returns the offset of level 2 table ti, 0 if there is none.
func (m *image) tableAt(ti int64) (int64, error) {
	at := m.l1[ti]
	if at == badTable {
		return 0, corrupt("level 1 entry %d of %s is bad: its table lies outside the file, across sectors, or overlaps something else", ti, m.f.Name())
	}
	return int64(at), nil
}

// entries returns the level 2 entries from a cluster on, at least one, as far as they lie
// together, and how many they are. They are nil if there is no table.
func (m *image) entries(cluster int64) ([]byte, int64, error) {
	ti, ci := cluster>>m.tableShift, cluster&(m.entriesPerTable()-1)
	count := m.entriesPerTable() - ci
	table, err := m.tableAt(ti)
	if table == 0 || err != nil {
		return nil, count, err
	}
	p, err := m.tables.View(0, table+ci*entryBytes)
	if err != nil {
		return nil, 0, err
	}
	if int64(len(p)) > count*entryBytes {
		p = p[:count*entryBytes]
	}
	return p, int64(len(p)) / entryBytes, nil
}

// Lookup says where guest bytes are. It is the path of every guest request.
func (m *image) Lookup(off, n int64) (engine.Run, error) {
	n = min(n, m.sizeBytes-off)
	cluster := off >> m.clusterShift
	p, count, err := m.entries(cluster)
	if err != nil {
		return engine.Run{}, err
	}
	first := uint64(0)
	if p != nil {
		first = binary.BigEndian.Uint64(p)
	}
	run, err := m.runAt(cluster, first, off, n)
	if err != nil || run.State == engine.Compressed {
		return run, err
	}
	in := off & (m.clusterBytes() - 1)
	if m.clusterBytes()-in < run.Len {
		clusters := m.alike(cluster, first, p, count, (in+run.Len-1)>>m.clusterShift+1)
		run.Len = min(run.Len, clusters<<m.clusterShift-in)
	}
	return run, nil
}

// runAt says what the entry of a cluster says of the guest bytes at off; its Len is how far
// a run can reach, n or less, if the following entries agree.
func (m *image) runAt(cluster int64, entry uint64, off, n int64) (engine.Run, error) {
	switch {
	case entry == 0:
		return engine.Run{State: engine.Absent, Len: n}, nil
	case entry&flagCompressed != 0:
		return m.compressedRun(cluster, entry, off, n)
	}
	room, ok := m.dataRoom(cluster, entry)
	if !ok {
		return engine.Run{}, m.badEntry(cluster, entry)
	}
	in := off & (m.clusterBytes() - 1)
	return engine.Run{State: engine.Data, Len: min(n, room-in), FileOff: int64(entry) + in}, nil
}

// dataRoom returns how many bytes of data can lie from the place on that an entry names,
// which must not be of a compressed cluster; ok is false if that is no place for the
// cluster. The last one of a file may be as short as the guest's last bytes.
func (m *image) dataRoom(cluster int64, entry uint64) (room int64, ok bool) {
	off := int64(entry)
	room = m.room(off)
	switch {
	case off%sectorBytes != 0:
		return 0, false
	case room >= m.clusterBytes():
		return room, true
	}
	isLast := off+room == m.fileEnd && off&(m.clusterBytes()-1) == 0
	return room, isLast && room > 0 && room >= m.sizeBytes-cluster<<m.clusterShift
}

func (m *image) badEntry(cluster int64, entry uint64) error {
	return corrupt("the entry of cluster %d (guest offset %#x) in %s is %#x: outside the file, in its metadata, or not at a sector",
		cluster, cluster<<m.clusterShift, m.f.Name(), entry)
}

// compressedAt returns where an entry says that a compressed cluster is.
func (m *image) compressedAt(entry uint64) (off, n int64) {
	shift := 63 - m.clusterShift
	return int64(entry & (1<<shift - 1)), int64(entry >> shift & (1<<m.clusterShift - 1))
}

func (m *image) compressedRun(cluster int64, entry uint64, off, n int64) (engine.Run, error) {
	at, stored := m.compressedAt(entry)
	if stored == 0 || m.room(at) < stored {
		return engine.Run{}, m.badEntry(cluster, entry)
	}
	start, end := m.Granule(off)
	return engine.Run{
		State: engine.Compressed, Len: min(n, end-off), FileOff: at,
		GranuleOff: start, GranuleLen: m.clusterBytes(), CompressedLen: stored,
	}, nil
}

// countTables makes counted anew.
func (m *image) countTables() {
	m.counted = make([]uint16, (len(m.l1)-1)/countedTogether+1)
	for ti, at := range m.l1 {
		if at != 0 {
			m.counted[ti/countedTogether]++
		}
	}
}

// tablesMissing returns how many level 2 tables from ti on do not exist, as far as that is
// quickly found.
func (m *image) tablesMissing(ti int64) int64 {
	n, tables := ti, int64(len(m.l1))
	for steps := 0; n < tables && steps < maxMissingSteps; steps++ {
		switch {
		case n%countedTogether == 0 && m.counted[n/countedTogether] == 0:
			n = min(n+countedTogether, tables)
		case m.l1[n] == 0:
			n++
		default:
			return n - ti
		}
	}
	return n - ti
}

// alike returns how many clusters from the first on, at most want, continue its run. p are
// the first's entry and the count-1 next ones.
func (m *image) alike(cluster int64, first uint64, p []byte, count, want int64) int64 {
	step := uint64(m.clusterBytes())
	if first == 0 {
		step = 0
	}
	found, expect := int64(0), first
	for walked := 0; ; walked++ {
		if p == nil {
			if first != 0 {
				return found
			}
			found += count + m.tablesMissing((cluster+found+count)>>m.tableShift)<<m.tableShift
		}
		for ; len(p) > 0; p = p[entryBytes:] {
			if binary.BigEndian.Uint64(p) != expect || found == want {
				return found
			}
			found++
			expect += step
		}
		if found >= want || walked == maxTablesPerLookup {
			return min(found, want)
		}
		var err error
		if p, count, err = m.entries(cluster + found); err != nil {
			return found // whoever asks for those bytes is told
		}
	}
}
