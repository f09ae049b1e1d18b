package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// maxProblems bounds how many problems are described; all are counted.
const maxProblems = 100

// Check counts all references to host clusters, from the active tables, snapshots and
// bitmaps, and compares them with the refcounts and with what L1 and L2 entries say of them
// (bit 63). A repair makes refcounts and entries say what was counted; if the refcounts'
// own structure is damaged, it makes a new one.
func (m *image) Check(ctx context.Context, c *engine.Commit, progress func(done, total int64)) (engine.CheckResult, error) {
	k := &checker{ctx: ctx, image: m, commit: c, progress: progress}
	err := k.decideToSeparate()
	if err == nil {
		err = k.run()
	}
	if err != nil {
		return k.result, fmt.Errorf("qcow2: check %s: %w", m.layer.Name, err)
	}
	return k.result, nil
}

// checker is one check.
type checker struct {
	ctx      context.Context
	image    *image
	commit   *engine.Commit // nil: look only
	progress func(done, total int64)
	result   engine.CheckResult
	// separates says that guest clusters that lie where something else is shall be copied:
	// that can take as much space as the guest has.
	separates bool
	// outside counts entries that lead past the end of the file. While there are any, nothing
	// is put there: they would refer to it, too.
	outside    int64
	notRebuilt bool // the refcounts had to be made anew and were not, because of them

	counts      counts
	broken      bool // the refcounts' structure cannot be used
	counted     bool // it was counted, too
	done, total int64
	lastHost    int64 // of the guest cluster before, to count fragments
	table       []byte
	changed     bool // table is to be written
}

func (k *checker) report(p engine.Problem) {
	r := &k.result
	switch {
	case p.Fixed && p.Corrupt:
		r.FixedProblems++
	case p.Corrupt:
		r.Corruptions++
	}
	if len(r.Problems) < maxProblems {
		r.Problems = append(r.Problems, p)
	}
}

func (k *checker) corruption(fixed bool, format string, args ...any) {
	k.report(engine.Problem{Corrupt: true, Fixed: fixed, Text: fmt.Sprintf(format, args...)})
}

// decideToSeparate looks through all entries before a repair.
func (k *checker) decideToSeparate() error {
	if k.commit == nil {
		return nil
	}
	look := &checker{ctx: k.ctx, image: k.image, table: make([]byte, k.image.clusterBytes)}
	if err := look.countGuest(); err != nil {
		return err
	}
	k.separates = look.outside == 0
	return nil
}

func (k *checker) run() error {
	m := k.image
	k.table = make([]byte, m.clusterBytes)
	k.result.TotalClusters = m.clusters(m.sizeBytes)
	if err := m.loadRefTable(); err != nil {
		return err
	}
	if err := k.countGuest(); err != nil {
		return err
	}
	if err := k.judgeRefcounts(); err != nil {
		return err
	}
	if err := k.checkRefcounts(); err != nil {
		return err
	}
	if err := k.checkCopied(); err != nil {
		return err
	}
	k.result.ImageEndOffset = (k.counts.last + 1) << m.clusterBits
	if k.commit == nil {
		return nil
	}
	return k.finishRepair()
}

// count counts a reference to each cluster of a range, which must lie in the file.
func (k *checker) count(off, n int64) error {
	for c := off >> k.image.clusterBits; c <= (off+n-1)>>k.image.clusterBits; c++ {
		if err := k.counts.add(c, 1); err != nil {
			return err
		}
	}
	return nil
}

// countGuest is countAll with refcount blocks being no metadata: where a damaged refcount
// table says that they are, guest data may be, which counts for more. Refcounts can be made
// anew.
func (k *checker) countGuest() error {
	m := k.image
	for _, e := range m.refTable {
		if e != 0 && e != badTable {
			m.metadata.remove(int64(e) >> m.clusterBits)
		}
	}
	err := k.countAll()
	for _, e := range m.refTable {
		if e != 0 && e != badTable {
			m.metadata.add(int64(e) >> m.clusterBits)
		}
	}
	return err
}

// countAll counts all references but those to refcounts.
func (k *checker) countAll() error {
	m := k.image
	h := m.header
	if err := k.count(0, 1); err != nil {
		return err
	}
	k.total = 2 * int64(len(m.l1))
	for _, s := range m.snapshots {
		k.total += s.l1Size
	}
	if len(m.l1) > 0 {
		if err := k.count(int64(h.l1TableOffset), int64(h.l1Size)*8); err != nil {
			return err
		}
	}
	if err := k.walk("", m.l1, k.countEntry); err != nil {
		return err
	}
	if err := k.countSnapshots(); err != nil {
		return err
	}
	return k.countBitmaps()
}

