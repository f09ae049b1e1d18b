package vhdx

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// Begin applies what the log holds, and gives the image new write GUIDs and an empty log
// of its own. It happens once after opening.
func (m *image) Begin(c *engine.Commit) error {
	if err := m.begin(c); err != nil {
		return fmt.Errorf("vhdx: %w", err)
	}
	return nil
}

func (m *image) begin(c *engine.Commit) error {
	if err := m.header.checkLogLength(); err != nil {
		return err
	}
	if err := m.makeSpace(); err != nil {
		return err
	}
	if err := m.settle(c); err != nil {
		return err
	}
	h := m.header
	if h.logLength == 0 {
		if err := m.addLog(&h); err != nil {
			return err
		}
	}
	// A flush must not find the store full.
	err := m.file.Allocate(int64(h.logOffset), int64(h.logLength))
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("reserve the log's %d bytes at %#x: %w", h.logLength, h.logOffset, err)
	}
	h.fileWrite, h.dataWrite = newGUID(), newGUID()
	return m.takeLog(c, h)
}

// addLog finds a place for the log of an image that has none.
func (m *image) addLog(h *header) error {
	place, err := m.space.Alloc(defaultLogBytes, defaultLogBytes)
	if err != nil {
		return fmt.Errorf("add a log: %w", err)
	}
	m.fileEnd = max(m.fileEnd, place.Off+place.Len)
	h.logOffset, h.logLength = uint64(place.Off), uint32(place.Len)
	m.reserve(span{place.Off, place.Off + place.Len})
	return nil
}

// reserve notes a stretch in which no block may lie.
func (m *image) reserve(s span) {
	i, _ := slices.BinarySearchFunc(m.reserved, s, func(a, b span) int { return cmp.Compare(a.off, b.off) })
	m.reserved = slices.Insert(slices.Clone(m.reserved), i, s)
}

// settle applies the log that the image was opened with.
func (m *image) settle(c *engine.Commit) error {
	r := m.file.pending.Load()
	if r == nil {
		return nil
	}
	size, err := m.file.File.Size()
	if err != nil {
		return fmt.Errorf("size of %s: %w", m.file.Name(), err)
	}
	if err := r.apply(c, size); err != nil {
		return fmt.Errorf("replay the log: %w", err)
	}
	m.file.pending.Store(nil)
	return nil
}

// takeLog gives the image a log that holds nothing but what is written from now on: what
// is in it has been applied. First it is void; then it gets an entry, which changes nothing,
// and then the headers name the GUID of that.
func (m *image) takeLog(c *engine.Commit, h header) error {
	if m.header.log != (guid{}) {
		if err := m.emptyLog(c); err != nil {
			return err
		}
	}
	if err := m.syncLength(); err != nil {
		return err
	}
	h.log, h.logVersion = newGUID(), 0
	if err := m.writeEntryFor(c, &h, nil); err != nil {
		return err
	}
	if err := m.writeHeaders(c, h); err != nil {
		return err
	}
	m.logIsOurs = true
	return nil
}

// writeEntryFor writes a log entry, durably, behind which the one before stays.
func (m *image) writeEntryFor(c *engine.Commit, h *header, pages []page) error {
	m.sequence++
	at := slotAt(int64(h.logLength), m.slot)
	m.slot = (m.slot + 1) % slots
	if err := c.WriteAt(0, encodeEntry(pages, at, h.log, m.sequence, m.durableEnd), int64(h.logOffset)+at); err != nil {
		return fmt.Errorf("write the log: %w", err)
	}
	if err := c.Sync(); err != nil {
		return fmt.Errorf("write the log: %w", err)
	}
	return nil
}

// writeHeaders writes both headers, one after the other: at any time one of them is
// intact, and the newer intact one counts.
func (m *image) writeHeaders(c *engine.Commit, h header) error {
	for range m.headers.copies {
		next := 1 - m.headers.current
		h.sequence = m.headers.now().sequence + 1
		if err := c.WriteAt(0, h.encode(), headerAt[next]); err != nil {
			return fmt.Errorf("header %d: %w", next+1, err)
		}
		if err := c.Sync(); err != nil {
			return fmt.Errorf("header %d: %w", next+1, err)
		}
		m.headers.copies[next], m.headers.valid[next], m.headers.current = h, true, next
		m.header = h
	}
	return nil
}

// Commit writes what has changed into the log, and then in place: see the package's
// documentation.
func (m *image) Commit(c *engine.Commit) error {
	if err := m.commit(c); err != nil {
		return fmt.Errorf("vhdx: %w", err)
	}
	return nil
}

func (m *image) commit(c *engine.Commit) error {
	if err := m.settle(c); err != nil {
		return err
	}
	if !m.logIsOurs { // what a killed process left is being replayed
		if err := m.takeLog(c, m.header); err != nil {
			return err
		}
	}
	pages, err := m.changedPages(c.Sectors())
	if err != nil {
		return err
	}
	if err := m.coverLength(c.Sectors()); err != nil {
		return err
	}
	return m.writeLogged(c, pages)
}

