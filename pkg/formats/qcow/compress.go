package qcow

import (
	"bytes"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// windowBytes is how far back compressed data may refer: readers need not remember more.
const windowBytes = 4 << 10

// inflater is what decompressing one cluster needs.
type inflater struct {
	stored []byte
	source bytes.Reader
	flate  io.ReadCloser
}

var inflaters = sync.Pool{New: func() any {
	in := new(inflater)
	in.flate = flate.NewReader(&in.source)
	return in
}}

// ReadCompressed inflates a cluster. Compressed clusters are never encrypted.
func (m *image) ReadCompressed(run engine.Run, p []byte) error {
	in := inflaters.Get().(*inflater)
	defer inflaters.Put(in)
	if int64(cap(in.stored)) < run.CompressedLen {
		in.stored = make([]byte, m.clusterBytes())
	}
	stored := in.stored[:run.CompressedLen]
	err := readFull(m.f, stored, run.FileOff)
	if err == nil {
		err = in.inflate(p, stored, min(int64(len(p)), m.sizeBytes-run.GranuleOff))
	}
	if err != nil {
		return fmt.Errorf("cluster at guest offset %#x, stored at %#x of %s: %w", run.GranuleOff, run.FileOff, m.f.Name(), err)
	}
	return nil
}

// inflate fills p from stored, which must hold at least atLeast bytes; the rest of p becomes
// zero. Nothing is inflated beyond p, whatever more there is.
func (in *inflater) inflate(p, stored []byte, atLeast int64) error {
	in.source.Reset(stored)
	if err := in.flate.(flate.Resetter).Reset(&in.source, nil); err != nil {
		return corrupt("inflate: %w", err)
	}
	n, err := io.ReadFull(in.flate, p)
	if err == nil || int64(n) >= atLeast {
		clear(p[n:])
		return nil
	}
	return corrupt("inflates to %d bytes, want %d: %w", n, len(p), err)
}

// deflater is what compressing one cluster needs.
type deflater struct {
	out   bytes.Buffer
	flate *flate.Writer
}

var deflaters = sync.Pool{New: func() any {
	d := new(deflater)
	d.flate, _ = flate.NewWriterWindow(&d.out, windowBytes) // the size is a valid one
	return d
}}

// Compress deflates a cluster. In an encrypted image nothing is compressed: the format
// stores compressed clusters in the clear.
func (m *image) Compress(_ int64, p []byte) ([]byte, error) {
	if m.cipher != nil {
		return nil, nil
	}
	d := deflaters.Get().(*deflater)
	defer deflaters.Put(d)
	if err := d.deflate(p); err != nil {
		return nil, fmt.Errorf("qcow: deflate: %w", err)
	}
	if int64(d.out.Len()) >= m.clusterBytes() {
		return nil, nil // its length could not even be said
	}
	return bytes.Clone(d.out.Bytes()), nil
}

func (d *deflater) deflate(p []byte) error {
	d.out.Reset()
	d.flate.Reset(&d.out)
	if _, err := d.flate.Write(p); err != nil {
		return err
	}
	return d.flate.Close()
}

// AllocateCompressed reserves n bytes, fewer than a cluster: compressed clusters lie side by
// side, wherever that is.
func (m *image) AllocateCompressed(_, n int64) (engine.Place, error) {
	if n <= 0 || n >= m.clusterBytes() {
		return engine.Place{}, invalid("compressed cluster of %d bytes, want 1 to %d", n, m.clusterBytes()-1)
	}
	s, ok := m.scraps.take(n)
	if !ok {
		if err := m.extendPacking(n); err != nil {
			return engine.Place{}, err
		}
		s = span{m.packing.start, m.packing.start + n}
		m.packing.start = s.end
	}
	m.fileEnd = max(m.fileEnd, s.end)
	return engine.Place{Span: engine.Span{Off: s.start, Len: n}}, nil
}

// extendPacking makes sure that n bytes can be taken from packing.
func (m *image) extendPacking(n int64) error {
	if m.packing.end-m.packing.start >= n {
		return nil
	}
	place, err := m.space.Alloc(m.clusterBytes(), m.clusterBytes())
	if err != nil {
		return err
	}
	if place.Off+place.Len > m.maxFileBytes() {
		m.space.Free(place.Off, place.Len, place.Zeroed)
		return fmt.Errorf("%w: compressed clusters end at %#x", block.ErrNoSpace, m.maxFileBytes())
	}
	if place.Off == m.packing.end {
		m.packing.end += place.Len
		return nil
	}
	if m.packing.start < m.packing.end {
		m.scraps.add(m.packing, m.clusterBytes())
	}
	m.packing = span{place.Off, place.Off + place.Len}
	return nil
}
