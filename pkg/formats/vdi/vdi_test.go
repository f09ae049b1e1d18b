package vdi_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/formattest"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vdi"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func TestMain(m *testing.M) {
	formats.Register(vdi.Format{})
	m.Run()
}

// factories are the kinds of images that Create makes, with blocks small enough for the
// suite to go through whole disks often; one kind has blocks that QEMU reads, too.
func factories() []formattest.Factory {
	return []formattest.Factory{
		{
			Name: "dynamic", Format: vdi.Format{}, CanShrink: true, RepairsLeaks: true, CanRebase: true,
			Create:  formats.CreateRequest{ClusterBytes: 4 << 10},
			Overlay: &formats.CreateRequest{ClusterBytes: 8 << 10},
		},
		{
			Name: "static", Format: vdi.Format{}, CanShrink: true, RepairsLeaks: true, CanRebase: true,
			Create:  formats.CreateRequest{ClusterBytes: 8 << 10, Subformat: "static"},
			Overlay: &formats.CreateRequest{ClusterBytes: 4 << 10},
		},
		{
			// The map has 128 entries at first, and outgrows its place.
			Name: "tight", Format: tight{}, CanShrink: true, RepairsLeaks: true, Cost: 6, SizeBytes: 125*4096 + 512,
			Create: formats.CreateRequest{ClusterBytes: 4 << 10},
		},
		{
			Name: "qemu", Format: vdi.Format{}, QEMU: "vdi", CanShrink: true, RepairsLeaks: true, Cost: 80, SizeBytes: 4<<20 + 512,
			BeforeOracle: repair,
		},
	}
}

// tight makes images as other programs do: without room for a larger block map, and with
// extra bytes before each block.
type tight struct{ vdi.Format }

func (f tight) Create(ctx context.Context, req formats.CreateRequest) error {
	if err := f.Format.Create(ctx, req); err != nil {
		return err
	}
	if err := tighten(req); err != nil {
		return errors.Join(err, req.FS.Remove(req.Name))
	}
	return nil
}

func tighten(req formats.CreateRequest) error {
	file, err := req.FS.Open(req.Name, vfs.ReadWrite)
	if err != nil {
		return err
	}
	const extraBytes = 512
	le := binary.LittleEndian
	blocks := (req.SizeBytes + req.ClusterBytes - 1) / req.ClusterBytes
	mapEnd := (512 + 4*blocks + 511) / 512 * 512
	_, err = file.WriteAt(le.AppendUint32(nil, uint32(mapEnd)), 0x158)
	if err == nil {
		_, err = file.WriteAt(le.AppendUint32(nil, extraBytes), 0x17c)
	}
	if err == nil {
		err = file.Truncate(mapEnd)
	}
	if err == nil {
		err = file.Sync()
	}
	return errors.Join(err, file.Close())
}

// repair corrects the count of blocks that a crash left too high, which qemu-img takes for
// an error.
func repair(_, file string) error {
	dir, err := vfs.OpenDir(filepath.Dir(file))
	if err != nil {
		return err
	}
	defer dir.Close()
	layer, err := vdi.Format{}.Open(formats.OpenRequest{FS: dir, Name: filepath.Base(file), Mode: vfs.ReadWrite})
	if err != nil {
		return err
	}
	result, err := engine.Check(context.Background(), layer, true, nil)
	if err == nil && result.Corruptions > 0 {
		err = fmt.Errorf("%s is corrupt: %+v", file, result)
	}
	return errors.Join(err, layer.Close())
}

func TestConformance(t *testing.T) { formattest.Run(t, factories()...) }

func TestKillProcess(t *testing.T) { formattest.KillProcess(t, factories()[0]) }
