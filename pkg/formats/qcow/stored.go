package qcow

import (
	"encoding/binary"
	"slices"
)

// storedList collects where compressed clusters are stored, in the order of the file, no more
// at once than memory is allowed to take. A key is the offset in the upper bits and the length
// in the lower cluster_bits ones, as many as an entry has.
type storedList struct {
	limit  int // of keys at once
	keys   []uint64
	from   uint64 // keys below were in an earlier pass
	before uint64 // keys from here on are left to a later one; 0: none
}

func (s *storedList) add(key uint64) {
	if key < s.from || s.before != 0 && key >= s.before {
		return
	}
	if len(s.keys) >= s.limit {
		s.thin()
		if s.before != 0 && key >= s.before {
			return
		}
	}
	s.keys = append(s.keys, key)
}

// thin makes space: two of a kind say as much as more do, and if that is not enough, the upper
// half of the file is left to another pass.
func (s *storedList) thin() {
	slices.Sort(s.keys)
	kept := s.keys[:0]
	for _, key := range s.keys {
		if n := len(kept); n < 2 || kept[n-2] != key {
			kept = append(kept, key)
		}
	}
	s.keys = kept
	if len(kept) <= s.limit/2 {
		return
	}
	s.before = kept[len(kept)/2]
	i, _ := slices.BinarySearch(kept, s.before)
	s.keys = kept[:i]
}

// checkStored looks for compressed clusters that overlap others, and notes where all of them
// are.
func (k *checker) checkStored() error {
	if k.result.Compressed == 0 {
		return nil
	}
	var end int64 // of the last one in the file so far
	for {
		if err := k.collectStored(); err != nil {
			return err
		}
		slices.Sort(k.stored.keys)
		shared := map[uint64]bool{}
		for _, key := range k.stored.keys {
			place := k.placeOf(key)
			if place.start < end || k.data.any(place, k.unitShift) {
				shared[key] = true
				continue
			}
			end = place.end
			k.used.fill(place, k.unitShift)
		}
		if len(shared) > 0 {
			if err := k.reportStored(shared); err != nil {
				return err
			}
		}
		if k.stored.before == 0 {
			return nil
		}
		k.stored.keys, k.stored.from, k.stored.before = k.stored.keys[:0], k.stored.before, 0
	}
}

func (k *checker) placeOf(key uint64) span {
	at := int64(key >> k.m.clusterShift)
	return span{at, at + int64(key&(1<<k.m.clusterShift-1))}
}

// eachStored calls do with the key of each compressed cluster whose place is one.
func (k *checker) eachStored(do func(cluster int64, key uint64, p []byte) (changed bool, err error)) error {
	return k.eachTable(func(ti int64) (changed bool, err error) {
		first, count := k.clustersIn(ti)
		for i := range count {
			p := k.table[i*entryBytes:]
			entry := binary.BigEndian.Uint64(p)
			if entry&flagCompressed == 0 {
				continue
			}
			at, n := k.m.compressedAt(entry)
			if n == 0 || k.m.room(at) < n {
				continue // checkTable has reported it
			}
			now, err := do(first+i, uint64(at)<<k.m.clusterShift|uint64(n), p)
			if err != nil {
				return changed, err
			}
			changed = changed || now
		}
		return changed, nil
	})
}

func (k *checker) collectStored() error {
	return k.eachStored(func(_ int64, key uint64, _ []byte) (bool, error) {
		k.stored.add(key)
		return false, nil
	})
}
