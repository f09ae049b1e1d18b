package vmdk

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

const (
	// seGroupGrains are the grains of one word of the free bitmap. A word is all zeroes or
	// all ones when it has been written here: which of its bits is which grain's has not
	// been published.
	seGroupGrains = 64
	seGroupFull   = 1<<64 - 1

	seOwned = 0x1000000000000000 // a back map's entry that names one

	// seMaxUsedPages bounds the memory for the map of used grains: 64 MiB, for 2 TiB.
	seMaxUsedPages = 16 << 10
	seMaxGrains    = seMaxDirectory * seTableEntries
)

// seOwner returns what the back map says of a grain that entry number at names, counted
// from the beginning of all grain tables.
func seOwner(at uint64) uint64 { return seOwned | seGrainEntry(at) }

// seOwnerEntry is the opposite of seOwner.
func seOwnerEntry(owner uint64) (at uint64, ok bool) {
	return seGrainNumber(owner), owner&seEntryKind == seOwned
}

// seMarked returns how many grains a word of the free bitmap says are in use.
func seMarked(word uint64) int { return bits.OnesCount64(word) }

// seBits is a set of small numbers; where it has none, it takes no memory.
type seBits struct {
	pages [][]uint64
	limit uint64 // all are less
	count int    // of pages that there are
}

const (
	sePageWords = 512
	sePageBits  = sePageWords * 64
)

func newSEBits(limit uint64) *seBits {
	return &seBits{pages: make([][]uint64, (limit+sePageBits-1)/sePageBits), limit: limit}
}

// word returns the 64 bits from 64*i on.
func (b *seBits) word(i uint64) uint64 {
	if page := b.pages[i/sePageWords]; page != nil {
		return page[i%sePageWords]
	}
	return 0
}

func (b *seBits) has(n uint64) bool { return n < b.limit && b.word(n/64)&(1<<(n%64)) != 0 }

func (b *seBits) add(n uint64) {
	page := &b.pages[n/sePageBits]
	if *page == nil {
		*page = make([]uint64, sePageWords)
		b.count++
	}
	(*page)[n/64%sePageWords] |= 1 << (n % 64)
}

func (b *seBits) remove(n uint64) {
	if page := b.pages[n/sePageBits]; page != nil {
		page[n/64%sePageWords] &^= 1 << (n % 64)
	}
}

// firstFree returns the least number from n on that is not in the set: limit if all are.
func (b *seBits) firstFree(n uint64) uint64 {
	for n < b.limit {
		free := ^b.word(n/64) >> (n % 64)
		if free != 0 {
			return min(n+uint64(bits.TrailingZeros64(free)), b.limit)
		}
		n = (n/64 + 1) * 64
	}
	return b.limit
}

// seSpace is what is free in an extent.
type seSpace struct {
	grains    *seBits // in use: named by an entry, reserved, or not known to be free
	first     uint64  // no lower grain is free
	fresh     uint64  // grains from this number on were never in the file
	tables    *seBits // named by the directory, or about to be
	freeTable uint64  // as the volatile header says
	leaving   seLeaving
}

// totalGrains returns how many grains there can be: what the file has room for in its layout,
// and what bitmap and back map can say.
func (s *seSparse) totalGrains() uint64 {
	h := &s.header
	return min(h.grains.sectors/seGrainSectors, h.bitmap.sectors*sectorBytes*8, h.backMap.sectors*seEntriesPerSector, seMaxGrains)
}

// fileGrains returns how many grains the file reaches into.
func (s *seSparse) fileGrains() uint64 {
	end := uint64(s.fileEnd+sectorBytes-1) / sectorBytes
	if end <= s.header.grains.at {
		return 0
	}
	return min((end-s.header.grains.at-1)/seGrainSectors+1, s.totalGrains())
}

