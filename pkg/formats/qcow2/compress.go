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

// packing is where the next compressed clusters are stored, one after the other: in the
// file's bytes [next, end), which are reserved. Host clusters from fresh on are in use by
// none yet; their refcount of 1 is for the first that is.
type packing struct {
	next, end int64
	fresh     int64
}

// packClusters is how many host clusters are reserved for compressed data at once: plain
// clusters that are written meanwhile must not come between.
const packClusters = 16

// AllocateCompressed reserves n bytes for a compressed cluster. Each host cluster they are in
// gets a reference.
func (m *image) AllocateCompressed(_, n int64) (engine.Place, error) {
	p := &m.packing
	shared, count, err := m.sharedByPacking()
	if err != nil {
		return engine.Place{}, err
	}
	if p.end-p.next < n {
		if err := m.reservePacking(n); err != nil {
			return engine.Place{}, err
		}
		shared = false
	}
	if shared {
		if err := m.setPrepared(p.next>>m.clusterBits, 1, count+1); err != nil {
			return engine.Place{}, err
		}
	}
	place := engine.Place{Span: engine.Span{Off: p.next, Len: n}}
	p.next += n
	p.fresh = max(p.fresh, m.clusters(p.next))
	return place, nil
}

// sharedByPacking reports whether the next compressed cluster begins in a host cluster with
// others, and how many those are; if it could not have one more, the next begins after it.
func (m *image) sharedByPacking() (bool, uint64, error) {
	p := &m.packing
	cluster := p.next >> m.clusterBits
	if p.next == p.end || cluster >= p.fresh {
		return false, 0, nil
	}
	count, err := m.refcount(cluster)
	if err != nil {
		return false, 0, err
	}
	if count == 0 || count == m.maxRefcount() {
		m.leavePacked(cluster)
		return false, 0, nil
	}
	return true, count, nil
}

// leavePacked has nothing more stored in a host cluster.
func (m *image) leavePacked(cluster int64) {
	if p := &m.packing; p.next != p.end && p.next>>m.clusterBits == cluster {
		p.next = min(p.fresh<<m.clusterBits, p.end)
	}
}

// reservePacking reserves space for at least n bytes of compressed data.
func (m *image) reservePacking(n int64) error {
	m.endPacking()
	got, err := m.take(packClusters, m.clusters(n))
	if err != nil {
		return err
	}
	p := packing{next: got.first << m.clusterBits, end: (got.first + got.count) << m.clusterBits, fresh: got.first}
	if p.end > 1<<m.sectorShift() {
		m.giveUp(got.first, got.count)
		return fullFormat("compressed data", 1<<m.sectorShift())
	}
	m.packing = p
	return nil
}

// endPacking gives back what was reserved and is not used.
func (m *image) endPacking() {
	p := m.packing
	m.packing = packing{}
	if end := p.end >> m.clusterBits; p.fresh < end {
		m.giveUp(p.fresh, end-p.fresh)
	}
}
