package vhd

import (
	"context"
	"fmt"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

const (
	// maxProblems bounds how many problems are described; all are counted.
	maxProblems = 100
	// maxSeparated bounds how many blocks one repair gives another place.
	maxSeparated = 1 << 16
)

// Check examines footers and block allocation table. A repair makes both footers the same,
// gives each block a place of its own, and cuts off what ends the file unused.
func (m *image) Check(ctx context.Context, c *engine.Commit, progress func(done, total int64)) (engine.CheckResult, error) {
	k := &checker{ctx: ctx, image: m, progress: progress, lost: m.lost}
	err := k.run()
	if err == nil && c != nil {
		err = k.repair(c)
	}
	k.describe(c != nil && err == nil)
	if err != nil {
		return k.result, fmt.Errorf("vpc: check %s: %w", m.layer.Name, err)
	}
	return k.result, nil
}

type checker struct {
	ctx      context.Context
	image    *image
	progress func(done, total int64)
	result   engine.CheckResult
	lost     lostFooter
	usage    usage
	outside  int64   // entries that name what is not in the file
	shared   int64   // blocks whose place is another's, too, in part or as a whole
	sharing  []int64 // their numbers, but at most maxSeparated
}

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

// run finds out what is wrong.
func (k *checker) run() error {
	m := k.image
	if m.fixed() {
		k.result.ImageEndOffset = m.footerOff + footerBytes
		if k.progress != nil {
			k.progress(1, 1)
		}
		return nil
	}
	places, err := k.scan()
	if err != nil {
		return err
	}
	m.arrange(&k.usage, places)
	k.findSharing(places)
	k.result.AllocatedCount = k.usage.used
	k.result.ImageEndOffset = k.usage.end
	k.result.Leaks = m.leaks(&k.usage)
	return nil
}

// leaks returns for how many blocks there is space that nothing refers to.
func (m *image) leaks(u *usage) int64 {
	n := m.slotsIn(span{u.end, m.fileBytes - footerBytes})
	for _, gap := range u.gaps {
		n += m.slotsIn(gap)
	}
	return n
}

// slotsIn returns how many blocks there is space for in a gap.
func (m *image) slotsIn(gap span) int64 {
	start := m.alignSlot(gap.start)
	if start+m.slotBytes() > gap.end {
		return 0
	}
	return (gap.end-start-m.slotBytes())/(m.alignSlot(start+m.slotBytes())-start) + 1
}

// scan returns the places of all blocks that have a good one.
func (k *checker) scan() ([]place, error) {
	m := k.image
	k.result.TotalClusters = m.blocksOf(m.sizeBytes)
	places, err := m.places(k.step, func(number int64, entry uint32) {
		k.outside++
		k.report(engine.Problem{Corrupt: true, Text: fmt.Sprintf(
			"entry %d of the block allocation table, sector %d, lies outside the file of %d bytes or in its metadata", number, entry, m.fileBytes)})
	})
	for i := 1; i < len(places); i++ {
		if places[i].slot() != m.alignSlot(places[i-1].slot()+m.slotBytes()) {
			k.result.Fragmented++
		}
	}
	return places, err
}

// step reports progress now and then, and whether to go on.
func (k *checker) step(number int64) error {
	const often = 1 << 16
	total := k.image.header.entries()
	if number%often != 0 && number != total-1 {
		return nil
	}
	if k.progress != nil {
		k.progress(number+1, total)
	}
	return k.ctx.Err()
}

// findSharing finds blocks, sorted by place, that begin within another one.
func (k *checker) findSharing(taken []place) {
	end := int64(0)
	for _, t := range taken {
		if t.slot() >= end {
			end = t.slot() + k.image.slotBytes()
			continue
		}
		// What follows may overlap this one, too, but need not be bad.
		if k.shared++; k.shared <= maxSeparated {
			k.sharing = append(k.sharing, int64(t.number))
		}
	}
	slices.Sort(k.sharing)
}

// describe reports what a repair could fix, and whether one did.
func (k *checker) describe(fixed bool) {
	for _, number := range k.sharing {
		k.report(engine.Problem{Corrupt: true, Fixed: fixed, Text: fmt.Sprintf("entry %d of the block allocation table overlaps another one", number)})
	}
	if k.lost.head {
		k.report(engine.Problem{Fixed: fixed, Text: "the copy of the footer at the start of the file is damaged"})
	}
	if k.lost.tail {
		k.report(engine.Problem{Fixed: fixed, Text: "the footer at the end of the file is missing, damaged or different from its copy at the start"})
	}
	if rest := k.shared - int64(len(k.sharing)); rest > 0 {
		k.result.Corruptions += rest - 1
		k.report(engine.Problem{Corrupt: true, Text: fmt.Sprintf("%d more entries overlap others: repair it again", rest)})
	}
	if k.result.Leaks > 0 || k.result.FixedLeaks > 0 {
		k.report(engine.Problem{Fixed: k.result.FixedLeaks > 0, Text: fmt.Sprintf("nothing refers to space for %d blocks in the file", k.result.Leaks+k.result.FixedLeaks)})
	}
}

// repair fixes what run has found.
func (k *checker) repair(c *engine.Commit) error {
	m := k.image
	defer m.layer.Tables.Forget()
	if m.fixed() {
		if !k.lost.tail {
			return nil
		}
		return m.beginFixed(c, m.footer)
	}
	if err := m.normalize(c, k.usage.end); err != nil {
		return err
	}
	if k.lost != (lostFooter{}) || len(k.sharing) > 0 {
		if err := m.writeFooters(c, m.footer); err != nil {
			return err
		}
	}
	m.room = room{end: k.usage.end, clean: m.fileBytes, loans: map[int64]*loan{}}
	for _, number := range k.sharing {
		if err := k.ctx.Err(); err != nil {
			return err
		}
		if err := k.separate(c, number); err != nil {
			return err
		}
	}
	if k.outside > 0 || k.shared > int64(len(k.sharing)) {
		return nil // the file was probably cut off, or has to be repaired again: leave what there is
	}
	u, err := m.pack(c)
	if err != nil {
		return err
	}
	if err := m.cut(c, u.end); err != nil {
		return err
	}
	left := m.leaks(u)
	k.result.FixedLeaks, k.result.Leaks = max(k.result.Leaks-left, 0), left
	return nil
}

// separate gives a block that overlaps another a copy of its own.
func (k *checker) separate(c *engine.Commit, number int64) error {
	m := k.image
	p := part{block: number}
	if err := m.prepare(&p); err != nil {
		return err
	}
	to, err := m.append(m.slotBytes(), m.alignSlot)
	if err != nil {
		return err
	}
	if err := m.copySlot(c, p.slot, to); err != nil {
		return err
	}
	if err := c.Sync(); err != nil {
		return err
	}
	return m.writeEntry(c, number, to)
}
