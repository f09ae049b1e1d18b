package vhdx

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// maxProblems bounds how many problems are described; all are counted.
const maxProblems = 100

// Check examines the headers, the region tables and the BAT; metadata were when the image
// was opened. A repair replays the log, makes a damaged header or region table anew from
// the other, clears what is left in entries of blocks that are not there, and gives back
// space that nothing refers to.
func (m *image) Check(ctx context.Context, c *engine.Commit, progress func(done, total int64)) (engine.CheckResult, error) {
	k := &checker{m: m, ctx: ctx, commit: c, tell: progress, u: m.newUsage()}
	if err := k.run(); err != nil {
		return k.result, fmt.Errorf("vhdx: check %s: %w", m.layer.Name, err)
	}
	return k.result, nil
}

type checker struct {
	m        *image
	ctx      context.Context
	commit   *engine.Commit // nil: look only
	tell     func(done, total int64)
	result   engine.CheckResult
	u        *usage
	previous int64   // where the last block ended, to count fragments
	stale    []int64 // indices of entries to be cleared
}

func (k *checker) run() error {
	k.result.TotalClusters = k.m.blocks(k.m.meta.sizeBytes)
	if err := k.checkLog(); err != nil {
		return err
	}
	if err := k.checkRegionTables(); err != nil {
		return err
	}
	if err := k.m.eachEntry(k); err != nil {
		return err
	}
	if err := k.clearStale(); err != nil {
		return err
	}
	k.result.ImageEndOffset = k.u.end
	if err := k.checkSpace(); err != nil {
		return err
	}
	return k.checkHeaders()
}

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

func (k *checker) repairs() bool { return k.commit != nil }

func (k *checker) corrupt(err error) error {
	k.report(engine.Problem{Corrupt: true, Text: err.Error()})
	return nil
}

// checkLog replays a log that is not empty. Not to be closed is no damage: what is in the
// log is read as if it were in place.
func (k *checker) checkLog() error {
	if k.m.torn {
		k.report(engine.Problem{Fixed: k.repairs(), Text: "the headers say that the log is in use, but no entry in it is intact"})
	}
	r := k.m.file.pending.Load()
	if r == nil {
		return nil
	}
	k.report(engine.Problem{Fixed: k.repairs(), Text: fmt.Sprintf("the log holds changes of %d sectors that are not in place yet", len(r.pages))})
	if !k.repairs() {
		return nil
	}
	return k.m.settle(k.commit)
}

func (k *checker) checkRegionTables() error {
	tables := [2][]byte{make([]byte, regionTableSize), make([]byte, regionTableSize)}
	var valid [2]bool
	for i, at := range regionTableAt {
		if err := readFull(k.m.file, tables[i], at); err != nil {
			return err
		}
		_, valid[i] = decodeRegions(tables[i])
	}
	good := 0
	if !valid[0] {
		good = 1
	}
	bad := 1 - good
	switch {
	case !valid[bad]:
		k.report(engine.Problem{Fixed: k.repairs(), Text: fmt.Sprintf("region table %d is damaged", bad+1)})
	case !bytes.Equal(tables[0], tables[1]):
		k.report(engine.Problem{Fixed: k.repairs(), Text: "region table 2 differs from region table 1"})
	default:
		return nil
	}
	if !k.repairs() {
		return nil
	}
	if err := k.commit.WriteAt(0, tables[good], regionTableAt[bad]); err != nil {
		return err
	}
	return k.commit.Sync()
}

// checkHeaders reports a header that is damaged. A repair writes both, with an empty log.
func (k *checker) checkHeaders() error {
	m := k.m
	needed := m.logIsOurs || m.header.log != guid{}
	for i, ok := range m.headers.valid {
		if !ok {
			k.report(engine.Problem{Fixed: k.repairs(), Text: fmt.Sprintf("header %d is damaged, the other counts", i+1)})
			needed = true
		}
	}
	if !k.repairs() || !needed {
		return nil
	}
	return m.emptyLog(k.commit)
}

func (k *checker) progress(done, total int64) error {
	if k.tell != nil {
		k.tell(done, total)
	}
	return k.ctx.Err()
}

