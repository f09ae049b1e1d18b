package formattest

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
)

// change is a write, or a zeroing when data is nil, of the guest bytes [off, off+n).
type change struct {
	what   string // for messages
	off, n int64
	data   []byte
}

func (c change) end() int64 { return c.off + c.n }

// at returns the change's byte for a guest offset inside it.
func (c change) at(off int64) byte {
	if c.data == nil {
		return 0
	}
	return c.data[off-c.off]
}

// slice returns the part of c within [off, end), which must overlap it.
func (c change) slice(off, end int64) change {
	off, end = max(off, c.off), min(end, c.end())
	part := change{what: c.what, off: off, n: end - off}
	if c.data != nil {
		part.data = c.data[off-c.off : end-c.off]
	}
	return part
}

// contents is what a disk may hold: every byte is as in bytes, or as in one of the
// maybes that cover it.
type contents struct {
	bytes []byte
	maybe []change
}

func newContents(size int64) contents { return contents{bytes: make([]byte, size)} }

func (c *contents) clone() contents {
	return contents{bytes: bytes.Clone(c.bytes), maybe: slices.Clone(c.maybe)}
}

// set makes ch certain.
func (c *contents) set(ch change) {
	if ch.data == nil {
		clear(c.bytes[ch.off:ch.end()])
	} else {
		copy(c.bytes[ch.off:], ch.data)
	}
	c.forget(ch.off, ch.end())
}

// allow makes ch possible, byte by byte.
func (c *contents) allow(ch change) {
	if ch.n > 0 {
		c.maybe = append(c.maybe, ch)
	}
}

// forget drops what may be in [off, end).
func (c *contents) forget(off, end int64) {
	kept := c.maybe[:0:0]
	for _, m := range c.maybe {
		if m.end() <= off || end <= m.off {
			kept = append(kept, m)
			continue
		}
		if m.off < off {
			kept = append(kept, m.slice(m.off, off))
		}
		if end < m.end() {
			kept = append(kept, m.slice(end, m.end()))
		}
	}
	c.maybe = kept
}

// resize makes the disk larger, with zeroes, or smaller.
func (c *contents) resize(size int64) {
	if n := size - int64(len(c.bytes)); n > 0 {
		c.bytes = append(c.bytes, make([]byte, n)...)
		return
	}
	c.forget(size, int64(len(c.bytes)))
	c.bytes = c.bytes[:size]
}

// keepTail adds what a longer disk holds past the end of this one.
func (c *contents) keepTail(longer contents) {
	end := int64(len(c.bytes))
	if int64(len(longer.bytes)) <= end {
		return
	}
	c.bytes = append(c.bytes, longer.bytes[end:]...)
	for _, m := range longer.maybe {
		if m.end() > end {
			c.maybe = append(c.maybe, m.slice(end, m.end()))
		}
	}
}

// settle checks that got can be what is at off, and takes it as what is there from now
// on: a byte that could be old or new does not change its mind.
func (c *contents) settle(off int64, got []byte) error {
	if err := c.check(off, got, nil); err != nil {
		return err
	}
	if len(c.maybe) > 0 {
		copy(c.bytes[off:], got)
		c.forget(off, off+int64(len(got)))
	}
	return nil
}

// check returns an error unless every byte of got is one that can be at off, or one
// that a change in also has there.
func (c *contents) check(off int64, got []byte, also []change) error {
	const piece = 4096 // most of the disk is as it should be
	for len(got) > 0 {
		n := min(len(got), piece)
		if err := c.checkPiece(off, got[:n], also); err != nil {
			return err
		}
		got, off = got[n:], off+int64(n)
	}
	return nil
}

