package vdi

import (
	"encoding/binary"
	"iter"
	"math/bits"
)

// scanBytes is how much of the block map is read at once.
const scanBytes = 64 << 10

// usage is what the block map says about the blocks in the file.
type usage struct {
	used  []uint64 // bitmap, by index
	count int64    // of blocks that entries name
	end   int64    // one more than the greatest index
	bad   int64    // entries that name what another names, or what is not in the file
}

// take notes a block as used. It returns false if it is already, or not in the file.
func (u *usage) take(index int64) bool {
	if index >= int64(len(u.used))*64 || u.used[index/64]&(1<<(index%64)) != 0 {
		u.bad++
		return false
	}
	u.used[index/64] |= 1 << (index % 64)
	u.count++
	u.end = max(u.end, index+1)
	return true
}

// maxFree bounds how many free blocks are remembered.
const maxFree = 1 << 20

// free are the unused indexes below the end, in order: not all of them, if a file says
// that it has very many. Others are found another time.
func (u *usage) free() iter.Seq[int64] {
	return func(yield func(int64) bool) {
		count := 0
		for word := int64(0); word*64 < u.end; word++ {
			for free := ^u.used[word]; free != 0; free &= free - 1 {
				index := word*64 + int64(bits.TrailingZeros64(free))
				if index >= u.end {
					return
				}
				if count++; count > maxFree || !yield(index) {
					return
				}
			}
		}
	}
}

// newUsage returns a usage with nothing used, for indexes below indexLimit.
func (m *image) newUsage() *usage {
	// A bit for each index; those past the limit share the last word, and are not taken
	// because eachEntry tells them apart.
	return &usage{used: make([]uint64, (m.indexLimit+63)/64)}
}

// scan reads the block map: nothing of it may be dirty.
func (m *image) scan() (*usage, error) {
	u := m.newUsage()
	err := m.eachEntry(0, m.h.blocks(), func(_ int64, entry uint32) error {
		if entry == entryFree || entry == entryZero {
			return nil
		}
		if int64(entry) >= m.indexLimit {
			u.bad++
			return nil
		}
		u.take(int64(entry))
		return nil
	})
	return u, err
}

// eachEntry calls f with the entries of the guest blocks [from, to), past the table cache.
func (m *image) eachEntry(from, to int64, f func(block int64, entry uint32) error) error {
	return m.eachChunk(from, to, func(first int64, p []byte) error {
		for i := range int64(len(p) / entryBytes) {
			if err := f(first+i, binary.LittleEndian.Uint32(p[i*entryBytes:])); err != nil {
				return err
			}
		}
		return nil
	})
}

// eachChunk calls f with the entries of the guest blocks [from, to), as bytes, as many at
// once as are read at once. f may change them.
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
