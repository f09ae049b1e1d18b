package vmdk

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// The journal is a ring of slots. A transaction fills one: a sector that says where the
// following ones belong in the file. Its bytes 32 to 39 are most likely a checksum, but of
// which kind is not known: that a transaction is complete is seen by what it makes.
const (
	seJournalHeaderMagic = 0xdeafc0de
	seJournalHeaderNext  = 8 // the sequence number of the next transaction

	seMaxJournalSectors = 4 << 20 / sectorBytes // ESXi's have 1 MiB
	seSlotSectors       = 25

	seTransactionMagic    = 0xc0ffee
	seTransactionOne      = 8  // 1 in all that are known
	seTransactionSlot     = 16 // its place in the ring
	seTransactionSectors  = 24 // with this one
	seTransactionSequence = 40
	seTransactionOnes     = 48  // all bits are set in all that are known
	seTransactionTargets  = 128 // a sector and its count, 1, for each that follows
)

// seTransaction is what became one step of an extent's metadata.
type seTransaction struct {
	sequence uint64
	sectors  []seSectorCopy
}

// seSectorCopy is what a sector of the file is to hold.
type seSectorCopy struct {
	at   uint64
	data []byte
}

// decodeSEJournal returns the transactions of a journal by their sequence numbers. A header
// is one sector, which is written or not: one that says something unknown was not torn, and
// may mean anything.
func decodeSEJournal(journal []byte, h *seHeader) ([]seTransaction, error) {
	var all []seTransaction
	const slotBytes = seSlotSectors * sectorBytes
	for slot := 0; (slot+1)*slotBytes <= len(journal); slot++ {
		p := journal[slot*slotBytes : (slot+1)*slotBytes]
		if isZero(p[:sectorBytes]) {
			continue
		}
		t, err := decodeSETransaction(p, slot, h)
		if err != nil {
			return nil, fmt.Errorf("slot %d of the seSparse journal: %w", slot, err)
		}
		all = append(all, t)
	}
	slices.SortFunc(all, func(a, b seTransaction) int { return cmp.Compare(a.sequence, b.sequence) })
	for i := 1; i < len(all); i++ {
		if all[i].sequence == all[i-1].sequence {
			return nil, corrupt("the seSparse journal has two transactions of number %d", all[i].sequence)
		}
	}
	return all, nil
}

func decodeSETransaction(p []byte, slot int, h *seHeader) (seTransaction, error) {
	le := binary.LittleEndian
	count := le.Uint64(p[seTransactionSectors:])
	switch {
	case le.Uint64(p) != seTransactionMagic:
		return seTransaction{}, unsupported("it starts with %#x, want %#x", le.Uint64(p), uint64(seTransactionMagic))
	case le.Uint64(p[seTransactionOne:]) != 1 || le.Uint64(p[seTransactionOnes:]) != 1<<64-1 || le.Uint64(p[seTransactionSlot:]) != uint64(slot):
		return seTransaction{}, unsupported("its header says %#x, %#x and slot %d, want 1, all bits and its own slot: what else means is not known",
			le.Uint64(p[seTransactionOne:]), le.Uint64(p[seTransactionOnes:]), le.Uint64(p[seTransactionSlot:]))
	case count < 1 || count > seSlotSectors:
		return seTransaction{}, corrupt("its transaction has %d sectors, want 1 to %d", count, seSlotSectors)
	}
	t := seTransaction{sequence: le.Uint64(p[seTransactionSequence:])}
	for i := range int(count) - 1 {
		pair := p[seTransactionTargets+16*i:]
		at, n := le.Uint64(pair), le.Uint64(pair[8:])
		if n != 1 || !h.isJournaled(at) {
			return seTransaction{}, corrupt("transaction %d changes %d sectors at sector %d, want 1 in the volatile header, directory, tables, bitmap or back map",
				t.sequence, n, at)
		}
		t.sectors = append(t.sectors, seSectorCopy{at, p[(i+1)*sectorBytes : (i+2)*sectorBytes]})
	}
	return t, nil
}

