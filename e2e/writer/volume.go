package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const blockBytes = 4096

// errWrong says that the volume's contents are not what they have to be.
var errWrong = errors.New("wrong contents")

// config is what to write, and where.
type config struct {
	path                 string
	blocks, run, flushed uint64
	batch                int
	every, rest          time.Duration
}

// header begins each block. Integers are little-endian; the rest of the block follows from
// the sequence number.
//
//	magic:8  run:8  sequence:8  crc32c:4 of the block with 0 here
type header struct{ run, sequence uint64 }

const (
	magic     = 0x72657469727732e0
	crcOffset = 24
	bodyStart = 32
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func encode(b []byte, h header) {
	binary.LittleEndian.PutUint64(b, magic)
	binary.LittleEndian.PutUint64(b[8:], h.run)
	binary.LittleEndian.PutUint64(b[16:], h.sequence)
	binary.LittleEndian.PutUint64(b[crcOffset:], 0)
	for i, x := bodyStart, h.sequence*0x9e3779b97f4a7c15+h.run; i < blockBytes; i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(b[i:], x)
	}
	binary.LittleEndian.PutUint32(b[crcOffset:], crc32.Checksum(b, castagnoli))
}

// decode returns the zero header for a block of zeroes.
func decode(b []byte) (header, error) {
	if binary.LittleEndian.Uint64(b) == 0 {
		for i := range b {
			if b[i] != 0 {
				return header{}, fmt.Errorf("no block of ours, and not zero at byte %d: %w", i, errWrong)
			}
		}
		return header{}, nil
	}
	if m := binary.LittleEndian.Uint64(b); m != magic {
		return header{}, fmt.Errorf("corrupt: begins with %#x, not %#x: %w", m, uint64(magic), errWrong)
	}
	h := header{binary.LittleEndian.Uint64(b[8:]), binary.LittleEndian.Uint64(b[16:])}
	want := make([]byte, blockBytes)
	encode(want, h)
	for i := range want {
		if want[i] != b[i] {
			return h, fmt.Errorf("corrupt: says run %d sequence %d, and is another's from byte %d on: %w", h.run, h.sequence, i, errWrong)
		}
	}
	return h, nil
}

// volume is what is written to.
type volume struct {
	config
	file  *os.File
	block []byte // aligned, as direct I/O wants it

	is      []header // what is in each block
	least   []uint64 // the sequence number that each block has to have at least, before this run
	found   uint64   // blocks that were not zero
	next    uint64   // sequence number of the next write
	flushed uint64   // everything up to here is flushed

	longest, longestEver time.Duration
	printed              time.Time
}

func open(c config) (*volume, error) {
	if c.blocks == 0 || c.blocks&(c.blocks-1) != 0 || c.run == 0 || c.batch < 1 {
		return nil, fmt.Errorf("-blocks %d -run %d -batch %d: want a power of two, and two numbers from 1 on", c.blocks, c.run, c.batch)
	}
	file, err := os.OpenFile(c.path, os.O_RDWR|os.O_CREATE|unix.O_DIRECT, 0o600)
	if err != nil {
		return nil, err
	}
	w := &volume{config: c, file: file, block: aligned(), is: make([]header, c.blocks), least: make([]uint64, c.blocks), next: 1, flushed: c.flushed}
	for s := c.flushed; s > 0 && s+c.blocks > c.flushed; s-- {
		w.least[w.place(s)] = s
	}
	if err := w.makeRoom(); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return w, nil
}

// aligned returns memory for a block at an address that is a multiple of its size.
func aligned() []byte {
	b := make([]byte, 2*blockBytes)
	skip := blockBytes - int(uintptr(unsafe.Pointer(&b[0]))%blockBytes)
	return b[skip : skip+blockBytes]
}

// makeRoom makes a file as large as it has to be, durably.
func (w *volume) makeRoom() error {
	info, err := w.file.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() >= int64(w.blocks)*blockBytes {
		return err
	}
	if w.config.flushed > 0 {
		return fmt.Errorf("lost: %s has %d bytes: %w", w.path, info.Size(), errWrong)
	}
	if err := w.file.Truncate(int64(w.blocks) * blockBytes); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(w.path))
	if err != nil {
		return err
	}
	return errors.Join(w.file.Sync(), dir.Sync(), dir.Close())
}

