package raw_test

import (
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/formattest"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/raw"
)

func TestConformance(t *testing.T) {
	formattest.Run(t,
		formattest.Factory{Name: "sparse", Format: raw.Format{}, QEMU: "raw", Headerless: true, CanShrink: true},
		formattest.Factory{
			Name: "full", Format: raw.Format{}, QEMU: "raw", Headerless: true, CanShrink: true,
			Create: formats.CreateRequest{Preallocation: formats.PreallocateFull},
		},
	)
}

func TestKillProcess(t *testing.T) {
	formattest.KillProcess(t, formattest.Factory{Name: "sparse", Format: raw.Format{}, QEMU: "raw", Headerless: true, CanShrink: true})
}

func FuzzImage(f *testing.F) {
	formattest.Fuzz(f, formattest.Factory{Name: "sparse", Format: raw.Format{}, Headerless: true})
}
