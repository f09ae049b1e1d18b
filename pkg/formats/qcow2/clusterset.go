package qcow2

// clusterSet is a set of host clusters: where the image's metadata lies, so that no guest
// data is found there. It is a sparse bitmap.
type clusterSet struct {
	pages map[int64]*setPage
	full  bool // no more pages are taken: clusters may be missing
}

type setPage [1 << (setPageBits - 6)]uint64

const (
	setPageBits = 16
	// maxSetPages bounds the memory to 32 MiB, enough for a file of 16 TiB in clusters of
	// 64 KiB. The set is a second line of defence: it may be incomplete beyond that.
	maxSetPages = 4096
)

// add adds a cluster and reports whether it was new.
func (s *clusterSet) add(cluster int64) bool {
	p := s.pages[cluster>>setPageBits]
	if p == nil {
		if len(s.pages) >= maxSetPages {
			s.full = true
			return true
		}
		if s.pages == nil {
			s.pages = map[int64]*setPage{}
		}
		p = new(setPage)
		s.pages[cluster>>setPageBits] = p
	}
	word, bit := &p[cluster>>6&(1<<(setPageBits-6)-1)], uint64(1)<<(cluster&63)
	isNew := *word&bit == 0
	*word |= bit
	return isNew
}

func (s *clusterSet) addRange(first, n int64) {
	for c := first; c < first+n; c++ {
		s.add(c)
	}
}

func (s *clusterSet) remove(cluster int64) {
	if p := s.pages[cluster>>setPageBits]; p != nil {
		p[cluster>>6&(1<<(setPageBits-6)-1)] &^= 1 << (cluster & 63)
	}
}

func (s *clusterSet) has(cluster int64) bool {
	p := s.pages[cluster>>setPageBits]
	return p != nil && p[cluster>>6&(1<<(setPageBits-6)-1)]&(1<<(cluster&63)) != 0
}

// before returns how many of the clusters [first, first+n) come before the first member.
func (s *clusterSet) before(first, n int64) int64 {
	for c := first; c < first+n; {
		p := s.pages[c>>setPageBits]
		if p == nil {
			c = (c>>setPageBits + 1) << setPageBits
			continue
		}
		word := p[c>>6&(1<<(setPageBits-6)-1)] >> (c & 63)
		if word == 0 {
			c = (c>>6 + 1) << 6
			continue
		}
		for word&1 == 0 {
			word >>= 1
			c++
		}
		return min(c-first, n)
	}
	return n
}
