package vdi

import (
	"errors"
	"fmt"
	"io"
	"math/bits"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Open opens an image. Of a differencing one, it also finds the parent.
func (Format) Open(req formats.OpenRequest) (*engine.Layer, error) {
	layer, err := open(req)
	if err != nil {
		return nil, fmt.Errorf("vdi: open %s: %w", req.Name, err)
	}
	return layer, nil
}

func open(req formats.OpenRequest) (*engine.Layer, error) {
	f, err := req.FS.Open(req.Name, req.Mode)
	if err != nil {
		return nil, err
	}
	layer, err := openFile(req, f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return layer, nil
}

func openFile(req formats.OpenRequest, f vfs.File) (*engine.Layer, error) {
	if !req.NoLock {
		kind := vfs.LockRead
		if req.Mode == vfs.ReadWrite {
			kind = vfs.LockWrite
		}
		if err := f.Lock(kind); err != nil {
			return nil, err
		}
	}
	size, err := f.Size()
	if err != nil {
		return nil, fmt.Errorf("size of %s: %w", req.Name, err)
	}
	m := &image{fileBytes: size}
	if err := readFull(f, m.h[:], 0); err != nil {
		return nil, err
	}
	if err := m.h.validate(size); err != nil {
		return nil, err
	}
	m.adoptHeader()
	layer := engine.NewLayer(req.Name, formatName, []vfs.File{f}, req.Mode == vfs.ReadWrite)
	m.layer, m.f = layer, f
	if m.h.isChild() {
		link, err := req.Link(m.findLink(req))
		if err != nil {
			return nil, err
		}
		layer.Parent = link
	}
	layer.Codec = m
	return layer, nil
}

// adoptHeader takes over what the header says about the places of blocks.
func (m *image) adoptHeader() {
	m.blockShift = uint(bits.TrailingZeros32(m.h.u32(fieldBlockSize)))
	m.stride = m.h.strideBytes()
	m.sizeBytes = m.h.guestBytes()
	m.limitIndex()
}

// limitIndex bounds what entries can name: blocks that begin in the file.
func (m *image) limitIndex() {
	m.indexLimit = min((max(m.fileBytes-m.h.dataOffset(), 0)+m.stride-1)/m.stride, m.mostBlocks())
}

// mostBlocks bounds the blocks in the file. Legal indexes are below the number of blocks,
// but for a moment while an image grows; twice that keeps bitmaps of them small in any case.
func (m *image) mostBlocks() int64 { return 2*m.h.blocks() + 1024 }

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
