package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// Compressed clusters ("Compressed Clusters Descriptor"): a byte offset, and how many
// sectors follow the one that it is in.

// sectorShift returns the descriptor's x: the offset is in the bits below it.
func (m *image) sectorShift() uint { return 62 - (m.clusterBits - 8) }

// compressedPlace returns where a compressed cluster is stored, and in how many bytes at
// most: the descriptor can say no more than those of two clusters.
func (m *image) compressedPlace(e entry) (off, n int64) {
	x := m.sectorShift()
	off = int64(e.descriptor & (1<<x - 1))
	sectors := int64(e.descriptor & (flagCompressed - 1) >> x)
	return off, (sectors+1)*sectorBytes - off&(sectorBytes-1)
}

func (m *image) compressedRun(e entry, off, n int64) (engine.Run, error) {
	cluster := off >> m.clusterBits
	at, stored := m.compressedPlace(e)
	switch {
	case m.dataFile != 0:
		return engine.Run{}, m.badEntry(cluster, e, "compressed, in an image with an external data file")
	case e.descriptor&flagCopied != 0:
		return engine.Run{}, m.badEntry(cluster, e, "compressed, and yet marked as copied")
	case at < m.clusterBytes || at >= m.fileEnd:
		return engine.Run{}, m.badEntry(cluster, e, "compressed data outside the file")
	}
	first, last := at>>m.clusterBits, (at+stored-1)>>m.clusterBits
	if m.metadata.before(first, last-first+1) != last-first+1 {
		return engine.Run{}, m.badEntry(cluster, e, "compressed data where metadata is")
	}
	start := cluster << m.clusterBits
	return engine.Run{
		State: engine.Compressed, Len: min(n, start+m.clusterBytes-off), FileOff: at,
		GranuleOff: start, GranuleLen: m.clusterBytes, CompressedLen: stored,
	}, nil
}

// ReadCompressed inflates a cluster. Nothing is inflated beyond it, whatever is stored.
func (m *image) ReadCompressed(run engine.Run, p []byte) error {
	in := inflaters.Get().(*inflater)
	defer inflaters.Put(in)
	if int64(cap(in.stored)) < run.CompressedLen {
		in.stored = make([]byte, run.CompressedLen)
	}
	stored := in.stored[:run.CompressedLen]
	// The last sector of a file may be cut off.
	n, err := m.f.ReadAt(stored, run.FileOff)
	if n < len(stored) && err != io.EOF {
		return fmt.Errorf("read %d bytes at %#x of %s: %w", len(stored), run.FileOff, m.f.Name(), err)
	}
	in.source.Reset(stored[:n])
	if m.header.compressionType == compressionZstd {
		err = in.inflateZstd(p)
	} else {
		err = in.inflateZlib(p)
	}
	if err != nil {
		return corrupt("compressed data at %#x of %s: %w", run.FileOff, m.f.Name(), err)
	}
	return nil
}

// inflater is what decompressing one cluster needs.
type inflater struct {
	stored []byte
	source bytes.Reader
	zlib   io.ReadCloser
	zstd   *zstd.Decoder
}

var inflaters = sync.Pool{New: func() any { return new(inflater) }}

// inflateZlib inflates a deflate stream without zlib's header, as QEMU writes it.
func (in *inflater) inflateZlib(p []byte) error {
	if in.zlib == nil {
		in.zlib = flate.NewReader(&in.source)
	} else if err := in.zlib.(flate.Resetter).Reset(&in.source, nil); err != nil {
		return err
	}
	return inflate(in.zlib, p)
}

// maxZstdWindow is more than a cluster: decoders take a window that is larger than what
// they inflate.
const maxZstdWindow = 8 << 20

func (in *inflater) inflateZstd(p []byte) (err error) {
	if in.zstd == nil {
		in.zstd, err = zstd.NewReader(&in.source, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
	} else {
		err = in.zstd.Reset(&in.source)
	}
	if err != nil {
		return err
	}
	return inflate(in.zstd, p)
}

func inflate(r io.Reader, p []byte) error {
	n, err := io.ReadFull(r, p)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("inflates to %d bytes or is cut off, want %d", n, len(p))
	}
	return err
}

