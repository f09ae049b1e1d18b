package vfs

import (
	"io"
	"maps"
	"math/rand/v2"
	"slices"
)

const (
	// maxVersions is how many unsynced states of one sector a crash can choose from,
	// and maxSizes how many lengths: the newest ones. It bounds memory.
	maxVersions = 4
	maxSizes    = 16
)

// content is one state of a file. Bytes past size are zeroes in every page.
type content struct {
	size      int64
	pages     pageMap
	allocated pageSet // includes every page in pages
}

// memData is a file's contents: what is seen now, what is certain to survive a crash,
// and what a crash may keep of the way from one to the other.
type memData struct {
	live, synced content
	sizes        []int64              // since the last sync, oldest first, the last is live.size
	dirty        map[int64]*dirtyPage // by page
	reallocated  bool                 // live.allocated differs from synced.allocated
	dataRuns     []int64              // sorted keys of live.pages, nil when outdated
}

// dirtyPage holds the unsynced states of a page's sectors, oldest first; the last one is
// the live one. A sector without any is as synced.
type dirtyPage struct {
	versions [sectorsPerPage][]*sector
}

// note records that a sector became s.
func (d *dirtyPage) note(i int, s *sector) {
	v := d.versions[i]
	if len(v) == maxVersions {
		v = append(v[:0:0], v[1:]...)
	}
	d.versions[i] = append(v, s)
}

// read fills p from off, which must lie before the end with all of p.
func (c *content) read(p []byte, off int64) {
	for len(p) > 0 {
		pg, within := c.pages.pages[off/pageBytes], off%pageBytes
		for i := within / sectorBytes; i < sectorsPerPage && len(p) > 0; i++ {
			skip := within % sectorBytes
			n := min(sectorBytes-skip, int64(len(p)))
			if s := pg[i]; s != nil {
				copy(p[:n], s[skip:])
			} else {
				clear(p[:n])
			}
			p, off, within = p[n:], off+n, within+n
		}
	}
}

// write stores p at off, growing the file as needed.
func (d *memData) write(p []byte, off int64) {
	if len(p) == 0 {
		return
	}
	end := off + int64(len(p))
	first := off / pageBytes
	d.reserve(first, pagesFor(end))
	for len(p) > 0 {
		index, within := off/pageBytes, off%pageBytes
		n := min(pageBytes-within, int64(len(p)))
		pg := d.live.pages.pages[index]
		fresh := new([sectorsPerPage]sector)
		for i := within / sectorBytes; i*sectorBytes < within+n; i++ {
			if pg[i] != nil {
				fresh[i] = *pg[i]
			}
			from, to := max(within, i*sectorBytes), min(within+n, (i+1)*sectorBytes)
			copy(fresh[i][from-i*sectorBytes:], p[from-within:to-within])
			pg[i] = &fresh[i]
			d.dirtyPage(index).note(int(i), pg[i])
		}
		d.setLive(index, pg)
		p, off = p[n:], off+n
	}
	if end > d.live.size {
		d.resize(end)
	}
}

// zero makes [off, off+n) read as zeroes and gives whole pages back.
func (d *memData) zero(off, n int64) {
	end := min(off+n, d.live.size)
	if off >= end {
		return
	}
	for _, index := range keysFrom(d.live.pages.pages, off/pageBytes, pagesFor(end)) {
		pg := d.live.pages.pages[index]
		for i, s := range pg {
			at := index*pageBytes + int64(i)*sectorBytes
			from, to := max(off, at), min(end, at+sectorBytes)
			if s == nil || from >= to {
				continue
			}
			if to == d.live.size { // the last sector's tail is zeroes already
				to = at + sectorBytes
			}
			pg[i] = s.zeroRange(from-at, to-at)
			d.dirtyPage(index).note(i, pg[i])
		}
		d.setLive(index, pg)
	}
	if end == d.live.size {
		end = pagesFor(end) * pageBytes
	}
	d.live.allocated.remove(pagesFor(off), end/pageBytes)
	d.reallocated = true
}

// truncate sets the length.
func (d *memData) truncate(size int64) {
	if size < d.live.size {
		d.cut(size)
	}
	if size != d.live.size {
		d.resize(size)
	}
}

// cut zeroes what lies past size. Bytes that were written and cut off without a sync
// between are gone for good: a crash chooses between what was synced there and zeroes.
func (d *memData) cut(size int64) {
	first, end := size/pageBytes, pagesFor(d.live.size)
	touched := slices.Concat(keysFrom(d.live.pages.pages, first, end), keysFrom(d.dirty, first, end))
	slices.Sort(touched)
	for _, index := range slices.Compact(touched) {
		pg := d.live.pages.pages[index]
		for i, s := range pg {
			from := size - index*pageBytes - int64(i)*sectorBytes
			if from >= sectorBytes {
				continue
			}
			pg[i] = d.cutSector(index, i, s, max(from, 0))
		}
		d.setLive(index, pg)
	}
	d.live.allocated.remove(pagesFor(size), end)
	d.reallocated = true
}

// cutSector zeroes a sector from a byte on, in all its unsynced versions, and returns
// the live one.
func (d *memData) cutSector(index int64, i int, live *sector, from int64) *sector {
	live = live.zeroRange(from, sectorBytes)
	dirty := d.dirtyPage(index)
	if from == 0 {
		dirty.versions[i] = []*sector{nil}
		return live
	}
	versions := dirty.versions[i]
	dirty.versions[i] = nil
	for _, v := range versions {
		dirty.note(i, v.zeroRange(from, sectorBytes))
	}
	dirty.note(i, live)
	return live
}

