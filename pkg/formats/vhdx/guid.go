package vhdx

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"strconv"
	"strings"
)

// guid is a GUID as it is stored: the first three fields little-endian.
type guid [16]byte

// mustGUID returns a GUID that the specification names.
func mustGUID(text string) guid {
	g, ok := parseGUID(text)
	if !ok {
		panic("vhdx: GUID " + text)
	}
	return g
}

// parseGUID reads the usual text form, with or without braces.
func parseGUID(text string) (g guid, ok bool) {
	text = strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(text), "{"), "}")
	f := strings.Split(text, "-")
	if len(f) != 5 || len(f[0]) != 8 || len(f[1]) != 4 || len(f[2]) != 4 || len(f[3]) != 4 || len(f[4]) != 12 {
		return g, false
	}
	var values [5]uint64
	for i := range f {
		v, err := strconv.ParseUint(f[i], 16, 64)
		if err != nil {
			return g, false
		}
		values[i] = v
	}
	binary.LittleEndian.PutUint32(g[0:], uint32(values[0]))
	binary.LittleEndian.PutUint16(g[4:], uint16(values[1]))
	binary.LittleEndian.PutUint16(g[6:], uint16(values[2]))
	binary.BigEndian.PutUint64(g[8:], values[3]<<48|values[4])
	return g, true
}

// String returns the usual text form, without braces.
func (g guid) String() string {
	return fmt.Sprintf("%08x-%04x-%04x-%04x-%012x",
		binary.LittleEndian.Uint32(g[0:]), binary.LittleEndian.Uint16(g[4:]), binary.LittleEndian.Uint16(g[6:]),
		binary.BigEndian.Uint16(g[8:]), binary.BigEndian.Uint64(g[8:])&(1<<48-1))
}

// newGUID returns a random GUID.
func newGUID() (g guid) {
	binary.LittleEndian.PutUint64(g[0:], rand.Uint64())
	binary.LittleEndian.PutUint64(g[8:], rand.Uint64())
	g[7] = g[7]&0x0f | 0x40
	g[8] = g[8]&0x3f | 0x80
	return g
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sumOffset is where headers, region tables and log entries keep their checksum.
const sumOffset = 4

// checksum returns the CRC-32C of a structure, its own field counted as zero.
func checksum(p []byte) uint32 {
	sum := crc32.Update(0, castagnoli, p[:sumOffset])
	sum = crc32.Update(sum, castagnoli, make([]byte, 4))
	return crc32.Update(sum, castagnoli, p[sumOffset+4:])
}

func sumIsRight(p []byte) bool { return binary.LittleEndian.Uint32(p[sumOffset:]) == checksum(p) }

func putSum(p []byte) { binary.LittleEndian.PutUint32(p[sumOffset:], checksum(p)) }
