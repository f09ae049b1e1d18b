package vmdk

import (
	"errors"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// validCOWD describes an image of 1 GiB in a file of 5000 sectors.
func validCOWD() sparseHeader {
	h := sparseHeader{capacity: 1 << 21, grainSize: 8}
	h.layOutCOWD()
	return h
}

func TestCOWD_RoundTrip(t *testing.T) {
	want := validCOWD()
	p := make([]byte, sectorBytes)
	want.encode(p)
	got, err := decodeCOWD(p)
	want.overHead = cowdHeaderSectors // a file does not say where its grains begin
	if err != nil || got != want || !isCOWD(p) {
		t.Errorf("decoded %+v, %v; want %+v", got, err, want)
	}
}

func TestCOWD_Validate(t *testing.T) {
	for name, c := range map[string]struct {
		change  func(h *sparseHeader)
		message string // "" is valid
	}{
		"as made":          {func(*sparseHeader) {}, ""},
		"grains of ESX":    {func(h *sparseHeader) { h.grainSize, h.cowdEntries = 1, 512 }, ""},
		"more entries":     {func(h *sparseHeader) { h.cowdEntries = 1 << 31 }, ""},
		"no grains":        {func(h *sparseHeader) { h.grainSize = 0 }, "granularity is 0"},
		"odd grains":       {func(h *sparseHeader) { h.grainSize = 3 }, "granularity is 3"},
		"empty":            {func(h *sparseHeader) { h.capacity = 0 }, "numSectors is 0"},
		"too few entries":  {func(h *sparseHeader) { h.cowdEntries = 63 }, "numGDEntries is 63, but 2097152 sectors need 64"},
		"in the header":    {func(h *sparseHeader) { h.gdOffset = 3 }, "overlaps the header"},
		"directory out":    {func(h *sparseHeader) { h.gdOffset = fileSectors }, "gdOffset is 5000"},
		"larger than told": {func(h *sparseHeader) { h.capacity = 1<<32 - 1 }, "numGDEntries is 64"},
	} {
		t.Run(name, func(t *testing.T) {
			h := validCOWD()
			c.change(&h)
			err := h.validate(fileSectors)
			if c.message == "" && err != nil || c.message != "" && (!errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), c.message)) {
				t.Errorf("error %v, want %q", err, c.message)
			}
		})
	}
}

// FuzzHeader feeds beginnings of files to all parsers of headers: what one accepts is
// bounded.
func FuzzHeader(f *testing.F) {
	hosted, cowd, se := make([]byte, sectorBytes), make([]byte, sectorBytes), make([]byte, sectorBytes)
	h, c := validHeader(), validCOWD()
	h.encode(hosted)
	c.encode(cowd)
	copy(se, "\xbe\xba\xfe\xca\x00\x00\x00\x00\x01\x00\x00\x00\x02")
	for _, p := range [][]byte{hosted, cowd, se} {
		f.Add(p, uint16(fileSectors))
	}
	f.Fuzz(func(t *testing.T, p []byte, length uint16) {
		p = append(p, make([]byte, sectorBytes)...)[:sectorBytes]
		parsed := []sparseHeader{decodeHeader(p)}
		if h, err := decodeCOWD(p); err == nil {
			parsed = append(parsed, h)
		}
		for _, h := range parsed {
			if h.validate(uint64(length)) != nil {
				continue
			}
			if h.grainTables() > maxGrainTables || h.gdOffset+h.gdSectors() > uint64(length) ||
				h.descriptorOffset != 0 && h.descriptorSize > maxDescriptorSectors {
				t.Errorf("accepted %+v in a file of %d sectors", h, length)
			}
		}
		if h, err := decodeSE(p); err == nil && h.validate(uint64(length)) == nil {
			if h.directory.end() > uint64(length) || h.volatile.at >= uint64(length) {
				t.Errorf("accepted %+v in a file of %d sectors", h, length)
			}
		}
	})
}
