package qcow

// bitmap has a bit for each unit of a file.
type bitmap struct {
	words []uint64
	units int64
}

func newBitmap(units int64) bitmap { return bitmap{make([]uint64, (units+63)/64), units} }

// of returns the units that a stretch of the file touches, those past the end left out.
func (b *bitmap) of(s span, unitShift uint) (first, end int64) {
	return s.start >> unitShift, min((s.end-1)>>unitShift+1, b.units)
}

// fill sets the bits of a stretch, whether they are set or not.
func (b *bitmap) fill(s span, unitShift uint) {
	first, end := b.of(s, unitShift)
	for u := first; u < end; u++ {
		b.words[u/64] |= 1 << (u % 64)
	}
}

// any reports whether a bit of a stretch is set.
func (b *bitmap) any(s span, unitShift uint) bool {
	first, end := b.of(s, unitShift)
	for u := first; u < end; u++ {
		if b.words[u/64]&(1<<(u%64)) != 0 {
			return true
		}
	}
	return false
}

// mark sets the bits of a stretch, unless one of them is set.
func (b *bitmap) mark(s span, unitShift uint) bool {
	if b.any(s, unitShift) {
		return false
	}
	b.fill(s, unitShift)
	return true
}

// eachClear calls do for each longest stretch of units whose bits are clear.
func (b *bitmap) eachClear(do func(first, end int64)) {
	from := int64(-1)
	for u := int64(0); u < b.units; u++ {
		word := b.words[u/64]
		if u%64 == 0 && u+64 <= b.units && (from < 0 && word == 1<<64-1 || from >= 0 && word == 0) {
			u += 63
			continue
		}
		switch isClear := word&(1<<(u%64)) == 0; {
		case isClear && from < 0:
			from = u
		case !isClear && from >= 0:
			do(from, u)
			from = -1
		}
	}
	if from >= 0 {
		do(from, b.units)
	}
}
