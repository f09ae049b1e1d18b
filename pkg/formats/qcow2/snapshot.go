package qcow2

import (
	"encoding/binary"
	"fmt"
)

// snapshot is an entry of the snapshot table ("Snapshots").
type snapshot struct {
	l1Offset    int64
	l1Size      int64 // entries
	id, name    string
	dateSec     uint32
	dateNsec    uint32
	vmClockNsec uint64
	vmStateSize uint64
	diskSize    uint64 // 0 if the table does not say
	icount      uint64 // noIcount if the table does not say
}

const (
	snapshotFixedBytes = 40
	noIcount           = 1<<64 - 1

	// Limits. QEMU has the first two, too.
	maxSnapshots          = 65536
	maxSnapshotTableBytes = 64 << 20
	maxSnapshotExtra      = 1024
	maxSnapshotName       = 4096
	// maxSnapshotL1Bytes bounds the L1 tables of all snapshots together.
	maxSnapshotL1Bytes = 1 << 30
)

// readSnapshots reads the snapshot table, whose clusters and whose L1 tables' clusters are
// metadata. A table that cannot be understood makes the image unusable: who overwrote
// shared clusters would not know.
func (m *image) readSnapshots(fileBytes int64) ([]snapshot, error) {
	h := m.header
	if h.nbSnapshots == 0 {
		return nil, nil
	}
	if h.nbSnapshots > maxSnapshots {
		return nil, unsupported("nb_snapshots is %d, want at most %d", h.nbSnapshots, maxSnapshots)
	}
	if err := h.checkTable("the snapshot table", h.snapshotsOffset, int64(h.nbSnapshots)*snapshotFixedBytes, fileBytes); err != nil {
		return nil, err
	}
	r := &tableReader{image: m, off: int64(h.snapshotsOffset), end: min(fileBytes, int64(h.snapshotsOffset)+maxSnapshotTableBytes)}
	var all []snapshot
	var l1Bytes int64
	for i := range h.nbSnapshots {
		s, err := r.snapshot()
		if err == nil {
			err = h.checkTable("its L1 table", uint64(s.l1Offset), s.l1Size*8, fileBytes)
		}
		if l1Bytes += s.l1Size * 8; err == nil && (s.l1Size*8 > maxL1Bytes || l1Bytes > maxSnapshotL1Bytes) {
			err = unsupported("its L1 table has %d entries, want at most %d, and %d bytes in all snapshots", s.l1Size, maxL1Bytes/8, maxSnapshotL1Bytes)
		}
		if err != nil {
			return nil, fmt.Errorf("snapshot %d of %d: %w", i+1, h.nbSnapshots, err)
		}
		m.metadata.addRange(s.l1Offset>>m.clusterBits, m.clusters(s.l1Size*8))
		all = append(all, s)
	}
	m.metadata.addRange(int64(h.snapshotsOffset)>>m.clusterBits, m.clusters(r.off-int64(h.snapshotsOffset)))
	m.snapshotBytes = r.off - int64(h.snapshotsOffset)
	return all, nil
}

// tableReader reads a table of entries of variable length.
type tableReader struct {
	image    *image
	off, end int64
	buf      []byte // the file's bytes from off on
}

// next returns the next n bytes.
func (r *tableReader) next(n int64) ([]byte, error) {
	if n > r.end-r.off {
		return nil, corrupt("%d bytes at %#x, but the table can only reach to %#x", n, r.off, r.end)
	}
	if int64(len(r.buf)) < n {
		const ahead = 64 << 10
		r.buf = make([]byte, min(max(n, ahead), r.end-r.off))
		if err := readFull(r.image.f, r.buf, r.off); err != nil {
			return nil, err
		}
	}
	p := r.buf[:n]
	r.off, r.buf = r.off+n, r.buf[n:]
	return p, nil
}

// snapshot reads the next entry of the snapshot table.
func (r *tableReader) snapshot() (s snapshot, err error) {
	be := binary.BigEndian
	p, err := r.next(snapshotFixedBytes)
	if err != nil {
		return s, err
	}
	s = snapshot{
		l1Offset: int64(be.Uint64(p)), l1Size: int64(be.Uint32(p[8:])), dateSec: be.Uint32(p[16:]), dateNsec: be.Uint32(p[20:]),
		vmClockNsec: be.Uint64(p[24:]), vmStateSize: uint64(be.Uint32(p[32:])), icount: noIcount,
	}
	idLen, nameLen, extraLen := int64(be.Uint16(p[12:])), int64(be.Uint16(p[14:])), int64(be.Uint32(p[36:]))
	if extraLen > maxSnapshotExtra || idLen > maxSnapshotName || nameLen > maxSnapshotName {
		return s, unsupported("an id of %d bytes, a name of %d and %d more, want at most %d, %d and %d",
			idLen, nameLen, extraLen, maxSnapshotName, maxSnapshotName, maxSnapshotExtra)
	}
	length := extraLen + idLen + nameLen
	padding := (8 - (snapshotFixedBytes+length)%8) % 8
	if p, err = r.next(min(length+padding, r.end-r.off)); err != nil {
		return s, err
	}
	if int64(len(p)) < length {
		return s, corrupt("its entry reaches past the end of the table at %#x", r.end)
	}
	for _, f := range []struct {
		at int
		to *uint64
	}{{0, &s.vmStateSize}, {8, &s.diskSize}, {16, &s.icount}} {
		if int64(f.at+8) <= extraLen {
			*f.to = be.Uint64(p[f.at:])
		}
	}
	s.id = string(p[extraLen : extraLen+idLen])
	s.name = string(p[extraLen+idLen : length])
	return s, nil
}
