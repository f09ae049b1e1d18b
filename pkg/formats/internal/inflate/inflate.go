// Package inflate decompresses granules: deflate streams (RFC 1951), plain or in a zlib
// wrapper (RFC 1950), that lie in memory as a whole and whose length when inflated is known.
// That makes it about twice as fast as decompressors that read and write streams, and
// converting compressed images is as fast as this is.
//
//	inflate.go  the entry points, blocks and their headers
//	symbols.go  the symbols of a block: where the time goes
//	tables.go   from code lengths to tables
//
// Input is untrusted: whatever it says, nothing is read outside of src, nothing written
// outside of dst, and the work is bounded by the lengths of both.
package inflate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/adler32"
	"sync"
)

// Errors of streams that cannot be used.
var (
	ErrCorrupt = errors.New("the compressed data is corrupt")
	ErrCut     = errors.New("the compressed data is cut off")
	// ErrLonger says that dst was filled, correctly, before the stream ended.
	ErrLonger = errors.New("the compressed data holds more than is expected")
)

// Raw inflates the deflate stream that src begins with into dst, and returns how many
// bytes of dst it filled and how many of src it took. What follows in dst is undefined then.
// It is safe for concurrent use.
func Raw(dst, src []byte) (filled, taken int, err error) {
	d := decoders.Get().(*decoder)
	defer decoders.Put(d)
	d.src, d.dst, d.in, d.out, d.bits, d.count = src, dst, 0, 0, 0, 0
	err = d.stream()
	d.src, d.dst = nil, nil
	return d.out, d.in, err
}

// Zlib inflates the zlib stream that src begins with into dst, and returns how many bytes
// of dst it filled; what follows there is undefined. The checksum is verified. It is safe
// for concurrent use.
func Zlib(dst, src []byte) (filled int, err error) {
	const (
		headerBytes  = 2
		methodMask   = 0x0f
		deflate      = 8
		maxWindow    = 7 // log2, less 8
		dictionary   = 0x20
		trailerBytes = 4
	)
	if len(src) < headerBytes+trailerBytes {
		return 0, ErrCut
	}
	header := binary.BigEndian.Uint16(src)
	if src[0]&methodMask != deflate || src[0]>>4 > maxWindow || header%31 != 0 || src[1]&dictionary != 0 {
		return 0, fmt.Errorf("%w: the header %#04x is not zlib's", ErrCorrupt, header)
	}
	filled, taken, err := Raw(dst, src[headerBytes:])
	if err != nil {
		return filled, err
	}
	trailer := src[headerBytes+taken:]
	if len(trailer) < trailerBytes {
		return filled, ErrCut
	}
	if got, want := adler32.Checksum(dst[:filled]), binary.BigEndian.Uint32(trailer); got != want {
		return filled, fmt.Errorf("%w: its checksum is %#08x, want %#08x", ErrCorrupt, got, want)
	}
	return filled, nil
}

var decoders = sync.Pool{New: func() any { return new(decoder) }}

// decoder is what inflating one stream needs.
type decoder struct {
	src, dst []byte
	in, out  int    // what has been read into bits, and written
	bits     uint64 // read and not used yet, the next one lowest
	count    uint   // how many; above them are zeroes

	literals  literalTable
	distances distanceTable
	lengths   [maxLiterals + maxDistances]uint8
}

// Types of blocks.
const (
	blockStored = iota
	blockFixed
	blockDynamic
)

// stream inflates blocks until the last.
func (d *decoder) stream() error {
	for last := false; !last; {
		head, err := d.take(3)
		if err != nil {
			return err
		}
		last = head&1 != 0
		switch head >> 1 {
		case blockStored:
			err = d.stored()
		case blockFixed:
			err = d.symbols(&fixed().literals, &fixed().distances)
		case blockDynamic:
			if err = d.readCodes(); err == nil {
				err = d.symbols(&d.literals, &d.distances)
			}
		default:
			err = fmt.Errorf("%w: a block has type %d", ErrCorrupt, head>>1)
		}
		if err != nil {
			return err
		}
	}
	d.in -= int(d.count / 8) // whole bytes that were read ahead
	return nil
}

