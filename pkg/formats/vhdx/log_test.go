package vhdx

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

var testGUID = mustGUID("01020304-0506-4708-890a-0b0c0d0e0f10")

// testEntry returns an entry of a log that fills pages at the given file offsets with its
// number.
func testEntry(sequence uint64, tail int64, offs ...int64) []byte {
	var pages []page
	for _, off := range offs {
		pages = append(pages, page{off, bytes.Repeat([]byte{byte(sequence)}, logSectorBytes)})
	}
	return encodeEntry(pages, tail, testGUID, sequence, 10*mib)
}

// put writes an entry into a log, around its end if need be.
func (r ring) put(off int64, p []byte) {
	for ; len(p) > 0; p, off = p[logSectorBytes:], off+logSectorBytes {
		copy(r.sector(off), p[:logSectorBytes])
	}
}

func sequences(entries []entry) (numbers []uint64) {
	for i := range entries {
		numbers = append(numbers, entries[i].sequence)
	}
	return numbers
}

func TestRing_Active(t *testing.T) {
	const k = logSectorBytes
	const end = mib
	for name, c := range map[string]struct {
		fill func(r ring)
		want []uint64
	}{
		"empty":         {func(ring) {}, nil},
		"one":           {func(r ring) { r.put(0, testEntry(7, 0, mib)) }, []uint64{7}},
		"no changes":    {func(r ring) { r.put(0, testEntry(7, 0)) }, []uint64{7}},
		"in the middle": {func(r ring) { r.put(10*k, testEntry(7, 10*k, mib)) }, []uint64{7}},
		"two that belong together": {func(r ring) {
			r.put(0, testEntry(7, 0, mib))
			r.put(2*k, testEntry(8, 0, mib))
		}, []uint64{7, 8}},
		"tail after the first": {func(r ring) {
			r.put(0, testEntry(7, 0, mib))
			r.put(2*k, testEntry(8, 2*k, mib))
			r.put(4*k, testEntry(9, 2*k, mib))
		}, []uint64{8, 9}},
		"tail is gone": {func(r ring) {
			r.put(2*k, testEntry(8, 0, mib))
			r.put(4*k, testEntry(9, 0, mib))
		}, nil},
		"over the end": {func(r ring) {
			r.put(end-3*k, testEntry(7, end-3*k, mib))
			r.put(end-k, testEntry(8, end-3*k, mib))
			r.put(k, testEntry(9, end-3*k, mib))
		}, []uint64{7, 8, 9}},
		"an older one follows": {func(r ring) {
			r.put(0, testEntry(9, 0, mib))
			r.put(2*k, testEntry(3, 2*k, mib))
		}, []uint64{9}},
		"the higher number wins": {func(r ring) {
			r.put(0, testEntry(8, 0, mib))
			r.put(end/2, testEntry(9, end/2, mib))
		}, []uint64{9}},
		"the newest is torn": {func(r ring) {
			r.put(0, testEntry(8, 0, mib))
			p := testEntry(9, end/2, mib)
			p[len(p)-2000] ^= 1
			r.put(end/2, p)
		}, []uint64{8}},
		"a data sector is missing": {func(r ring) {
			p := testEntry(9, 0, mib)
			clear(p[logSectorBytes:])
			r.put(0, p)
		}, nil},
		"another log's": {func(r ring) {
			p := testEntry(9, 0, mib)
			p[32] ^= 1
			putSum(p)
			r.put(0, p)
		}, nil},
		"number 0":         {func(r ring) { r.put(0, testEntry(0, 0, mib)) }, nil},
		"longer than log":  {func(r ring) { r.put(0, patched(testEntry(9, 0, mib), 8, 2*mib)) }, nil},
		"odd length":       {func(r ring) { r.put(0, patched(testEntry(9, 0, mib), 8, 100)) }, nil},
		"no length":        {func(r ring) { r.put(0, patched(testEntry(9, 0, mib), 8, 0)) }, nil},
		"many descriptors": {func(r ring) { r.put(0, patched(testEntry(9, 0, mib), 24, 1<<31)) }, nil},
		"tail outside":     {func(r ring) { r.put(0, patched(testEntry(9, 0, mib), 12, mib)) }, nil},
		"odd offset":       {func(r ring) { r.put(0, patched(testEntry(9, 0, mib), entryHeader+16, mib+512)) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			r := make(ring, mib)
			c.fill(r)
			if got := sequences(r.active(testGUID)); !slices.Equal(got, c.want) {
				t.Errorf("entries %d are active, want %d", got, c.want)
			}
		})
	}
}

