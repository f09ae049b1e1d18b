package load

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// state is what a block has to hold.
type state struct {
	// seq numbers its worker's requests: that which wrote the block last; 0 = none did.
	seq  uint64
	kind kind
}

type kind uint8

const (
	zeroes   kind = iota
	data          // what fill makes
	anything      // discarded: its old contents or zeroes
)

const magic = 0x6b6f_6c62_6b61_6f73 // "soakblok"

// A block's header; the rest is determined by it.
const (
	atMagic  = 0
	atOff    = 8
	atSeq    = 16
	atID     = 24
	atWorker = 28
	atRest   = 32
)

// fill fills a block.
func (w *worker) fill(b []byte, off int64, seq uint64) {
	binary.LittleEndian.PutUint64(b[atMagic:], magic)
	binary.LittleEndian.PutUint64(b[atOff:], uint64(off))
	binary.LittleEndian.PutUint64(b[atSeq:], seq)
	binary.LittleEndian.PutUint32(b[atID:], w.model.options.ID)
	binary.LittleEndian.PutUint32(b[atWorker:], uint32(w.number))
	x := uint64(off)*0x9e3779b97f4a7c15 + seq
	for i := atRest; i < len(b); i += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(b[i:], x)
	}
}

var zeroBlock [BlockBytes]byte

// holds says whether a block is as it has to be.
func (w *worker) holds(b []byte, off int64, s state) bool {
	switch s.kind {
	case anything:
		return true
	case zeroes:
		return bytes.Equal(b, zeroBlock[:])
	}
	w.fill(w.want[:], off, s.seq)
	return bytes.Equal(b, w.want[:])
}

// seqOf returns which request a block was written by, 0 for one that is zeroes. ok says
// that it is whole and this worker's.
func (w *worker) seqOf(b []byte, off int64) (seq uint64, ok bool) {
	if bytes.Equal(b, zeroBlock[:]) {
		return 0, true
	}
	seq = binary.LittleEndian.Uint64(b[atSeq:])
	return seq, w.holds(b, off, state{seq, data})
}

func (s state) String() string {
	switch s.kind {
	case zeroes:
		return fmt.Sprintf("zeroes (of request %d)", s.seq)
	case anything:
		return fmt.Sprintf("anything (discarded by request %d)", s.seq)
	}
	return fmt.Sprintf("data of request %d", s.seq)
}

// describe tells what a block that is not as it should be holds.
func describe(b []byte) string {
	switch {
	case bytes.Equal(b, zeroBlock[:]):
		return "zeroes"
	case binary.LittleEndian.Uint64(b[atMagic:]) != magic:
		return fmt.Sprintf("unknown data, % x…", b[:16])
	}
	return fmt.Sprintf("a block that says: offset %d, request %d, device %#x, worker %d",
		binary.LittleEndian.Uint64(b[atOff:]), binary.LittleEndian.Uint64(b[atSeq:]),
		binary.LittleEndian.Uint32(b[atID:]), binary.LittleEndian.Uint32(b[atWorker:]))
}
