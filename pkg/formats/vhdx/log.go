package vhdx

import (
	"encoding/binary"
	"hash/crc32"
	"slices"
)

// The log ([MS-VHDX] 2.3) is a ring of entries; an entry is a header, descriptors and
// data sectors, and says which 4 KiB sectors of the file become what. Entries that carry
// the header's log GUID and are intact form sequences of consecutive numbers; the one
// with the highest number counts, from the entry on that its last one names as its tail.
const (
	logSectorBytes  = 4 << 10
	entrySignature  = "loge"
	zeroSignature   = "zero"
	descSignature   = "desc"
	dataSignature   = "data"
	entryHeader     = 64
	descriptorBytes = 32

	// Of a data sector, the first 8 bytes and the last 4 are in the descriptor: there
	// the log has its signature and sequence number.
	dataLeading  = 8
	dataTrailing = 4

	// maxLogBytes is how long a log may be: it is read as a whole.
	maxLogBytes = 32 * mib
	// maxEntryPages is how many sectors of the file one entry of ours changes at most.
	maxEntryPages = 4 << 10
	// maxReplayZeroBytes is how much a replay zeroes at most.
	maxReplayZeroBytes = 1 << 30
	// maxReplayGrowth is how much a replay lengthens the file at most.
	maxReplayGrowth = 16 << 30
)

// entry is an intact log entry.
type entry struct {
	off      int64 // in the log
	length   int64
	tail     int64
	sequence uint64
	flushed  uint64 // FlushedFileOffset: the file was at least this long
	last     uint64 // LastFileOffset: the file has to be at least this long
	pages    []page
	zeroes   []span
}

// page is a sector of the log, and what it becomes.
type page struct {
	off  int64 // in the file
	data []byte
}

// descriptorSectors returns how many sectors an entry's header and n descriptors take.
func descriptorSectors(n int64) int64 {
	return (entryHeader + n*descriptorBytes + logSectorBytes - 1) / logSectorBytes
}

// ring is a log that was read.
type ring []byte

// sector returns the log sector at off, which may lie past the end: then it is at the
// beginning again.
func (r ring) sector(off int64) []byte {
	off %= int64(len(r))
	return r[off : off+logSectorBytes]
}

// parseEntry returns the intact entry at off. All that is cheap to see is looked at first,
// and each sector belongs to one entry at most, so that looking for entries everywhere
// takes time in proportion to the log's length, whatever is in it.
func (r ring) parseEntry(off int64, log guid) (e entry, ok bool) {
	h := r.sector(off)
	le := binary.LittleEndian
	if string(h[:4]) != entrySignature || guid(h[32:48]) != log {
		return e, false
	}
	e = entry{
		off: off, length: int64(le.Uint32(h[8:])), tail: int64(le.Uint32(h[12:])), sequence: le.Uint64(h[16:]),
		flushed: le.Uint64(h[48:]), last: le.Uint64(h[56:]),
	}
	n := int64(le.Uint32(h[24:]))
	first := descriptorSectors(n)
	if e.length == 0 || e.length%logSectorBytes != 0 || e.length > int64(len(r)) || e.sequence == 0 ||
		e.tail%logSectorBytes != 0 || e.tail >= int64(len(r)) || first*logSectorBytes > e.length {
		return e, false
	}
	data := off + first*logSectorBytes
	for i := range n {
		at := entryHeader + i*descriptorBytes
		d := r.sector(off + at/logSectorBytes*logSectorBytes)[at%logSectorBytes:]
		isData, ok := e.take(d, func() []byte { return r.sector(data) })
		if !ok {
			return e, false
		}
		if isData {
			data += logSectorBytes
		}
		if data-off > e.length {
			return e, false
		}
	}
	return e, r.entrySumIsRight(&e)
}

// take adds what a descriptor says to the entry.
func (e *entry) take(d []byte, sector func() []byte) (isData, ok bool) {
	le := binary.LittleEndian
	off := le.Uint64(d[16:])
	if le.Uint64(d[24:]) != e.sequence || off%logSectorBytes != 0 || off > 1<<62 {
		return false, false
	}
	switch string(d[:4]) {
	case zeroSignature:
		n := le.Uint64(d[8:])
		if n%logSectorBytes != 0 || n > 1<<62 {
			return false, false
		}
		e.zeroes = append(e.zeroes, span{int64(off), int64(off + n)})
		return false, true
	case descSignature:
		s := sector()
		if string(s[:4]) != dataSignature || le.Uint32(s[4:]) != uint32(e.sequence>>32) || le.Uint32(s[logSectorBytes-4:]) != uint32(e.sequence) {
			return true, false
		}
		p := make([]byte, logSectorBytes)
		copy(p, s)
		copy(p, d[8:8+dataLeading])
		copy(p[logSectorBytes-dataTrailing:], d[4:4+dataTrailing])
		e.pages = append(e.pages, page{int64(off), p})
		return true, true
	}
	return false, false
}