func (k *checker) countSnapshots() error {
	m := k.image
	if len(m.snapshots) == 0 {
		return nil
	}
	if err := k.count(int64(m.header.snapshotsOffset), m.snapshotBytes); err != nil {
		return err
	}
	seen := map[int64]bool{int64(m.header.l1TableOffset): true}
	for _, s := range m.snapshots {
		if s.l1Size == 0 {
			continue
		}
		if err := k.count(s.l1Offset, s.l1Size*8); err != nil {
			return err
		}
		if seen[s.l1Offset] {
			k.corruption(false, "snapshot %q has the L1 table of another, at %#x", shorten(s.id), s.l1Offset)
			continue
		}
		seen[s.l1Offset] = true
		l1, err := m.readEntries(s.l1Offset, s.l1Size)
		if err != nil {
			return err
		}
		if err := k.walk(fmt.Sprintf("snapshot %q: ", shorten(s.id)), l1, k.countSnapshotEntry); err != nil {
			return err
		}
	}
	return nil
}

func (k *checker) countBitmaps() error {
	m := k.image
	if m.bitmapsBroken != nil {
		k.corruption(k.commit != nil, "the bitmaps cannot be used: %v", m.bitmapsBroken)
		return nil
	}
	if len(m.bitmaps) == 0 {
		return nil
	}
	ext, _ := m.header.extension(extBitmaps)
	if err := k.count(int64(binary.BigEndian.Uint64(ext[16:])), int64(binary.BigEndian.Uint64(ext[8:]))); err != nil {
		return err
	}
	for _, b := range m.bitmaps {
		if b.tableSize == 0 {
			continue
		}
		if err := k.count(b.tableOffset, b.tableSize*8); err != nil {
			return err
		}
		table, err := m.readEntries(b.tableOffset, b.tableSize)
		if err != nil {
			return err
		}
		for i, e := range table {
			off := int64(e & offsetMask)
			switch {
			case off == 0:
			case off&(m.clusterBytes-1) != 0 || off >= m.fileEnd:
				if off >= m.fileEnd {
					k.outside++
				}
				k.corruption(false, "bitmap %q: entry %d, %#x, lies outside the file", shorten(b.name), i, e)
			default:
				if err := k.count(off, 1); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// walk calls visit with each L2 table of an L1 table, after having counted it.
func (k *checker) walk(who string, l1 []uint64, visit func(who string, cluster int64, e entry) error) error {
	m := k.image
	var own clusterSet // a table must not occur twice
	for i, e := range l1 {
		if err := k.step(); err != nil {
			return err
		}
		if e == badTable && who == "" {
			var err error
			if e, err = k.judgeBadTable(int64(i), &own); err != nil {
				return err
			}
		}
		off := int64(e & offsetMask)
		if e == 0 || e != badTable && off == 0 {
			continue
		}
		if e == badTable || off&(m.clusterBytes-1) != 0 || off >= m.fileEnd || !own.add(off>>m.clusterBits) {
			if e != badTable && off >= m.fileEnd {
				k.outside++
			}
			k.corruption(false, "%sL1 entry %d: its table lies outside the file or overlaps something else", who, i)
			continue
		}
		if err := k.count(off, 1); err != nil {
			return err
		}
		if err := m.tables.Read(0, off, k.table); err != nil {
			return err
		}
		k.changed = false
		for j := int64(0); j < 1<<m.l2Bits; j++ {
			if err := visit(who, int64(i)<<m.l2Bits+j, m.at(k.table[j<<m.entryShift:])); err != nil {
				return err
			}
		}
		if err := k.writeTable(off); err != nil {
			return err
		}
	}
	return nil
}

// writeTable writes a table that has changed, after what it refers to now.
func (k *checker) writeTable(off int64) error {
	if !k.changed {
		return nil
	}
	if err := k.commit.Sync(); err != nil {
		return err
	}
	return k.writePast(k.table, off)
}

// writePast writes to where tables are, past their cache, which is not to remember what was
// there before.
func (k *checker) writePast(p []byte, off int64) error {
	defer k.image.tables.Forget()
	return k.commit.WriteAt(0, p, off)
}

func (k *checker) step() error {
	k.done++
	if k.progress != nil && (k.done%64 == 0 || k.done == k.total) {
		k.progress(k.done, k.total)
	}
	return k.ctx.Err()
}

// countEntry counts what an active L2 entry refers to.
func (k *checker) countEntry(who string, cluster int64, e entry) error {
	if !e.compressed() && e.descriptor == 0 && e.bitmap == 0 {
		return nil
	}
	if k.overlaps(e) {
		var err error
		if e, err = k.copyOut(cluster, e); err != nil {
			return err
		}
	}
	host, ok, err := k.countHost(who, cluster, e)
	if !ok || err != nil {
		return err
	}
	k.result.AllocatedCount++
	if e.compressed() {
		k.result.Compressed++
		return nil
	}
	if k.lastHost != 0 && host != k.lastHost+k.image.clusterBytes {
		k.result.Fragmented++
	}
	k.lastHost = host
	return nil
}

func (k *checker) countSnapshotEntry(who string, cluster int64, e entry) error {
	_, _, err := k.countHost(who, cluster, e)
	return err
}

// countHost counts what an L2 entry refers to; ok is false if that is nothing, or bad.
func (k *checker) countHost(who string, cluster int64, e entry) (host int64, ok bool, err error) {
	m := k.image
	if e.compressed() {
		run, err := m.compressedRun(e, cluster<<m.clusterBits, 1)
		if err != nil {
			k.outside++ // its data may begin before the end of the file, and end after it
			k.corruption(false, "%s%v", who, err)
			return 0, false, nil
		}
		return 0, true, k.count(run.FileOff, run.CompressedLen)
	}
	host = e.host()
	state := engine.Zero
	if m.extended && e.bitmap&allSubclusters != 0 || !m.extended && e.descriptor != 0 && e.descriptor&flagZero == 0 {
		state = engine.Data
	}
	if err := m.checkEntry(cluster, e, state); err != nil {
		if m.dataFile == 0 && host >= m.fileEnd {
			k.outside++
		}
		k.corruption(false, "%s%v", who, err)
		return 0, false, nil
	}
	if host == 0 || m.dataFile != 0 {
		return host, m.dataFile != 0 && state == engine.Data, nil
	}
	// A place kept for a zero cluster may lie past the end of the file, where refcounts are.
	if host&(m.clusterBytes-1) != 0 || host >= m.fileEnd && host>>m.clusterBits >= int64(len(m.refTable))<<m.blockBits {
		k.outside++
		k.corruption(false, "%s%v", who, m.badEntry(cluster, e, "outside the file, or not a multiple of the cluster size"))
		return 0, false, nil
	}
	return host, state == engine.Data, k.count(host, 1)
}

// judgeRefcounts counts the refcounts' own structure, unless that is damaged.
func (k *checker) judgeRefcounts() error {
	m := k.image
	table := int64(m.header.refcountTableOffset) >> m.clusterBits
	if k.counts.any(table, int64(m.header.refcountTableClusters)) {
		k.brokenStructure("the refcount table at %#x overlaps something else", m.header.refcountTableOffset)
	}
	for i, e := range m.refTable {
		switch {
		case e == badTable:
			k.brokenStructure("refcount table entry %d: its block lies outside the file or overlaps something else", i)
		case e != 0 && k.counts.get(int64(e)>>m.clusterBits) != 0:
			k.brokenStructure("the refcount block of entry %d at %#x overlaps something else", i, e)
		}
	}
	if k.broken {
		return nil
	}
	k.counted = true
	if err := k.count(table<<m.clusterBits, int64(m.header.refcountTableClusters)<<m.clusterBits); err != nil {
		return err
	}
	for _, e := range m.refTable {
		if e == 0 {
			continue
		}
		if err := k.count(int64(e), 1); err != nil {
			return err
		}
	}
	return nil
}

// brokenStructure notes that a repair has to make new refcounts.
func (k *checker) brokenStructure(format string, args ...any) {
	k.corruption(k.commit != nil, format, args...)
	k.broken = true
}

// checkRefcounts compares refcounts with what was counted, block by block.
func (k *checker) checkRefcounts() error {
	m := k.image
	if k.broken {
		return k.repairStructure()
	}
	for _, number := range k.counts.blocks(m.blockBits) {
		if number >= int64(len(m.refTable)) || m.refTable[number] == 0 {
			k.brokenStructure("clusters from %#x on are in use, but have no refcounts", number<<m.blockBits<<m.clusterBits)
		}
	}
	for number, e := range m.refTable {
		if e == 0 {
			continue
		}
		if err := k.checkBlock(int64(number)); err != nil {
			return err
		}
	}
	return k.repairStructure()
}

// repairStructure makes new refcounts if the old ones cannot be used, and if it may.
func (k *checker) repairStructure() error {
	if !k.broken || k.commit == nil {
		return nil
	}
	return k.rebuild()
}

// checkBlock compares the refcounts of a block, and replaces those that are wrong.
func (k *checker) checkBlock(number int64) error {
	m := k.image
	if err := k.ctx.Err(); err != nil {
		return err
	}
	off, order := int64(m.refTable[number]), uint(m.header.refcountOrder)
	if err := m.tables.Read(0, off, k.table); err != nil {
		return err
	}
	changed := false
	for i := range m.blockEntries() {
		cluster, bit := number<<m.blockBits+i, i<<order
		has, want := decodeRefcount(k.table[bit>>3:], uint(bit&7), order), k.counts.get(cluster)
		if has == want {
			continue
		}
		fixed := k.commit != nil && want <= m.maxRefcount()
		if fixed {
			encodeRefcount(k.table[bit>>3:], uint(bit&7), order, want)
			changed = true
		}
		k.reportRefcount(cluster, has, want, fixed)
	}
	if !changed {
		return nil
	}
	return k.writePast(k.table, off)
}

func (k *checker) reportRefcount(cluster int64, has, want uint64, fixed bool) {
	text := fmt.Sprintf("the cluster at %#x has a refcount of %d, but %d references", cluster<<k.image.clusterBits, has, want)
	if has < want {
		k.corruption(fixed, "%s", text)
		return
	}
	if fixed {
		k.result.FixedLeaks++
	} else {
		k.result.Leaks++
	}
	k.report(engine.Problem{Fixed: fixed, Text: text})
}

// checkCopied compares bit 63 of the active entries with what was counted.
func (k *checker) checkCopied() error {
	m := k.image
	if m.dataFile != 0 {
		return k.checkCopiedL1() // a data file's clusters have no refcounts
	}
	for i, e := range m.l1 {
		if err := k.step(); err != nil {
			return err
		}
		if e == 0 || e == badTable {
			continue
		}
		if err := k.checkCopiedL2(int64(i), int64(e&offsetMask)); err != nil {
			return err
		}
	}
	return k.checkCopiedL1()
}

func (k *checker) checkCopiedL2(l1Index, off int64) error {
	m := k.image
	if err := m.tables.Read(0, off, k.table); err != nil {
		return err
	}
	changed := false
	for j := int64(0); j < 1<<m.l2Bits; j++ {
		p := k.table[j<<m.entryShift:]
		e := m.at(p)
		host := e.host()
		if e.compressed() || host == 0 || host&(m.clusterBytes-1) != 0 || host >= m.fileEnd {
			continue
		}
		count := k.counts.get(host >> m.clusterBits)
		if e.exclusive() == (count == 1) {
			continue
		}
		k.corruption(k.commit != nil, "the L2 entry of guest offset %#x is %#x, but its cluster has %d references",
			(l1Index<<m.l2Bits+j)<<m.clusterBits, e.descriptor, count)
		if k.commit != nil {
			binary.BigEndian.PutUint64(p, e.descriptor^flagCopied)
			changed = true
		}
	}
	if !changed {
		return nil
	}
	return k.writePast(k.table, off)
}

func (k *checker) checkCopiedL1() error {
	m := k.image
	for i, e := range m.l1 {
		if e == 0 || e == badTable {
			continue
		}
		count := k.counts.get(int64(e&offsetMask) >> m.clusterBits)
		if (e&flagCopied != 0) == (count == 1) {
			continue
		}
		k.corruption(k.commit != nil, "L1 entry %d is %#x, but its table has %d references", i, e, count)
		if k.commit == nil {
			continue
		}
		m.l1[i] ^= flagCopied
		p := binary.BigEndian.AppendUint64(nil, m.l1[i])
		if err := k.writePast(p, int64(m.header.l1TableOffset)+int64(i)*8); err != nil {
			return err
		}
	}
	return nil
}
