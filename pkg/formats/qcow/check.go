package qcow

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

const (
	// maxProblems bounds how many problems are described; all are counted.
	maxProblems = 100
	// maxUnits bounds each bitmap of a check: a bit for each unit of the file.
	maxUnits = 64 << 20 * 8
	// maxStored bounds how many compressed clusters are compared at once.
	maxStored = 8 << 20
)

// Check examines both levels of tables. A repair gives clusters that share their place with
// others a copy of it, clears entries that lead nowhere, and cuts off what nothing refers to
// at the file's end: see repair.go.
func (m *image) Check(ctx context.Context, c *engine.Commit, progress func(done, total int64)) (engine.CheckResult, error) {
	k := newChecker(ctx, m, c, progress)
	err := k.run()
	if err == nil && c != nil {
		err = c.Sync()
		m.tables.Forget()
	}
	if err != nil {
		return k.result, fmt.Errorf("qcow: check %s: %w", m.layer.Name, err)
	}
	return k.result, nil
}

// checker goes over the tables several times: first to find how fine the bitmaps must be,
// then to fill them with plain clusters, then for compressed ones, which lie anywhere.
type checker struct {
	ctx      context.Context
	m        *image
	commit   *engine.Commit // nil: look only
	result   engine.CheckResult
	progress func(done, total int64)
	done     int64

	table     []byte // scratch: a level 2 table
	unitShift uint   // log2 of the bytes that a bit stands for
	data      bitmap // units in which plain clusters are
	used      bitmap // units in which anything is
	previous  uint64 // the last plain cluster's entry, to count fragments
	stored    storedList
	damaged   bool // something is corrupt, or was
	punched   bool // leaks that cannot be cut off take no space any more
}

func newChecker(ctx context.Context, m *image, c *engine.Commit, progress func(done, total int64)) *checker {
	return &checker{
		ctx: ctx, m: m, commit: c, progress: progress,
		table: make([]byte, m.tableBytes()), stored: storedList{limit: maxStored},
	}
}

func (k *checker) run() error {
	if err := k.scan(); err != nil {
		return err
	}
	k.countLeaks()
	if k.repairs() {
		if err := k.cutOff(); err != nil {
			return err
		}
	}
	k.reportLeaks()
	if k.progress != nil {
		k.progress(k.total(), k.total())
	}
	return nil
}

// scan goes through all tables: used is complete afterwards.
func (k *checker) scan() error {
	m := k.m
	k.result.TotalClusters = m.clusters()
	if err := k.checkL1(); err != nil {
		return err
	}
	if err := k.makeBitmaps(); err != nil {
		return err
	}
	for _, s := range m.fixed {
		k.used.fill(s, k.unitShift)
	}
	for _, at := range m.l2s {
		k.used.fill(span{at, at + m.tableBytes()}, k.unitShift)
	}
	if err := k.eachTable(k.checkTable); err != nil {
		return err
	}
	return k.checkStored()
}

// repairs reports whether the image is to be repaired.
func (k *checker) repairs() bool { return k.commit != nil && k.m.space != nil }

// report counts a problem and, if there are not too many yet, describes it.
func (k *checker) report(p engine.Problem) {
	switch {
	case p.Fixed:
		k.result.FixedProblems++
	case p.Corrupt:
		k.result.Corruptions++
	}
	if len(k.result.Problems) < maxProblems {
		k.result.Problems = append(k.result.Problems, p)
	}
}

func (k *checker) corrupt(fixed bool, format string, args ...any) {
	k.damaged = true
	k.report(engine.Problem{Corrupt: true, Fixed: fixed, Text: fmt.Sprintf(format, args...)})
}

// eachTable calls do for each level 2 table that can be read, with its contents in k.table.
// If do returns true, it has changed them, and they are written.
func (k *checker) eachTable(do func(ti int64) (changed bool, err error)) error {
	for ti := range int64(len(k.m.l1)) {
		if err := k.ctx.Err(); err != nil {
			return err
		}
		k.step()
		at, err := k.m.tableAt(ti)
		if err != nil || at == 0 {
			continue // checkL1 has reported it
		}
		if err := k.m.tables.Read(0, at, k.table); err != nil {
			return err
		}
		changed, err := do(ti)
		if err != nil {
			return err
		}
		if changed {
			if err := k.writeTable(at); err != nil {
				return err
			}
		}
	}
	return nil
}

// step tells how far the check is, as if it took three passes.
func (k *checker) step() {
	k.done++
	if k.progress != nil && k.done%64 == 0 {
		k.progress(min(k.done, k.total()), k.total())
	}
}

func (k *checker) total() int64 { return 3 * int64(len(k.m.l1)) }

// clustersIn returns the clusters of level 2 table ti: its entries from count on are past the
// end of the disk.
func (k *checker) clustersIn(ti int64) (first, count int64) {
	first = ti << k.m.tableShift
	return first, min(k.m.entriesPerTable(), k.m.clusters()-first)
}

// checkL1 reports what judgeTables has found.
func (k *checker) checkL1() error {
	for ti, at := range k.m.l1 {
		if at != badTable {
			continue
		}
		fixed, err := k.repairL1(int64(ti))
		if err != nil {
			return err
		}
		k.corrupt(fixed, "level 1 entry %d: its table lies outside the file of %d bytes, across sectors, or overlaps something else",
			ti, k.m.fileEnd)
	}
	return nil
}