// patched returns an entry with another 32-bit field and the right sum.
func patched(p []byte, off int, value uint32) []byte {
	binary.LittleEndian.PutUint32(p[off:], value)
	putSum(p)
	return p
}

// What an entry says is what is read from it, first and last bytes included.
func TestEncodeEntry(t *testing.T) {
	r := testenv.Rand(t)
	for _, n := range []int{1, 126, 127, 128, 254, 255} {
		var pages []page
		for i := range n {
			p := page{int64(mib + i*logSectorBytes), make([]byte, logSectorBytes)}
			for j := range p.data {
				p.data[j] = byte(r.Uint32())
			}
			pages = append(pages, p)
		}
		log := make(ring, 2*mib)
		log.put(mib, encodeEntry(pages, mib, testGUID, 1<<40+5, 7*mib+1))
		got := log.active(testGUID)
		if len(got) != 1 || len(got[0].pages) != n {
			t.Fatalf("%d pages: %d entries are active", n, len(got))
		}
		for i, p := range got[0].pages {
			if p.off != pages[i].off || !bytes.Equal(p.data, pages[i].data) {
				t.Fatalf("page %d of %d differs", i, n)
			}
		}
		if got[0].flushed != 7*mib || got[0].last != 8*mib {
			t.Errorf("file lengths %d and %d", got[0].flushed, got[0].last)
		}
	}
}

// Entries of ours never reach from one place to the other, whatever the log's length.
func TestEntryPages(t *testing.T) {
	for _, length := range []int64{mib, 3 * mib, maxLogBytes} {
		n := entryPages(length)
		if n < 100 {
			t.Errorf("a log of %d bytes takes %d pages", length, n)
		}
		bytes := (descriptorSectors(n) + n) * logSectorBytes
		if slotAt(length, 0)+bytes >= slotAt(length, 1) || slotAt(length, 1)+bytes >= length {
			t.Errorf("a log of %d bytes: entries of %d bytes at %d and %d", length, bytes, slotAt(length, 0), slotAt(length, 1))
		}
	}
}

// zeroEntry returns an entry that zeroes a stretch.
func zeroEntry(sequence uint64, off, n int64) []byte {
	p := make([]byte, logSectorBytes)
	copy(p, testEntry(sequence, 0))
	d := p[entryHeader:]
	copy(d, zeroSignature)
	binary.LittleEndian.PutUint64(d[8:], uint64(n))
	binary.LittleEndian.PutUint64(d[16:], uint64(off))
	binary.LittleEndian.PutUint64(d[24:], sequence)
	return patched(p, 24, 1)
}

func TestNewReplay_Refuses(t *testing.T) {
	h := &header{logOffset: mib, logLength: mib, log: testGUID}
	const size = 10 * mib
	for name, c := range map[string]struct {
		entry []byte
		want  string
		err   error
	}{
		"good":                 {testEntry(1, 0, 2*mib, size-logSectorBytes), "", nil},
		"good zeroes":          {zeroEntry(1, 3*mib, mib), "", nil},
		"region table":         {testEntry(1, 0, 192<<10), "", nil},
		"identifier":           {testEntry(1, 0, 0), "where the headers or the log are", block.ErrCorrupt},
		"header":               {testEntry(1, 0, 128<<10), "where the headers or the log are", block.ErrCorrupt},
		"log":                  {testEntry(1, 0, 2*mib-logSectorBytes), "where the headers or the log are", block.ErrCorrupt},
		"zeroes over log":      {zeroEntry(1, 256<<10, 2*mib), "where the headers or the log are", block.ErrCorrupt},
		"past the end":         {testEntry(1, 0, size), "past the end of the file", block.ErrCorrupt},
		"zeroes past the end":  {zeroEntry(1, 9*mib, 2*mib), "past the end of the file", block.ErrCorrupt},
		"far away":             {testEntry(1, 0, 1<<61), "past the end of the file", block.ErrCorrupt},
		"many zeroes":          {zeroEntry(1, 2*mib, 2<<30), "zeroes more than", block.ErrUnsupported},
		"file was longer":      {patched(testEntry(1, 0, 2*mib), 48, 11*mib), "it was truncated", block.ErrCorrupt},
		"file shall be longer": {patched(testEntry(1, 0, 2*mib), 56, 11*mib), "", nil},
		"much longer":          {patched(testEntry(1, 0, 2*mib), 60, 1<<20), "wants the file to have", block.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			log := make(ring, mib)
			log.put(0, c.entry)
			entries := log.active(testGUID)
			if len(entries) != 1 {
				t.Fatalf("%d entries are active", len(entries))
			}
			_, err := newReplay(entries, h, size)
			if !errors.Is(err, c.err) || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %v that says %q", err, c.err, c.want)
			}
		})
	}
}