// place returns the block that a sequence number goes to: an odd factor makes it a
// permutation of each pass.
func (w *volume) place(sequence uint64) uint64 { return (sequence * 2654435761) & (w.blocks - 1) }

// request does one request and remembers how long it took.
func (w *volume) request(do func() error) error {
	start := time.Now()
	err := do()
	took := time.Since(start)
	w.longest = max(w.longest, took)
	w.longestEver = max(w.longestEver, took)
	return err
}

func (w *volume) read(place uint64) (header, error) {
	err := w.request(func() error {
		_, err := w.file.ReadAt(w.block, int64(place)*blockBytes)
		return err
	})
	if err != nil {
		return header{}, err
	}
	h, err := decode(w.block)
	if err != nil {
		return h, fmt.Errorf("block %d: %w", place, err)
	}
	return h, nil
}

// readAll reads every block, and reports all that are not right, at most ten.
func (w *volume) readAll(check func(place uint64, h header) error) error {
	var errs []error
	for place := range w.blocks {
		h, err := w.read(place)
		if err == nil {
			err = check(place, h)
		}
		if err != nil {
			errs = append(errs, err)
		}
		if len(errs) == 10 || err != nil && !errors.Is(err, errWrong) {
			break
		}
	}
	return errors.Join(errs...)
}

// adopt checks what an earlier run left in a block, and remembers it.
func (w *volume) adopt(place uint64, h header) error {
	w.is[place] = h
	if h != (header{}) {
		w.found++
		w.next = max(w.next, h.sequence+1)
		if h.run >= w.run {
			return fmt.Errorf("block %d: corrupt: of run %d, and this is run %d: %w", place, h.run, w.run, errWrong)
		}
		if w.place(h.sequence) != place {
			return fmt.Errorf("block %d: corrupt: sequence %d belongs to block %d: %w", place, h.sequence, w.place(h.sequence), errWrong)
		}
	}
	if last := w.least[place]; h.sequence < last {
		return fmt.Errorf("block %d: lost: sequence %d was flushed, %d is there: %w", place, last, h.sequence, errWrong)
	}
	return nil
}

func (w *volume) compare(place uint64, h header) error {
	if h != w.is[place] {
		return fmt.Errorf("block %d: corrupt: run %d sequence %d is there, and should be run %d sequence %d: %w",
			place, h.run, h.sequence, w.is[place].run, w.is[place].sequence, errWrong)
	}
	return nil
}

// fillGaps writes what the earlier run wrote last, without having flushed it, and what is not
// there although something later is: from now on everything up to next has to be there.
func (w *volume) fillGaps() error {
	first := w.config.flushed + 1
	if w.next > w.blocks {
		first = max(first, w.next-w.blocks)
	}
	for s := first; s < w.next; s++ {
		if w.is[w.place(s)].sequence >= s {
			continue
		}
		if err := w.write(s); err != nil {
			return err
		}
	}
	return nil
}

// write writes the block of a sequence number.
func (w *volume) write(sequence uint64) error {
	h := header{w.run, sequence}
	place := w.place(sequence)
	encode(w.block, h)
	err := w.request(func() error {
		_, err := w.file.WriteAt(w.block, int64(place)*blockBytes)
		return err
	})
	if err == nil {
		w.is[place] = h
	}
	return err
}

// round writes some blocks, checks one that was written before and one that was written
// just now, and flushes.
func (w *volume) round() error {
	for range w.batch {
		if err := w.write(w.next); err != nil {
			return err
		}
		w.next++
	}
	for _, place := range []uint64{w.place(w.next - 1), w.place(w.next * 40503)} {
		h, err := w.read(place)
		if err == nil {
			err = w.compare(place, h)
		}
		if err != nil {
			return err
		}
	}
	if err := w.request(w.file.Sync); err != nil {
		return err
	}
	w.flushed = w.next - 1
	if time.Since(w.printed) >= w.every {
		w.print()
	}
	time.Sleep(w.rest)
	return nil
}

// print says what is flushed.
func (w *volume) print() {
	w.printed = time.Now()
	fmt.Printf("flushed %d at %d longest %d\n", w.flushed, w.printed.UnixMilli(), w.longest.Milliseconds())
	w.longest = 0
}

func (w *volume) close() error {
	return errors.Join(w.request(w.file.Sync), w.file.Close())
}
