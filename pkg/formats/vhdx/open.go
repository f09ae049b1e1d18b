package vhdx

import (
	"errors"
	"fmt"
	"io"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Open opens a dynamic, fixed or differencing image. A log that is not empty is replayed
// in memory; the file changes with the first change of the image.
func (Format) Open(req formats.OpenRequest) (*engine.Layer, error) {
	layer, err := open(req)
	if err != nil {
		return nil, fmt.Errorf("vhdx: open %s: %w", req.Name, err)
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
	if err := lock(f, req); err != nil {
		return nil, err
	}
	file := &replayedFile{File: f}
	m, err := readImage(file)
	if err != nil {
		return nil, err
	}
	layer := engine.NewLayer(req.Name, formatName, []vfs.File{file}, req.Mode == vfs.ReadWrite)
	m.layer, m.tables = layer, layer.Tables
	if layer.Parent, err = req.Link(m.parentLink(req.Name)); err != nil {
		return nil, err
	}
	layer.Codec = m
	return layer, nil
}

func lock(f vfs.File, req formats.OpenRequest) error {
	switch {
	case req.NoLock:
		return nil
	case req.Mode == vfs.ReadWrite:
		return f.Lock(vfs.LockWrite)
	}
	return f.Lock(vfs.LockRead)
}

// readImage reads everything but the block allocation table.
func readImage(file *replayedFile) (*image, error) {
	m := &image{file: file}
	signature := make([]byte, len(fileSignature))
	if err := readFull(file, signature, 0); err != nil {
		return nil, err
	}
	if string(signature) != fileSignature {
		return nil, unsupported("not a VHDX file: wrong file type identifier")
	}
	var err error
	if m.headers, err = readHeaders(file); err != nil {
		return nil, err
	}
	m.header = *m.headers.now()
	if err := m.readLog(); err != nil {
		return nil, err
	}
	if m.fileEnd, err = file.Size(); err != nil {
		return nil, fmt.Errorf("size of %s: %w", file.Name(), err)
	}
	if m.regions, _, err = readRegions(file); err != nil {
		return nil, err
	}
	if m.reserved, err = validateRegions(m.regions, &m.header, m.fileEnd); err != nil {
		return nil, err
	}
	if m.meta, err = readMetadata(file, m.regions[findRegion(m.regions, metadataRegion)]); err != nil {
		return nil, err
	}
	m.adoptShape()
	bat := &m.regions[findRegion(m.regions, batRegion)]
	if need := m.entryCount(m.meta.sizeBytes) * batEntryBytes; need > int64(bat.length) {
		return nil, corrupt("the BAT has %d bytes, want %d for a disk of %d bytes in blocks of %d", bat.length, need, m.meta.sizeBytes, m.meta.blockBytes)
	}
	return m, nil
}

// readLog has the file show what the log says that it has to become.
func (m *image) readLog() error {
	h := &m.header
	if h.log == (guid{}) {
		return nil
	}
	if err := h.checkLogLength(); err != nil {
		return err
	}
	size, err := m.file.Size()
	if err != nil {
		return fmt.Errorf("size of %s: %w", m.file.Name(), err)
	}
	if int64(h.logOffset)+int64(h.logLength) > size {
		return corrupt("the log ends at %#x, past the end of the file, %#x: it was truncated", int64(h.logOffset)+int64(h.logLength), size)
	}
	log := make(ring, h.logLength)
	if err := readFull(m.file, log, int64(h.logOffset)); err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	entries := log.active(h.log)
	if len(entries) == 0 {
		// The specification calls that corrupt, but QEMU leaves it when it is stopped
		// before its first entry is complete. Nothing was changed then.
		m.torn = true
		return nil
	}
	m.sequence = last(entries).sequence
	r, err := newReplay(entries, h, size)
	if err != nil {
		return fmt.Errorf("replay the log: %w", err)
	}
	isDone, err := r.dropDone(m.file, size)
	if err != nil {
		return fmt.Errorf("replay the log: %w", err)
	}
	if !isDone {
		m.file.pending.Store(r)
	}
	return nil
}

// maxFileBytes bounds the map of a file's space: 32 MiB of memory.
const maxFileBytes = 256 << 40

// makeSpace finds out which space of the file is free, before the first change. An image
// whose table is damaged is not changed.
func (m *image) makeSpace() error {
	if m.space != nil {
		return nil
	}
	if m.fileEnd > maxFileBytes {
		return unsupported("a file of %d bytes, want at most %d to write to", m.fileEnd, int64(maxFileBytes))
	}
	used, err := m.scan()
	if err != nil {
		return err
	}
	if used.damage != nil {
		return fmt.Errorf("the image is only read: %w", used.damage)
	}
	m.space = engine.NewSpace(m.file, 0, max(m.fileEnd, used.end), mib, 0)
	asked := 0
	used.eachFree(func(s span) {
		isHole := false
		if asked++; asked <= maxHolesAsked {
			start, _, err := m.file.NextData(s.off)
			isHole = err == io.EOF || err == nil && start >= s.end
		}
		m.space.Free(s.off, s.end-s.off, isHole)
	})
	return nil
}

// maxHolesAsked is for how many stretches of free space the file system is asked whether
// they are holes, which need no zeroing when they are used.
const maxHolesAsked = 4096

// isCorrupt reports whether an error says that the image is damaged, rather than that it
// could not be read.
func isCorrupt(err error) bool { return errors.Is(err, block.ErrCorrupt) }
