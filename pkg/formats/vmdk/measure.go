package vmdk

import (
	"cmp"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
)

// Measure returns how long the files are that Create makes, once they hold data. Tables
// that no grain needs are holes; of a stream, where nothing says how well the data
// compresses, it is the most that it can take.
func (Format) Measure(req formats.CreateRequest, dataBytes int64) (int64, error) {
	req.Name = cmp.Or(req.Name, "image."+formatName)
	c, err := checkCreate(req)
	if err == nil && dataBytes < 0 {
		err = invalid("%d bytes of data, want 0 or more", dataBytes)
	}
	if err != nil {
		return 0, fmt.Errorf("vmdk: measure: %w", err)
	}
	total := int64(0)
	if !c.kind.embedded {
		total = int64(len(c.descriptorText()))
	}
	for i, sectors := range c.lengths {
		data := min(dataBytes, sectors*sectorBytes)
		if i == len(c.lengths)-1 {
			data = dataBytes
		}
		dataBytes -= data
		total += c.measureExtent(sectors, data)
	}
	return total, nil
}

// measureExtent returns how long an extent's file is.
func (c *creation) measureExtent(sectors, data int64) int64 {
	full := c.Preallocation == formats.PreallocateFalloc || c.Preallocation == formats.PreallocateFull
	switch {
	case !c.kind.sparse && full:
		return sectors * sectorBytes
	case !c.kind.sparse:
		return min(data, sectors*sectorBytes)
	case c.kind.stream:
		return c.measureStream(data)
	}
	h := c.header(sectors)
	grains := (data + c.ClusterBytes - 1) / c.ClusterBytes
	if full {
		grains = (sectors*sectorBytes-1)/c.ClusterBytes + 1
	}
	metadata := int64(h.overHead)
	if c.Preallocation == formats.PreallocateOff {
		tables := (grains + int64(h.numGTEsPerGT) - 1) / int64(h.numGTEsPerGT)
		copies := int64(len(h.directories()))
		metadata = h.headerSectors() + int64(h.descriptorSize) + copies*(int64(h.gdSectors())+tables*int64(h.gtSectors()))
	}
	return metadata*sectorBytes + grains*c.ClusterBytes
}

// headerSectors returns the length of the header.
func (h *sparseHeader) headerSectors() int64 {
	if h.cowd {
		return cowdHeaderSectors
	}
	return 1
}

// measureStream returns how long a stream gets at most: what does not compress takes a
// sector more, with its marker.
func (c *creation) measureStream(data int64) int64 {
	h := c.header(c.sectors)
	grains := (data + c.ClusterBytes - 1) / c.ClusterBytes
	tables := (grains + int64(h.numGTEsPerGT) - 1) / int64(h.numGTEsPerGT)
	return int64(h.overHead)*sectorBytes + grains*(c.ClusterBytes+sectorBytes) +
		tables*int64(1+h.gtSectors())*sectorBytes + int64(len(h.streamEnd(make([]uint32, h.grainTables()), 0)))
}
