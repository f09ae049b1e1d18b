package vmdk

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/klauspost/compress/zlib"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// streamWriter writes a streamOptimized extent from its beginning to its end: header and
// descriptor are there; grains come in ascending order, each behind its marker; each table
// follows the last of its grains, then the directory, the footer, and the end-of-stream
// marker. There is one table in memory.
//
// A stream is complete when its footer is there. Until then nobody can open it: what a
// crash leaves of one is refused as truncated.
type streamWriter struct {
	s       *sparse
	end     int64  // file offset of whatever comes next; whole sectors
	table   int64  // number of the table whose grains are coming; -1: none yet
	entries []byte // of that table
	next    int64  // the least grain that can still come
	broken  bool   // space in the middle was given back: there is a gap
}

// isEmptyStream reports whether the image is a stream without any grain, that its creation
// or a copy of nothing but zeroes leaves: only such a stream can be written.
func (m *image) isEmptyStream() bool {
	if len(m.extents) != 1 || m.extents[0].sparse == nil {
		return false
	}
	s := m.extents[0].sparse
	for _, key := range []string{keyChangeTrack, keyFilters} {
		if value, _ := m.descriptor.lookup(key); value != "" {
			return false
		}
	}
	if !s.header.footer || s.header.flags != flagNewlineTest|flagCompressed|flagMarkers || s.header.compressAlgorithm != compressDeflate {
		return false
	}
	for _, gt := range s.gd {
		if gt != 0 {
			return false
		}
	}
	return true
}

// stream returns the writer of the image, nil if it is not a stream that is being written.
func (m *image) stream() *streamWriter {
	if len(m.extents) != 1 || m.extents[0].sparse == nil {
		return nil
	}
	return m.extents[0].sparse.stream
}

func newStreamWriter(s *sparse) *streamWriter {
	return &streamWriter{s: s, end: int64(s.dataStart) * sectorBytes, table: -1, entries: make([]byte, s.tableBytes())}
}

// begin takes the end of the empty stream away: from now on it is being written.
func (w *streamWriter) begin(c *engine.Commit) error {
	w.s.fileEnd = w.end
	w.s.meta = nil
	return c.Truncate(w.s.file, w.end)
}

// streamImage is an image that is a stream which is being written.
type streamImage struct{ *image }

var _ engine.Compressor = streamImage{}

// Compress returns a grain as streams store it: behind its marker, padded to whole
// sectors.
func (m streamImage) Compress(off int64, p []byte) ([]byte, error) {
	return m.stream().s.compress(off, p)
}

// deflateLevel gives grains that are 3 % longer than those of zlib's usual level, in less
// than half the time.
const deflateLevel = 5

// deflater is what compressing one grain needs.
type deflater struct {
	stored bytes.Buffer
	zlib   *zlib.Writer
	whole  []byte // a grain at the end of the guest, with zeroes
}

var deflaters = sync.Pool{New: func() any { return new(deflater) }}

func (s *sparse) compress(off int64, p []byte) ([]byte, error) {
	if in := (off - s.guestOff) & (s.grainBytes() - 1); in != 0 || int64(len(p)) > s.grainBytes() {
		return nil, invalid("compress %d bytes at guest offset %d: want one grain of %d", len(p), off, s.grainBytes())
	}
	d := deflaters.Get().(*deflater)
	defer deflaters.Put(d)
	if int64(len(p)) < s.grainBytes() {
		// Some readers want every grain whole.
		d.whole = append(append(d.whole[:0], p...), make([]byte, s.grainBytes()-int64(len(p)))...)
		p = d.whole
	}
	d.stored.Reset()
	d.stored.Write(make([]byte, markerHeaderBytes))
	if d.zlib == nil {
		d.zlib, _ = zlib.NewWriterLevel(&d.stored, deflateLevel) // fails for levels that do not exist only
	} else {
		d.zlib.Reset(&d.stored)
	}
	if _, err := d.zlib.Write(p); err != nil {
		return nil, fmt.Errorf("compress guest offset %d: %w", off, err)
	}
	if err := d.zlib.Close(); err != nil {
		return nil, fmt.Errorf("compress guest offset %d: %w", off, err)
	}
	n := d.stored.Len()
	stored := make([]byte, wholeSectors(int64(n)))
	copy(stored, d.stored.Bytes())
	binary.LittleEndian.PutUint64(stored, uint64(off-s.guestOff)/sectorBytes)
	binary.LittleEndian.PutUint32(stored[8:], uint32(n-markerHeaderBytes))
	return stored, nil
}

func wholeSectors(n int64) int64 { return (n + sectorBytes - 1) / sectorBytes * sectorBytes }

// AllocateCompressed reserves the next n bytes of the stream for the grain at off.
func (m streamImage) AllocateCompressed(off, n int64) (engine.Place, error) {
	w := m.stream()
	grain := w.s.grainOf(off)
	switch {
	case w.broken:
		return engine.Place{}, fmt.Errorf("%w: an earlier grain of the stream could not be written", block.ErrPoisoned)
	case grain < w.next || off-w.s.guestOff != grain<<w.s.grainShift:
		return engine.Place{}, invalid("guest offset %d in a stream: want a whole grain, at %d or later", off, w.next<<w.s.grainShift)
	case n <= markerHeaderBytes || n > w.s.maxStored():
		return engine.Place{}, invalid("a stored grain of %d bytes, want at most %d", n, w.s.maxStored())
	}
	if ti := grain >> w.s.tableShift; ti != w.table {
		if err := w.placeTable(); err != nil {
			return engine.Place{}, err
		}
		w.table = ti
	}
	n = wholeSectors(n)
	if w.end+n > maxFileSectors*sectorBytes {
		return engine.Place{}, fmt.Errorf("%w: the format's limit is %d bytes", block.ErrNoSpace, int64(maxFileSectors*sectorBytes))
	}
	place := engine.Place{Span: engine.Span{File: w.s.file, Off: w.end, Len: n}}
	w.end += n
	w.s.fileEnd = w.end
	w.next = grain + 1
	return place, nil
}

