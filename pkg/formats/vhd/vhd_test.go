package vhd_test

import (
	"path/filepath"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/formattest"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vhd"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func TestMain(m *testing.M) {
	formats.Register(vhd.Format{})
	m.Run()
}

// factories are the kinds of images that Create makes, with blocks small enough for the
// suite to go through whole disks often.
func factories() []formattest.Factory {
	return []formattest.Factory{
		{
			Name: "dynamic", Format: vhd.Format{}, Reseal: reseal, RepairsLeaks: true, QEMU: "vpc", CanShrink: true,
			Create: formats.CreateRequest{ClusterBytes: 4 << 10},
		},
		{
			Name: "differencing", Format: vhd.Format{}, Reseal: reseal, RepairsLeaks: true, CanShrink: true, CanRebase: true, GranuleBytes: 512,
			Create:  formats.CreateRequest{ClusterBytes: 8 << 10},
			Overlay: &formats.CreateRequest{ClusterBytes: 8 << 10},
		},
		{
			Name: "fixed", Format: unclustered{}, Reseal: reseal, RepairsLeaks: true, QEMU: "vpc", CanShrink: true, SizeBytes: 320<<10 + 5*512,
			Create:       formats.CreateRequest{Subformat: "fixed"},
			BeforeOracle: openOnce,
		},
	}
}

// unclustered is the format as far as fixed images go: the suite asks it for clusters.
type unclustered struct{ vhd.Format }

func (f unclustered) Options() formats.Options {
	options := f.Format.Options()
	options.MinClusterBytes, options.MaxClusterBytes, options.DefaultClusterBytes = 0, 0, 0
	return options
}

// openOnce opens a fixed image for writing. While one is being enlarged or cut, its file
// may end with zeroes after a crash, which only our own opening cuts off: see doc.go.
func openOnce(_, file string) error {
	dir, err := vfs.OpenDir(filepath.Dir(file))
	if err != nil {
		return err
	}
	defer dir.Close()
	layer, err := vhd.Format{}.Open(formats.OpenRequest{FS: dir, Name: filepath.Base(file), Mode: vfs.ReadWrite})
	if err != nil {
		return err
	}
	return layer.Close()
}

func TestConformance(t *testing.T) { formattest.Run(t, factories()...) }

func TestKillProcess(t *testing.T) { formattest.KillProcess(t, factories()[1]) }
