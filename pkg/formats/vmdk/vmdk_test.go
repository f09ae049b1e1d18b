package vmdk_test

import (
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/formattest"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/raw"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vmdk"
)

func TestMain(m *testing.M) {
	formats.Register(vmdk.Format{}, raw.Format{})
	m.Run()
}

// factories are the kinds of images that Create makes, with grains small enough for the
// suite to go through whole disks often.
func factories() []formattest.Factory {
	zeroed := map[string]string{"zeroed_grain": "on"}
	return []formattest.Factory{
		{
			Name: "sparse", Format: vmdk.Format{}, QEMU: "vmdk", CanShrink: true, CanRebase: true,
			Create:  formats.CreateRequest{ClusterBytes: 4 << 10},
			Overlay: &formats.CreateRequest{ClusterBytes: 8 << 10},
		},
		{
			Name: "zeroed-grain", Format: lazyTables{}, QEMU: "vmdk", CanShrink: true, CanRebase: true,
			Create:  formats.CreateRequest{ClusterBytes: 8 << 10, Extra: zeroed},
			Overlay: &formats.CreateRequest{ClusterBytes: 4 << 10, Extra: zeroed},
		},
		{
			// QEMU reads past the end of an extent that ends within a grain.
			Name: "split", Format: split{}, CanShrink: true, CanRebase: true,
			Create:  formats.CreateRequest{ClusterBytes: 4 << 10},
			Overlay: &formats.CreateRequest{ClusterBytes: 4 << 10},
		},
		{
			Name: "flat", Format: vmdk.Format{}, QEMU: "vmdk", SizeBytes: 320<<10 + 5*512, CanShrink: true, CanRebase: true,
			Create:  formats.CreateRequest{Subformat: "monolithicFlat"},
			Overlay: &formats.CreateRequest{ClusterBytes: 16 << 10},
		},
		{
			Name: "cowd", Format: vmdk.Format{}, QEMU: "vmdk", CanShrink: true, CanRebase: true,
			Create:  formats.CreateRequest{Subformat: "vmfsSparse", ClusterBytes: 4 << 10},
			Overlay: &formats.CreateRequest{Subformat: "vmfsSparse", ClusterBytes: 512},
		},
		{
			Name: "sesparse", Format: seSparse{}, QEMU: "vmdk", CannotGrow: true, CanRebase: true, RepairsLeaks: true,
			Create:  formats.CreateRequest{ClusterBytes: 4 << 10},
			Overlay: &formats.CreateRequest{ClusterBytes: 4 << 10},
		},
		{
			Name: "stream", Format: vmdk.Format{}, QEMU: "vmdk", FilledOnly: true, Compressed: true,
			Create: formats.CreateRequest{Subformat: "streamOptimized", ClusterBytes: 4 << 10},
		},
	}
}

func TestConformance(t *testing.T) { formattest.Run(t, factories()...) }

// Images of several small files: growing adds some, shrinking removes some.
func TestConformance_Split(t *testing.T) {
	for sectors, f := range map[int64]formattest.Factory{
		64: {
			Name: "split-sparse", Format: vmdk.Format{}, QEMU: "vmdk", CanShrink: true, CanRebase: true,
			Create:  formats.CreateRequest{Subformat: "twoGbMaxExtentSparse", ClusterBytes: 4 << 10},
			Overlay: &formats.CreateRequest{Subformat: "twoGbMaxExtentSparse", ClusterBytes: 8 << 10},
		},
		300: {
			Name: "split-flat", Format: vmdk.Format{}, QEMU: "vmdk", CanShrink: true, SizeBytes: 320<<10 + 5*512,
			Create: formats.CreateRequest{Subformat: "twoGbMaxExtentFlat"},
		},
	} {
		restore := vmdk.SetSplit(sectors)
		formattest.Run(t, f)
		restore()
	}
}

func TestKillProcess(t *testing.T) {
	for _, f := range factories() {
		if f.Name == "sparse" || f.Name == "cowd" || f.Name == "sesparse" || f.Name == "split" {
			t.Run(f.Name, func(t *testing.T) { formattest.KillProcess(t, f) })
		}
	}
}