// begin prepares the extent for its first change: what its journal says is written, and
// void from then on, and what is free is found out.
func (s *seSparse) begin(c *engine.Commit) error {
	if s.space == nil {
		survey, err := s.takeSurvey(func() error { return nil }, func(f seFinding) error {
			if f.corrupt {
				return fmt.Errorf("%w: %s: it must not be written as it is: see image check --repair", block.ErrCorrupt, f.text)
			}
			return nil
		})
		if err != nil {
			return err
		}
		if survey.otherOwners {
			return unsupported("the back map of %s names entries in another way than is known", s.f.Name())
		}
		s.space = &seSpace{
			grains: survey.inUse(), fresh: s.fileGrains(), tables: survey.tables, freeTable: survey.freeTable,
			leaving: seLeaving{grains: map[uint64]*seLeavingGrain{}, byGuest: map[int64]uint64{}},
		}
	}
	if err := s.settle(c); err != nil {
		return err
	}
	return s.voidJournal(c)
}

// allocate is Codec.Allocate within the extent. Whole words of the free bitmap are marked;
// what is left of them is used next. There are no more grains than the guest has, so one
// that is on its way to becoming free goes to whom it was first.
func (s *seSparse) allocate(off, n int64) (engine.Place, error) {
	space, grain, want := s.space, s.grainOf(off), (n+seGrainBytes-1)/seGrainBytes
	if first, count := space.leaving.take(grain, want); count > 0 {
		return engine.Place{Span: engine.Span{File: s.file, Off: s.grainOff(first), Len: min(count*seGrainBytes, n)}}, nil
	}
	first := space.grains.firstFree(space.first)
	space.first = first
	if first == space.grains.limit {
		return engine.Place{}, fmt.Errorf("%w: all %d grains of %s are in use", block.ErrNoSpace, space.grains.limit, s.f.Name())
	}
	if space.grains.count > seMaxUsedPages {
		return engine.Place{}, fmt.Errorf("%w: more than %d grains of %s are in use, and what is free is not kept beyond", block.ErrNoSpace,
			seMaxUsedPages*sePageBits, s.f.Name())
	}
	count := s.freeRun(first, uint64(space.leaving.before(grain, want)))
	if err := s.extendTo(first + count); err != nil {
		return engine.Place{}, err
	}
	if err := s.mark(first, count, seGroupFull); err != nil {
		return engine.Place{}, err
	}
	for i := range count {
		space.grains.add(first + i)
	}
	place := engine.Place{
		Span:   engine.Span{File: s.file, Off: s.grainOff(first), Len: min(int64(count)*seGrainBytes, n)},
		Zeroed: first >= space.fresh,
	}
	space.fresh = max(space.fresh, first+count)
	return place, nil
}

// freeRun returns how many grains from a free one on are free, at most want.
func (s *seSparse) freeRun(first, want uint64) uint64 {
	count := uint64(1)
	for count < want && first+count < s.space.grains.limit && !s.space.grains.has(first+count) {
		count++
	}
	return count
}

func (s *seSparse) grainOff(number uint64) int64 {
	return s.header.grains.bytes() + int64(number)*seGrainBytes
}

// extendTo makes the file long enough for the grains below end, the way ESXi does: by all
// grains of a table and one more.
func (s *seSparse) extendTo(end uint64) error {
	if s.grainOff(end) <= s.fileEnd {
		return nil
	}
	tables := (end + seTableEntries - 1) / seTableEntries
	size := s.grainOff(min(tables*seTableEntries+1, max(end, s.header.grains.sectors/seGrainSectors)))
	if err := s.f.Truncate(size); err != nil {
		return fmt.Errorf("extend %s to %d bytes: %w", s.f.Name(), size, err)
	}
	s.fileEnd = size
	return nil
}

// mark makes the words of the free bitmap that grains are in a word.
func (s *seSparse) mark(first, count, word uint64) error {
	group, end := first/seGroupGrains, (first+count-1)/seGroupGrains+1
	p := make([]byte, (end-group)*seEntryBytes)
	off := s.header.bitmap.bytes() + int64(group*seEntryBytes)
	if err := s.tables.Read(s.file, off, p); err != nil {
		return err
	}
	old := slices.Clone(p)
	for i := range end - group {
		binary.LittleEndian.PutUint64(p[i*seEntryBytes:], word)
	}
	if slices.Equal(p, old) {
		return nil
	}
	return s.tables.Write(stageSpace, s.file, off, p)
}