// changedPages returns the log sectors that changed table sectors lie in. What else is in
// them is as in the file: nobody else writes tables.
func (m *image) changedPages(sectors []engine.Sector) ([]page, error) {
	var pages []page
	for len(sectors) > 0 {
		p := page{sectors[0].Off &^ (logSectorBytes - 1), make([]byte, logSectorBytes)}
		n := 0
		for n < len(sectors) && sectors[n].Off < p.off+logSectorBytes {
			n++
		}
		if n < logSectorBytes/512 {
			if err := readPadded(m.file, p.data, p.off); err != nil {
				return nil, err
			}
		}
		for _, s := range sectors[:n] {
			copy(p.data[s.Off-p.off:], s.Data)
		}
		pages = append(pages, p)
		sectors = sectors[n:]
	}
	m.order(pages)
	return pages, nil
}

// order puts pages in an order in which they may be made durable in several steps, if one
// log entry cannot hold them all. Bitmaps come first: they do not count until the table
// says that the block is partially present, and a block that says so never gets another
// place in the same commit (see blockClaims). Then the table, from its end: a bitmap's
// entry lies behind those of its blocks.
func (m *image) order(pages []page) {
	bat := m.regions[findRegion(m.regions, batRegion)].span()
	isBAT := func(p page) int {
		if bat.off <= p.off && p.off < bat.end {
			return 1
		}
		return 0
	}
	slices.SortFunc(pages, func(a, b page) int {
		return cmp.Or(cmp.Compare(isBAT(a), isBAT(b)), cmp.Compare(b.off, a.off))
	})
}

// coverLength makes the file's length durable where changed entries refer to space that
// may be new: nothing may be durable that refers to what lies past the end.
func (m *image) coverLength(sectors []engine.Sector) error {
	bat := m.regions[findRegion(m.regions, batRegion)].span()
	need := int64(0)
	for _, s := range sectors {
		if s.Off < bat.off || s.Off >= bat.end {
			continue
		}
		for p := s.Data; len(p) >= batEntryBytes; p = p[batEntryBytes:] {
			if e := batEntry(binary.LittleEndian.Uint64(p)); e.state() == stateFull || e.state() == statePartial {
				need = max(need, e.off()+m.meta.blockBytes)
			}
		}
	}
	if need <= m.durableEnd {
		return nil
	}
	return m.syncLength()
}

func (m *image) syncLength() error {
	size, err := m.file.Size()
	if err != nil {
		return fmt.Errorf("size of %s: %w", m.file.Name(), err)
	}
	if err := m.file.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", m.file.Name(), err)
	}
	m.durableEnd = size
	return nil
}

// writeLogged changes pages of the file, crash-safely: all together if they fit into one
// log entry, else in order, as many at a time as do. The engine, or the next call, syncs
// them in place.
//
// Every entry is its own tail: what came before it has been applied.
func (m *image) writeLogged(c *engine.Commit, pages []page) error {
	for len(pages) > 0 {
		n := min(int64(len(pages)), entryPages(int64(m.header.logLength)))
		// The entry in the log may be void when what it says is in place.
		if err := c.Sync(); err != nil {
			return err
		}
		if err := m.writeEntryFor(c, &m.header, pages[:n]); err != nil {
			return err
		}
		if err := writePages(c, pages[:n]); err != nil {
			return c.Lose(err) // the log has it, and the log must be applied
		}
		pages = pages[n:]
	}
	return nil
}

// writePages writes pages in place, adjacent ones together.
func writePages(c *engine.Commit, pages []page) error {
	const most = 256
	pages = slices.Clone(pages)
	slices.SortFunc(pages, func(a, b page) int { return cmp.Compare(a.off, b.off) })
	for len(pages) > 0 {
		n := 1
		for n < min(len(pages), most) && pages[n].off == pages[n-1].off+logSectorBytes {
			n++
		}
		data := make([]byte, 0, n*logSectorBytes)
		for _, p := range pages[:n] {
			data = append(data, p.data...)
		}
		if err := c.WriteAt(0, data, pages[0].off); err != nil {
			return err
		}
		pages = pages[n:]
	}
	return nil
}

// Finish empties the log, and trims what was reserved ahead. Lookups may go on meanwhile,
// and do not notice: nothing refers to what goes.
func (m *image) Finish(c *engine.Commit) error {
	if err := m.finish(c); err != nil {
		return fmt.Errorf("vhdx: %w", err)
	}
	return nil
}

func (m *image) finish(c *engine.Commit) error {
	if err := m.emptyLog(c); err != nil {
		return err
	}
	for _, off := range m.claims.bitmaps {
		m.space.Free(off, bitmapBytes, false)
	}
	m.claims.bitmaps = nil
	m.durableEnd = 0
	return m.space.Trim()
}

// emptyLog notes in the headers that the log, which has been applied, holds nothing.
func (m *image) emptyLog(c *engine.Commit) error {
	if err := c.Sync(); err != nil {
		return err
	}
	h := m.header
	h.log = guid{}
	if err := m.writeHeaders(c, h); err != nil {
		return err
	}
	m.logIsOurs = false
	return nil
}