// fill reads bytes until there are at least want bits, or no more bytes.
func (d *decoder) fill(want uint) {
	for d.count < want && d.in < len(d.src) {
		d.bits |= uint64(d.src[d.in]) << d.count
		d.in++
		d.count += 8
	}
}

// take takes n bits, at most 16.
func (d *decoder) take(n uint) (uint, error) {
	d.fill(n)
	if d.count < n {
		return 0, ErrCut
	}
	v := uint(d.bits) & (1<<n - 1)
	d.bits >>= n
	d.count -= n
	return v, nil
}

// stored copies a block that is not compressed.
func (d *decoder) stored() error {
	d.in -= int(d.count / 8)
	d.bits, d.count = 0, 0
	const headerBytes = 4
	if len(d.src)-d.in < headerBytes {
		return ErrCut
	}
	n, inverse := binary.LittleEndian.Uint16(d.src[d.in:]), binary.LittleEndian.Uint16(d.src[d.in+2:])
	if n != ^inverse {
		return fmt.Errorf("%w: a stored block's length is %#04x, inverted %#04x", ErrCorrupt, n, inverse)
	}
	d.in += headerBytes
	got := copy(d.dst[d.out:], d.src[d.in:min(d.in+int(n), len(d.src))])
	d.in += got
	d.out += got
	switch {
	case got == int(n):
		return nil
	case d.out == len(d.dst):
		return ErrLonger
	}
	return ErrCut
}

// codeOrder is the order in which a dynamic block gives the lengths of the code for lengths.
var codeOrder = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// readCodes reads the codes of a dynamic block (RFC 1951, section 3.2.7).
func (d *decoder) readCodes() error {
	head, err := d.take(14)
	if err != nil {
		return err
	}
	nLiterals, nDistances, nCodes := 257+head&31, 1+head>>5&31, 4+head>>10
	if nLiterals > 286 || nDistances > maxDistances-2 {
		return fmt.Errorf("%w: a block has %d literals and lengths and %d distances", ErrCorrupt, nLiterals, nDistances)
	}
	var codeLengths [19]uint8
	for _, symbol := range codeOrder[:nCodes] {
		n, err := d.take(3)
		if err != nil {
			return err
		}
		codeLengths[symbol] = uint8(n)
	}
	var codes lengthTable
	if !codes.build(codeLengths[:]) {
		return fmt.Errorf("%w: the code of a block's code lengths is none", ErrCorrupt)
	}
	lengths := d.lengths[:nLiterals+nDistances]
	if err := d.readLengths(lengths, &codes); err != nil {
		return err
	}
	if lengths[endOfBlock] == 0 || !d.literals.build(lengths[:nLiterals]) || !d.distances.build(lengths[nLiterals:]) {
		return fmt.Errorf("%w: a code of a block is none", ErrCorrupt)
	}
	return nil
}

// readLengths reads run-length encoded code lengths.
func (d *decoder) readLengths(lengths []uint8, codes *lengthTable) error {
	for i := 0; i < len(lengths); {
		d.fill(lengthTableBits + 7)
		e := codes[d.bits&(1<<lengthTableBits-1)]
		n := uint(e & 15)
		if n == 0 {
			return fmt.Errorf("%w: a code length has no code", ErrCorrupt)
		}
		if d.count < n {
			return ErrCut
		}
		d.bits >>= n
		d.count -= n
		symbol := uint8(e >> 4)
		if symbol < 16 {
			lengths[i] = symbol
			i++
			continue
		}
		value, times, err := d.repeat(symbol, lengths[:i])
		if err != nil {
			return err
		}
		if times > len(lengths)-i {
			return fmt.Errorf("%w: more code lengths than codes", ErrCorrupt)
		}
		for range times {
			lengths[i] = value
			i++
		}
	}
	return nil
}

// repeat returns what symbol 16, 17 or 18 stands for after some code lengths.
func (d *decoder) repeat(symbol uint8, before []uint8) (value uint8, times int, err error) {
	extra, least := uint(7), 11
	switch symbol {
	case 16:
		if len(before) == 0 {
			return 0, 0, fmt.Errorf("%w: the first code length repeats one", ErrCorrupt)
		}
		value, extra, least = before[len(before)-1], 2, 3
	case 17:
		extra, least = 3, 3
	}
	n, err := d.take(extra)
	return value, least + int(n), err
}