// makeBitmaps makes the bitmaps, with the greatest units in which no two plain clusters share
// one without overlapping.
func (k *checker) makeBitmaps() error {
	m := k.m
	k.unitShift = m.clusterShift
	err := k.eachTable(func(ti int64) (bool, error) {
		_, count := k.clustersIn(ti)
		for p := k.table[:count*entryBytes]; len(p) > 0; p = p[entryBytes:] {
			entry := binary.BigEndian.Uint64(p)
			if entry != 0 && entry&flagCompressed == 0 && entry%sectorBytes == 0 && entry < uint64(m.fileEnd) {
				k.unitShift = min(k.unitShift, uint(bits.TrailingZeros64(entry)))
			}
		}
		return false, nil
	})
	if err != nil {
		return err
	}
	units := (m.fileEnd-1)>>k.unitShift + 1
	if units > maxUnits {
		return unsupported("%s has %d bytes: finding what is used twice in units of %d would take %d MiB of memory",
			m.f.Name(), m.fileEnd, 1<<k.unitShift, 2*units>>23)
	}
	k.data, k.used = newBitmap(units), newBitmap(units)
	return nil
}

// checkTable checks the entries of a level 2 table, and notes where plain clusters are.
func (k *checker) checkTable(ti int64) (changed bool, err error) {
	first, count := k.clustersIn(ti)
	for i := range count {
		p := k.table[i*entryBytes:]
		entry := binary.BigEndian.Uint64(p)
		if entry == 0 {
			continue
		}
		why := k.take(first+i, entry)
		if why == "" {
			continue
		}
		repaired, err := k.repairEntry(first+i, entry)
		if err != nil {
			return changed, err
		}
		if repaired.done {
			binary.BigEndian.PutUint64(p, repaired.entry)
			changed = true
		}
		k.corrupt(repaired.done, "cluster %d (guest offset %#x): %s%s", first+i, (first+i)<<k.m.clusterShift, why, repaired.text)
	}
	return k.checkPastEnd(ti, k.table[count*entryBytes:]) || changed, nil
}

// checkPastEnd reports entries for clusters past the end of the disk: nobody reads them, but
// what they refer to is lost, and they would come up if the disk grew.
func (k *checker) checkPastEnd(ti int64, rest []byte) (changed bool) {
	if isZero(rest) {
		return false
	}
	k.report(engine.Problem{
		Fixed: k.repairs(),
		Text:  fmt.Sprintf("level 2 table %d has entries for clusters past the end of the disk", ti),
	})
	if k.repairs() {
		clear(rest)
	}
	return k.repairs()
}

// take checks an entry and notes the space it refers to as used. It returns what is wrong
// with it, and then notes nothing.
func (k *checker) take(cluster int64, entry uint64) string {
	m := k.m
	if entry&flagCompressed != 0 {
		at, n := m.compressedAt(entry)
		if n == 0 || m.room(at) < n {
			return fmt.Sprintf("its entry says that %d bytes are stored at %#x, outside the file or in its metadata", n, at)
		}
		k.result.Compressed++
		k.result.AllocatedCount++
		k.noteEnd(at + n)
		return ""
	}
	if _, ok := m.dataRoom(cluster, entry); !ok {
		return fmt.Sprintf("its entry is %#x, outside the file, in its metadata, or not at a sector", entry)
	}
	place := span{int64(entry), int64(entry) + m.clusterBytes()}
	if !k.data.mark(place, k.unitShift) {
		return fmt.Sprintf("its place at %#x is also another cluster's", entry)
	}
	k.used.fill(place, k.unitShift)
	k.result.AllocatedCount++
	if k.previous != 0 && entry != k.previous+uint64(m.clusterBytes()) {
		k.result.Fragmented++
	}
	k.previous = entry
	k.noteEnd(min(place.end, m.fileEnd))
	return ""
}

func (k *checker) noteEnd(off int64) { k.result.ImageEndOffset = max(k.result.ImageEndOffset, off) }

// countLeaks counts the clusters of the file that nothing refers to.
func (k *checker) countLeaks() {
	m := k.m
	for _, s := range m.fixed {
		k.noteEnd(min(s.end, m.fileEnd))
	}
	for _, at := range m.l2s {
		k.noteEnd(at + m.tableBytes())
	}
	k.eachFree(func(free span) { k.result.Leaks += (free.end - free.start) >> m.clusterShift })
}

// reportLeaks describes the leaks that are left, and those that are not.
func (k *checker) reportLeaks() {
	if n := k.result.FixedLeaks; n > 0 {
		k.result.Problems = append(k.result.Problems, engine.Problem{
			Fixed: true, Text: fmt.Sprintf("nothing referred to the last %d clusters of the file; they are cut off", n),
		})
	}
	if n := k.result.Leaks; n > 0 {
		text := fmt.Sprintf("nothing refers to %d clusters of the file", n)
		if k.punched {
			text += "; they are holes now"
		}
		k.report(engine.Problem{Text: text})
	}
}

// eachFree calls do for each stretch of whole clusters that nothing is in. The file's last one
// may be shorter.
func (k *checker) eachFree(do func(free span)) {
	m := k.m
	k.used.eachClear(func(first, end int64) {
		free := span{m.wholeClusters(first << k.unitShift), end << k.unitShift &^ (m.clusterBytes() - 1)}
		if end == k.used.units {
			free.end = m.wholeClusters(m.fileEnd)
		}
		if free.start < free.end {
			do(free)
		}
	})
}
