package vmdk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// seFinding is one thing wrong with an extent.
type seFinding struct {
	corrupt bool
	leaked  int64 // grains that are marked, or have an owner, but nothing refers to them; without a text
	text    string
	fix     func(*engine.Commit) error // nil if it cannot be repaired
}

// seSurvey goes through all tables, the back map and the bitmap of an extent: before its
// first change, and to check it.
type seSurvey struct {
	s        *seSparse
	canceled func() error
	found    func(seFinding) error

	grains      *seBits // that entries name
	kept        *seBits // that none names, but ESXi may count on
	tables      *seBits // that the directory names
	freeTable   uint64  // as the volatile header says
	otherOwners bool    // the back map names guest grains instead of entries

	allocated, fragmented int64
	previous, end         int64 // of the grain before, in the file; of all of them

	table [seTableBytes]byte // scratch
}

// takeSurvey calls found for each thing that is wrong, until it returns an error.
func (s *seSparse) takeSurvey(canceled func() error, found func(seFinding) error) (*seSurvey, error) {
	v := &seSurvey{
		s: s, canceled: canceled, found: found, previous: -1,
		grains: newSEBits(s.totalGrains()), kept: newSEBits(s.totalGrains()), tables: newSEBits(min(s.header.tables.sectors/seTableSectors, seMaxDirectory)),
	}
	err := v.takeTables()
	if err == nil && v.isPlaced() {
		err = v.takeSpace()
	}
	return v, err
}

// isPlaced reports whether bitmap and back map are where they should be.
func (v *seSurvey) isPlaced() bool { return v.s.unwritable == nil }

// takeTables goes through the directory, and the tables that it names.
func (v *seSurvey) takeTables() error {
	var chunk [seGrainBytes]byte
	s, count := v.s, v.s.header.directoryEntries()
	for first := int64(0); first < count; {
		p := chunk[:min(int64(len(chunk)), (count-first)*seEntryBytes)]
		if err := s.tables.Read(s.file, s.header.directory.bytes()+first*seEntryBytes, p); err != nil {
			return err
		}
		if err := v.canceled(); err != nil {
			return err
		}
		for ; len(p) > 0; p = p[seEntryBytes:] {
			if entry := binary.LittleEndian.Uint64(p); entry != 0 {
				if err := v.takeDirectoryEntry(first, entry); err != nil {
					return err
				}
			}
			first++
		}
	}
	return nil
}

func (v *seSurvey) takeDirectoryEntry(table int64, entry uint64) error {
	s := v.s
	number, ok := s.tableNumber(entry)
	if !ok || number >= v.tables.limit {
		return v.found(seFinding{corrupt: true, text: s.badTable(table, entry).Error()})
	}
	if v.tables.has(number) {
		return v.found(seFinding{corrupt: true, text: fmt.Sprintf("grain directory entry %d of %s: grain table %d is another's, too", table, s.f.Name(), number)})
	}
	v.tables.add(number)
	if err := v.canceled(); err != nil {
		return err
	}
	entries := v.table[:]
	if err := s.tables.Read(s.file, s.tableOff(number), entries); err != nil {
		return err
	}
	for in := range int64(seTableEntries) {
		if entry := binary.LittleEndian.Uint64(entries[in*seEntryBytes:]); entry != 0 {
			if err := v.takeEntry(table*seTableEntries+in, number*seTableEntries+uint64(in), entry); err != nil {
				return err
			}
		}
	}
	return nil
}

// takeEntry judges the entry of a guest grain, which is entry number at of all tables.
func (v *seSurvey) takeEntry(grain int64, at, entry uint64) error {
	s := v.s
	number := seGrainNumber(entry)
	switch entry & seEntryKind {
	case seEntryUnmapped, seEntryZero:
		// ESXi may yet give back a grain that is named here.
		if number == 0 || number >= v.kept.limit {
			return nil
		}
		return v.keep(number)
	case seEntryAllocated:
	default:
		return v.found(seFinding{corrupt: true, text: s.badEntry(grain, entry).Error()})
	}
	off, ok := s.grainAt(number)
	if !ok || v.isPlaced() && number >= v.grains.limit {
		return v.found(seFinding{corrupt: true, text: s.badEntry(grain, entry).Error()})
	}
	if number < v.grains.limit {
		if v.grains.has(number) {
			return v.found(seFinding{corrupt: true, text: fmt.Sprintf("grain %d of %s: grain number %d is another's, too", grain, s.f.Name(), number)})
		}
		v.grains.add(number)
		if err := v.checkMemory(); err != nil {
			return err
		}
	}
	v.count(grain, off)
	if !v.isPlaced() {
		return nil
	}
	return v.takeOwner(grain, number, at)
}

func (v *seSurvey) keep(number uint64) error {
	v.kept.add(number)
	return v.checkMemory()
}

func (v *seSurvey) checkMemory() error {
	if v.grains.count+v.kept.count > seMaxUsedPages {
		return unsupported("%s has more than %d grains in use: finding what is free would take more than 64 MiB", v.s.f.Name(), seMaxUsedPages*sePageBits)
	}
	return nil
}

