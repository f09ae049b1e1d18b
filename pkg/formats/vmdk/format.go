package vmdk

import (
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
)

const formatName = "vmdk"

// Values of createType that are written or read.
const (
	typeMonolithicSparse = "monolithicSparse"
	typeMonolithicFlat   = "monolithicFlat"
	typeStreamOptimized  = "streamOptimized"
	typeSplitSparse      = "twoGbMaxExtentSparse"
	typeSplitFlat        = "twoGbMaxExtentFlat"
	typeVMFS             = "vmfs"
	typeVMFSSparse       = "vmfsSparse"
	typeSESparse         = "seSparse"
)

// Format is VMware's virtual disk format.
type Format struct{}

var _ formats.Format = Format{}

// Name returns "vmdk".
func (Format) Name() string { return formatName }

// Probe reports whether a file starts like a sparse extent, of whatever kind, or like a
// descriptor.
func (Format) Probe(head []byte, _ int64) bool {
	return isHeader(head) || isCOWD(head) || foreignExtent(head) != "" || looksLikeDescriptor(head)
}
