package qcow

import (
	"encoding/binary"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
)

const (
	formatName  = "qcow"
	sectorBytes = 512
)

// Format is version 1 of QEMU's copy-on-write format.
type Format struct{}

var _ formats.Format = Format{}

// Name returns "qcow".
func (Format) Name() string { return formatName }

// Probe reports whether a file starts with the header of version 1. Later versions, which
// start with the same magic number, are another format.
func (Format) Probe(head []byte, _ int64) bool {
	return len(head) >= headerBytes && binary.BigEndian.Uint32(head) == magic && binary.BigEndian.Uint32(head[4:]) == version
}