func (r ring) entrySumIsRight(e *entry) bool {
	first := r.sector(e.off)
	sum := checksum(first)
	for off := int64(logSectorBytes); off < e.length; off += logSectorBytes {
		sum = crc32.Update(sum, castagnoli, r.sector(e.off+off))
	}
	return sum == binary.LittleEndian.Uint32(first[sumOffset:])
}

// active returns the entries to be replayed, in order: none if the log is empty.
func (r ring) active(log guid) []entry {
	entries := map[int64]entry{}
	var starts []int64
	for off := int64(0); off < int64(len(r)); off += logSectorBytes {
		if e, ok := r.parseEntry(off, log); ok {
			entries[off] = e
			starts = append(starts, off)
		}
	}
	var best []entry
	follows := map[int64]bool{} // those that are not the first of their sequence
	for _, off := range starts {
		e := entries[off]
		next, ok := entries[(off+e.length)%int64(len(r))]
		if ok && next.sequence == e.sequence+1 {
			follows[next.off] = true
		}
	}
	for _, off := range starts {
		if follows[off] {
			continue
		}
		if s := sequenceFrom(entries, off, int64(len(r))); len(s) > 0 && (best == nil || last(s).sequence > last(best).sequence) {
			best = s
		}
	}
	return best
}

func last(s []entry) *entry { return &s[len(s)-1] }

// sequenceFrom returns the sequence of entries that starts at off, from its tail on; none
// if its last entry names a tail that is not in it.
func sequenceFrom(entries map[int64]entry, off, length int64) []entry {
	var s []entry
	for {
		e, ok := entries[off]
		if !ok || len(s) > 0 && e.sequence != last(s).sequence+1 {
			break
		}
		s = append(s, e)
		off = (off + e.length) % length
	}
	tail := slices.IndexFunc(s, func(e entry) bool { return e.off == last(s).tail })
	if tail < 0 {
		return nil
	}
	return s[tail:]
}

// slots are the places of a log at which our entries start. They are used in turn, so that
// the entry before the one being written stays intact: a log that is in use always holds a
// valid entry, as the specification wants.
const slots = 2

// slotBytes returns how long an entry of ours may be in a log of length bytes. One sector
// stays free behind it: QEMU 7.2 takes an intact entry that follows another at once for its
// successor, whatever its number, and a log that is full to the last sector for empty.
func slotBytes(length int64) int64 {
	return length/slots/logSectorBytes*logSectorBytes - logSectorBytes
}

// slotAt returns where in a log of length bytes a slot starts.
func slotAt(length int64, slot int) int64 {
	return int64(slot) * (slotBytes(length) + logSectorBytes)
}

// entryPages returns how many pages an entry of ours can change in a log of length bytes.
func entryPages(length int64) int64 {
	sectors := slotBytes(length) / logSectorBytes
	n := sectors
	for n > 0 && descriptorSectors(n)+n > sectors {
		n--
	}
	return min(n, maxEntryPages)
}

// encodeEntry returns a log entry that changes pages, for offset at of a log: it is its own
// tail. The file is fileBytes long, durably.
func encodeEntry(pages []page, at int64, log guid, sequence uint64, fileBytes int64) []byte {
	le := binary.LittleEndian
	first := descriptorSectors(int64(len(pages))) * logSectorBytes
	p := make([]byte, first+int64(len(pages))*logSectorBytes)
	copy(p, entrySignature)
	le.PutUint32(p[8:], uint32(len(p)))
	le.PutUint32(p[12:], uint32(at))
	le.PutUint64(p[16:], sequence)
	le.PutUint32(p[24:], uint32(len(pages)))
	copy(p[32:], log[:])
	le.PutUint64(p[48:], uint64(fileBytes/mib*mib))
	le.PutUint64(p[56:], uint64(alignUp(fileBytes, mib)))
	for i, page := range pages {
		d, s := p[entryHeader+i*descriptorBytes:], p[first+int64(i)*logSectorBytes:][:logSectorBytes]
		copy(d, descSignature)
		copy(d[4:8], page.data[logSectorBytes-dataTrailing:])
		copy(d[8:16], page.data[:dataLeading])
		le.PutUint64(d[16:], uint64(page.off))
		le.PutUint64(d[24:], sequence)
		copy(s, page.data)
		copy(s, dataSignature)
		le.PutUint32(s[4:], uint32(sequence>>32))
		le.PutUint32(s[logSectorBytes-4:], uint32(sequence))
	}
	putSum(p)
	return p
}
