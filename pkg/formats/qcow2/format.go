package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
)

const (
	formatName  = "qcow2"
	sectorBytes = 512
)

// Format is QEMU's QCOW2, versions 2 and 3.
type Format struct{}

var _ formats.Format = Format{}

// Name returns "qcow2".
func (Format) Name() string { return formatName }

// Probe reports whether a file starts with the magic and version of QCOW2: version 1 is
// another format.
func (Format) Probe(head []byte, _ int64) bool {
	return len(head) >= 8 && string(head[:4]) == magic && binary.BigEndian.Uint32(head[4:]) >= 2
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %s", block.ErrInvalid, fmt.Sprintf(format, args...))
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: %s", block.ErrUnsupported, fmt.Sprintf(format, args...))
}

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %w", block.ErrCorrupt, fmt.Errorf(format, args...))
}

// shorten makes a string from an image fit into an error.
func shorten(s string) string {
	const most = 64
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}
