package inflate

import (
	"encoding/binary"
	"fmt"
)

const (
	maxMatch = 258
	// What one turn of the fast loop may use: of the input two refills of 8 bytes, of the
	// output three literals and a match that is copied in words.
	fastIn  = 16
	fastOut = 3 + maxMatch + 8
)

// symbols inflates the rest of a block.
func (d *decoder) symbols(literals *literalTable, distances *distanceTable) error {
	done, err := d.fast(literals, distances)
	for !done && err == nil {
		done, err = d.symbol(literals, distances)
	}
	return err
}

// fast inflates symbols while there is so much input and output that nothing has to be
// checked on the way. It reports whether the block has ended.
func (d *decoder) fast(literals *literalTable, distances *distanceTable) (done bool, err error) {
	src, dst, in, out, bits, count := d.src, d.dst, d.in, d.out, d.bits, d.count
	for len(src)-in >= fastIn && len(dst)-out >= fastOut {
		// At least 56 bits. Those above count are the next ones, too: reading them again
		// changes nothing.
		bits |= binary.LittleEndian.Uint64(src[in:]) << (count & 63)
		in += int((63 - count) >> 3)
		count |= 56

		e := literals[bits&(1<<literalBits-1)]
		if e&isLiteral != 0 {
			bits >>= e.codeBits()
			count -= e.codeBits()
			dst[out] = byte(e >> 16)
			out++
			e = literals[bits&(1<<literalBits-1)]
			if e&isLiteral != 0 {
				bits >>= e.codeBits()
				count -= e.codeBits()
				dst[out] = byte(e >> 16)
				out++
				e = literals[bits&(1<<literalBits-1)]
			}
		}
		if e&isLink != 0 {
			e = literals[(e.value()+uint(bits>>literalBits)&(1<<e.extraBits()-1))%literalEntries]
		}
		bits >>= e.codeBits()
		count -= e.codeBits()
		if e&isLiteral != 0 {
			dst[out] = byte(e >> 16)
			out++
			continue
		}
		if e&isOther != 0 {
			done = true
			if e&isEnd == 0 {
				err = errNoCode
			}
			break
		}
		length := int(e.value() + uint(bits)&(1<<e.extraBits()-1))
		bits >>= e.extraBits()
		count -= e.extraBits()

		bits |= binary.LittleEndian.Uint64(src[in:]) << (count & 63)
		in += int((63 - count) >> 3)
		count |= 56
		e = distances[bits&(1<<distanceBits-1)]
		if e&isOther != 0 {
			if e&isLink == 0 {
				err = errNoCode
				break
			}
			e = distances[(e.value()+uint(bits>>distanceBits)&(1<<e.extraBits()-1))%distanceEntries]
			if e&isOther != 0 {
				err = errNoCode
				break
			}
		}
		bits >>= e.codeBits()
		distance := int(e.value() + uint(bits)&(1<<e.extraBits()-1))
		bits >>= e.extraBits()
		count -= e.codeBits() + e.extraBits()
		if distance > out {
			err = errFar(distance, out)
			break
		}
		copyMatch(dst, out, distance, length)
		out += length
	}
	d.in, d.out, d.bits, d.count = in, out, bits&(1<<count-1), count
	return done, err
}

// copyMatch repeats length bytes from distance before out. It may write up to 8 bytes more.
func copyMatch(dst []byte, out, distance, length int) {
	from := out - distance
	switch {
	case distance >= 8:
		for end := out + length; out < end; out, from = out+8, from+8 {
			binary.LittleEndian.PutUint64(dst[out:], binary.LittleEndian.Uint64(dst[from:]))
		}
	case distance == 1:
		word := uint64(dst[from]) * 0x0101010101010101
		for end := out + length; out < end; out += 8 {
			binary.LittleEndian.PutUint64(dst[out:], word)
		}
	default:
		for i := range length {
			dst[out+i] = dst[from+i]
		}
	}
}

var errNoCode = fmt.Errorf("%w: some bits are no code", ErrCorrupt)

func errFar(distance, have int) error {
	return fmt.Errorf("%w: a match begins %d bytes back, of %d", ErrCorrupt, distance, have)
}

// symbol inflates one symbol near the end of the input or the output. It reports whether
// the block has ended.
func (d *decoder) symbol(literals *literalTable, distances *distanceTable) (done bool, err error) {
	e, err := d.next(literals[:], literalBits)
	switch {
	case err != nil:
		return false, err
	case e&isOther != 0:
		return true, nil
	case d.out == len(d.dst):
		return false, ErrLonger
	case e&isLiteral != 0:
		d.dst[d.out] = byte(e >> 16)
		d.out++
		return false, nil
	}
	extra, err := d.take(e.extraBits())
	if err != nil {
		return false, err
	}
	length := int(e.value() + extra)
	e, err = d.next(distances[:], distanceBits)
	if err != nil {
		return false, err
	}
	if extra, err = d.take(e.extraBits()); err != nil {
		return false, err
	}
	distance := int(e.value() + extra)
	if distance > d.out {
		return false, errFar(distance, d.out)
	}
	n := min(length, len(d.dst)-d.out)
	for range n {
		d.dst[d.out] = d.dst[d.out-distance]
		d.out++
	}
	if n < length {
		return false, ErrLonger
	}
	return false, nil
}

// next takes the code that comes next: a literal, a length or distance, or the block's end.
func (d *decoder) next(table []entry, index uint) (entry, error) {
	d.fill(maxCodeBits)
	e := table[d.bits&(1<<index-1)]
	if e&isLink != 0 {
		e = table[e.value()+uint(d.bits>>index)&(1<<e.extraBits()-1)]
	}
	n := e.codeBits()
	switch {
	case e&isOther != 0 && e&isEnd == 0:
		if d.count < maxCodeBits {
			return 0, ErrCut
		}
		return 0, errNoCode
	case n > d.count:
		return 0, ErrCut
	}
	d.bits >>= n
	d.count -= n
	return e, nil
}