// placeTable puts the table whose grains have all come, with its marker, next into the
// stream. Entries of grains that are still on their way are written when they are Set.
func (w *streamWriter) placeTable() error {
	if w.table < 0 {
		return nil
	}
	marker := newMarker(markerGrainTable, uint64(w.s.tableBytes()/sectorBytes))
	if err := w.s.tables.Write(stageTables, w.s.file, w.end, append(marker, w.entries...)); err != nil {
		return err
	}
	w.s.gd[w.table] = uint32(w.end/sectorBytes + 1)
	w.reserveMeta(sectorBytes + w.s.tableBytes())
	clear(w.entries)
	w.table = -1
	return nil
}

// reserveMeta notes what comes next as metadata, n bytes long.
func (w *streamWriter) reserveMeta(n int64) {
	start := w.end
	w.end += n
	w.s.fileEnd = w.end
	w.s.meta = appendSpan(w.s.meta, sectorSpan{uint64(start / sectorBytes), uint64(w.end / sectorBytes)})
}

// newMarker returns a marker that is not of a grain: one sector that says what follows,
// and how many sectors of it.
func newMarker(kind uint32, sectors uint64) []byte {
	p := make([]byte, sectorBytes)
	binary.LittleEndian.PutUint64(p, sectors)
	binary.LittleEndian.PutUint32(p[12:], kind)
	return p
}

// set notes where a grain is.
func (w *streamWriter) set(off int64, to engine.State, at engine.Place) error {
	if to != engine.Compressed {
		return unsupported("a stream is written once: what is in it stays")
	}
	grain := w.s.grainOf(off)
	ti, in := grain>>w.s.tableShift, w.s.entryOff(grain)
	entry := binary.LittleEndian.AppendUint32(nil, uint32(at.Off/sectorBytes))
	if ti == w.table {
		copy(w.entries[in:], entry)
		return nil
	}
	gt, err := w.s.tableAt(ti)
	if err != nil {
		return err
	}
	return w.s.tables.Write(stageTables, w.s.file, int64(gt)*sectorBytes+in, entry)
}

// giveBack takes back a grain that was not written. At the end of the stream it can come
// again; elsewhere it leaves a gap, over which no reader gets.
func (w *streamWriter) giveBack(span engine.Span) {
	if span.Off+span.Len != w.end {
		w.broken = true
		return
	}
	w.end = span.Off
	w.s.fileEnd = w.end
	w.next--
}

// finish writes what ends the stream: the last table, the directory, and the footer, which
// says where that is.
func (w *streamWriter) finish(c *engine.Commit) error {
	if w.broken {
		return fmt.Errorf("%w: a grain of it could not be written", block.ErrPoisoned)
	}
	var tail []byte
	start := w.end
	if w.table >= 0 {
		tail = append(newMarker(markerGrainTable, uint64(w.s.tableBytes()/sectorBytes)), w.entries...)
		w.s.gd[w.table] = uint32(w.end/sectorBytes + 1)
		w.reserveMeta(int64(len(tail)))
		w.table = -1
	}
	tail = append(tail, w.s.header.streamEnd(w.s.gd, w.end)...)
	end := start + int64(len(tail))
	if end > maxFileSectors*sectorBytes {
		return fmt.Errorf("%w: the format's limit is %d bytes", block.ErrNoSpace, int64(maxFileSectors*sectorBytes))
	}
	if err := c.WriteAt(w.s.file, tail, start); err != nil {
		return err
	}
	w.end, w.s.fileEnd = end, end
	w.s.tables.Forget()
	return c.Truncate(w.s.file, end)
}

// streamEnd returns what follows the last table of a stream, at a file offset.
func (h *sparseHeader) streamEnd(gd []uint32, off int64) []byte {
	p := newMarker(markerGrainDirectory, h.gdSectors())
	for _, gt := range gd {
		p = binary.LittleEndian.AppendUint32(p, gt)
	}
	p = append(p, make([]byte, wholeSectors(int64(len(p)))-int64(len(p)))...)
	p = append(p, newMarker(markerFooter, 1)...)
	footer := *h
	footer.gdOffset = uint64(off/sectorBytes) + 1
	sector := make([]byte, sectorBytes)
	footer.encode(sector)
	p = append(p, sector...)
	return append(p, newMarker(markerEndOfStream, 0)...)
}

// fillStream writes a stream without grains.
func (c *creation) fillStream(f vfs.File) error {
	text, err := c.embeddedDescriptor()
	if err != nil {
		return err
	}
	h := c.header(c.sectors)
	start := make([]byte, int64(h.overHead)*sectorBytes)
	h.encode(start)
	copy(start[sectorBytes:], text)
	end := h.streamEnd(make([]uint32, h.grainTables()), int64(len(start)))
	_, err = f.WriteAt(append(start, end...), 0)
	return err
}
