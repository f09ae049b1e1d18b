package vhdx

import (
	"bytes"
	"io"
	"slices"
	"sort"
	"sync/atomic"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// replay is what an image's log says that the file has yet to become.
type replay struct {
	pages  map[int64][]byte // by file offset; the last change of each
	zeroes []span           // in order, apart; no page lies in one
	size   int64            // the file has to be at least this long
}

// newReplay turns the entries of a log into what they amount to. They come from a
// stranger: nothing outside the file as it is, or as it modestly grows, is changed, nor
// what the log cannot change, the file identifier, headers and the log itself.
func newReplay(entries []entry, h *header, fileBytes int64) (*replay, error) {
	r := &replay{pages: map[int64][]byte{}, size: fileBytes}
	for i := range entries {
		e := &entries[i]
		if e.flushed > uint64(fileBytes) {
			return nil, corrupt("log entry %d: the file was %d bytes long when it was written, is %d: it was truncated", e.sequence, e.flushed, fileBytes)
		}
		if e.last > uint64(fileBytes)+maxReplayGrowth {
			return nil, corrupt("log entry %d: wants the file to have %d bytes, it has %d", e.sequence, e.last, fileBytes)
		}
		r.size = max(r.size, alignUp(int64(e.last), mib))
	}
	log := span{int64(h.logOffset), int64(h.logOffset) + int64(h.logLength)}
	var zeroed int64
	for i := range entries {
		e := &entries[i]
		for _, z := range e.zeroes {
			zeroed += z.end - z.off
			if zeroed > maxReplayZeroBytes {
				return nil, unsupported("log entry %d: zeroes more than %d bytes", e.sequence, maxReplayZeroBytes)
			}
			if err := r.checkTarget(e, z, log); err != nil {
				return nil, err
			}
			r.zero(z)
		}
		for _, p := range e.pages {
			if err := r.checkTarget(e, span{p.off, p.off + logSectorBytes}, log); err != nil {
				return nil, err
			}
			r.pages[p.off] = p.data
		}
	}
	r.settleZeroes()
	return r, nil
}

func (r *replay) checkTarget(e *entry, s span, log span) error {
	if s.off < regionTableAt[0] || s.off < log.end && log.off < s.end {
		return corrupt("log entry %d: changes %#x to %#x, where the headers or the log are", e.sequence, s.off, s.end)
	}
	if s.end > r.size {
		return corrupt("log entry %d: changes %#x to %#x, past the end of the file, %#x", e.sequence, s.off, s.end, r.size)
	}
	return nil
}

// zero notes a stretch that becomes zeroes: pages there that came before go.
func (r *replay) zero(z span) {
	for off := z.off; off < z.end; off += logSectorBytes {
		delete(r.pages, off)
	}
	r.zeroes = append(r.zeroes, z)
}

// settleZeroes makes the zeroed stretches ordered and apart. Pages win: those that a
// stretch overtook are gone already.
func (r *replay) settleZeroes() {
	slices.SortFunc(r.zeroes, func(a, b span) int { return int(min(max(a.off-b.off, -1), 1)) })
	var apart []span
	for _, z := range r.zeroes {
		if n := len(apart); n > 0 && z.off <= apart[n-1].end {
			apart[n-1].end = max(apart[n-1].end, z.end)
			continue
		}
		apart = append(apart, z)
	}
	r.zeroes = apart
}

// dropDone forgets the pages that are as they shall be, and reports whether nothing is left
// to do: as a rule a log's last entry is in place.
func (r *replay) dropDone(f vfs.File, fileBytes int64) (bool, error) {
	p := make([]byte, logSectorBytes)
	for _, off := range r.offsets() {
		if err := readPadded(f, p, off); err != nil {
			return false, err
		}
		if bytes.Equal(p, r.pages[off]) && !r.isZeroed(off) {
			delete(r.pages, off)
		}
	}
	return len(r.pages) == 0 && len(r.zeroes) == 0 && r.size <= fileBytes, nil
}

// isZeroed reports whether the page at off lies where something is zeroed first.
func (r *replay) isZeroed(off int64) bool {
	for _, z := range r.zeroes[r.firstZero(off):] {
		return z.off < off+logSectorBytes
	}
	return false
}

// firstZero returns the index of the first zeroed stretch that ends behind off.
func (r *replay) firstZero(off int64) int {
	return sort.Search(len(r.zeroes), func(i int) bool { return r.zeroes[i].end > off })
}

// apply writes it all to the file, durably. It can be repeated.
func (r *replay) apply(c *engine.Commit, fileBytes int64) error {
	if fileBytes < r.size {
		if err := c.Truncate(0, r.size); err != nil {
			return err
		}
	}
	zeroes := make([]byte, mib)
	for _, z := range r.zeroes {
		for off := z.off; off < z.end; off += int64(len(zeroes)) {
			if err := c.WriteAt(0, zeroes[:min(int64(len(zeroes)), z.end-off)], off); err != nil {
				return err
			}
		}
	}
	for _, off := range r.offsets() {
		if err := c.WriteAt(0, r.pages[off], off); err != nil {
			return err
		}
	}
	return c.Sync()
}

// offsets returns where the pages lie, in order.
func (r *replay) offsets() []int64 {
	offsets := make([]int64, 0, len(r.pages))
	for off := range r.pages {
		offsets = append(offsets, off)
	}
	slices.Sort(offsets)
	return offsets
}

// replayedFile shows a file as its log says that it has to become. It writes nothing of
// that by itself: an image that is only read stays as it is.
type replayedFile struct {
	vfs.File
	pending atomic.Pointer[replay] // nil when it has been applied
}

// Size returns the length that the file is to have.
func (f *replayedFile) Size() (int64, error) {
	size, err := f.File.Size()
	if r := f.pending.Load(); r != nil {
		size = max(size, r.size)
	}
	return size, err
}

// ReadAt reads what the file is to hold.
func (f *replayedFile) ReadAt(p []byte, off int64) (int, error) {
	r := f.pending.Load()
	if r == nil {
		return f.File.ReadAt(p, off)
	}
	n, err := f.File.ReadAt(p, off)
	if err != nil && err != io.EOF {
		return n, err
	}
	if err == io.EOF && off < r.size {
		longer := int(min(int64(len(p)), r.size-off))
		clear(p[n:max(n, longer)])
		n = max(n, longer)
		if n == len(p) {
			err = nil
		}
	}
	r.show(p[:n], off)
	return n, err
}

// show puts what the log says over bytes of the file.
func (r *replay) show(p []byte, off int64) {
	end := off + int64(len(p))
	for _, z := range r.zeroes[r.firstZero(off):] {
		if z.off >= end {
			break
		}
		clear(p[max(z.off, off)-off : min(z.end, end)-off])
	}
	for at := off / logSectorBytes * logSectorBytes; at < end; at += logSectorBytes {
		data, ok := r.pages[at]
		if !ok {
			continue
		}
		from := max(at, off)
		copy(p[from-off:], data[from-at:])
	}
}

// NextData returns what the file, or its log, has next.
func (f *replayedFile) NextData(off int64) (start, end int64, err error) {
	r := f.pending.Load()
	if r == nil {
		return f.File.NextData(off)
	}
	start, end, err = f.File.NextData(off)
	if err != nil && err != io.EOF {
		return start, end, err
	}
	page, ok := r.nextPage(off)
	if ok && (err == io.EOF || page < start) {
		return max(page, off), page + logSectorBytes, nil
	}
	return start, end, err
}

// nextPage returns where the first page lies that does not end before off.
func (r *replay) nextPage(off int64) (int64, bool) {
	first := off &^ (logSectorBytes - 1)
	next, found := int64(0), false
	for at := range r.pages {
		if at >= first && (!found || at < next) {
			next, found = at, true
		}
	}
	return next, found
}
