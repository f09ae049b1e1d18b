package vhd

import (
	"context"
	"fmt"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// maxProblems bounds how many problems are described; all are counted.
const maxProblems = 100

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
	sharing  []int64 // blocks whose place is another's, too, in part or as a whole
	tail     int64   // blocks that would fit between the last one and the footer
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
	taken, err := k.scan()
	if err != nil {
		return err
	}
	k.findSharing(taken)
	slots := make([]uint32, len(taken))
	for i, t := range taken {
		slots[i] = t.sector
	}
	k.usage.used = int64(len(taken))
	m.arrange(&k.usage, slots)
	k.result.AllocatedCount = k.usage.used
	k.result.ImageEndOffset = k.usage.end
	for _, gap := range k.usage.gaps {
		k.result.Leaks += (gap.end - m.alignSlot(gap.start)) / m.slotBytes()
	}
	k.tail = max(m.fileBytes-footerBytes-m.alignSlot(k.usage.end), 0) / m.slotBytes()
	k.result.Leaks += k.tail
	return nil
}

// place is where a block is.
type place struct{ sector, number uint32 }

// scan returns the places of all blocks that have a good one.
func (k *checker) scan() ([]place, error) {
	m := k.image
	k.result.TotalClusters = m.blocksOf(m.sizeBytes)
	var taken []place
	previous := int64(0)
	err := m.eachEntry(0, m.header.entries(), func(number int64, entry uint32) error {
		if err := k.step(number); err != nil {
			return err
		}
		if entry == entryUnused {
			return nil
		}
		slot, err := m.slotAt(number, entry)
		if err != nil {
			k.outside++
			k.report(engine.Problem{Corrupt: true, Text: fmt.Sprintf(
				"entry %d of the block allocation table, sector %d, lies outside the file of %d bytes or in its metadata", number, entry, m.fileBytes)})
			return nil
		}
		if previous != 0 && slot != m.alignSlot(previous) {
			k.result.Fragmented++
		}
		previous = slot + m.slotBytes()
		taken = append(taken, place{entry, uint32(number)})
		return nil
	})
	return taken, err
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

// findSharing finds blocks that begin within another one.
func (k *checker) findSharing(taken []place) {
	slices.SortStableFunc(taken, func(a, b place) int { return int(int64(a.sector) - int64(b.sector)) })
	end := int64(0)
	for _, t := range taken {
		start := int64(t.sector) * sectorBytes
		if start < end {
			k.sharing = append(k.sharing, int64(t.number))
			continue // what follows overlaps it, too, but need not be bad
		}
		end = start + k.image.slotBytes()
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
	if k.result.Leaks > 0 {
		k.report(engine.Problem{Fixed: fixed && k.tail == k.result.Leaks, Text: fmt.Sprintf("nothing refers to space for %d blocks in the file", k.result.Leaks)})
	}
	if fixed && k.outside == 0 {
		k.result.FixedLeaks = k.tail
		k.result.Leaks -= k.tail
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
		if err := k.separate(c, number); err != nil {
			return err
		}
	}
	if k.outside > 0 {
		return nil // the file was probably cut off: leave what there is
	}
	return m.cut(c, m.room.end)
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
	buf := make([]byte, min(copyBytes, m.slotBytes()))
	for done := int64(0); done < m.slotBytes(); {
		b := buf[:min(int64(len(buf)), m.slotBytes()-done)]
		clear(b)
		if n := min(int64(len(b)), max(m.fileBytes-p.slot-done, 0)); n > 0 {
			if err := readFull(m.f, b[:n], p.slot+done); err != nil {
				return err
			}
		}
		if err := c.WriteAt(0, b, to+done); err != nil {
			return err
		}
		done += int64(len(b))
	}
	if err := c.Sync(); err != nil {
		return err
	}
	entry := uint32(to / sectorBytes)
	return c.WriteAt(0, []byte{byte(entry >> 24), byte(entry >> 16), byte(entry >> 8), byte(entry)}, m.entryOff(number))
}
