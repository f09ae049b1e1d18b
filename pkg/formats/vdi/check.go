package vdi

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

const (
	// maxProblems bounds how many problems are described; all are counted.
	maxProblems = 100
	// maxSeparated bounds how many blocks one repair gives another place.
	maxSeparated = 1 << 16
)

// Check examines the block map. A repair gives each guest block a block of its own, moves
// blocks into unused places before them, corrects the count and cuts off what is not used.
func (m *image) Check(ctx context.Context, c *engine.Commit, progress func(done, total int64)) (engine.CheckResult, error) {
	k := &checker{ctx: ctx, image: m, progress: progress, counted: m.h.allocated()}
	err := k.run()
	if err == nil && c != nil {
		err = k.repair(c)
	}
	k.describe(c != nil && err == nil)
	if err != nil {
		return k.result, fmt.Errorf("vdi: check %s: %w", m.layer.Name, err)
	}
	return k.result, nil
}

type checker struct {
	ctx      context.Context
	image    *image
	progress func(done, total int64)
	result   engine.CheckResult
	used     *usage
	counted  int64   // allocated blocks, by the header
	outside  int64   // entries that name what is not in the file
	shared   int64   // guest blocks whose block another one has
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
	k.used = m.newUsage()
	k.result.TotalClusters = m.h.blocks()
	previous := int64(-1)
	err := m.eachEntry(0, m.h.blocks(), func(block int64, entry uint32) error {
		if err := k.step(block); err != nil {
			return err
		}
		index := int64(entry)
		switch {
		case entry == entryFree || entry == entryZero:
			return nil
		case index >= m.indexLimit:
			k.outside++
			k.report(engine.Problem{Corrupt: true, Text: fmt.Sprintf(
				"block map entry %d names block %d, which lies outside the file of %d bytes", block, index, m.fileBytes)})
			return nil
		case !k.used.take(index):
			if k.shared++; k.shared <= maxSeparated {
				k.sharing = append(k.sharing, block)
			}
			return nil
		}
		if previous >= 0 && index != previous+1 {
			k.result.Fragmented++
		}
		previous = index
		return nil
	})
	inFile := (max(m.fileBytes-m.h.dataOffset(), 0) + m.stride - 1) / m.stride
	k.result.AllocatedCount = k.used.count
	k.result.ImageEndOffset = m.endOf(k.used.end)
	k.result.Leaks = inFile - k.used.count
	return err
}

// step reports progress now and then, and whether to go on.
func (k *checker) step(block int64) error {
	const often = 1 << 16
	total := k.image.h.blocks()
	if block%often != 0 && block != total-1 {
		return nil
	}
	if k.progress != nil {
		k.progress(block+1, total)
	}
	return k.ctx.Err()
}

// describe reports what a repair could fix, and whether one did.
func (k *checker) describe(fixed bool) {
	for _, block := range k.sharing {
		k.report(engine.Problem{Corrupt: true, Fixed: fixed, Text: fmt.Sprintf("block map entry %d names a block that another entry names, too", block)})
	}
	if rest := k.shared - int64(len(k.sharing)); rest > 0 {
		k.result.Corruptions += rest - 1
		k.report(engine.Problem{Corrupt: true, Text: fmt.Sprintf("%d more entries name blocks that others name, too: repair it again", rest)})
	}
	if have, want := k.counted, k.used.count; have != want {
		k.report(engine.Problem{Fixed: fixed, Text: fmt.Sprintf("the header counts %d allocated blocks, but the block map has %d", have, want)})
	}
	if most := k.image.h.blocks(); k.used.end > most {
		k.report(engine.Problem{Fixed: fixed && k.packs(), Text: fmt.Sprintf("the block map names block %d of the file, but the disk has %d blocks", k.used.end-1, most)})
	}
	if k.result.Leaks > 0 {
		k.report(engine.Problem{Fixed: fixed && k.packs(), Text: fmt.Sprintf("nothing refers to %d blocks of the file", k.result.Leaks)})
	}
	if fixed && k.packs() {
		k.result.FixedLeaks, k.result.Leaks = k.result.Leaks, 0
	}
}

// packs reports whether a repair moves blocks.
func (k *checker) packs() bool { return k.outside == 0 && k.shared == int64(len(k.sharing)) }

// repair fixes what run has found. Where entries lead out of the file it was probably cut
// off, and nothing is moved in it.
func (k *checker) repair(c *engine.Commit) error {
	m := k.image
	count := k.used.end
	if k.packs() {
		var err error
		if count, err = m.pack(c); err != nil {
			return err
		}
	}
	count, err := k.separate(c, count)
	if err != nil {
		return err
	}
	if m.h.allocated() != count {
		h := m.h
		h.setAllocated(count)
		if err := m.writeHeader(c, h); err != nil {
			return err
		}
	}
	if end := m.endOf(count); k.packs() && end != m.fileBytes {
		if err := c.Truncate(0, end); err != nil {
			return err
		}
		m.fileBytes = end
	}
	m.layer.Tables.Forget()
	return nil
}

// separate gives guest blocks that share one with another copies of their own, from the
// index next on, and returns what the next index is then.
func (k *checker) separate(c *engine.Commit, next int64) (int64, error) {
	m := k.image
	var entry [entryBytes]byte
	for _, block := range k.sharing {
		if err := k.ctx.Err(); err != nil {
			return next, err
		}
		if err := readFull(m.f, entry[:], m.entryOff(block)); err != nil {
			return next, err
		}
		if err := m.copyBlock(c, int64(binary.LittleEndian.Uint32(entry[:])), next); err != nil {
			return next, err
		}
		if err := c.Sync(); err != nil {
			return next, err
		}
		h := m.h
		h.setAllocated(next + 1)
		if err := m.writeHeader(c, h); err != nil {
			return next, err
		}
		binary.LittleEndian.PutUint32(entry[:], uint32(next))
		if err := c.WriteAt(0, entry[:], m.entryOff(block)); err != nil {
			return next, err
		}
		next++
	}
	return next, c.Sync()
}