// isJournaled reports whether a sector may be a transaction's target.
func (h *seHeader) isJournaled(sector uint64) bool {
	return sector == h.volatile.at || h.directory.holds(sector) || h.tables.holds(sector) || h.bitmap.holds(sector) || h.backMap.holds(sector)
}

// lastRun returns the transactions, in order, that follow one another without a gap up to
// the last one. What came before a gap was applied long ago: its slots were used again.
func lastRun(all []seTransaction) []seTransaction {
	i := max(len(all)-1, 0)
	for i > 0 && all[i-1].sequence+1 == all[i].sequence {
		i--
	}
	return all[i:]
}

// openJournal has the extent show what its journal says, if it was not closed.
func (s *seSparse) openJournal() error {
	volatileHeader := make([]byte, sectorBytes)
	if err := readFull(s.f, volatileHeader, s.header.volatile.bytes()); err != nil {
		return fmt.Errorf("read the volatile header: %w", err)
	}
	le := binary.LittleEndian
	if magic := le.Uint64(volatileHeader); magic != seVolatileMagic {
		return corrupt("%s: the seSparse volatile header starts with %#x, want %#x", s.f.Name(), magic, uint64(seVolatileMagic))
	}
	if le.Uint64(volatileHeader[seVolatileReplay:]) == 0 {
		return nil
	}
	err := s.unwritable
	if err == nil {
		err = s.replay()
	}
	if err != nil {
		return fmt.Errorf("%w: %w", unsupported("%s was not closed, and its journal cannot be replayed here, in a format that is not public: "+
			"start and stop its machine on ESXi, or clone it there (vmkfstools -i)", s.f.Name()), err)
	}
	return nil
}

// replay finds out what the journal makes of the metadata. A crash may have torn the last
// transaction. What it would change then is looked at all the same: if any of it is in
// place already, the rest is missing.
func (s *seSparse) replay() error {
	journal := make([]byte, s.header.journal.sectors*sectorBytes)
	if err := readFull(s.f, journal, s.header.journal.bytes()); err != nil {
		return fmt.Errorf("read the journal: %w", err)
	}
	all, err := decodeSEJournal(journal, &s.header)
	if err != nil {
		return err
	}
	run := lastRun(all)
	err = s.tryReplay(run, run)
	if n := len(run); err != nil && n > 0 {
		without := s.tryReplay(run[:n-1], run)
		if without == nil {
			return nil
		}
		err = fmt.Errorf("%w; and without that one: %w", err, without)
	}
	return err
}

// looksTorn reports whether a transaction makes a whole sector zeroes: that is how sectors
// of the journal that were never written look, and hardly anything that was.
func (t *seTransaction) looksTorn() bool {
	return slices.ContainsFunc(t.sectors, func(c seSectorCopy) bool { return isZero(c.data) })
}

// tryReplay shows what transactions make, unless it is inconsistent anywhere where the
// touching ones, among which they are, change anything.
func (s *seSparse) tryReplay(run, touching []seTransaction) error {
	if n := len(run); n > 0 && run[n-1].looksTorn() && n == len(touching) {
		return corrupt("transaction %d has a sector of zeroes", run[n-1].sequence)
	}
	r := &seReplay{sectors: map[int64][]byte{}, transactions: len(run), dropped: len(touching) - len(run)}
	for _, t := range run {
		for _, c := range t.sectors {
			r.put(int64(c.at)*sectorBytes, c.data)
		}
	}
	file := &seReplayedFile{File: s.f}
	file.pending.Store(r)
	v := newSEVerifier(file, s, touching)
	if err := v.verify(touching); err != nil {
		return err
	}
	next := uint64(0)
	if n := len(touching); n > 0 {
		next = touching[n-1].sequence + 1
	}
	if err := s.closeIn(file, r, next, v.freeTable); err != nil {
		return err
	}
	s.dirty, s.f = file, file
	return nil
}