// free is Codec.Free within the extent: of what Allocate gave and Set was not told, and of
// what a Set gave back.
func (s *seSparse) free(span engine.Span) {
	first := uint64(span.Off-s.header.grains.bytes()) / seGrainBytes
	count := uint64(span.Len+seGrainBytes-1) / seGrainBytes
	run := uint64(0) // grains before number that are free now
	for number := first; number <= first+count; number++ {
		if number < first+count && s.space.leaving.isFree(number, span.Shared) {
			run++
			continue
		}
		if run > 0 {
			s.freeGrains(number-run, run, span.Shared)
		}
		run = 0
	}
}

// freeGrains makes grains free. A word of the bitmap is cleared once all of its grains are.
// What cannot be noted stays in use until the extent is opened anew.
func (s *seSparse) freeGrains(first, count uint64, punch bool) {
	if punch {
		_ = s.f.PunchHole(s.grainOff(first), int64(count)*seGrainBytes) // not every store can
	}
	if s.disown(first, count) != nil {
		return
	}
	space := s.space
	for number := first; number < first+count; number++ {
		space.grains.remove(number)
		last := number == first+count-1 || (number+1)%seGroupGrains == 0
		if last && space.grains.word(number/seGroupGrains) == 0 {
			_ = s.mark(number, 1, 0) // what stays marked is used here all the same
		}
	}
	space.first = min(space.first, first)
}

// disown clears the back map of grains.
func (s *seSparse) disown(first, count uint64) error {
	owners := make([]byte, count*seEntryBytes)
	off := s.header.backMap.bytes() + int64(first*seEntryBytes)
	if err := s.tables.Read(s.file, off, owners); err != nil || isZero(owners) {
		return err
	}
	clear(owners)
	return s.tables.Write(stageSpace, s.file, off, owners)
}

// seLeaving are grains that a Set has given back, and that become free when that is durable.
// Until then the guest grains that they were part of may take them again: whatever a crash
// leaves, nobody else's bytes were ever in them.
type seLeaving struct {
	grains  map[uint64]*seLeavingGrain
	byGuest map[int64]uint64 // which are to be had, by the guest grains they were part of
}

// seMaxLeaving bounds the memory for them: more just become free.
var seMaxLeaving = 64 << 10

type seLeavingGrain struct {
	guest int64
	frees int // how many calls of Free are to come
	state seLeavingState
}

type seLeavingState uint8

const (
	seToBeHad  seLeavingState = iota
	seReserved                // by Allocate
	seMapped                  // by Set: it only waits for calls of Free, which mean nothing
)

// add notes that a grain has been given back, and reports whether there was room for that.
func (l *seLeaving) add(guest int64, number uint64) bool {
	g := l.grains[number]
	if g == nil {
		if len(l.grains) >= seMaxLeaving {
			return false
		}
		g = &seLeavingGrain{}
		l.grains[number] = g
	}
	g.guest, g.state = guest, seToBeHad
	g.frees++
	l.byGuest[guest] = number
	return true
}

// take reserves the grains that were part of the guest grains from one on, as far as they
// lie together; count is 0 if there is none.
func (l *seLeaving) take(guest, want int64) (first uint64, count int64) {
	first, ok := l.byGuest[guest]
	for ; ok && count < want; count++ {
		number := first + uint64(count)
		if l.byGuest[guest+count] != number || l.grains[number] == nil || l.grains[number].guest != guest+count {
			break
		}
		l.grains[number].state = seReserved
	}
	return first, count
}

// before returns how many of the want guest grains from one on come before any that has a
// grain to take.
func (l *seLeaving) before(guest, want int64) int64 {
	if len(l.byGuest) == 0 {
		return want
	}
	count := int64(1)
	for count < want {
		if _, ok := l.byGuest[guest+count]; ok {
			break
		}
		count++
	}
	return count
}

// mapped notes that a Set has given a grain to a guest grain.
func (l *seLeaving) mapped(number uint64) {
	g := l.grains[number]
	if g == nil {
		return
	}
	delete(l.byGuest, g.guest)
	g.state = seMapped
	if g.frees == 0 {
		delete(l.grains, number)
	}
}

