package qcow

import (
	"math/bits"
	"slices"
)

// sorted returns file offsets, multiples of a sector, in order; p is no longer the caller's.
// Opening an image of terabytes means sorting half a million of them: by digits, that takes a
// small part of the time that comparing them does.
func sorted(p []int64) []int64 {
	const sectorShift, digitBits, worthIt = 9, 16, 1 << 14
	if len(p) < worthIt || slices.IsSorted(p) {
		slices.Sort(p)
		return p
	}
	spare, length := make([]int64, len(p)), bits.Len64(uint64(slices.Max(p)))
	for shift := sectorShift; shift < length; shift += digitBits {
		var next [1 << digitBits]int // where the next offset with a digit goes
		for _, off := range p {
			next[off>>shift&(1<<digitBits-1)]++
		}
		before := 0
		for digit, n := range next {
			next[digit] = before
			before += n
		}
		for _, off := range p {
			digit := off >> shift & (1<<digitBits - 1)
			spare[next[digit]] = off
			next[digit]++
		}
		p, spare = spare, p
	}
	return p
}
