package engine

import (
	"fmt"
	"sort"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Space allocates space in a file for formats that append new clusters at its end and
// keep no map of free space: what has been freed is remembered only while the image is
// open. It is not safe for concurrent use: a Codec calls it where it is called alone.
type Space struct {
	file     vfs.File
	index    int   // of file in Layer.Files
	align    int64 // of every allocation
	limit    int64 // no allocation ends past it
	end      int64 // everything below is in use or in free
	size     int64 // the file's length; [end, size) reads as zeroes
	free     []freeSpan
	extended bool
}

type freeSpan struct {
	off, n int64
	zeroed bool
}

// extendBytes is how far the file is extended ahead of its use. The extension is a
// hole: it costs no space, and what is written into it needs no zeroing around it.
const extendBytes = 4 << 20

// NewSpace returns an allocator for file, the Layer's File number index, whose present
// length is size. Allocations are multiples of align, a power of two, aligned to it, and
// end at or before limit (0: no limit): what the format's pointers can say.
func NewSpace(file vfs.File, index int, size, align, limit int64) *Space {
	if limit == 0 {
		limit = 1<<63 - 1 - extendBytes
	}
	return &Space{file: file, index: index, align: align, limit: limit, end: alignUp(size, align), size: size}
}

// Alloc reserves n bytes, or fewer, but at least atLeast; both are multiples of the
// alignment. It returns an error that wraps ErrNoSpace when the format's limit is
// reached.
func (s *Space) Alloc(n, atLeast int64) (Place, error) {
	if p, ok := s.reuse(n, atLeast); ok {
		return p, nil
	}
	if s.end > s.limit-atLeast {
		return Place{}, fmt.Errorf("allocate %d bytes at %#x of %s: %w: the format's limit is %#x",
			atLeast, s.end, s.file.Name(), errFormatFull, s.limit)
	}
	n = min(n, (s.limit-s.end)/s.align*s.align)
	if s.end+n > s.size {
		size := min(s.end+n+extendBytes, max(s.limit, s.end+n))
		if err := s.file.Truncate(size); err != nil {
			return Place{}, fmt.Errorf("extend %s to %d bytes: %w", s.file.Name(), size, err)
		}
		s.size, s.extended = size, true
	}
	p := Place{Span: Span{File: s.index, Off: s.end, Len: n}, Zeroed: true}
	s.end += n
	return p, nil
}

// reuse takes the first free span of at least atLeast bytes.
func (s *Space) reuse(n, atLeast int64) (Place, bool) {
	for i := range s.free {
		f := &s.free[i]
		if f.n < atLeast {
			continue
		}
		n = min(n, f.n)
		p := Place{Span: Span{File: s.index, Off: f.off, Len: n}, Zeroed: f.zeroed}
		f.off += n
		if f.n -= n; f.n == 0 {
			s.free = append(s.free[:i], s.free[i+1:]...)
		}
		return p, true
	}
	return Place{}, false
}

// Free gives a span back, for reuse at once.
func (s *Space) Free(off, n int64, zeroed bool) {
	i := sort.Search(len(s.free), func(i int) bool { return s.free[i].off >= off })
	if i > 0 && s.free[i-1].off+s.free[i-1].n == off && s.free[i-1].zeroed == zeroed {
		s.free[i-1].n += n
		return
	}
	s.free = append(s.free, freeSpan{})
	copy(s.free[i+1:], s.free[i:])
	s.free[i] = freeSpan{off: off, n: n, zeroed: zeroed}
}

// FreeBytes returns how much of the file below its end is free.
func (s *Space) FreeBytes() int64 {
	var n int64
	for _, f := range s.free {
		n += f.n
	}
	return n
}

// End returns the file offset below which everything is in use or free.
func (s *Space) End() int64 { return s.end }

// Trim shortens the file to what is in use: what was reserved ahead, and free space at
// the end, goes. For Codec.Finish.
func (s *Space) Trim() error {
	for len(s.free) > 0 {
		last := s.free[len(s.free)-1]
		if last.off+last.n != s.end {
			break
		}
		s.end = last.off
		s.free = s.free[:len(s.free)-1]
	}
	if s.size <= s.end {
		return nil
	}
	if err := s.file.Truncate(s.end); err != nil {
		return fmt.Errorf("trim %s to %d bytes: %w", s.file.Name(), s.end, err)
	}
	s.size, s.extended = s.end, false
	return nil
}

func alignUp(n, align int64) int64 { return (n + align - 1) / align * align }
