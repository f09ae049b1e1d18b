package vhdx_test

import (
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/formattest"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vhdx"
)

func TestMain(m *testing.M) {
	formats.Register(vhdx.Format{})
	m.Run()
}

// diskBytes is the size of the disks under test: few blocks, the smallest of which have
// 1 MiB, and a part of one.
const diskBytes = 5<<20 + 5*512

// factories are the kinds of images that Create makes. QEMU reads no differencing ones, and
// of 4096-byte sectors only every eighth.
func factories() []formattest.Factory {
	return []formattest.Factory{
		{
			Name: "dynamic", Format: vhdx.Format{}, Reseal: reseal, QEMU: "vhdx", BeforeOracle: formattest.ReplayLog("vhdx"),
			SizeBytes: diskBytes, Cost: 20, CanShrink: true, CanRebase: true,
			Create: formats.CreateRequest{ClusterBytes: 1 << 20},
		},
		{
			Name: "differencing", Format: vhdx.Format{}, Reseal: reseal,
			SizeBytes: diskBytes, Cost: 40, CanShrink: true, CanRebase: true, GranuleBytes: 512,
			Create:  formats.CreateRequest{ClusterBytes: 1 << 20},
			Overlay: &formats.CreateRequest{ClusterBytes: 1 << 20},
		},
		{
			Name: "sectors-of-4096", Format: fourK{}, Reseal: reseal,
			SizeBytes: 5<<20 + 3*4096, Cost: 60, CanShrink: true, CanRebase: true, GranuleBytes: 4096,
			Create:  formats.CreateRequest{ClusterBytes: 1 << 20, Extra: map[string]string{"logical_sector_size": "4096"}},
			Overlay: &formats.CreateRequest{ClusterBytes: 2 << 20},
		},
		{
			Name: "fixed", Format: vhdx.Format{}, Reseal: reseal, QEMU: "vhdx", BeforeOracle: formattest.ReplayLog("vhdx"),
			SizeBytes: diskBytes, Cost: 40, CanShrink: true, CanRebase: true,
			Create: formats.CreateRequest{Subformat: "fixed", ClusterBytes: 1 << 20},
		},
		{
			Name: "on-a-shorter-parent", Format: vhdx.Format{}, Reseal: reseal,
			SizeBytes: diskBytes, Cost: 80, CanShrink: true, CanRebase: true, GranuleBytes: 512,
			Overlay: &formats.CreateRequest{ClusterBytes: 1 << 20},
			Base:    &formattest.Base{Format: vhdx.Format{}, SizeBytes: 3<<20 + 512, Create: formats.CreateRequest{ClusterBytes: 2 << 20}},
		},
	}
}

// fourK is the format as images with sectors of 4096 bytes have it: sizes are multiples.
type fourK struct{ vhdx.Format }

func (fourK) Options() formats.Options {
	o := vhdx.Format{}.Options()
	o.SizeMultiple = 4096
	return o
}

func TestConformance(t *testing.T) { formattest.Run(t, factories()...) }

func TestKillProcess(t *testing.T) { formattest.KillProcess(t, factories()[0]) }
