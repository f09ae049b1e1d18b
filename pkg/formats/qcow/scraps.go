package qcow

import "slices"

// scraps is free space in pieces that are not whole clusters: what compressed clusters were
// stored in. It is remembered only while the image is open.
type scraps struct {
	free []span // sorted, neither touching nor overlapping
}

// add takes a piece back, and returns the whole clusters that it completes, if any.
func (s *scraps) add(piece span, clusterBytes int64) (whole span, ok bool) {
	i, _ := slices.BinarySearchFunc(s.free, piece.start, func(f span, start int64) int {
		if f.end < start {
			return -1
		}
		return 1
	})
	end := i
	for end < len(s.free) && s.free[end].start <= piece.end {
		piece = span{min(piece.start, s.free[end].start), max(piece.end, s.free[end].end)}
		end++
	}
	whole = span{(piece.start + clusterBytes - 1) &^ (clusterBytes - 1), piece.end &^ (clusterBytes - 1)}
	if whole.start >= whole.end {
		s.free = slices.Replace(s.free, i, end, piece)
		return span{}, false
	}
	var rest []span
	if piece.start < whole.start {
		rest = append(rest, span{piece.start, whole.start})
	}
	if whole.end < piece.end {
		rest = append(rest, span{whole.end, piece.end})
	}
	s.free = slices.Replace(s.free, i, end, rest...)
	return whole, true
}

// take returns n bytes of the first piece that has so many.
func (s *scraps) take(n int64) (span, bool) {
	for i := range s.free {
		f := &s.free[i]
		if f.end-f.start < n {
			continue
		}
		taken := span{f.start, f.start + n}
		f.start = taken.end
		if f.start == f.end {
			s.free = slices.Delete(s.free, i, i+1)
		}
		return taken, true
	}
	return span{}, false
}