// closeIn adds to a replay what closing an extent leaves in its headers: nothing to replay,
// the next sequence number, and the next free table.
func (s *seSparse) closeIn(file *seReplayedFile, r *seReplay, next, freeTable uint64) error {
	le := binary.LittleEndian
	p, q := make([]byte, sectorBytes), make([]byte, sectorBytes)
	if err := readFull(file, p, s.header.volatile.bytes()); err != nil {
		return err
	}
	if err := readFull(file, q, s.header.journalHeader.bytes()); err != nil {
		return err
	}
	switch {
	case le.Uint64(p) != seVolatileMagic:
		return corrupt("a transaction gives the volatile header the beginning %#x", le.Uint64(p))
	case le.Uint64(q) != seJournalHeaderMagic:
		return unsupported("the journal header starts with %#x, want %#x", le.Uint64(q), uint64(seJournalHeaderMagic))
	}
	raise := func(p []byte, least uint64) { le.PutUint64(p, max(le.Uint64(p), least)) }
	raise(p[seVolatileFreeGT:], freeTable)
	raise(p[seVolatileNext:], next)
	raise(q[seJournalHeaderNext:], next)
	le.PutUint64(p[seVolatileReplay:], 0)
	r.put(s.header.volatile.bytes(), p)
	r.put(s.header.journalHeader.bytes(), q)
	r.last = s.header.volatile.bytes()
	return nil
}

// seReplay is what an extent's journal says that its metadata has yet to become.
type seReplay struct {
	sectors               map[int64][]byte // by file offset
	end                   int64            // of the last of them
	last                  int64            // the one that says that the extent was closed
	transactions, dropped int
}

func (r *seReplay) put(off int64, sector []byte) {
	r.sectors[off] = sector
	r.end = max(r.end, off+sectorBytes)
}

// apply writes it all, durably, and only then that nothing is to be replayed any more. It
// can be repeated.
func (r *seReplay) apply(c *engine.Commit, file int) error {
	for _, off := range slices.Sorted(maps.Keys(r.sectors)) {
		if off == r.last {
			continue
		}
		if err := c.WriteAt(file, r.sectors[off], off); err != nil {
			return err
		}
	}
	if err := c.Sync(); err != nil {
		return err
	}
	if err := c.WriteAt(file, r.sectors[r.last], r.last); err != nil {
		return err
	}
	return c.Sync()
}

// seReplayedFile shows an extent as its journal says that it has to become. It writes
// nothing of that by itself: an image that is only read stays as it is.
type seReplayedFile struct {
	vfs.File
	pending atomic.Pointer[seReplay] // nil when it has been applied
}

// ReadAt reads what the file is to hold.
func (f *seReplayedFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(p, off)
	r := f.pending.Load()
	if r == nil || off >= r.end {
		return n, err
	}
	end := min(off+int64(n), r.end)
	for at := off / sectorBytes * sectorBytes; at < end; at += sectorBytes {
		if data, ok := r.sectors[at]; ok {
			from := max(at, off)
			copy(p[from-off:n], data[from-at:])
		}
	}
	return n, err
}

// settle writes what the journal says, if the extent was opened with one that counts.
func (s *seSparse) settle(c *engine.Commit) error {
	if s.dirty == nil {
		return nil
	}
	r := s.dirty.pending.Load()
	if r == nil {
		return nil
	}
	if err := r.apply(c, s.file); err != nil {
		return fmt.Errorf("replay the journal of %s: %w", s.f.Name(), err)
	}
	s.dirty.pending.Store(nil)
	return nil
}

// voidJournal makes all transactions void, durably: none of them may ever bring back what
// is changed from now on. Sequence numbers go on where they were.
func (s *seSparse) voidJournal(c *engine.Commit) error {
	journal := make([]byte, s.header.journal.sectors*sectorBytes)
	if err := readFull(s.f, journal, s.header.journal.bytes()); err != nil {
		return fmt.Errorf("read the journal of %s: %w", s.f.Name(), err)
	}
	magic := binary.LittleEndian.AppendUint64(nil, seTransactionMagic)
	for off := 0; off < len(journal); off += sectorBytes {
		if !bytes.HasPrefix(journal[off:], magic) {
			continue
		}
		if err := c.WriteAt(s.file, make([]byte, sectorBytes), s.header.journal.bytes()+int64(off)); err != nil {
			return err
		}
	}
	return c.Sync()
}

