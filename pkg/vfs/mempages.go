package vfs

import (
	"maps"
	"slices"
)

const (
	sectorBytes    = 512
	pageBytes      = 4096
	sectorsPerPage = pageBytes / sectorBytes
)

// sector is the unit a crash keeps or loses. One that has been stored is never changed:
// all copies of a file share it.
type sector [sectorBytes]byte

// page is the unit of allocation. A nil sector reads as zeroes.
type page [sectorsPerPage]*sector

// empty reports whether the whole page reads as zeroes because nothing was written.
func (p *page) empty() bool { return *p == page{} }

// zeroRange returns s with the bytes [from, to) zeroed.
func (s *sector) zeroRange(from, to int64) *sector {
	if s == nil || from == 0 && to == sectorBytes {
		return nil
	}
	out := *s
	clear(out[from:to])
	return &out
}

// pageMap holds the pages of a file that are not empty, by index. Forks share the map
// until one of them changes it.
type pageMap struct {
	pages  map[int64]page
	shared bool
}

// fork returns a copy that changes independently.
func (m *pageMap) fork() pageMap {
	m.shared = true
	return pageMap{m.pages, true}
}

// set stores a page; an empty one is dropped.
func (m *pageMap) set(index int64, p page) {
	if m.shared || m.pages == nil {
		m.pages = maps.Clone(m.pages)
		if m.pages == nil {
			m.pages = make(map[int64]page)
		}
		m.shared = false
	}
	if p.empty() {
		delete(m.pages, index)
		return
	}
	m.pages[index] = p
}

// keysFrom returns the keys of m that are at least first and less than end, sorted.
func keysFrom[V any](m map[int64]V, first, end int64) []int64 {
	var keys []int64
	if end-first < int64(len(m)) {
		for i := first; i < end; i++ {
			if _, ok := m[i]; ok {
				keys = append(keys, i)
			}
		}
		return keys
	}
	for i := range m {
		if first <= i && i < end {
			keys = append(keys, i)
		}
	}
	slices.Sort(keys)
	return keys
}

// pageRun is the page numbers [first, end).
type pageRun struct{ first, end int64 }

// pageSet is a set of page numbers. It makes reserving a terabyte as cheap as reserving a
// page.
type pageSet struct {
	runs  []pageRun // sorted; they neither overlap nor touch
	count int64     // of pages
}

func (s *pageSet) clone() pageSet { return pageSet{slices.Clone(s.runs), s.count} }

// find returns the position of the first run that ends after page.
func (s *pageSet) find(page int64) int {
	i, _ := slices.BinarySearchFunc(s.runs, page, func(r pageRun, page int64) int {
		if r.end <= page {
			return -1
		}
		return 1
	})
	return i
}

// add puts [first, end) into the set.
func (s *pageSet) add(first, end int64) {
	if first >= end {
		return
	}
	s.count += end - first - s.countIn(first, end)
	i := s.find(first - 1) // a run that ends at first is joined
	j := i
	for j < len(s.runs) && s.runs[j].first <= end {
		first, end = min(first, s.runs[j].first), max(end, s.runs[j].end)
		j++
	}
	s.runs = slices.Replace(s.runs, i, j, pageRun{first, end})
}

// remove takes [first, end) out of the set.
func (s *pageSet) remove(first, end int64) {
	if first >= end {
		return
	}
	s.count -= s.countIn(first, end)
	i := s.find(first)
	j := i
	var rest []pageRun
	for ; j < len(s.runs) && s.runs[j].first < end; j++ {
		r := s.runs[j]
		if r.first < first {
			rest = append(rest, pageRun{r.first, first})
		}
		if r.end > end {
			rest = append(rest, pageRun{end, r.end})
		}
	}
	s.runs = slices.Replace(s.runs, i, j, rest...)
}

// has reports whether page is in the set.
func (s *pageSet) has(page int64) bool {
	i := s.find(page)
	return i < len(s.runs) && s.runs[i].first <= page
}

// countIn returns how many pages of [first, end) are in the set.
func (s *pageSet) countIn(first, end int64) int64 {
	var n int64
	for i := s.find(first); i < len(s.runs) && s.runs[i].first < end; i++ {
		n += min(s.runs[i].end, end) - max(s.runs[i].first, first)
	}
	return n
}
