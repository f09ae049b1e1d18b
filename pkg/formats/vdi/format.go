package vdi

import (
	"encoding/binary"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
)

const formatName = "vdi"

// Subformats, in QEMU's words.
const (
	subDynamic = "dynamic"
	subStatic  = "static"
)

// Format is VirtualBox's disk image format.
type Format struct{}

var _ formats.Format = Format{}

// Name returns "vdi".
func (Format) Name() string { return formatName }

// Probe reports whether a file starts like a VDI.
func (Format) Probe(head []byte, _ int64) bool {
	return len(head) >= headerBytes && binary.LittleEndian.Uint32(head[fieldSignature:]) == signature
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