// reserve gives pages space.
func (d *memData) reserve(first, end int64) {
	if d.live.allocated.countIn(first, end) < end-first {
		d.live.allocated.add(first, end)
		d.reallocated = true
	}
}

// sync makes the live state the one that survives.
func (d *memData) sync() {
	for index := range d.dirty {
		d.synced.pages.set(index, d.live.pages.pages[index])
	}
	if d.reallocated {
		d.synced.allocated = d.live.allocated.clone()
	}
	d.synced.size = d.live.size
	d.sizes, d.dirty, d.reallocated = nil, nil, false
}

// nextData returns the first run of pages with data at or after off.
func (d *memData) nextData(off int64) (start, end int64, err error) {
	if d.dataRuns == nil {
		d.dataRuns = slices.Sorted(maps.Keys(d.live.pages.pages))
	}
	i, _ := slices.BinarySearch(d.dataRuns, off/pageBytes)
	if i == len(d.dataRuns) || off >= d.live.size {
		return 0, 0, io.EOF
	}
	start = d.dataRuns[i]
	for end = start; i < len(d.dataRuns) && d.dataRuns[i] == end; i++ {
		end++
	}
	return max(off, start*pageBytes), min(end*pageBytes, d.live.size), nil
}

func (d *memData) setLive(index int64, pg page) {
	if _, had := d.live.pages.pages[index]; had == pg.empty() {
		d.dataRuns = nil
	}
	d.live.pages.set(index, pg)
}

func (d *memData) resize(size int64) {
	d.live.size = size
	if len(d.sizes) == maxSizes {
		d.sizes = d.sizes[1:]
	}
	d.sizes = append(d.sizes, size)
}

func (d *memData) dirtyPage(index int64) *dirtyPage {
	p := d.dirty[index]
	if p == nil {
		if d.dirty == nil {
			d.dirty = make(map[int64]*dirtyPage)
		}
		p = new(dirtyPage)
		d.dirty[index] = p
	}
	return p
}

// clone returns a copy that changes independently, with the same future after a crash.
func (d *memData) clone() *memData {
	c := &memData{
		live:        d.live.fork(),
		synced:      d.synced.fork(),
		sizes:       slices.Clone(d.sizes),
		reallocated: d.reallocated,
	}
	if len(d.dirty) > 0 {
		c.dirty = make(map[int64]*dirtyPage, len(d.dirty))
	}
	for index, p := range d.dirty {
		copied := new(dirtyPage)
		for i, v := range p.versions {
			copied.versions[i] = slices.Clone(v)
		}
		c.dirty[index] = copied
	}
	return c
}

func (c *content) fork() content {
	return content{size: c.size, pages: c.pages.fork(), allocated: c.allocated.clone()}
}

// afterCrash returns what a crash may leave of the file, see [Mem.Crash].
func (d *memData) afterCrash(r *rand.Rand, fate fate) *memData {
	left := d.synced.fork()
	if fate.keeps(r) {
		left.allocated = d.live.allocated.clone()
	}
	left.size = d.sizeAfterCrash(r, fate)
	for _, index := range slices.Sorted(maps.Keys(d.dirty)) {
		pg := left.pages.pages[index]
		for i, versions := range d.dirty[index].versions {
			if len(versions) > 0 && fate.keeps(r) {
				pg[i] = versions[fate.newest(r, len(versions))]
			}
		}
		left.pages.set(index, pg)
	}
	left.cutTail(max(d.synced.size, d.live.size)) // no version holds data past these
	for index := range left.pages.pages {
		if !left.allocated.has(index) {
			left.allocated.add(index, index+1)
		}
	}
	return &memData{live: left.fork(), synced: left}
}

// sizeAfterCrash chooses among the lengths the file had since its last sync. Where it
// grew, a length between is possible too.
func (d *memData) sizeAfterCrash(r *rand.Rand, fate fate) int64 {
	if len(d.sizes) == 0 || !fate.keeps(r) {
		return d.synced.size
	}
	i := fate.newest(r, len(d.sizes))
	size, before := d.sizes[i], d.synced.size
	if i > 0 {
		before = d.sizes[i-1]
	}
	if fate.kind == keepSome && size > before && r.IntN(4) == 0 {
		return max(before, (before+r.Int64N(size-before))/sectorBytes*sectorBytes)
	}
	return size
}

// cutTail zeroes what pages hold past the end; nothing lies past limit.
func (c *content) cutTail(limit int64) {
	for _, index := range keysFrom(c.pages.pages, c.size/pageBytes, pagesFor(limit)) {
		pg := c.pages.pages[index]
		for i, s := range pg {
			from := c.size - index*pageBytes - int64(i)*sectorBytes
			if from < sectorBytes {
				pg[i] = s.zeroRange(max(from, 0), sectorBytes)
			}
		}
		c.pages.set(index, pg)
	}
	c.allocated.remove(pagesFor(c.size), pagesFor(limit))
}

// pagesFor returns how many pages hold n bytes.
func pagesFor(n int64) int64 { return (n + pageBytes - 1) / pageBytes }