// count counts a grain of the guest's.
func (v *seSurvey) count(grain, off int64) {
	if grain*seGrainBytes >= v.s.guestEnd-v.s.guestOff {
		return
	}
	v.allocated++
	if v.previous >= 0 && off != v.previous+seGrainBytes {
		v.fragmented++
	}
	v.previous, v.end = off, max(v.end, off+seGrainBytes)
}

// takeOwner compares what the back map says of a grain with the entry that names it.
func (v *seSurvey) takeOwner(grain int64, number, at uint64) error {
	s := v.s
	owner, err := s.entryAt(s.header.backMap.bytes() + int64(number*seEntryBytes))
	switch {
	case err != nil || owner == seOwner(at):
		return err
	case owner == seOwner(uint64(grain)):
		v.otherOwners = true
		return nil
	}
	return v.found(seFinding{
		corrupt: true,
		text:    fmt.Sprintf("grain %d of %s: the back map of its grain number %d is %#x, want %#x", grain, s.f.Name(), number, owner, seOwner(at)),
		fix:     s.setEntry(s.header.backMap, number, seOwner(at)),
	})
}

// entryAt returns the 64-bit entry at an offset of the file.
func (s *seSparse) entryAt(off int64) (uint64, error) {
	p, err := s.tables.View(s.file, off)
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(p), nil
}

// setEntry returns what writes an entry of a region in place.
func (s *seSparse) setEntry(r seRegion, i, value uint64) func(*engine.Commit) error {
	return func(c *engine.Commit) error {
		return c.WriteAt(s.file, binary.LittleEndian.AppendUint64(nil, value), r.bytes()+int64(i*seEntryBytes))
	}
}

// takeSpace judges back map and bitmap, as far as the file has grains, and the number of the
// next table.
func (v *seSurvey) takeSpace() error {
	s := v.s
	var err error
	if v.freeTable, err = s.entryAt(s.header.volatile.bytes() + seVolatileFreeGT); err != nil {
		return err
	}
	if err := v.takeFreeTable(); err != nil {
		return err
	}
	for group := uint64(0); group*seGroupGrains < s.fileGrains(); group++ {
		if group%sePageWords == 0 {
			if err := v.canceled(); err != nil {
				return err
			}
		}
		if err := v.takeGroup(group); err != nil {
			return err
		}
	}
	return nil
}

// takeFreeTable judges the number of the first table that was never used.
func (v *seSurvey) takeFreeTable() error {
	s := v.s
	least := uint64(0)
	for i := range uint64(len(v.tables.pages)) * sePageWords {
		if word := v.tables.word(i); word != 0 {
			least = i*64 + uint64(bits.Len64(word))
		}
	}
	set := func(number uint64) func(*engine.Commit) error {
		return func(c *engine.Commit) error {
			v.freeTable = number
			return c.WriteAt(s.file, binary.LittleEndian.AppendUint64(nil, number), s.header.volatile.bytes()+seVolatileFreeGT)
		}
	}
	if v.freeTable < least {
		return v.found(seFinding{
			corrupt: true, fix: set(least),
			text: fmt.Sprintf("the volatile header of %s says that grain table %d is free, but the directory names it", s.f.Name(), v.freeTable),
		})
	}
	if most := s.header.tables.sectors / seTableSectors; v.freeTable > most {
		return v.found(seFinding{
			corrupt: true, fix: set(most),
			text: fmt.Sprintf("the volatile header of %s says that grain table %d is the next, but there are %d", s.f.Name(), v.freeTable, most),
		})
	}
	return nil
}

// takeGroup judges the grains of a word of the bitmap, whose owners are a sector of the back
// map.
func (v *seSurvey) takeGroup(group uint64) error {
	s := v.s
	word, err := s.entryAt(s.header.bitmap.bytes() + int64(group*seEntryBytes))
	if err != nil {
		return err
	}
	first := group * seGroupGrains
	if named := seMarked(v.grains.word(group)); seMarked(word) < named {
		err = v.found(seFinding{
			corrupt: true, fix: s.setEntry(s.header.bitmap, group, seGroupFull),
			text: fmt.Sprintf("%d of the grains %d to %d of %s are marked as in use, but %d are", seMarked(word), first, first+seGroupGrains-1, s.f.Name(), named),
		})
		if err != nil {
			return err
		}
	}
	owners, err := s.tables.View(s.file, s.header.backMap.bytes()+int64(first*seEntryBytes))
	if err != nil {
		return err
	}
	owners = owners[:sectorBytes]
	if !isZero(owners) {
		var copied [sectorBytes]byte
		copy(copied[:], owners)
		if err := v.takeStale(first, copied[:]); err != nil {
			return err
		}
	}
	if word != 0 && v.isUnused(group) {
		return v.found(seFinding{leaked: int64(min(seMarked(word), int(v.grains.limit-first))), fix: s.setEntry(s.header.bitmap, group, 0)})
	}
	return nil
}

