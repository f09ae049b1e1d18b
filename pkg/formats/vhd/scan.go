package vhd

import (
	"cmp"
	"encoding/binary"
	"slices"
)

// scanBytes is how much of the block allocation table is read at once.
const scanBytes = 64 << 10

// usage is what table and headers say about the file.
type usage struct {
	end  int64  // of everything that is in use
	gaps []span // what is not, below the end
	used int64  // blocks that have space
	bad  int64  // entries that lie outside the file, in metadata, or in another block
}

// scan reads the block allocation table: nothing of it may be dirty.
func (m *image) scan() (*usage, error) {
	u := &usage{}
	places, err := m.places(func(int64) error { return nil }, func(int64, uint32) { u.bad++ })
	if err != nil {
		return nil, err
	}
	m.arrange(u, places)
	return u, nil
}

// place is where a block is: the sector that its entry says.
type place struct{ sector, number uint32 }

func (p place) slot() int64 { return int64(p.sector) * sectorBytes }

// places returns those of all blocks, in the order of the table. Entries that cannot be
// right are not among them; bad is called with each. step is called with each block's
// number, and may end it.
func (m *image) places(step func(number int64) error, bad func(number int64, entry uint32)) ([]place, error) {
	var all []place
	err := m.eachEntry(0, m.header.entries(), func(number int64, entry uint32) error {
		if err := step(number); err != nil {
			return err
		}
		if entry == entryUnused {
			return nil
		}
		if _, err := m.slotAt(number, entry); err != nil {
			bad(number, entry)
			return nil
		}
		all = append(all, place{entry, uint32(number)})
		return nil
	})
	return all, err
}

// sortPlaces sorts places by where they are.
func sortPlaces(places []place) {
	slices.SortStableFunc(places, func(a, b place) int { return cmp.Compare(a.sector, b.sector) })
}

// arrange goes through everything in the file, by offset. It sorts places.
func (m *image) arrange(u *usage, places []place) {
	u.used = int64(len(places))
	sortPlaces(places)
	meta := slices.SortedFunc(slices.Values(m.meta), func(a, b span) int { return cmp.Compare(a.start, b.start) })
	slotEnd := int64(0)
	for len(places) > 0 || len(meta) > 0 {
		var next span
		if len(places) == 0 || len(meta) > 0 && meta[0].start < places[0].slot() {
			next, meta = meta[0], meta[1:]
		} else {
			next.start = places[0].slot()
			next.end = next.start + m.slotBytes()
			places = places[1:]
			if next.start < slotEnd {
				u.bad++
			}
			slotEnd = next.end
		}
		if next.start > u.end {
			u.gaps = append(u.gaps, span{u.end, next.start})
		}
		u.end = max(u.end, next.end)
	}
}

// eachEntry calls f with the entries of the blocks [from, to), past the table cache.
func (m *image) eachEntry(from, to int64, f func(number int64, entry uint32) error) error {
	return m.eachChunk(from, to, func(first int64, p []byte) error {
		for i := range int64(len(p) / entryBytes) {
			if err := f(first+i, binary.BigEndian.Uint32(p[i*entryBytes:])); err != nil {
				return err
			}
		}
		return nil
	})
}

// eachChunk calls f with the entries of the blocks [from, to), as bytes, as many at once as
// are read at once. f may change them.
func (m *image) eachChunk(from, to int64, f func(first int64, p []byte) error) error {
	buf := make([]byte, min(scanBytes, (to-from)*entryBytes))
	for from < to {
		p := buf[:min(int64(len(buf)), (to-from)*entryBytes)]
		if err := readFull(m.f, p, m.entryOff(from)); err != nil {
			return err
		}
		if err := f(from, p); err != nil {
			return err
		}
		from += int64(len(p) / entryBytes)
	}
	return nil
}