// isFree reports whether a call of Free makes a grain free: one that had been given back, or
// one that was reserved only.
func (l *seLeaving) isFree(number uint64, givenBack bool) bool {
	g := l.grains[number]
	if g == nil {
		return true
	}
	if givenBack {
		g.frees--
	} else {
		g.state = seToBeHad
	}
	if g.frees > 0 || g.state == seReserved {
		return false
	}
	delete(l.grains, number)
	if g.state == seMapped {
		return false
	}
	delete(l.byGuest, g.guest)
	return true
}

// seChange is a prepared change of the entries of consecutive grains. Everything that can
// fail has been done.
type seChange struct {
	grain, count int64
	to           engine.State
	number       uint64 // of the grain that the first entry is to name
	old          []byte // the present entries
	tables       []seChangedTable
}

// seChangedTable is a grain table with entries that change.
type seChangedTable struct {
	number  uint64
	isNew   bool // in no directory yet
	missing bool // there is none, and none is needed
}

func (s *seSparse) grainOf(off int64) int64 { return (off - s.guestOff) / seGrainBytes }

// inTable returns how many of the grains [grain, end) are in one table with the first.
func (s *seSparse) inTable(grain, end int64) int64 {
	return min(end-grain, seTableEntries-grain%seTableEntries)
}

// prepareSet prepares a Codec.Set for a range within the extent.
func (s *seSparse) prepareSet(off, n int64, to engine.State, at engine.Place) error {
	p := &s.plan
	s.dropPlan()
	p.grain, p.count, p.to = s.grainOf(off), s.grainOf(off+n-1)+1-s.grainOf(off), to
	p.old = slices.Grow(p.old[:0], int(p.count*seEntryBytes))[:p.count*seEntryBytes]
	clear(p.old)
	if to == engine.Data {
		p.number = uint64(at.Off-s.header.grains.bytes()) / seGrainBytes
		owners := s.header.backMap.bytes() + int64(p.number*seEntryBytes)
		if err := s.tables.Prepare(s.file, owners, p.count*seEntryBytes); err != nil {
			return err
		}
	}
	old := p.old
	for grain := p.grain; grain < p.grain+p.count; {
		count := s.inTable(grain, p.grain+p.count)
		t, err := s.prepareTable(grain, old[:count*seEntryBytes])
		if err != nil {
			s.dropPlan()
			return err
		}
		p.tables = append(p.tables, t)
		old = old[count*seEntryBytes:]
		grain += count
	}
	return nil
}

// dropPlan gives back the numbers of tables that were prepared and not needed.
func (s *seSparse) dropPlan() {
	for _, t := range s.plan.tables {
		if t.isNew {
			s.space.tables.remove(t.number)
		}
	}
	s.plan.tables = s.plan.tables[:0]
}

// prepareTable prepares writing entries from a grain's on in one table, and reads the present
// ones into old.
func (s *seSparse) prepareTable(grain int64, old []byte) (seChangedTable, error) {
	table, in := grain/seTableEntries, grain%seTableEntries
	off, err := s.tableAt(table)
	switch {
	case err != nil:
		return seChangedTable{}, err
	case off == 0 && s.plan.to == engine.Absent:
		return seChangedTable{missing: true}, nil
	case off == 0:
		return s.prepareNewTable(table)
	}
	t := seChangedTable{number: uint64(off-s.header.tables.bytes()) / seTableBytes}
	if err := s.tables.Prepare(s.file, off+in*seEntryBytes, int64(len(old))); err != nil {
		return t, err
	}
	return t, s.tables.Read(s.file, off+in*seEntryBytes, old)
}

// prepareNewTable takes a grain table that the directory does not name: one that a crash has
// left over, or the next that was never used.
func (s *seSparse) prepareNewTable(table int64) (seChangedTable, error) {
	tables := s.space.tables
	number := tables.firstFree(0)
	if number == tables.limit {
		return seChangedTable{}, fmt.Errorf("add grain table %d: %w: all %d grain tables of %s are in use", table, block.ErrNoSpace, tables.limit, s.f.Name())
	}
	for off, n := range map[int64]int64{
		s.tableOff(number): seTableBytes,
		s.header.directory.bytes() + table*seEntryBytes: seEntryBytes,
		s.header.volatile.bytes() + seVolatileFreeGT:    seEntryBytes,
	} {
		if err := s.tables.Prepare(s.file, off, n); err != nil {
			return seChangedTable{}, err
		}
	}
	tables.add(number)
	return seChangedTable{number: number, isNew: true}, nil
}