// seVerifier finds out whether metadata that transactions have changed is consistent.
type seVerifier struct {
	file      vfs.File
	s         *seSparse
	guests    map[uint64]int64 // the directory entries that name the touched tables; -1: none
	freeTable uint64           // the first number that no table has
	sector    [sectorBytes]byte
}

func newSEVerifier(file vfs.File, s *seSparse, touching []seTransaction) *seVerifier {
	v := &seVerifier{file: file, s: s, guests: map[uint64]int64{}}
	for _, t := range touching {
		for _, c := range t.sectors {
			if s.header.tables.holds(c.at) {
				v.guests[(c.at-s.header.tables.at)/seTableSectors] = -1
			}
		}
	}
	return v
}

func (v *seVerifier) verify(touching []seTransaction) error {
	if err := v.readDirectory(); err != nil {
		return err
	}
	done := map[uint64]bool{}
	for _, t := range touching {
		for _, c := range t.sectors {
			if done[c.at] {
				continue
			}
			done[c.at] = true
			if err := v.verifySector(c.at); err != nil {
				return fmt.Errorf("what transactions up to %d make does not fit together: %w", touching[len(touching)-1].sequence, err)
			}
		}
	}
	return nil
}

// readDirectory judges the whole directory, and notes which entries name touched tables.
func (v *seVerifier) readDirectory() error {
	h := &v.s.header
	named := newSEBits(min(h.tables.sectors/seTableSectors, seMaxDirectory))
	chunk := make([]byte, 1<<20)
	for first, count := int64(0), h.directoryEntries(); first < count; {
		p := chunk[:min(int64(len(chunk)), (count-first)*seEntryBytes)]
		if err := readFull(v.file, p, h.directory.bytes()+first*seEntryBytes); err != nil {
			return fmt.Errorf("read the grain directory: %w", err)
		}
		for i := range int64(len(p)) / seEntryBytes {
			entry := binary.LittleEndian.Uint64(p[i*seEntryBytes:])
			if entry == 0 {
				continue
			}
			number, ok := v.s.tableNumber(entry)
			if !ok || number >= named.limit {
				return v.s.badTable(first+i, entry)
			}
			if named.has(number) {
				return corrupt("grain directory entry %d of %s names grain table %d, as another does", first+i, v.s.f.Name(), number)
			}
			named.add(number)
			if _, touched := v.guests[number]; touched {
				v.guests[number] = first + i
			}
			v.freeTable = max(v.freeTable, number+1)
		}
		first += int64(len(p)) / seEntryBytes
	}
	return nil
}

func (v *seVerifier) verifySector(at uint64) error {
	h := &v.s.header
	switch {
	case h.tables.holds(at):
		return v.verifyEntries((at - h.tables.at) * seEntriesPerSector)
	case h.backMap.holds(at):
		return v.verifyOwners((at - h.backMap.at) * seEntriesPerSector)
	case h.bitmap.holds(at):
		for word := range uint64(seEntriesPerSector) {
			if err := v.verifyGroup((at-h.bitmap.at)*seEntriesPerSector + word); err != nil {
				return err
			}
		}
	}
	return nil // the directory has been looked at as a whole
}

// entry reads one 64-bit entry of a region.
func (v *seVerifier) entry(r seRegion, i uint64) (uint64, error) {
	if i/seEntriesPerSector >= r.sectors {
		return 0, nil
	}
	var p [seEntryBytes]byte
	err := readFull(v.file, p[:], r.bytes()+int64(i*seEntryBytes))
	return binary.LittleEndian.Uint64(p[:]), err
}

