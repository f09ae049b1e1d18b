package vmdk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/internal/inflate"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Markers of a streamOptimized extent ("Virtual Disk Format 1.1", section
// "Stream-Optimized Compressed Sparse Extents").
const (
	markerHeaderBytes    = 12 // of a grain: its sector, and the length of its data
	markerEndOfStream    = 0
	markerGrainTable     = 1
	markerGrainDirectory = 2
	markerFooter         = 3

	// footerBytes is what ends a file whose directory is at its end: the footer's marker,
	// the footer, which is a header, and the end-of-stream marker.
	footerBytes = 3 * sectorBytes
)

// readFooter returns the header at the end of a file whose header says gdAtEnd.
func readFooter(f vfs.File, size int64) (sparseHeader, error) {
	if size < sectorBytes+footerBytes {
		return sparseHeader{}, corrupt("the file of %d bytes is too short for its footer: it was truncated", size)
	}
	p := make([]byte, footerBytes)
	if err := readFull(f, p, size-footerBytes); err != nil {
		return sparseHeader{}, fmt.Errorf("read the footer: %w", err)
	}
	marker, footer, end := p[:sectorBytes], p[sectorBytes:2*sectorBytes], p[2*sectorBytes:]
	if !isMarker(marker, markerFooter) || !isHeader(footer) || !isMarker(end, markerEndOfStream) {
		return sparseHeader{}, corrupt("the file does not end with a footer: it was truncated, was never finished, or something follows it")
	}
	h := decodeHeader(footer)
	if h.gdOffset == gdAtEnd {
		return sparseHeader{}, corrupt("the footer does not say where the grain directory is")
	}
	return h, nil
}

// isMarker reports whether a sector is a marker of a type, not of a grain.
func isMarker(p []byte, kind uint32) bool {
	return binary.LittleEndian.Uint32(p[8:]) == 0 && binary.LittleEndian.Uint32(p[12:]) == kind
}

// maxStored bounds what a grain takes when it is stored: deflate makes nothing much longer.
func (s *sparse) maxStored() int64 { return 2*s.grainBytes() + markerHeaderBytes }

// compressedRun is runAt for a grain that is stored compressed; room is how much of the
// file can be its.
func (s *sparse) compressedRun(grain int64, entry uint32, room, off, n int64) (engine.Run, error) {
	if room <= markerHeaderBytes {
		return engine.Run{}, s.badEntry(grain, entry)
	}
	grainOff := s.guestOff + grain<<s.grainShift
	return engine.Run{
		State: engine.Compressed, Len: min(n, grainOff+s.grainBytes()-off),
		File: s.file, FileOff: int64(entry) * sectorBytes,
		GranuleOff: grainOff, GranuleLen: s.grainBytes(), CompressedLen: min(s.maxStored(), room),
	}, nil
}

// inflater is what decompressing one grain needs.
type inflater struct {
	stored []byte // as it was read, with a marker
	packed []byte // of it, what is to be inflated
}

var inflaters = sync.Pool{New: func() any { return new(inflater) }}

// readCompressed is Codec.ReadCompressed for a grain of the extent.
func (s *sparse) readCompressed(run engine.Run, p []byte) error {
	in := inflaters.Get().(*inflater)
	defer inflaters.Put(in)
	err := in.load(s, run)
	if err == nil {
		err = in.inflate(p, min(s.grainBytes(), s.guestEnd-run.GranuleOff))
	}
	if err != nil {
		return fmt.Errorf("grain at guest offset %#x, sector %d of %s: %w", run.GranuleOff, run.FileOff/sectorBytes, s.f.Name(), err)
	}
	return nil
}

// load makes the stored bytes of a grain the source. Most grains fit into what they hold,
// so that much is read first.
func (in *inflater) load(s *sparse, run engine.Run) error {
	if int64(cap(in.stored)) < run.CompressedLen {
		in.stored = make([]byte, run.CompressedLen)
	}
	stored := in.stored[:run.CompressedLen]
	first := min(int64(len(stored)), s.grainBytes()+markerHeaderBytes)
	if s.header.flags&flagMarkers == 0 {
		first = int64(len(stored))
	}
	if err := readFull(s.f, stored[:first], run.FileOff); err != nil {
		return err
	}
	if s.header.flags&flagMarkers != 0 {
		size, err := s.markedLength(stored, run)
		if err != nil {
			return err
		}
		stored = stored[:markerHeaderBytes+size]
		if int64(len(stored)) > first {
			if err := readFull(s.f, stored[first:], run.FileOff+first); err != nil {
				return err
			}
		}
		stored = stored[markerHeaderBytes:]
	}
	in.packed = stored
	return nil
}

// markedLength returns how many bytes are stored after a grain's marker, which must be that
// grain's.
func (s *sparse) markedLength(marker []byte, run engine.Run) (int64, error) {
	lba, size := binary.LittleEndian.Uint64(marker), int64(binary.LittleEndian.Uint32(marker[8:]))
	if want := uint64(run.GranuleOff-s.guestOff) / sectorBytes; lba != want {
		return 0, corrupt("its marker says that it is sector %d of the guest, want %d", lba, want)
	}
	if size == 0 || size > run.CompressedLen-markerHeaderBytes {
		return 0, corrupt("its marker says that %d bytes are stored, want 1 to %d", size, run.CompressedLen-markerHeaderBytes)
	}
	return size, nil
}

// inflate fills p from the source, which must hold at least atLeast bytes and no more than
// fit; the rest of p becomes zero. Nothing is inflated beyond p, whatever the source says.
func (in *inflater) inflate(p []byte, atLeast int64) error {
	n, err := inflate.Zlib(p, in.packed)
	switch {
	case errors.Is(err, inflate.ErrLonger):
		return corrupt("inflates to more than %d bytes", len(p))
	case errors.Is(err, inflate.ErrCut), err == nil && int64(n) < atLeast:
		return corrupt("inflates to %d bytes or is cut off, want %d", n, len(p))
	case err != nil:
		return corrupt("inflate: %w", err)
	}
	clear(p[n:])
	return nil
}