// applySet makes the prepared change and returns the space that nothing refers to any more.
func (s *seSparse) applySet() (unused []engine.Span, err error) {
	p := &s.plan
	le := binary.LittleEndian
	grain, end, entries, number := p.grain, p.grain+p.count, p.old, p.number
	for i := range p.tables {
		t := &p.tables[i]
		count := s.inTable(grain, end)
		mine := entries[:count*seEntryBytes]
		owners := make([]byte, len(mine))
		for i := range count {
			at := mine[i*seEntryBytes:]
			is := p.entryOf(number + uint64(i))
			unused = s.appendUnused(unused, grain+i, le.Uint64(at), is)
			if p.to == engine.Data {
				s.space.leaving.mapped(number + uint64(i))
			}
			le.PutUint64(at, is)
			le.PutUint64(owners[i*seEntryBytes:], seOwner(t.number*seTableEntries+uint64((grain+i)%seTableEntries)))
		}
		if p.to == engine.Data {
			off := s.header.backMap.bytes() + int64(number*seEntryBytes)
			if err := s.tables.Write(stageSpace, s.file, off, owners); err != nil {
				return nil, err
			}
		}
		if err := s.applyTable(grain, t, mine); err != nil {
			return nil, err
		}
		entries = entries[count*seEntryBytes:]
		grain, number = grain+count, number+uint64(count)
	}
	p.tables = p.tables[:0]
	return unused, nil
}

// entryOf returns the entry to write, of one that shall name a grain if it names any.
func (p *seChange) entryOf(number uint64) uint64 {
	switch p.to {
	case engine.Data:
		return seEntryAllocated | seGrainEntry(number)
	case engine.Zero:
		return seEntryZero
	}
	return 0
}

// applyTable writes entries into a table. A new one is written as a whole; that it is taken
// is noted before, and named in the directory after it is there.
func (s *seSparse) applyTable(grain int64, t *seChangedTable, entries []byte) error {
	if t.missing {
		return nil
	}
	in := grain % seTableEntries * seEntryBytes
	if !t.isNew {
		return s.tables.Write(stageTables, s.file, s.tableOff(t.number)+in, entries)
	}
	le := binary.LittleEndian
	if t.number >= s.space.freeTable {
		s.space.freeTable = t.number + 1
		field := le.AppendUint64(nil, s.space.freeTable)
		if err := s.tables.Write(stageSpace, s.file, s.header.volatile.bytes()+seVolatileFreeGT, field); err != nil {
			return err
		}
	}
	whole := make([]byte, seTableBytes)
	copy(whole[in:], entries)
	if err := s.tables.Write(stageTables, s.file, s.tableOff(t.number), whole); err != nil {
		return err
	}
	entry := le.AppendUint64(nil, seTableAllocated|t.number)
	return s.tables.Write(stageDirectories, s.file, s.header.directory.bytes()+grain/seTableEntries*seEntryBytes, entry)
}

// appendUnused adds the grain that a guest grain's entry referred to, if it does not any
// more. It is called shared as long as it is not certain that the guest grain will not take
// it again.
func (s *seSparse) appendUnused(unused []engine.Span, grain int64, was, is uint64) []engine.Span {
	if was&seEntryKind != seEntryAllocated || was == is {
		return unused
	}
	number := seGrainNumber(was)
	off, ok := s.grainAt(number)
	if !ok {
		return unused
	}
	span := engine.Span{File: s.file, Off: off, Len: seGrainBytes, Shared: s.space.leaving.add(grain, number)}
	if n := len(unused); n > 0 && unused[n-1].Off+unused[n-1].Len == off && unused[n-1].Shared == span.Shared {
		unused[n-1].Len += seGrainBytes
		return unused
	}
	return append(unused, span)
}
