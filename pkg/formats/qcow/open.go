package qcow

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/internal/aescbc"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Open opens an image.
func (Format) Open(req formats.OpenRequest) (*engine.Layer, error) {
	layer, err := open(req)
	if err != nil {
		return nil, fmt.Errorf("qcow: open %s: %w", req.Name, err)
	}
	return layer, nil
}

func open(req formats.OpenRequest) (*engine.Layer, error) {
	f, err := req.FS.Open(req.Name, req.Mode)
	if err != nil {
		return nil, err
	}
	m, err := openFile(req, f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return m.layer, nil
}

// openFile makes an image of a file, which is still the caller's when that fails.
func openFile(req formats.OpenRequest, f vfs.File) (*image, error) {
	if !req.NoLock {
		if err := f.Lock(lockKind(req.Mode)); err != nil {
			return nil, err
		}
	}
	size, err := f.Size()
	if err != nil {
		return nil, fmt.Errorf("size of %s: %w", req.Name, err)
	}
	h, err := readHeader(f, size)
	if err != nil {
		return nil, err
	}
	m := newImage(f, h, size)
	parent, err := req.Link(m.readParent(req.Name))
	if err != nil {
		return nil, err
	}
	if err := m.readL1(); err != nil {
		return nil, err
	}
	if h.cryptMethod == cryptAES {
		password, err := req.Secret.Ask(req.Name)
		if err != nil {
			return nil, err
		}
		m.cipher = aescbc.New(password)
		clear(password)
	}
	m.layer = engine.NewLayer(req.Name, formatName, []vfs.File{f}, req.Mode == vfs.ReadWrite)
	m.layer.Codec, m.layer.Parent, m.tables = m, parent, m.layer.Tables
	if m.layer.Writable {
		m.space = engine.NewSpace(f, 0, size, m.clusterBytes(), m.maxFileBytes())
		if err := m.reclaim(); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func lockKind(mode vfs.Mode) vfs.LockKind {
	if mode == vfs.ReadWrite {
		return vfs.LockWrite
	}
	return vfs.LockRead
}

// readHeader returns the header of a file, valid.
func readHeader(f vfs.File, size int64) (header, error) {
	p := make([]byte, headerBytes)
	if size < headerBytes {
		return header{}, corrupt("the file of %d bytes is shorter than a header of %d", size, headerBytes)
	}
	if err := readFull(f, p, 0); err != nil {
		return header{}, err
	}
	if binary.BigEndian.Uint32(p) != magic {
		return header{}, unsupported("it does not start with the header of a QCOW image")
	}
	if v := binary.BigEndian.Uint32(p[4:]); v != version {
		return header{}, unsupported("version %d, want %d: 2 and 3 are format qcow2", v, version)
	}
	h := decodeHeader(p)
	if err := h.validate(size); err != nil {
		return header{}, fmt.Errorf("header of %s: %w", f.Name(), err)
	}
	return h, nil
}

// readParent returns the link to the backing file, nil if there is none. The file says
// nothing about the backing file but its name.
func (m *image) readParent(name string) (*engine.ParentLink, error) {
	h := &m.header
	if !h.hasBacking() {
		return nil, nil
	}
	p := make([]byte, h.backingFileSize)
	if err := readFull(m.f, p, int64(h.backingFileOffset)); err != nil {
		return nil, fmt.Errorf("read the backing file's name: %w", err)
	}
	p, _, _ = bytes.Cut(p, []byte{0}) // as readers in C take it
	parent, err := vfs.Resolve(name, string(p))
	if err != nil {
		return nil, fmt.Errorf("backing file: %w", err)
	}
	return &engine.ParentLink{Name: parent}, nil
}

// readL1 reads the level 1 table, whose place and length validate has bounded.
func (m *image) readL1() error {
	m.l1 = make([]uint64, 0, m.header.l1Entries())
	p := make([]byte, min(chunkBytes, cap(m.l1)*entryBytes))
	for off := int64(m.header.l1TableOffset); len(m.l1) < cap(m.l1); off += int64(len(p)) {
		p = p[:min(len(p), (cap(m.l1)-len(m.l1))*entryBytes)]
		if err := readFull(m.f, p, off); err != nil {
			return fmt.Errorf("read the level 1 table: %w", err)
		}
		for entry := p; len(entry) > 0; entry = entry[entryBytes:] {
			m.l1 = append(m.l1, binary.BigEndian.Uint64(entry))
		}
	}
	m.judgeTables()
	return nil
}

// readFull reads all of p; a file that ends before is truncated.
func readFull(f vfs.File, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return corrupt("%s ends at %d, want %d bytes at %#x: it was truncated", f.Name(), off+int64(n), len(p), off)
	}
	return fmt.Errorf("read %d bytes at %#x of %s: %w", len(p), off, f.Name(), err)
}