// deflateWindow is what QEMU tells its inflater to expect.
const deflateWindow = 4096

// deflater is what compressing one cluster needs.
type deflater struct {
	out  bytes.Buffer
	zlib *flate.Writer
}

var (
	deflaters = sync.Pool{New: func() any { return new(deflater) }}

	// zstdEncoder has no state between calls.
	zstdEncoder = sync.OnceValues(func() (*zstd.Encoder, error) {
		return zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false))
	})
)

// Compress returns a cluster as it is stored; nil if that takes as much as a cluster, or if
// it would not be one compressed cluster: in an external data file, or a subcluster.
func (m *image) Compress(_ int64, p []byte) ([]byte, error) {
	if m.dataFile != 0 || int64(len(p)) != m.clusterBytes {
		return nil, nil
	}
	var stored []byte
	if m.header.compressionType == compressionZstd {
		encoder, err := zstdEncoder()
		if err != nil {
			return nil, fmt.Errorf("qcow2: zstd: %w", err)
		}
		stored = encoder.EncodeAll(p, nil)
	} else {
		var err error
		if stored, err = deflate(p); err != nil {
			return nil, fmt.Errorf("qcow2: zlib: %w", err)
		}
	}
	if len(stored) >= len(p) {
		return nil, nil
	}
	return stored, nil
}

func deflate(p []byte) ([]byte, error) {
	d := deflaters.Get().(*deflater)
	defer deflaters.Put(d)
	d.out.Reset()
	if d.zlib == nil {
		w, err := flate.NewWriterWindow(&d.out, deflateWindow)
		if err != nil {
			return nil, err
		}
		d.zlib = w
	} else {
		d.zlib.Reset(&d.out)
	}
	if _, err := d.zlib.Write(p); err != nil {
		return nil, err
	}
	if err := d.zlib.Close(); err != nil {
		return nil, err
	}
	return bytes.Clone(d.out.Bytes()), nil
}

// packing is where the next compressed cluster may be stored: after the last one, in the
// same host cluster.
type packing struct {
	next int64 // 0: nowhere
}

// AllocateCompressed reserves n bytes for a compressed cluster: they continue where the
// last ones ended, if what is left of that host cluster, and the next one if it is free,
// are enough. Each host cluster has a reference for each compressed cluster in it.
func (m *image) AllocateCompressed(_, n int64) (engine.Place, error) {
	place, err := m.packInto(n)
	if err != nil {
		return engine.Place{}, err
	}
	if place.Len == 0 {
		got, err := m.take(m.clusters(n), m.clusters(n))
		if err != nil {
			return engine.Place{}, err
		}
		if got.first<<m.clusterBits >= 1<<m.sectorShift() {
			m.giveUp(got.first, got.count)
			return engine.Place{}, fullFormat("compressed data", 1<<m.sectorShift())
		}
		place.Off, place.Len = got.first<<m.clusterBits, n
	}
	m.packing.next = place.Off + n
	if m.packing.next&(m.clusterBytes-1) == 0 {
		m.packing.next = 0
	}
	return place, nil
}

// packInto places n bytes into the host cluster that has been begun; it returns an empty
// place if they don't fit.
func (m *image) packInto(n int64) (engine.Place, error) {
	at := m.packing.next
	if at == 0 || n > m.alignUp(at)-at {
		return engine.Place{}, nil
	}
	cluster := at >> m.clusterBits
	count, err := m.refcount(cluster)
	if err != nil {
		return engine.Place{}, err
	}
	if count == 0 || count == m.maxRefcount() {
		return engine.Place{}, nil
	}
	if err := m.setRefcounts(cluster, 1, count+1); err != nil {
		return engine.Place{}, err
	}
	return engine.Place{Span: engine.Span{Off: at, Len: n}}, nil
}
