package vdi_test

import (
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/formattest"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vdi"
)

func TestMain(m *testing.M) {
	formats.Register(vdi.Format{})
	m.Run()
}

// factories are the kinds of images that Create makes, with blocks small enough for the
// suite to go through whole disks often. QEMU reads blocks of 1 MiB only: see oracle_test.go.
func factories() []formattest.Factory {
	return []formattest.Factory{
		{
			Name: "dynamic", Format: vdi.Format{}, CanShrink: true, CanRebase: true,
			Create:  formats.CreateRequest{ClusterBytes: 4 << 10},
			Overlay: &formats.CreateRequest{ClusterBytes: 8 << 10},
		},
		{
			Name: "static", Format: vdi.Format{}, CanShrink: true, CanRebase: true,
			Create:  formats.CreateRequest{ClusterBytes: 8 << 10, Subformat: "static"},
			Overlay: &formats.CreateRequest{ClusterBytes: 4 << 10},
		},
	}
}

func TestConformance(t *testing.T) { formattest.Run(t, factories()...) }

func TestKillProcess(t *testing.T) { formattest.KillProcess(t, factories()[0]) }
