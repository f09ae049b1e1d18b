package qcow_test

import (
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/formattest"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/qcow"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/raw"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vmdk"
)

func TestMain(m *testing.M) {
	formats.Register(qcow.Format{}, vmdk.Format{}, raw.Format{})
	m.Run()
}

// factories are kinds of images, with clusters small enough for the suite to go through
// whole disks often.
func factories() []formattest.Factory {
	encrypted := map[string]string{"encrypt.format": "aes"}
	tiny := map[string]string{"l2_bits": "6"}
	return []formattest.Factory{
		{
			Name: "default", Format: qcow.Format{}, QEMU: "qcow", Compressed: true, CanShrink: true, CanRebase: true,
			Create:  formats.CreateRequest{ClusterBytes: 4 << 10},
			Overlay: &formats.CreateRequest{ClusterBytes: 8 << 10},
		},
		{
			Name: "512-byte-clusters", Format: qcow.Format{}, QEMU: "qcow", Compressed: true, CanShrink: true, CanRebase: true,
			SizeBytes: 70<<10 + 512,
			Create:    formats.CreateRequest{ClusterBytes: 1024, Extra: tiny},
			Overlay:   &formats.CreateRequest{ClusterBytes: 512},
		},
		{
			Name: "encrypted", Format: qcow.Format{}, CanShrink: true, CanRebase: true, Secret: secret,
			Create:  formats.CreateRequest{ClusterBytes: 4 << 10, Extra: encrypted},
			Overlay: &formats.CreateRequest{ClusterBytes: 2 << 10, Extra: encrypted},
		},
		{
			// Alone, so that QEMU judges what crashes leave, too.
			Name: "encrypted-base", Format: qcow.Format{}, QEMU: "qcow", QEMUCrypt: "aes", CanShrink: true, Secret: secret,
			Create: formats.CreateRequest{ClusterBytes: 4 << 10, Extra: encrypted}, Cost: 2,
		},
		{
			Name: "on-raw", Format: qcow.Format{}, QEMU: "qcow", Compressed: true, CanShrink: true, CanRebase: true,
			SizeBytes: 80<<10 + 512,
			Overlay:   &formats.CreateRequest{ClusterBytes: 4 << 10},
			Base:      &formattest.Base{Format: raw.Format{}, QEMU: "raw", Unnamed: true, SizeBytes: 50<<10 + 512},
		},
	}
}

func TestConformance(t *testing.T) { formattest.Run(t, factories()...) }

func TestKillProcess(t *testing.T) { formattest.KillProcess(t, factories()[0]) }
