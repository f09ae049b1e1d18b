// Package all names every format: programs that open images call Register first.
package all

import (
	"sync"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/qcow"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/qcow2"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/raw"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vdi"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vhd"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vhdx"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vmdk"
)

// Register registers all formats, in the order in which they are probed: raw last,
// because every file is a raw image. Only its first call does anything.
func Register() { register() }

var register = sync.OnceFunc(func() {
	formats.Register(vmdk.Format{}, vdi.Format{}, vhd.Format{}, vhdx.Format{}, qcow.Format{}, qcow2.Format{}, raw.Format{})
})
