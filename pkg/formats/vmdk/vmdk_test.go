package vmdk_test

import (
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/formattest"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vmdk"
)

func TestMain(m *testing.M) {
	formats.Register(vmdk.Format{})
	m.Run()
}

func TestConformance(t *testing.T) {
	formattest.Run(t,
		formattest.Factory{
			Name: "sparse", Format: vmdk.Format{}, QEMU: "vmdk",
			Create:  formats.CreateRequest{ClusterBytes: 4 << 10},
			Overlay: &formats.CreateRequest{ClusterBytes: 8 << 10},
		},
		formattest.Factory{
			Name: "zeroed-grain", Format: vmdk.Format{}, QEMU: "vmdk",
			Create:  formats.CreateRequest{Extra: map[string]string{"zeroed_grain": "on"}},
			Overlay: &formats.CreateRequest{Extra: map[string]string{"zeroed_grain": "on"}},
		},
		formattest.Factory{
			Name: "flat", Format: vmdk.Format{}, QEMU: "vmdk",
			Create:  formats.CreateRequest{Subformat: "monolithicFlat"},
			Overlay: &formats.CreateRequest{},
		},
	)
}
