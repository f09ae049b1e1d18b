package vhd

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
		return nil, fmt.Errorf("vpc: open %s: %w", req.Name, err)
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
	e, err := readEnds(f)
	if err != nil {
		return nil, err
	}
	m := &image{f: f, fileBytes: e.fileBytes, footer: e.footer, lost: e.lost}
	if err := m.footer.validateSize(); err != nil {
		return nil, err
	}
	m.sizeBytes = m.footer.guestBytes()
	m.layer = engine.NewLayer(req.Name, formatName, []vfs.File{f}, req.Mode == vfs.ReadWrite)
	m.layer.Codec = m
	if m.fixed() {
		m.footerOff = e.footerOff
		if m.sizeBytes > m.footerOff {
			return nil, corrupt("size %d, but only %d bytes before the footer: it was truncated", m.sizeBytes, m.footerOff)
		}
		return m.layer, m.endWithFooter(req)
	}
	if err := m.readHeader(); err != nil {
		return nil, err
	}
	if m.footer.kind() == kindDifferencing {
		link, err := req.Link(m.findLink(req, f))
		if err != nil {
			return nil, err
		}
		m.layer.Parent = link
	}
	return m.layer, nil
}

// endWithFooter cuts off the zeroes that a crash has left behind a fixed image's footer:
// other programs do not open it before. An image opened for reading is left as it is.
func (m *image) endWithFooter(req formats.OpenRequest) error {
	end := m.footerOff + footerBytes
	if !m.lost.tail || req.Mode == vfs.ReadOnly || req.NoLock {
		return nil
	}
	if err := m.f.Truncate(end); err != nil {
		return fmt.Errorf("cut %s to %d bytes, where its footer ends: %w", req.Name, end, err)
	}
	if err := m.f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", req.Name, err)
	}
	m.fileBytes, m.lost = end, lostFooter{}
	return nil
}

// lostFooter says which copies of the footer are missing, damaged or different.
type lostFooter struct{ head, tail bool }

// ends is what the footers at both ends of a file say.
type ends struct {
	fileBytes int64
	footer    footer // the one that counts
	footerOff int64  // of a fixed image: where it is
	lost      lostFooter
}

// readEnds decides which footer counts. Fixed images have only one, at the end; a guest
// can write what looks like a footer at the start of those. In all others the copy at the
// start never moves, and is what QEMU goes by.
func readEnds(f vfs.File) (ends, error) {
	size, err := f.Size()
	if err != nil {
		return ends{}, fmt.Errorf("size of %s: %w", f.Name(), err)
	}
	e := ends{fileBytes: size}
	if size < footerBytes {
		return e, corrupt("%s has %d bytes, want at least a footer of %d", f.Name(), size, footerBytes)
	}
	e.footerOff = size - footerBytes
	if size%sectorBytes == sectorBytes-1 {
		e.footerOff++ // a footer of 511 bytes
	}
	head, inHead, err := readFooter(f, 0)
	if err != nil {
		return e, err
	}
	tail, inTail, err := readFooter(f, e.footerOff)
	if err != nil {
		return e, err
	}
	switch {
	case inTail && tail.kind() == kindFixed:
		e.footer = tail
		return e, nil
	case inHead && head.kind() != kindFixed:
		e.footer, e.lost.tail = head, head != tail
	case inTail:
		e.footer, e.lost.head = tail, true
	default:
		return e, e.findLost(f)
	}
	if kind := e.footer.kind(); kind != kindDynamic && kind != kindDifferencing {
		return e, unsupported("disk type %d, want 2 (fixed), 3 (dynamic) or 4 (differencing)", kind)
	}
	return e, nil
}

func readFooter(f vfs.File, off int64) (footer, bool, error) {
	p := make([]byte, footerBytes)
	n, err := f.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return footer{}, false, fmt.Errorf("read footer at %#x of %s: %w", off, f.Name(), err)
	}
	found, ok := parseFooter(p[:n])
	return found, ok, nil
}

// maxSearchBytes bounds how much of a file is read to find a footer, if its file system
// cannot say where data ends.
const maxSearchBytes = 1 << 30

// findLost finds the footer of a fixed image that was being enlarged when power failed:
// the file may be longer by zeroes then, and its last other bytes are the old footer.
func (e *ends) findLost(f vfs.File) error {
	none := corrupt("%s has no footer with a valid checksum, neither at its end nor at its start", f.Name())
	end, err := dataEnd(f, e.fileBytes)
	if err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	for searched := int64(0); end > 0 && searched < maxSearchBytes; searched += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), end)]
		if err := readFull(f, p, end-int64(len(p))); err != nil {
			return err
		}
		for i := len(p) - 1; i >= 0; i-- {
			if p[i] == 0 {
				continue
			}
			e.footerOff = (end - int64(len(p)) + int64(i)) / sectorBytes * sectorBytes
			var ok bool
			if e.footer, ok, err = readFooter(f, e.footerOff); err != nil {
				return err
			}
			if !ok || e.footer.kind() != kindFixed || e.footer.u64(footerCurrentSize) > uint64(e.footerOff) {
				return none
			}
			e.lost.tail = true
			return nil
		}
		end -= int64(len(p))
	}
	return none
}

// dataEnd returns an offset past which the file system knows of no data, as low as it
// knows.
func dataEnd(f vfs.File, size int64) (int64, error) {
	low, high := int64(0), size // no data at or past high
	for high-low > sectorBytes {
		middle := low + (high-low)/2
		_, _, err := f.NextData(middle)
		switch {
		case errors.Is(err, io.EOF):
			high = middle
		case err != nil:
			return 0, fmt.Errorf("find data at %#x of %s: %w", middle, f.Name(), err)
		default:
			low = middle
		}
	}
	return high, nil
}

// readHeader reads the header of a dynamic or differencing image.
func (m *image) readHeader() error {
	at := m.footer.dataOffset()
	if at < footerBytes || at%sectorBytes != 0 || at > uint64(m.fileBytes) {
		return corrupt("dynamic disk header at %#x, want a multiple of %d in the file of %d bytes", at, sectorBytes, m.fileBytes)
	}
	if err := readFull(m.f, m.header[:], int64(at)); err != nil {
		return fmt.Errorf("read dynamic disk header: %w", err)
	}
	if err := m.header.validate(m.fileBytes, m.sizeBytes); err != nil {
		return err
	}
	m.adoptHeader()
	return nil
}

// adoptHeader takes over what footer and header say about the places of blocks.
func (m *image) adoptHeader() {
	h := &m.header
	m.blockShift = uint(bits.TrailingZeros64(uint64(h.blockBytes())))
	m.bitmapBytes = h.bitmapBytes()
	at := int64(m.footer.dataOffset())
	m.meta = []span{{0, footerBytes}, {at, at + headerBytes}, {h.tableOffset(), h.tableOffset() + h.entries()*entryBytes}}
	for _, l := range h.locators() {
		if l.off > 0 && l.off < m.fileBytes && l.length > 0 && l.length <= maxLocatorTextBytes {
			m.meta = append(m.meta, span{l.off, l.off + l.length})
		}
	}
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
