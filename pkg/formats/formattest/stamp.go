package formattest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
)

// A test's data says where it came from: 16-byte cells like "00002a@0001f400 ", the
// number of the operation that wrote it and the guest offset it was written to. So data
// that turns up in a wrong place, or too late, names itself. No byte of it is zero.
const (
	cellBytes = 16
	opDigits  = 6
	offDigits = 8
)

// sectorBytes is what is never torn.
const sectorBytes = 512

const hexDigits = "0123456789abcdef"

// stamp returns the n bytes that operation op writes at guestOff.
func stamp(op int, guestOff, n int64) []byte {
	p := make([]byte, n)
	var cell [cellBytes]byte
	for at := guestOff &^ (cellBytes - 1); at < guestOff+n; at += cellBytes {
		putHex(cell[:opDigits], uint64(op))
		cell[opDigits] = '@'
		putHex(cell[opDigits+1:cellBytes-1], uint64(at))
		cell[cellBytes-1] = ' '
		if at < guestOff {
			copy(p, cell[guestOff-at:])
		} else {
			copy(p[at-guestOff:], cell[:])
		}
	}
	return p
}

// noise returns n bytes, none of them zero, that nothing can compress.
func noise(op int, n int64) []byte {
	r := rand.New(rand.NewPCG(uint64(op), uint64(n)))
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(1 + r.IntN(255))
	}
	return p
}

func putHex(p []byte, v uint64) {
	for i := len(p) - 1; i >= 0; i-- {
		p[i] = hexDigits[v%16]
		v /= 16
	}
}

// snippet shows the bytes around index bad of p, which lies at guest offset off, as
// whole cells: stamps as text, zeroes as one word, other bytes in hex.
func snippet(p []byte, off int64, bad int) string {
	at := (off + int64(bad)) &^ (cellBytes - 1)
	from := int(max(at-off, 0))
	to := int(min(at-off+2*cellBytes, int64(len(p))))
	b := p[from:to]
	if len(bytes.Trim(b, "\x00")) == 0 {
		return fmt.Sprintf("%d zeroes", len(b))
	}
	text := strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '.'
		}
		return r
	}, string(b))
	if strings.Count(text, ".") > 0 {
		return fmt.Sprintf("%q [% x]", text, b)
	}
	return fmt.Sprintf("%q", text)
}
