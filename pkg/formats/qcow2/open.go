package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Open opens an image, and its external data file if it has one.
func (Format) Open(req formats.OpenRequest) (*engine.Layer, error) {
	o := &opener{req: req}
	layer, err := o.open()
	if err != nil {
		for _, f := range o.files {
			err = errors.Join(err, f.Close())
		}
		return nil, fmt.Errorf("qcow2: open %s: %w", req.Name, err)
	}
	return layer, nil
}

// opener opens one image; what it has opened so far is in files.
type opener struct {
	req   formats.OpenRequest
	files []vfs.File
}

func (o *opener) open() (*engine.Layer, error) {
	f, size, err := o.openFile(o.req.Name)
	if err != nil {
		return nil, err
	}
	h, err := readHeader(f, size)
	if err != nil {
		return nil, err
	}
	m := newImage(f, h, size)
	m.fs = o.req.FS
	if h.hasDataFile() {
		if err := o.openDataFile(h); err != nil {
			return nil, fmt.Errorf("external data file: %w", err)
		}
		m.dataFile = 1
	}
	parent, err := o.req.Link(parentLink(o.req.Name, h))
	if err != nil {
		return nil, err
	}
	if err := m.readTables(size); err != nil {
		return nil, err
	}
	layer := engine.NewLayer(o.req.Name, formatName, o.files, o.req.Mode == vfs.ReadWrite)
	layer.Codec, layer.Parent = m, parent
	m.layer, m.tables = layer, layer.Tables
	return layer, nil
}

// openFile opens and locks a file of the image.
func (o *opener) openFile(name string) (vfs.File, int64, error) {
	f, err := o.req.FS.Open(name, o.req.Mode)
	if err != nil {
		return nil, 0, err
	}
	o.files = append(o.files, f)
	if !o.req.NoLock {
		kind := vfs.LockRead
		if o.req.Mode == vfs.ReadWrite {
			kind = vfs.LockWrite
		}
		if err := f.Lock(kind); err != nil {
			return nil, 0, err
		}
	}
	size, err := f.Size()
	if err != nil {
		return nil, 0, fmt.Errorf("size of %s: %w", name, err)
	}
	return f, size, nil
}

// openDataFile opens the file that holds the guest clusters ("Incompatible features", bit 2).
func (o *opener) openDataFile(h *header) error {
	name, ok := h.extension(extDataFile)
	if !ok || len(name) == 0 || len(name) > maxDataFileName {
		return unsupported("its name has %d bytes, want 1 to %d in the image", len(name), maxDataFileName)
	}
	resolved, err := vfs.Resolve(o.req.Name, string(name))
	if err != nil {
		return err
	}
	if resolved == o.req.Name {
		return corrupt("%s is its own external data file", resolved)
	}
	_, _, err = o.openFile(resolved)
	return err
}

// newImage returns an image whose header is valid; tables are not read yet.
func newImage(f vfs.File, h *header, fileBytes int64) *image {
	m := &image{
		f: f, header: h,
		clusterBits: uint(h.clusterBits), clusterBytes: h.clusterBytes(),
		l2Bits: h.l2Bits(), entryShift: 3, subBits: uint(h.clusterBits),
		extended: h.extended(), sizeBytes: int64(h.size),
		blockBits: uint(h.clusterBits) + 3 - uint(h.refcountOrder),
		lowering:  map[int64]uint32{}, lent: map[int64]*loan{},
	}
	if m.extended {
		m.entryShift = 4
		m.subBits -= subclusterBits
	}
	m.fileEnd = m.alignUp(fileBytes)
	if _, ok := h.extension(extIdentity); !ok {
		m.noIdentity = newIdentity()
	}
	return m
}

// readTables reads what has to be in memory to find guest data. The refcounts are read
// when they are needed.
func (m *image) readTables(fileBytes int64) (err error) {
	h := m.header
	m.metadata.add(0)
	m.metadata.addRange(int64(h.l1TableOffset)>>m.clusterBits, m.clusters(int64(h.l1Size)*8))
	m.metadata.addRange(int64(h.refcountTableOffset)>>m.clusterBits, int64(h.refcountTableClusters))
	if m.tablesOverlap() {
		return corrupt("the L1 table at %#x overlaps the refcount table at %#x", h.l1TableOffset, h.refcountTableOffset)
	}
	if m.snapshots, err = m.readSnapshots(fileBytes); err != nil {
		return err
	}
	if m.bitmaps, err = m.readBitmaps(fileBytes); err != nil {
		m.bitmapsBroken = err
	}
	if m.l1, err = m.readEntries(int64(h.l1TableOffset), int64(h.l1Size)); err != nil {
		return fmt.Errorf("read the L1 table: %w", err)
	}
	m.judgeL1()
	return nil
}

func (m *image) tablesOverlap() bool {
	h := m.header
	l1, l1End := int64(h.l1TableOffset), int64(h.l1TableOffset)+int64(h.l1Size)*8
	ref, refEnd := int64(h.refcountTableOffset), int64(h.refcountTableOffset)+int64(h.refcountTableClusters)<<m.clusterBits
	return l1 < refEnd && ref < l1End
}

// readEntries reads a table of 8-byte entries, whose place has been checked.
func (m *image) readEntries(off, n int64) ([]uint64, error) {
	const chunk = 1 << 20
	entries := make([]uint64, 0, n)
	buf := make([]byte, min(n*8, chunk))
	for left := n * 8; left > 0; {
		p := buf[:min(left, chunk)]
		if err := readFull(m.f, p, off); err != nil {
			return nil, err
		}
		for i := 0; i < len(p); i += 8 {
			entries = append(entries, binary.BigEndian.Uint64(p[i:]))
		}
		off, left = off+int64(len(p)), left-int64(len(p))
	}
	return entries, nil
}

// judgeL1 puts badTable in place of L1 entries whose table lies outside the file, in other
// metadata, or where another's is. The image still opens: what the others hold is good,
// and a check can say more.
func (m *image) judgeL1() {
	for i, e := range m.l1 {
		off := int64(e & offsetMask)
		switch {
		case off == 0:
			m.l1[i] = 0
		case off&(m.clusterBytes-1) != 0 || off >= m.fileEnd || !m.metadata.add(off>>m.clusterBits):
			m.l1[i] = badTable
		}
	}
}
