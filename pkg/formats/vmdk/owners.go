package vmdk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

const (
	// ownerWindowBits is how many grains' places are told apart at a time: 16 MiB.
	ownerWindowBits = 16 << 20 * 8
	// ownerChunkBytes is how much of the tables is read at once.
	ownerChunkBytes = 1 << 20
)

// judgeOwners returns an error if two entries of an image refer to overlapping grains: to
// write what one of them maps would change the other, which nobody asked for. It happens
// once, before the first change after opening. It costs reading all grain tables; where
// they are holes in the file, that is nothing.
func (m *image) judgeOwners() error {
	if m.ownersJudged {
		return nil
	}
	for i := range m.extents {
		s := m.extents[i].sparse
		if s == nil || s.stream != nil {
			continue
		}
		if err := s.judgeOwners(); err != nil {
			return err
		}
	}
	m.ownersJudged = true
	return nil
}

// owners finds out whether places of grains overlap. Writers align grains, to the
// beginning of the file or to something else, all alike: then a bit for each will do.
type owners struct {
	s       *sparse
	start   uint64 // the first sector of the window
	end     uint64
	unit    uint64 // sectors that a bit stands for
	residue uint64 // of the first entry, by the grain size
	any     bool   // there was an entry
	used    []uint64
}

var errUneven = errors.New("grains are not aligned alike")

func (s *sparse) judgeOwners() error {
	err := s.judgeWindows(s.header.grainSize)
	if errors.Is(err, errUneven) {
		err = s.judgeWindows(1)
	}
	return err
}

// judgeWindows looks at one part of the file after the other, so that memory is bounded.
func (s *sparse) judgeWindows(unit uint64) error {
	fileSectors := uint64(s.fileEnd+sectorBytes-1) / sectorBytes
	for start := uint64(0); start < fileSectors; start += ownerWindowBits * unit {
		o := owners{s: s, start: start, end: min(start+ownerWindowBits*unit, fileSectors), unit: unit}
		o.used = make([]uint64, (o.end-o.start+2*s.header.grainSize)/unit/64+2)
		if err := o.scan(); err != nil {
			return err
		}
	}
	return nil
}

// scan reads all tables, those that lie together at once.
func (o *owners) scan() error {
	s := o.s
	tables := make([]uint32, 0, len(s.gd))
	for _, gt := range s.gd {
		if gt != 0 && gt != badTable {
			tables = append(tables, gt)
		}
	}
	slices.Sort(tables)
	length := uint32(s.header.gtSectors())
	buf := make([]byte, 0, max(ownerChunkBytes, s.tableBytes()))
	for len(tables) > 0 {
		n := 1
		for n < len(tables) && tables[n] == tables[n-1]+length && int64(n+1)*s.tableBytes() <= int64(cap(buf)) {
			n++
		}
		off, end := int64(tables[0])*sectorBytes, (int64(tables[0])+int64(n)*int64(length))*sectorBytes
		if err := o.scanStretch(buf, off, end); err != nil {
			return err
		}
		tables = tables[n:]
	}
	return nil
}

// scanStretch judges the entries in a stretch of the file that holds nothing but tables.
func (o *owners) scanStretch(buf []byte, off, end int64) error {
	for off < end {
		start, until, err := o.s.f.NextData(off)
		if err == io.EOF || err == nil && start >= end {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find data at %#x of %s: %w", off, o.s.f.Name(), err)
		}
		start, until = max(start, off)/sectorBytes*sectorBytes, min(wholeSectors(until), end)
		p := buf[:until-start]
		if err := readFull(o.s.f, p, start); err != nil {
			return err
		}
		if err := o.take(p); err != nil {
			return err
		}
		off = until
	}
	return nil
}

// take notes what entries refer to.
func (o *owners) take(p []byte) error {
	s, zeroes, size := o.s, o.s.hasZeroGrains(), o.s.header.grainSize
	for ; len(p) > 0; p = p[gteBytes:] {
		entry := uint64(binary.LittleEndian.Uint32(p))
		if entry == gteAbsent || entry == gteZero && zeroes {
			continue
		}
		if o.unit == size {
			if !o.any {
				o.any, o.residue = true, entry%size
			} else if entry%size != o.residue {
				return errUneven
			}
			if entry >= o.start && entry < o.end && o.mark((entry-o.start)/size) {
				return s.twoOwners(entry)
			}
			continue
		}
		for sector := max(entry, o.start); sector < min(entry+size, o.end); sector++ {
			if o.mark(sector - o.start) {
				return s.twoOwners(entry)
			}
		}
	}
	return nil
}

// mark sets a bit and reports whether it was set.
func (o *owners) mark(i uint64) bool {
	word, bit := &o.used[i/64], uint64(1)<<(i%64)
	was := *word&bit != 0
	*word |= bit
	return was
}

func (s *sparse) twoOwners(entry uint64) error {
	return fmt.Errorf("%w: two grain table entries of %s refer to the grain at sector %d or overlap it, so it must not be written: "+
		"image check --repair gives each its own", block.ErrCorrupt, s.f.Name(), entry)
}
