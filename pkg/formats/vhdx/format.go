package vhdx

import (
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
)

const formatName = "vhdx"

// Subformats, in qemu-img's words as far as it has them.
const (
	subformatDynamic      = "dynamic"
	subformatFixed        = "fixed"
	subformatDifferencing = "differencing"
)

// Format is Microsoft's virtual hard disk format, version 2.
type Format struct{}

var _ formats.Format = Format{}

// Name returns "vhdx".
func (Format) Name() string { return formatName }

// Probe reports whether a file starts with a VHDX file type identifier.
func (Format) Probe(head []byte, _ int64) bool {
	return len(head) >= len(fileSignature) && string(head[:len(fileSignature)]) == fileSignature
}
