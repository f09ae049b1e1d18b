package raw

import (
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const (
	formatName  = "raw"
	sectorBytes = 512
	// maxSizeBytes is beyond what any file system holds; each has its own limit below.
	maxSizeBytes = 1 << 60
)

// Format is the raw format.
type Format struct{}

var _ formats.Format = Format{}

// Name returns "raw".
func (Format) Name() string { return formatName }

// Probe reports true: every file is a raw image, if it is nothing else.
func (Format) Probe([]byte, int64) bool { return true }

// Options says what Create accepts.
func (Format) Options() formats.Options {
	return formats.Options{
		Preallocations: []formats.Preallocation{
			formats.PreallocateOff, formats.PreallocateFalloc, formats.PreallocateFull,
		},
		MaxSizeBytes: maxSizeBytes,
		SizeMultiple: sectorBytes,
	}
}

// Measure returns the guest size: a raw image is that long, whatever holds data. How much of
// it are holes is up to the file system.
func (Format) Measure(req formats.CreateRequest, _ int64) (int64, error) {
	if req.Name == "" {
		req.Name = "measured" // it is not created
	}
	if err := checkRequest(req); err != nil {
		return 0, fmt.Errorf("raw: measure: %w", err)
	}
	return req.SizeBytes, nil
}

// Open opens a file as it is.
func (Format) Open(req formats.OpenRequest) (*engine.Layer, error) {
	f, err := req.FS.Open(req.Name, req.Mode)
	if err != nil {
		return nil, fmt.Errorf("raw: %w", err)
	}
	size, err := lockAndMeasure(f, req)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("raw: %w", err)
	}
	l := engine.NewLayer(req.Name, formatName, []vfs.File{f}, req.Mode == vfs.ReadWrite)
	l.Codec = &codec{file: f, sizeBytes: size}
	return l, nil
}

// lockAndMeasure returns the length of a file that nobody else changes from now on.
func lockAndMeasure(f vfs.File, req formats.OpenRequest) (int64, error) {
	if !req.NoLock {
		kind := vfs.LockRead
		if req.Mode == vfs.ReadWrite {
			kind = vfs.LockWrite
		}
		if err := f.Lock(kind); err != nil {
			return 0, err
		}
	}
	size, err := f.Size()
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w", req.Name, err)
	}
	return size, nil
}
