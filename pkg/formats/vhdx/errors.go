package vhdx

import (
	"errors"
	"fmt"
	"io"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", block.ErrCorrupt, fmt.Sprintf(format, args...))
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: %s", block.ErrUnsupported, fmt.Sprintf(format, args...))
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %s", block.ErrInvalid, fmt.Sprintf(format, args...))
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

// readPadded reads all of p; past the end of the file are zeroes.
func readPadded(f vfs.File, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) || err == io.EOF {
		clear(p[n:])
		return nil
	}
	return fmt.Errorf("read %d bytes at %#x of %s: %w", len(p), off, f.Name(), err)
}

func alignUp(n, align int64) int64 { return (n + align - 1) / align * align }