// sectorEntries reads the entries of a region's sector from entry first on.
func (v *seVerifier) sectorEntries(r seRegion, first uint64) ([seEntriesPerSector]uint64, error) {
	var entries [seEntriesPerSector]uint64
	err := readFull(v.file, v.sector[:], r.bytes()+int64(first*seEntryBytes))
	for i := range entries {
		entries[i] = binary.LittleEndian.Uint64(v.sector[i*seEntryBytes:])
	}
	return entries, err
}

// verifyEntries judges a sector of a grain table: the grains that it names are in the file
// and in use, and say that they are its own.
func (v *seVerifier) verifyEntries(first uint64) error {
	guest := v.guests[first/seTableEntries]
	if guest < 0 {
		return nil // nobody gets to see it
	}
	entries, err := v.sectorEntries(v.s.header.tables, first)
	if err != nil {
		return err
	}
	for i, entry := range entries {
		at := first + uint64(i)
		if entry&seEntryKind != seEntryAllocated {
			if entry != 0 && entry&seEntryKind != seEntryUnmapped && entry&seEntryKind != seEntryZero {
				return corrupt("entry %d of grain table %d is %#x, of an unknown kind", at%seTableEntries, at/seTableEntries, entry)
			}
			continue
		}
		number := seGrainNumber(entry)
		if _, ok := v.s.grainAt(number); !ok {
			return corrupt("entry %d of grain table %d names grain number %d, outside the grains", at%seTableEntries, at/seTableEntries, number)
		}
		owner, err := v.entry(v.s.header.backMap, number)
		if err != nil {
			return err
		}
		if owner != seOwner(at) && owner != seOwner(uint64(guest)*seTableEntries+at%seTableEntries) {
			return corrupt("entry %d of grain table %d names grain number %d, whose back map is %#x", at%seTableEntries, at/seTableEntries, number, owner)
		}
		if err := v.verifyGroup(number / seGroupGrains); err != nil {
			return err
		}
	}
	return nil
}

// verifyOwners judges a sector of the back map: the entries that it names refer to its
// grains, or have been unmapped.
func (v *seVerifier) verifyOwners(first uint64) error {
	owners, err := v.sectorEntries(v.s.header.backMap, first)
	if err != nil {
		return err
	}
	for i, owner := range owners {
		if owner == 0 {
			continue
		}
		grain := first + uint64(i)
		at, ok := seOwnerEntry(owner)
		if !ok || at/seTableEntries >= v.s.header.tables.sectors/seTableSectors {
			return corrupt("the back map of grain number %d is %#x, of an unknown kind", grain, owner)
		}
		entry, err := v.entry(v.s.header.tables, at)
		if err != nil {
			return err
		}
		kind := entry & seEntryKind
		if kind == seEntryAllocated && seGrainNumber(entry) != grain || kind == 0 {
			return corrupt("the back map of grain number %d names entry %d of grain table %d, which is %#x", grain, at%seTableEntries, at/seTableEntries, entry)
		}
		if err := v.verifyGroup(grain / seGroupGrains); err != nil {
			return err
		}
	}
	return nil
}

// verifyGroup judges a word of the free bitmap. Which of its bits is which grain's does not
// matter: there are as many as its grains have owners, or all of them if any has.
func (v *seVerifier) verifyGroup(group uint64) error {
	word, err := v.entry(v.s.header.bitmap, group)
	if err != nil {
		return err
	}
	var owners [seEntriesPerSector]uint64
	if group < v.s.header.backMap.sectors {
		if owners, err = v.sectorEntries(v.s.header.backMap, group*seGroupGrains); err != nil {
			return err
		}
	}
	owned := seEntriesPerSector
	for _, owner := range owners {
		if owner == 0 {
			owned--
		}
	}
	if marked := seMarked(word); marked != owned && (word != seGroupFull || owned == 0) {
		return corrupt("%d of the grains %d to %d are marked as in use, but %d have an owner", marked, group*seGroupGrains, (group+1)*seGroupGrains-1, owned)
	}
	return nil
}