// payload checks the entry of a payload block.
func (k *checker) payload(block int64, e batEntry) error {
	if err := k.m.checkPayload(block, e); err != nil {
		return k.corrupt(err)
	}
	if e.state() == stateNotPresent || e.state() == stateZero {
		if e != newEntry(e.state(), 0) {
			k.reportStale(k.m.payloadIndex(block), fmt.Sprintf("BAT entry of block %d: state %d, but a file offset", block, e.state()))
		}
		return nil
	}
	if !e.holds() {
		return nil
	}
	if !k.u.mark(span{e.off(), e.off() + k.m.meta.blockBytes}) {
		return k.corrupt(corrupt("BAT entry of block %d: its place, %#x, is another's, too", block, e.off()))
	}
	if e.state() != stateFull && e.state() != statePartial {
		return nil
	}
	k.result.AllocatedCount++
	if k.previous != 0 && k.previous != e.off() {
		k.result.Fragmented++
	}
	k.previous = e.off() + k.m.meta.blockBytes
	if e.state() == statePartial {
		return k.checkPartial(block)
	}
	return nil
}

func (k *checker) checkPartial(block int64) error {
	at, err := k.m.bitmap(block / k.m.chunkRatio)
	switch {
	case isCorrupt(err):
		return nil // reported for itself
	case err != nil:
		return err
	case at == 0:
		return k.corrupt(corrupt("BAT entry of block %d: partially present, but its chunk has no sector bitmap", block))
	}
	return nil
}

// bitmap checks the entry of a sector bitmap. What it says counts for partially present
// blocks alone: whatever it has for others is no problem.
func (k *checker) bitmap(chunk int64, e batEntry) error {
	off, err := k.m.checkBitmap(chunk, e)
	switch {
	case err != nil && !k.m.meta.hasParent:
		k.reportStale(k.m.bitmapIndex(chunk), fmt.Sprintf("BAT entry of sector bitmap %d is %#x in an image without parent", chunk, uint64(e)))
	case err != nil:
		return k.corrupt(err)
	case off != 0 && !k.u.mark(span{off, off + bitmapBytes}):
		return k.corrupt(corrupt("BAT entry of sector bitmap %d: its place, %#x, is another's, too", chunk, off))
	}
	return nil
}

func (k *checker) reportStale(index int64, text string) {
	k.report(engine.Problem{Fixed: k.repairs(), Text: text})
	if k.repairs() {
		k.stale = append(k.stale, index)
	}
}

// clearStale clears what has no meaning in entries, but for the state.
func (k *checker) clearStale() error {
	if len(k.stale) == 0 {
		return nil
	}
	for _, index := range k.stale {
		e, err := k.m.entry(index)
		if err != nil {
			return err
		}
		state := e.state()
		if state != stateZero {
			state = stateNotPresent
		}
		if err := k.m.writeEntry(index, newEntry(state, 0)); err != nil {
			return err
		}
	}
	return k.commit.CommitTables()
}

// checkSpace counts what takes space though nothing refers to it. Holes take none.
func (k *checker) checkSpace() error {
	var lost int64
	var spans []span
	k.u.eachFree(func(s span) { spans = append(spans, s) })
	for _, s := range spans {
		n, err := k.dataIn(s)
		if err != nil {
			return err
		}
		lost += n
	}
	units := (lost + k.m.meta.blockBytes - 1) >> k.m.blockShift
	if units > 0 {
		k.report(engine.Problem{Text: fmt.Sprintf("nothing refers to %d bytes that take space", lost)})
	}
	if !k.repairs() || k.result.Corruptions > 0 {
		// What looks free may be what a bad entry has lost.
		k.result.Leaks += units
		return nil
	}
	return k.giveBack(spans, units)
}

// dataIn returns how many bytes of a stretch are no holes.
func (k *checker) dataIn(s span) (n int64, err error) {
	s.end = min(s.end, k.m.fileEnd)
	for off := s.off; off < s.end; {
		start, end, err := k.m.file.NextData(off)
		if errors.Is(err, io.EOF) || err == nil && start >= s.end {
			break
		}
		if err != nil {
			return n, fmt.Errorf("find data at %#x: %w", off, err)
		}
		end = min(end, s.end)
		n += end - max(start, off)
		off = end
	}
	return n, nil
}

// giveBack punches free stretches out of the file, and cuts off the last one.
func (k *checker) giveBack(spans []span, units int64) error {
	for _, s := range spans {
		if s.off >= k.u.end {
			continue
		}
		err := k.m.file.PunchHole(s.off, s.end-s.off)
		if errors.Is(err, errors.ErrUnsupported) {
			k.result.Leaks += units
			units = 0
			break
		}
		if err != nil {
			return fmt.Errorf("punch %d bytes at %#x: %w", s.end-s.off, s.off, err)
		}
	}
	k.result.FixedLeaks += units
	if k.u.end >= k.m.fileEnd {
		return nil
	}
	// The log may say that the file is longer.
	if err := k.m.emptyLog(k.commit); err != nil {
		return err
	}
	if err := k.commit.Truncate(0, k.u.end); err != nil {
		return err
	}
	k.m.fileEnd = k.u.end
	return k.commit.Sync()
}
