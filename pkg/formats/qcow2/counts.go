package qcow2

import (
	"maps"
	"math"
	"slices"
)

// counts are how many references to each host cluster a check has found.
type counts struct {
	pages map[int64]*[countPage]uint8
	over  map[int64]uint64 // of clusters with more than a page can say
	last  int64            // the highest cluster with references

	recent   *[countPage]uint8 // the page used last
	recentAt int64
}

const (
	countPageBits = 16
	countPage     = 1 << countPageBits
	// maxCountPages bounds the memory to 256 MiB: files of 16 TiB in clusters of 64 KiB.
	maxCountPages = 4096
)

// add counts n references to a cluster.
func (k *counts) add(cluster int64, n uint64) error {
	p := k.page(cluster)
	if p == nil {
		if len(k.pages) == maxCountPages {
			return unsupported("the image's clusters are spread over more than %d ranges of %d: a check would take too much memory", maxCountPages, countPage)
		}
		if k.pages == nil {
			k.pages, k.over = map[int64]*[countPage]uint8{}, map[int64]uint64{}
		}
		p = new([countPage]uint8)
		k.pages[cluster>>countPageBits] = p
	}
	k.last = max(k.last, cluster)
	at := &p[cluster&(countPage-1)]
	total := uint64(*at) + n
	if *at == math.MaxUint8 {
		total = k.over[cluster] + n
	}
	if total < math.MaxUint8 {
		*at = uint8(total)
		return nil
	}
	*at = math.MaxUint8
	k.over[cluster] = total
	return nil
}

func (k *counts) page(cluster int64) *[countPage]uint8 {
	if at := cluster >> countPageBits; k.recent == nil || k.recentAt != at {
		k.recent, k.recentAt = k.pages[at], at
	}
	return k.recent
}

// get returns how many references a cluster has.
func (k *counts) get(cluster int64) uint64 {
	p := k.page(cluster)
	if p == nil {
		return 0
	}
	n := p[cluster&(countPage-1)]
	if n == math.MaxUint8 {
		return k.over[cluster]
	}
	return uint64(n)
}

// any reports whether one of the clusters [first, first+n) has references.
func (k *counts) any(first, n int64) bool {
	for c := first; c < first+n; c++ {
		if k.page(c) == nil {
			c |= countPage - 1
			continue
		}
		if k.get(c) != 0 {
			return true
		}
	}
	return false
}

// blocks returns, in order, which groups of 1<<blockBits clusters have references.
func (k *counts) blocks(blockBits uint) []int64 {
	var all []int64
	for _, at := range slices.Sorted(maps.Keys(k.pages)) {
		first, end := at<<countPageBits, (at+1)<<countPageBits
		for first < end {
			number := first >> blockBits
			next := min((number+1)<<blockBits, end)
			known := len(all) > 0 && all[len(all)-1] == number
			if !known && k.any(first, next-first) {
				all = append(all, number)
			}
			first = next
		}
	}
	return all
}
