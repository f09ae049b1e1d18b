package vhd

import (
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
)

// formatName is what qemu-img calls the format.
const formatName = "vpc"

// Subformats, in QEMU's words.
const (
	subDynamic = "dynamic"
	subFixed   = "fixed"
)

// Format is Microsoft's Virtual Hard Disk format.
type Format struct{}

var _ formats.TailProber = Format{}

// Name returns "vpc".
func (Format) Name() string { return formatName }

// Probe reports whether a file starts with the copy of the footer that all but fixed
// images have.
func (Format) Probe(head []byte, _ int64) bool {
	f, ok := parseFooter(head)
	return ok && f.kind() != kindFixed
}

// ProbeTail reports whether a file ends with a fixed image's footer, which must say how
// long the file is.
func (Format) ProbeTail(tail []byte, size int64) bool {
	f, ok := parseFooter(tail)
	return ok && f.kind() == kindFixed && f.dataOffset() == noOffset && f.u64(footerCurrentSize) == uint64(size-footerBytes)
}

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{block.ErrCorrupt}, args...)...)
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{block.ErrUnsupported}, args...)...)
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{block.ErrInvalid}, args...)...)
}