func (c *contents) checkPiece(off int64, got []byte, also []change) error {
	end := off + int64(len(got))
	if bytes.Equal(got, c.bytes[off:end]) {
		return nil
	}
	wrong := make([]bool, len(got))
	for i := range got {
		wrong[i] = got[i] != c.bytes[off+int64(i)]
	}
	for _, changes := range [][]change{c.maybe, also} {
		for _, ch := range changes {
			for at := max(off, ch.off); at < min(end, ch.end()); at++ {
				wrong[at-off] = wrong[at-off] && got[at-off] != ch.at(at)
			}
		}
	}
	bad := slices.Index(wrong, true)
	if bad < 0 {
		return nil
	}
	return c.mismatch(off, got, bad, wrong, also)
}

// mismatch describes the first wrong byte.
func (c *contents) mismatch(off int64, got []byte, bad int, wrong []bool, also []change) error {
	count := 0
	for _, w := range wrong {
		if w {
			count++
		}
	}
	var want strings.Builder
	at := off + int64(bad)
	fmt.Fprintf(&want, "\n  want %s", snippet(c.bytes[off:off+int64(len(got))], off, bad))
	for _, ch := range slices.Concat(c.maybe, also) {
		if ch.off <= at && at < ch.end() {
			fmt.Fprintf(&want, "\n    or %s by %s", ch.show(at), ch.what)
		}
	}
	return fmt.Errorf("guest byte %#x (and %d more of the %d at %#x) is wrong:\n   got %s%s",
		at, count-1, len(got), off, snippet(got, off, bad), want.String())
}

// show shows what the change has at a guest offset.
func (c change) show(at int64) string {
	if c.data == nil {
		return "zeroes"
	}
	return snippet(c.data, c.off, int(at-c.off))
}

// model is a disk's contents through time.
type model struct {
	live    contents // what reads return
	durable contents // what it was when the last successful flush was called
	since   []change // begun since then: each byte of them may be durable, too
}

func newModel(c contents) *model { return &model{live: c, durable: c.clone()} }

// begin notes a change that is about to be made, and returns it.
func (m *model) begin(ch change) change {
	m.since = append(m.since, ch)
	return ch
}

// flushed notes that covered is durable, and of changes since the last flush those before
// begun. If the disk's size is not certain, it may yet have what lay past its end.
func (m *model) flushed(covered contents, begun int, sizeCertain bool) {
	if !sizeCertain {
		covered.keepTail(m.durable)
	}
	m.durable = covered
	m.since = slices.Clone(m.since[begun:])
}

// lose notes that the disk was closed without success: any part of what was begun since
// the last flush may be lost.
func (m *model) lose() {
	m.live = m.durable.clone()
	for _, ch := range m.since {
		m.live.allow(ch)
	}
}

// resize notes that the disk has another size; what is new is zero, and what was past
// its end is gone.
func (m *model) resize(size int64) {
	m.live.resize(size)
	m.durable.resize(size)
	var kept []change
	for _, ch := range m.since {
		if ch.off < size {
			kept = append(kept, ch.slice(0, size))
		}
	}
	m.since = kept
}

// shows notes that the disk shows a size which need not be durable: after a crash it may be
// longer once more, and hold what was past this size.
func (m *model) shows(size int64) {
	m.live.resize(size)
	if size > int64(len(m.durable.bytes)) {
		m.durable.resize(size)
	}
}

func (m *model) size() int64 { return int64(len(m.live.bytes)) }

// afterCrash returns an error unless got, all of the disk, can be what a crash left.
func (m *model) afterCrash(got []byte) error {
	d := m.durable
	if int64(len(got)) > int64(len(d.bytes)) {
		d = d.clone()
		d.resize(int64(len(got)))
	}
	return d.check(0, got, m.since)
}

// afterKill returns an error unless got, all of the disk, can be what the next process
// finds: every change that returned, and each byte of inFlight or what it replaces.
func (m *model) afterKill(got []byte, inFlight []change) error {
	l := m.live
	if int64(len(got)) > int64(len(l.bytes)) {
		l = l.clone()
		l.resize(int64(len(got)))
	}
	return l.check(0, got, inFlight)
}