// isUnused reports whether no grain of a group is in use.
func (v *seSurvey) isUnused(group uint64) bool { return v.grains.word(group)|v.kept.word(group) == 0 }

// takeStale judges the owners of grains that no entry names. Where the owner is an entry that
// the guest has unmapped, ESXi may count on it; such entries are not written here.
func (v *seSurvey) takeStale(first uint64, owners []byte) error {
	s := v.s
	for i := range uint64(seGroupGrains) {
		owner, number := binary.LittleEndian.Uint64(owners[i*seEntryBytes:]), first+i
		if owner == 0 || number >= v.grains.limit || v.grains.has(number) || v.kept.has(number) {
			continue
		}
		at, ok := seOwnerEntry(owner)
		if !ok {
			text := fmt.Sprintf("the back map of grain number %d of %s is %#x, of an unknown kind", number, s.f.Name(), owner)
			if err := errors.Join(v.keep(number), v.found(seFinding{text: text})); err != nil {
				return err
			}
			continue
		}
		kept := v.otherOwners
		if v.tables.has(at / seTableEntries) {
			entry, err := s.entryAt(s.tableOff(at/seTableEntries) + int64(at%seTableEntries)*seEntryBytes)
			if err != nil {
				return err
			}
			kept = kept || entry&seEntryKind == seEntryUnmapped
		}
		if kept {
			if err := v.keep(number); err != nil {
				return err
			}
			continue
		}
		leaked := int64(1)
		if v.isUnused(number / seGroupGrains) {
			leaked = 0 // it is counted with its whole group
		}
		if err := v.found(seFinding{leaked: leaked, fix: s.setEntry(s.header.backMap, number, 0)}); err != nil {
			return err
		}
	}
	return nil
}

// inUse returns the grains that must not be taken.
func (v *seSurvey) inUse() *seBits {
	for i := range uint64(len(v.kept.pages)) * sePageWords {
		for word := v.kept.word(i); word != 0; word &= word - 1 {
			v.grains.add(i*64 + uint64(bits.TrailingZeros64(word)))
		}
	}
	return v.grains
}

// check examines everything: entries must be of known kinds, inside the file, and no two may
// refer to one grain; bitmap and back map must agree with them. With a commit it repairs what
// the tables tell, which are what counts.
func (s *seSparse) check(result *engine.CheckResult, c *engine.Commit, canceled func() error) error {
	k := seChecker{s: s, commit: c, result: result}
	if s.unwritable != nil && errors.Is(s.unwritable, block.ErrCorrupt) {
		report(result, engine.Problem{Corrupt: true, Text: s.unwritable.Error()})
	}
	if err := k.checkJournal(); err != nil {
		return err
	}
	result.TotalClusters += (s.guestEnd - s.guestOff + seGrainBytes - 1) / seGrainBytes
	survey, err := s.takeSurvey(canceled, k.take)
	result.AllocatedCount += survey.allocated
	result.Fragmented += survey.fragmented
	result.ImageEndOffset = max(result.ImageEndOffset, survey.end)
	if leaks := k.leaks + k.fixedLeaks; leaks > 0 {
		report(result, engine.Problem{Text: fmt.Sprintf("nothing refers to %d grains of %s", leaks, s.f.Name())})
	}
	result.Leaks += k.leaks
	result.FixedLeaks += k.fixedLeaks
	return err
}

// seChecker reports what a survey finds, and repairs it.
type seChecker struct {
	s                 *seSparse
	commit            *engine.Commit // nil: look only
	result            *engine.CheckResult
	leaks, fixedLeaks int64
	voided            bool // no transaction is left in the journal
}

// checkJournal reports a journal that has to be replayed. The survey sees what it makes.
func (k *seChecker) checkJournal() error {
	s := k.s
	if k.commit != nil && s.unwritable != nil {
		k.commit = nil
	}
	if s.dirty != nil {
		if r := s.dirty.pending.Load(); r != nil {
			report(k.result, engine.Problem{Fixed: k.commit != nil, Text: fmt.Sprintf(
				"%s was not closed: its journal of %d transactions has to be replayed; the last %d of them were not completed", s.f.Name(), r.transactions+r.dropped, r.dropped)})
		}
	}
	if k.commit == nil {
		return nil
	}
	return s.settle(k.commit)
}

// repair makes a change, before the first of which no transaction may be left to undo it.
func (k *seChecker) repair(fix func(*engine.Commit) error) error {
	if !k.voided {
		if err := k.s.voidJournal(k.commit); err != nil {
			return err
		}
		k.voided = true
	}
	return fix(k.commit)
}

func (k *seChecker) take(f seFinding) error {
	fixed := k.commit != nil && f.fix != nil
	if fixed {
		if err := k.repair(f.fix); err != nil {
			return err
		}
	}
	switch {
	case f.corrupt:
		report(k.result, engine.Problem{Corrupt: true, Fixed: fixed, Text: f.text})
	case f.text != "":
		report(k.result, engine.Problem{Text: f.text})
	case fixed:
		k.fixedLeaks += f.leaked
	default:
		k.leaks += f.leaked
	}
	return nil
}
