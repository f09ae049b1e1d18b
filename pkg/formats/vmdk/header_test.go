package vmdk

import (
	"errors"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// validHeader describes an image of 1 GiB in a file of 5000 sectors.
func validHeader() sparseHeader {
	return sparseHeader{
		version: 1, flags: flagNewlineTest | flagRedundantGT, capacity: 1 << 21, grainSize: 128,
		descriptorOffset: 1, descriptorSize: 20, numGTEsPerGT: 512, rgdOffset: 21, gdOffset: 150, overHead: 384,
	}
}

const fileSectors = 5000

func TestHeader_RoundTrip(t *testing.T) {
	want := validHeader()
	want.compressAlgorithm, want.uncleanShutdown = compressDeflate, true
	p := make([]byte, sectorBytes)
	want.encode(p)
	if got := decodeHeader(p); got != want || !isHeader(p) {
		t.Errorf("decoded %+v, want %+v", got, want)
	}
}

func TestHeader_Validate(t *testing.T) {
	for name, c := range map[string]struct {
		change  func(h *sparseHeader)
		message string // "" is valid
		is      error
	}{
		"as made":        {func(*sparseHeader) {}, "", nil},
		"version 3":      {func(h *sparseHeader) { h.version = 3 }, "", nil},
		"2 TiB, 4 KiB":   {func(h *sparseHeader) { h.capacity, h.grainSize, h.gdOffset = 1<<32, 8, 1 }, "grain directory of 8192 sectors", block.ErrCorrupt},
		"smallest":       {func(h *sparseHeader) { h.capacity = 1 }, "", nil},
		"small tables":   {func(h *sparseHeader) { h.numGTEsPerGT = 128 }, "", nil},
		"no descriptor":  {func(h *sparseHeader) { h.descriptorOffset, h.descriptorSize = 0, 0 }, "", nil},
		"not redundant":  {func(h *sparseHeader) { h.flags, h.rgdOffset = flagNewlineTest, 1<<40 }, "", nil},
		"damaged":        {func(h *sparseHeader) { h.newlineTestDamaged = true }, "line ends", block.ErrCorrupt},
		"version 0":      {func(h *sparseHeader) { h.version = 0 }, "want 1 to 3", block.ErrUnsupported},
		"version 4":      {func(h *sparseHeader) { h.version = 4 }, "want 1 to 3", block.ErrUnsupported},
		"lzma":           {func(h *sparseHeader) { h.compressAlgorithm = 2 }, "compressAlgorithm 2", block.ErrUnsupported},
		"empty":          {func(h *sparseHeader) { h.capacity = 0 }, "capacity is 0", block.ErrCorrupt},
		"far too large":  {func(h *sparseHeader) { h.capacity = 1<<64 - 1 }, "want at most 1048576", block.ErrCorrupt},
		"tiny grains":    {func(h *sparseHeader) { h.grainSize = 4 }, "grainSize is 4", block.ErrCorrupt},
		"huge grains":    {func(h *sparseHeader) { h.grainSize = 1 << 40 }, "grainSize", block.ErrCorrupt},
		"odd grains":     {func(h *sparseHeader) { h.grainSize = 100 }, "grainSize is 100", block.ErrCorrupt},
		"no grains":      {func(h *sparseHeader) { h.grainSize = 0 }, "grainSize is 0", block.ErrCorrupt},
		"odd tables":     {func(h *sparseHeader) { h.numGTEsPerGT = 513 }, "numGTEsPerGT is 513", block.ErrCorrupt},
		"huge tables":    {func(h *sparseHeader) { h.numGTEsPerGT = 1 << 31 }, "numGTEsPerGT", block.ErrCorrupt},
		"truncated":      {func(h *sparseHeader) { h.overHead = fileSectors + 1 }, "it was truncated", block.ErrCorrupt},
		"directory 0":    {func(h *sparseHeader) { h.gdOffset = 0 }, "gdOffset is 0", block.ErrCorrupt},
		"directory out":  {func(h *sparseHeader) { h.gdOffset = fileSectors }, "gdOffset is 5000", block.ErrCorrupt},
		"directory wrap": {func(h *sparseHeader) { h.gdOffset = 1<<64 - 2 }, "gdOffset", block.ErrCorrupt},
		"copy out":       {func(h *sparseHeader) { h.rgdOffset = 1 << 60 }, "rgdOffset", block.ErrCorrupt},
		"on descriptor":  {func(h *sparseHeader) { h.gdOffset = 20 }, "overlaps the descriptor", block.ErrCorrupt},
		"descriptor out": {func(h *sparseHeader) { h.descriptorOffset = 1<<64 - 1 }, "outside the file", block.ErrCorrupt},
		"descriptor big": {func(h *sparseHeader) { h.descriptorSize = 1 << 20 }, "descriptorSize", block.ErrCorrupt},
		"descriptor 0":   {func(h *sparseHeader) { h.descriptorSize = 0 }, "descriptorSize is 0", block.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			h := validHeader()
			c.change(&h)
			err := h.validate(fileSectors)
			if c.message == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.message) {
				t.Errorf("error %v, want %v that says %q", err, c.is, c.message)
			}
		})
	}
}

func TestGuestSectors(t *testing.T) {
	for _, c := range []struct {
		capacity, described, want uint64
	}{
		{2048, 2048, 2048},
		{18560, 18435, 18435}, // rounded up by the writer
		{200, 200, 200},
		{100, 120, 120},    // within the same grain
		{128, 130, 128},    // more than the tables hold
		{4096, 2048, 4096}, // a crash while growing
		{2048, 4096, 2048},
		{2048, 2048 + 128, 2048},
		{2048 + 128, 2048, 2048 + 128},
	} {
		h := validHeader()
		h.capacity = c.capacity
		if got := guestSectors(h, c.described); got != c.want {
			t.Errorf("header %d, descriptor %d: %d sectors, want %d", c.capacity, c.described, got, c.want)
		}
	}
}
