package vhdx

import (
	"encoding/binary"
	"io"
	"math/bits"
)

// usage says what of a file is in use, MiB by MiB.
type usage struct {
	words  []uint64
	size   int64 // of the file
	end    int64 // everything in use lies below
	damage error // the first thing wrong with the table
}

func newUsage(size int64) *usage {
	return &usage{words: make([]uint64, (alignUp(size, mib)/mib+63)/64), size: size}
}

// mark notes a stretch as used; it returns false, and notes nothing, if some of it is
// already. What lies past the end of the file cannot be shared: bad entries are found by
// their place.
func (u *usage) mark(s span) bool {
	first, end := s.off/mib, min((s.end+mib-1)/mib, int64(len(u.words))*64)
	for i := first; i < end; i++ {
		if u.words[i/64]&(1<<(i%64)) != 0 {
			return false
		}
	}
	for i := first; i < end; i++ {
		u.words[i/64] |= 1 << (i % 64)
	}
	u.end = max(u.end, s.end)
	return true
}

// eachFree calls f with each stretch of the file that is not in use.
func (u *usage) eachFree(f func(span)) {
	units := alignUp(u.size, mib) / mib
	for i := int64(0); i < units; {
		if word := u.words[i/64] >> (i % 64); word&1 != 0 {
			i += int64(bits.TrailingZeros64(^word))
			continue
		}
		from := i
		for i < units {
			word := u.words[i/64] >> (i % 64)
			if word != 0 {
				i += int64(bits.TrailingZeros64(word))
				break
			}
			i += 64 - i%64
		}
		if i = min(i, units); from < i {
			f(span{from * mib, i * mib})
		}
	}
}

// scanner is told of every entry of the table that is not zero.
type scanner interface {
	payload(block int64, e batEntry) error
	bitmap(chunk int64, e batEntry) error
	progress(done, total int64) error
}

// eachEntry reads the whole table, past the cache, and tells s of its entries.
func (m *image) eachEntry(s scanner) error {
	total := m.entryCount(m.meta.sizeBytes)
	chunk := make([]byte, mib)
	for index := int64(0); index < total; {
		if err := s.progress(index, total); err != nil {
			return err
		}
		at := m.entryAt(index)
		// A table of a large disk is mostly a hole.
		start, _, err := m.file.NextData(at)
		if err == io.EOF || err == nil && start >= m.entryAt(total) {
			break
		}
		if err == nil && start > at {
			index = max(index, (start-m.batAt())/batEntryBytes)
			at = m.entryAt(index)
		}
		p := chunk[:min(int64(len(chunk)), m.entryAt(total)-at)]
		if err := readFull(m.file, p, at); err != nil {
			return err
		}
		if err := m.tellEntries(s, index, p); err != nil {
			return err
		}
		index += int64(len(p)) / batEntryBytes
	}
	return s.progress(total, total)
}

func (m *image) tellEntries(s scanner, index int64, p []byte) error {
	chunk, i := index/(m.chunkRatio+1), index%(m.chunkRatio+1)
	blocks := m.blocks(m.meta.sizeBytes)
	for ; len(p) > 0; p, i = p[batEntryBytes:], i+1 {
		if i > m.chunkRatio {
			chunk, i = chunk+1, 0
		}
		e := batEntry(binary.LittleEndian.Uint64(p))
		if e == 0 {
			continue
		}
		var err error
		if block := chunk*m.chunkRatio + i; i == m.chunkRatio {
			err = s.bitmap(chunk, e)
		} else if block < blocks {
			err = s.payload(block, e)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// newUsage returns what is in use apart from what the table tells of.
func (m *image) newUsage() *usage {
	u := newUsage(m.fileEnd)
	for _, s := range m.reserved {
		u.mark(s)
	}
	return u
}

// scan finds out which space is in use.
func (m *image) scan() (*usage, error) {
	s := &spaceScanner{m: m, u: m.newUsage()}
	return s.u, m.eachEntry(s)
}

// spaceScanner finds used space, and the first thing wrong.
type spaceScanner struct {
	m *image
	u *usage
}

func (s *spaceScanner) payload(block int64, e batEntry) error {
	if err := s.m.checkPayload(block, e); err != nil {
		return s.blame(err)
	}
	if !e.holds() {
		return nil
	}
	if !s.u.mark(span{e.off(), e.off() + s.m.meta.blockBytes}) {
		return s.blame(corrupt("BAT entry of block %d: its place, %#x, is another's, too", block, e.off()))
	}
	return nil
}

func (s *spaceScanner) bitmap(chunk int64, e batEntry) error {
	off, err := s.m.checkBitmap(chunk, e)
	if err != nil {
		return s.blame(err)
	}
	if off != 0 && !s.u.mark(span{off, off + bitmapBytes}) {
		return s.blame(corrupt("BAT entry of sector bitmap %d: its place, %#x, is another's, too", chunk, off))
	}
	return nil
}

func (s *spaceScanner) blame(err error) error {
	if s.u.damage == nil {
		s.u.damage = err
	}
	return nil
}

func (s *spaceScanner) progress(int64, int64) error { return nil }