// A log is replayed in the order of its entries, as a plain model does it.
func TestReplay_Show(t *testing.T) {
	r := testenv.Rand(t)
	h := &header{logOffset: mib, logLength: mib, log: testGUID}
	const size, from = 6 * mib, 2 * mib
	for range 100 {
		want := bytes.Repeat([]byte{0xff}, size)
		log := make(ring, mib)
		at := int64(0)
		for sequence := uint64(1); sequence <= 20; sequence++ {
			off := from + r.Int64N((size-from)/logSectorBytes-16)*logSectorBytes
			var p []byte
			if r.IntN(3) == 0 {
				n := r.Int64N(16) * logSectorBytes
				p = zeroEntry(sequence, off, n)
				clear(want[off : off+n])
			} else {
				p = testEntry(sequence, 0, off, off+logSectorBytes)
				copy(want[off:], bytes.Repeat([]byte{byte(sequence)}, 2*logSectorBytes))
			}
			log.put(at, p)
			at += int64(len(p))
		}
		// The tail is the first: entries name offset 0.
		replay, err := newReplay(log.active(testGUID), h, 10*mib)
		if err != nil {
			t.Fatal(err)
		}
		got := bytes.Repeat([]byte{0xff}, size)
		for off := int64(0); off < size; {
			n := min(1+r.Int64N(200<<10), size-off)
			replay.show(got[off:off+n], off)
			off += n
		}
		if !bytes.Equal(got, want) {
			t.Fatal("the file shows something else")
		}
	}
}

// The file under a replay has data where the log does, too.
func TestReplayedFile_NextData(t *testing.T) {
	mem := vfs.NewMem()
	f, err := mem.Create("f")
	if err == nil {
		_, err = f.WriteAt([]byte("x"), 3*mib)
	}
	if err == nil {
		err = f.Truncate(6 * mib)
	}
	if err != nil {
		t.Fatal(err)
	}
	file := &replayedFile{File: f}
	file.pending.Store(&replay{size: 6 * mib, pages: map[int64][]byte{mib: nil, 5 * mib: nil}})
	for off, want := range map[int64]int64{0: mib, mib + 100: mib + 100, mib + logSectorBytes: 3 * mib, 4 * mib: 5 * mib, 5*mib + logSectorBytes: -1} {
		start, end, err := file.NextData(off)
		if want < 0 && err != io.EOF || want >= 0 && (err != nil || start != want || end <= start) {
			t.Errorf("from %#x on, data is from %#x to %#x, error %v; want %#x", off, start, end, err, want)
		}
	}
}

// FuzzLog looks for entries in whatever a log holds, and replays them. It takes memory and
// time in proportion to the log.
func FuzzLog(f *testing.F) {
	f.Add(testEntry(1, 0, mib), uint32(0), uint64(1))
	f.Add(append(testEntry(1, 0, 3*mib), testEntry(2, 0, 4*mib)...), uint32(9), uint64(2))
	f.Add(zeroEntry(3, 3*mib, mib), uint32(70), uint64(3))
	h := &header{logOffset: mib, logLength: mib, log: testGUID}
	f.Fuzz(func(t *testing.T, data []byte, at uint32, seed uint64) {
		log := make(ring, 64<<10)
		r := rand.New(rand.NewPCG(seed, seed))
		for off := int64(at) % int64(len(log)); len(data) > 0; data = data[min(len(data), logSectorBytes):] {
			s := log.sector(off &^ (logSectorBytes - 1))
			copy(s, data)
			if r.IntN(2) == 0 && string(s[:4]) == entrySignature {
				putSum(s)
			}
			off += logSectorBytes
		}
		entries := log.active(testGUID)
		for i := 1; i < len(entries); i++ {
			if entries[i].sequence != entries[i-1].sequence+1 {
				t.Fatalf("numbers %d follow each other", sequences(entries))
			}
		}
		replay, err := newReplay(entries, h, 10*mib)
		if err != nil {
			return
		}
		if len(replay.pages) > len(log)/logSectorBytes {
			t.Fatalf("%d pages from a log of %d bytes", len(replay.pages), len(log))
		}
		p := make([]byte, 100<<10)
		replay.show(p, r.Int64N(10*mib))
	})
}
