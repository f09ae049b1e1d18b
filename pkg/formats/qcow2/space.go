package qcow2

import (
	"fmt"
	"slices"
	"sort"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// space is what is known about free host clusters. The refcounts say it all, but they are
// many: they are looked through bit by bit, as space is needed, from the beginning of the
// file. What this session frees or adds at the end of the file needs no looking for.
type space struct {
	free []extent // known free clusters, sorted, not adjacent if alike
	// The clusters in [unknown, unknownEnd) have not been looked at: none is in free.
	unknown, unknownEnd int64
	end                 int64 // no cluster from here on is in use, as far as is known
	fileBytes           int64 // the file's length; what is past end in it reads as zeroes
}

// extent is a run of free clusters.
type extent struct {
	first, count int64
	zeroed       bool
}

const (
	// maxExtents bounds the memory of free; what does not fit is unknown again.
	maxExtents = 1 << 14
	// scanBytes is how much of the refcounts one allocation looks through at most: 32768
	// clusters by default.
	scanBytes = 64 << 10
	// extendBytes is how far the file is extended ahead of its use. The extension is a
	// hole: it costs no space, and what is written into it needs no zeroing around it.
	extendBytes = 4 << 20
	// maxSkipped bounds how many clusters past the end of the file may have refcounts: a
	// crash can leave some.
	maxSkipped = 1 << 16
)

// add notes free clusters.
func (s *space) add(first, count int64, zeroed bool) {
	if first < s.unknownEnd && first+count > s.unknown {
		// What lies in the unknown part will be found there.
		if before := s.unknown - first; before > 0 {
			s.insert(extent{first, before, zeroed})
		}
		if after := first + count - s.unknownEnd; after > 0 {
			s.insert(extent{s.unknownEnd, after, zeroed})
		}
		return
	}
	s.insert(extent{first, count, zeroed})
}

func (s *space) insert(e extent) {
	i := sort.Search(len(s.free), func(i int) bool { return s.free[i].first > e.first })
	switch {
	case i > 0 && s.free[i-1].first+s.free[i-1].count == e.first && s.free[i-1].zeroed == e.zeroed:
		i--
		s.free[i].count += e.count
	case i < len(s.free) && e.first+e.count == s.free[i].first && s.free[i].zeroed == e.zeroed:
		s.free[i].first, s.free[i].count = e.first, s.free[i].count+e.count
		return
	default:
		s.free = slices.Insert(s.free, i, e)
	}
	if i+1 < len(s.free) && s.free[i].first+s.free[i].count == s.free[i+1].first && s.free[i].zeroed == s.free[i+1].zeroed {
		s.free[i].count += s.free[i+1].count
		s.free = slices.Delete(s.free, i+1, i+2)
	}
	if len(s.free) > maxExtents {
		s.forgetHalf()
	}
}

// forgetHalf makes the later half of what is known to be free unknown again.
func (s *space) forgetHalf() {
	half := len(s.free) / 2
	first := s.free[half].first
	if s.unknown < s.unknownEnd {
		first = min(first, s.unknown)
	}
	i := sort.Search(len(s.free), func(i int) bool { return s.free[i].first >= first })
	s.free = slices.Clone(s.free[:i])
	s.unknown, s.unknownEnd = first, s.end
}

// reuse returns up to n known free clusters that lie together, at least atLeast.
func (s *space) reuse(n, atLeast int64) (extent, bool) {
	for i := range s.free {
		e := &s.free[i]
		if e.count < atLeast {
			continue
		}
		got := extent{e.first, min(n, e.count), e.zeroed}
		s.takeOut(i, got)
		return got, true
	}
	return extent{}, false
}

// takeOut removes clusters from the beginning of a free extent.
func (s *space) takeOut(i int, got extent) {
	e := &s.free[i]
	e.first, e.count = e.first+got.count, e.count-got.count
	if e.count > 0 {
		return
	}
	if i == 0 {
		s.free = s.free[1:]
		return
	}
	s.free = slices.Delete(s.free, i, i+1)
}

// taken are clusters that have been reserved.
type taken struct {
	extent
	// fresh says that they have been in no use since the image was opened: they are zeroed,
	// and no part of them is in the cache of tables.
	fresh bool
}

// take reserves up to n host clusters that lie together, at least atLeast, and gives them a
// refcount of 1.
func (m *image) take(n, atLeast int64) (taken, error) {
	if err := m.loadRefTable(); err != nil {
		return taken{}, err
	}
	got, ok := m.space.reuse(n, atLeast)
	if !ok && m.space.unknown < m.space.unknownEnd {
		if err := m.scan(); err != nil {
			return taken{}, err
		}
		got, ok = m.space.reuse(n, atLeast)
	}
	if ok {
		return m.takeKnown(got, atLeast)
	}
	return m.takeAtEnd(n, atLeast)
}

// takeKnown takes clusters that were known to be free, and adds the refcount block they may
// lack.
func (m *image) takeKnown(got extent, atLeast int64) (taken, error) {
	fail := func(err error) (taken, error) {
		m.space.add(got.first, got.count, got.zeroed)
		return taken{}, err
	}
	for number := got.first >> m.blockBits; number <= (got.first+got.count-1)>>m.blockBits; number++ {
		if number >= int64(len(m.refTable)) {
			if err := m.growRefTable(number + 1); err != nil {
				return fail(err)
			}
		}
		if m.refTable[number] != 0 {
			continue
		}
		// The block's place is the first of the clusters, whose refcount is in this block or
		// in one before, which exists by now.
		if err := m.addRefBlock(number, got.first, false); err != nil {
			return fail(err)
		}
		got.first, got.count = got.first+1, got.count-1
		if got.count < atLeast {
			if got.count > 0 {
				m.space.add(got.first, got.count, got.zeroed)
			}
			return m.take(atLeast, atLeast)
		}
	}
	if err := m.setPrepared(got.first, got.count, 1); err != nil {
		return fail(err)
	}
	return taken{extent: got}, nil
}

// setPrepared sets refcounts in one or more blocks, or none of them.
func (m *image) setPrepared(first, n int64, v uint64) error {
	if err := m.prepareRefcounts(first, n); err != nil {
		return err
	}
	return m.setRefcounts(first, n, v)
}

// takeAtEnd takes clusters from the end of the file, which it extends.
func (m *image) takeAtEnd(n, atLeast int64) (taken, error) {
	s := &m.space
	for range maxSkipped {
		first, count := s.end, n
		if atLeast < n {
			// As many as are in one refcount block.
			count = max(atLeast, min(n, m.blockEntries()-first&(m.blockEntries()-1)))
		}
		if first+count > maxClusterOff>>m.clusterBits {
			return taken{}, fullFormat("the file", maxClusterOff)
		}
		missing, err := m.missingBlock(first, count)
		if err != nil {
			return taken{}, err
		}
		if missing >= 0 {
			if err := m.addBlockAtEnd(missing); err != nil {
				return taken{}, err
			}
			continue
		}
		used, err := m.firstUsed(first, count)
		if err != nil {
			return taken{}, err
		}
		if used > 0 && used >= atLeast {
			count = used
		} else if used >= 0 {
			// Refcounts past the end of the file: a crash has cut off what had them.
			if used > 0 {
				s.add(first, used, true)
			}
			s.end += used + 1
			continue
		}
		if err := m.extend(first + count); err != nil {
			return taken{}, err
		}
		if err := m.setPrepared(first, count, 1); err != nil {
			return taken{}, err
		}
		s.end += count
		return taken{extent{first, count, true}, true}, nil
	}
	return taken{}, corrupt("clusters from %#x on, past the end of %s, have refcounts; repair the image", s.end<<m.clusterBits, m.layer.Name)
}

// missingBlock returns the number of the first refcount block that the clusters lack, or
// less than 0.
func (m *image) missingBlock(first, n int64) (int64, error) {
	for number := first >> m.blockBits; number <= (first+n-1)>>m.blockBits; number++ {
		block, err := m.refBlock(number << m.blockBits)
		if err != nil {
			return 0, err
		}
		if block == 0 {
			return number, nil
		}
	}
	return -1, nil
}

// addBlockAtEnd adds a refcount block at the end of the file: it is the first missing one
// there, so that its own refcount is in it or in one before.
func (m *image) addBlockAtEnd(number int64) error {
	if number >= int64(len(m.refTable)) {
		return m.growRefTable(number + 1)
	}
	cluster := m.space.end
	if cluster>>m.blockBits != number {
		// Its refcount is in a block that exists already, which may say that it is used.
		used, err := m.firstUsed(cluster, 1)
		if err != nil {
			return err
		}
		if used == 0 {
			m.space.end++
			return nil
		}
	}
	if err := m.extend(cluster + 1); err != nil {
		return err
	}
	if err := m.addRefBlock(number, cluster, true); err != nil {
		return err
	}
	m.space.end++
	return nil
}

// firstUsed returns which of the clusters is the first one with a refcount, less than 0 if
// none is.
func (m *image) firstUsed(first, n int64) (int64, error) {
	for i := range n {
		count, err := m.refcount(first + i)
		if err != nil {
			return 0, err
		}
		if count != 0 {
			return i, nil
		}
	}
	return -1, nil
}

// extend makes the file long enough for end clusters.
func (m *image) extend(end int64) error {
	need := end << m.clusterBits
	if need > m.space.fileBytes {
		size := m.alignUp(need + extendBytes)
		if err := m.f.Truncate(size); err != nil {
			return fmt.Errorf("extend %s to %d bytes: %w", m.f.Name(), size, err)
		}
		m.space.fileBytes = size
	}
	m.fileEnd = max(m.fileEnd, need)
	return nil
}

// scan looks through the next refcounts for free clusters.
func (m *image) scan() error {
	s := &m.space
	order := uint(m.header.refcountOrder)
	last := min(s.unknownEnd, s.unknown+scanBytes*8>>order)
	run := extent{first: s.unknown}
	for c := s.unknown; c < last && len(s.free) < maxExtents-2; {
		count, err := m.scanSome(c, last-c, &run)
		if err != nil {
			return err
		}
		c += count
		s.unknown = c
	}
	s.note(run)
	return nil
}

// note adds what a scan has found.
func (s *space) note(run extent) {
	if run.count > 0 {
		s.insert(run)
	}
}

// scanSome looks through the refcounts of up to n clusters that lie together on disk, and
// returns how many. run are the free clusters just before.
func (m *image) scanSome(cluster, n int64, run *extent) (int64, error) {
	order := uint(m.header.refcountOrder)
	in := cluster & (m.blockEntries() - 1)
	n = min(n, m.blockEntries()-in)
	block, err := m.refBlock(cluster)
	switch {
	case err != nil: // bad: nothing is known to be free
		m.space.note(*run)
		*run = extent{first: cluster + n}
		return n, nil
	case block == 0:
		run.count += n
		return n, nil
	}
	bit := in << order
	p, err := m.tables.View(0, block+bit>>3)
	if err != nil {
		return 0, err
	}
	n = min(n, (int64(len(p))<<3-bit&7)>>order)
	for i := range n {
		at := bit&7 + i<<order
		if decodeRefcount(p[at>>3:], uint(at&7), order) == 0 {
			run.count++
			continue
		}
		if len(m.space.free) >= maxExtents-2 {
			return i, nil // enough for now
		}
		m.space.note(*run)
		*run = extent{first: cluster + i + 1}
	}
	return n, nil
}

// giveUp takes back clusters whose refcount is 1 and that nothing refers to.
func (m *image) giveUp(first, n int64) {
	m.free(engine.Span{Off: first << m.clusterBits, Len: n << m.clusterBits}, false)
}

// Free takes back space: clusters that lose their last reference can be used again.
func (m *image) Free(span engine.Span, zeroed bool) {
	if span.File != 0 || span.Len == 0 {
		return // an external data file is not allocated from
	}
	if len(m.lent) > 0 && m.returnLoan(span) {
		return
	}
	m.free(span, zeroed)
}

// free lowers the refcounts of clusters. Where it cannot, they stay as they are: that is a
// leak, which a check finds.
func (m *image) free(span engine.Span, zeroed bool) {
	first := span.Off >> m.clusterBits
	last := (span.Off + span.Len - 1) >> m.clusterBits
	for first <= last {
		count, alike, err := m.alikeRefcounts(first, last-first+1)
		if err != nil {
			return
		}
		m.lowered(first, alike, span.Shared)
		if count != 0 {
			if err := m.setPrepared(first, alike, count-1); err != nil {
				return
			}
		}
		if count == 1 {
			m.freed(first, alike, zeroed)
		}
		first += alike
	}
}

// alikeRefcounts returns a cluster's refcount, and how many clusters from it on have it.
func (m *image) alikeRefcounts(first, n int64) (count uint64, alike int64, err error) {
	if count, err = m.refcount(first); err != nil {
		return 0, 0, err
	}
	for alike = 1; alike < n; alike++ {
		next, err := m.refcount(first + alike)
		if err != nil || next != count {
			break
		}
	}
	return count, alike, nil
}

// lowered notes that references that Set gave up have been taken back.
func (m *image) lowered(first, n int64, shared bool) {
	if !shared || len(m.lowering) == 0 {
		return
	}
	for c := first; c < first+n; c++ {
		if m.lowering[c]--; m.lowering[c] == 0 {
			delete(m.lowering, c)
		}
	}
}

// freed notes that clusters are free now. Where tables were, the cache of tables still knows
// them: that they read as zeroes is of no use there.
func (m *image) freed(first, n int64, zeroed bool) {
	if next := m.packing.next >> m.clusterBits; first <= next && next < first+n {
		m.leavePacked(next)
	}
	for n > 0 {
		count := m.metadata.before(first, n)
		if count > 0 {
			m.space.add(first, count, zeroed)
		} else {
			count = 1
			m.metadata.remove(first)
			m.space.add(first, count, false)
		}
		first, n = first+count, n-count
	}
}

// trim shortens the file to what is in use.
func (m *image) trim() error {
	s := &m.space
	for len(s.free) > 0 {
		last := s.free[len(s.free)-1]
		if last.first+last.count != s.end {
			break
		}
		s.end = last.first
		s.unknownEnd = min(s.unknownEnd, s.end)
		s.free = s.free[:len(s.free)-1]
	}
	size := s.end << m.clusterBits
	if s.fileBytes <= size {
		return nil
	}
	if err := m.f.Truncate(size); err != nil {
		return fmt.Errorf("trim %s to %d bytes: %w", m.f.Name(), size, err)
	}
	s.fileBytes, m.fileEnd = size, size
	return nil
}
