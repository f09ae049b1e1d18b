package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
)

// makeLarge makes an image of 2 TiB, or what its format can have of that, whose first
// TiB is mapped: tables are written, data is one hole.
func (b *bench) makeLarge(ctx context.Context, format, name string) error {
	if format == vmdkName {
		return b.makeLargeVMDK(ctx, name)
	}
	if err := b.program(ctx, qemuImg, "create", "-q", "-f", format, "-o", "preallocation=metadata", name, fmt.Sprint(mappedBytes)); err != nil {
		return err
	}
	return b.program(ctx, qemuImg, "resize", "-q", "-f", format, name, fmt.Sprint(2*mappedBytes))
}

// vmdkBytes is the size of the large VMDK: a sparse file of the format ends at 2 TiB,
// with its tables.
const vmdkBytes = 2*mappedBytes - 8<<30

// makeLargeVMDK makes an empty image and writes its tables, of both directories ("Virtual
// Disk Format 1.1", "Hosted Sparse Extents").
func (b *bench) makeLargeVMDK(ctx context.Context, name string) error {
	if err := b.create(ctx, vmdkName, name, vmdkBytes); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(b.dir, name), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	err = mapGrains(f, mappedBytes)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("map the grains of %s: %w", name, err)
	}
	return nil
}

// sparseHeader is what mapping needs of an extent's header.
type sparseHeader struct {
	grainSectors      uint64
	entriesPerTable   uint32
	directory, second uint64 // sectors at which the grain directories begin
	overheadSectors   uint64
}

const (
	vmdkSector      = 512
	vmdkMagic       = 0x564d444b // "KDMV"
	entryBytes      = 4
	maxTableEntries = 1 << 16
)

func readSparseHeader(f *os.File) (sparseHeader, error) {
	raw := make([]byte, vmdkSector)
	if _, err := f.ReadAt(raw, 0); err != nil {
		return sparseHeader{}, err
	}
	if magic := binary.LittleEndian.Uint32(raw); magic != vmdkMagic {
		return sparseHeader{}, fmt.Errorf("magic number %#x, want %#x", magic, vmdkMagic)
	}
	h := sparseHeader{
		grainSectors:    binary.LittleEndian.Uint64(raw[20:]),
		entriesPerTable: binary.LittleEndian.Uint32(raw[44:]),
		second:          binary.LittleEndian.Uint64(raw[48:]),
		directory:       binary.LittleEndian.Uint64(raw[56:]),
		overheadSectors: binary.LittleEndian.Uint64(raw[64:]),
	}
	if h.grainSectors == 0 || h.entriesPerTable == 0 || h.entriesPerTable > maxTableEntries {
		return sparseHeader{}, fmt.Errorf("grains of %d sectors, tables of %d entries", h.grainSectors, h.entriesPerTable)
	}
	return h, nil
}

// mapGrains gives the first grains of a sparse extent their places: one after the other,
// past the tables.
func mapGrains(f *os.File, guestBytes int64) error {
	h, err := readSparseHeader(f)
	if err != nil {
		return err
	}
	grains := uint64(guestBytes) / vmdkSector / h.grainSectors
	tables := (grains + uint64(h.entriesPerTable) - 1) / uint64(h.entriesPerTable)
	first := (h.overheadSectors + h.grainSectors - 1) / h.grainSectors * h.grainSectors
	for _, start := range []uint64{h.directory, h.second} {
		directory := make([]byte, tables*entryBytes)
		if _, err := f.ReadAt(directory, int64(start*vmdkSector)); err != nil {
			return err
		}
		table := make([]byte, h.entriesPerTable*entryBytes)
		for i := range tables {
			for j := range uint64(h.entriesPerTable) {
				grain := i*uint64(h.entriesPerTable) + j
				entry := uint32(first + grain*h.grainSectors)
				if grain >= grains {
					entry = 0
				}
				binary.LittleEndian.PutUint32(table[j*entryBytes:], entry)
			}
			at := int64(binary.LittleEndian.Uint32(directory[i*entryBytes:])) * vmdkSector
			if _, err := f.WriteAt(table, at); err != nil {
				return err
			}
		}
	}
	return f.Truncate(int64(first+grains*h.grainSectors) * vmdkSector)
}
