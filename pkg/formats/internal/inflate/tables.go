package inflate

import (
	"math/bits"
	"sync"
)

const (
	maxLiterals  = 288
	maxDistances = 32
	endOfBlock   = 256
	maxCodeBits  = 15

	// How many bits index a table at once; longer codes go on in a table of their own.
	literalBits     = 11
	distanceBits    = 8
	lengthTableBits = 7

	// The most entries that tables for 288 and 32 symbols can need, those of longer codes
	// included: build refuses codes that are not complete, which bounds them.
	literalEntries  = 2400
	distanceEntries = 512
)

// entry is what a code stands for.
//
//	bits 0–3    length of the code
//	bits 4–7    how many extra bits follow it; of a link, how many bits index the table
//	bits 16–30  the literal, the least length or distance, or where the linked table is
type entry uint32

const (
	isLiteral entry = 1 << 31
	// isOther marks what is neither a literal nor a length or distance: a link, the end
	// of the block, or, with no other bit, a code that stands for nothing.
	isOther entry = 1 << 15
	isLink  entry = 1 << 14
	isEnd   entry = 1 << 13
)

func (e entry) codeBits() uint  { return uint(e & 15) }
func (e entry) extraBits() uint { return uint(e >> 4 & 15) }
func (e entry) value() uint     { return uint(e >> 16 & 0x7fff) }

type (
	literalTable  [literalEntries]entry
	distanceTable [distanceEntries]entry
	// lengthTable is for the code of code lengths: the symbol above the code's length.
	lengthTable [1 << lengthTableBits]uint16
)

// meanings are what symbols stand for, without the lengths of their codes.
type meanings struct {
	literals  [maxLiterals]entry
	distances [maxDistances]entry
}

// symbolMeanings follows RFC 1951, section 3.2.5.
var symbolMeanings = sync.OnceValue(func() *meanings {
	m := new(meanings)
	for i := range endOfBlock {
		m.literals[i] = isLiteral | entry(i)<<16
	}
	m.literals[endOfBlock] = isOther | isEnd
	length := 3
	for i := range 28 {
		extra := max(0, i/4-1)
		m.literals[endOfBlock+1+i] = entry(length)<<16 | entry(extra)<<4
		length += 1 << extra
	}
	m.literals[285] = 258 << 16
	m.literals[286], m.literals[287] = isOther, isOther
	distance := 1
	for i := range 30 {
		extra := max(0, i/2-1)
		m.distances[i] = entry(distance)<<16 | entry(extra)<<4
		distance += 1 << extra
	}
	m.distances[30], m.distances[31] = isOther, isOther
	return m
})

type fixedTables struct {
	literals  literalTable
	distances distanceTable
}

// fixed returns the codes of RFC 1951, section 3.2.6.
var fixed = sync.OnceValue(func() *fixedTables {
	t := new(fixedTables)
	var lengths [maxLiterals]uint8
	for i := range lengths {
		switch {
		case i < 144, i >= 280:
			lengths[i] = 8
		case i < 256:
			lengths[i] = 9
		default:
			lengths[i] = 7
		}
	}
	t.literals.build(lengths[:])
	var five [maxDistances]uint8
	for i := range five {
		five[i] = 5
	}
	t.distances.build(five[:])
	return t
})

func (t *literalTable) build(lengths []uint8) bool {
	return buildTable(t[:], literalBits, lengths, symbolMeanings().literals[:])
}

func (t *distanceTable) build(lengths []uint8) bool {
	return buildTable(t[:], distanceBits, lengths, symbolMeanings().distances[:])
}

// build makes the table for the code of code lengths, whose codes have at most 7 bits.
func (t *lengthTable) build(lengths []uint8) bool {
	c := newCode(lengths)
	if !c.usable() {
		return false
	}
	clear(t[:])
	for symbol, n := range lengths {
		if n == 0 {
			continue
		}
		for i := c.next(n); i < 1<<lengthTableBits; i += 1 << n {
			t[i] = uint16(symbol)<<4 | uint16(n)
		}
	}
	return true
}

// code hands out a canonical Huffman code (RFC 1951, section 3.2.2).
type code struct {
	symbols int
	longest uint8
	counts  [maxCodeBits + 1]int
	nexts   [maxCodeBits + 1]int
}

func newCode(lengths []uint8) *code {
	c := new(code)
	for _, n := range lengths {
		if n > 0 {
			c.counts[n]++
			c.symbols++
			c.longest = max(c.longest, n)
		}
	}
	for n, at := 1, 0; n <= maxCodeBits; n++ {
		at = (at + c.counts[n-1]) << 1
		c.nexts[n] = at
	}
	return c
}

// usable reports whether the code is complete: every sequence of bits stands for something.
// A code of one symbol may have half of that, and there may be no symbols at all.
func (c *code) usable() bool {
	if c.symbols == 0 {
		return true
	}
	room := 1
	for n := 1; n <= maxCodeBits; n++ {
		room = room<<1 - c.counts[n]
		if room < 0 {
			return false
		}
	}
	return room == 0 || c.symbols == 1 && c.longest == 1
}

// next returns the next code of n bits, its first bit lowest.
func (c *code) next(n uint8) int {
	v := c.nexts[n]
	c.nexts[n]++
	return int(bits.Reverse16(uint16(v)) >> (16 - n))
}

// buildTable fills a table that is indexed by index bits, and by more in tables that its
// entries link to. It reports whether the code can be used.
func buildTable(table []entry, index uint, lengths []uint8, meaning []entry) bool {
	c := newCode(lengths)
	if !c.usable() {
		return false
	}
	first := table[:1<<index]
	for i := range first {
		first[i] = isOther
	}
	if c.longest > uint8(index) {
		return buildLong(table, index, lengths, meaning, c)
	}
	for symbol, n := range lengths {
		if n > 0 {
			place(first, c.next(n), uint(n), meaning[symbol]|entry(n))
		}
	}
	return true
}

// place puts an entry wherever the lowest n bits of the index are its code.
func place(table []entry, code int, n uint, e entry) {
	for ; code < len(table); code += 1 << n {
		table[code] = e
	}
}

// buildLong is buildTable for codes some of which are longer than index bits.
func buildLong(table []entry, index uint, lengths []uint8, meaning []entry, c *code) bool {
	var codes [maxLiterals]uint16
	var rest [1 << literalBits]uint8 // by the first bits: the most bits that follow them
	first := table[:1<<index]
	for symbol, n := range lengths {
		if n == 0 {
			continue
		}
		v := c.next(n)
		codes[symbol] = uint16(v)
		if uint(n) <= index {
			place(first, v, uint(n), meaning[symbol]|entry(n))
		} else if head := v & (len(first) - 1); rest[head] < n-uint8(index) {
			rest[head] = n - uint8(index)
		}
	}
	end := len(first)
	for head := range first {
		if n := rest[head]; n > 0 {
			if end+1<<n > len(table) {
				return false
			}
			first[head] = isOther | isLink | entry(n)<<4 | entry(end)<<16
			end += 1 << n
		}
	}
	for symbol, n := range lengths {
		if uint(n) <= index {
			continue
		}
		link := first[int(codes[symbol])&(len(first)-1)]
		at := int(link.value())
		place(table[at:at+1<<link.extraBits()], int(codes[symbol])>>index, uint(n)-index, meaning[symbol]|entry(n))
	}
	return true
}
