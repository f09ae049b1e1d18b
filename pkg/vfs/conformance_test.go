package vfs_test

import (
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs/vfstest"
)

func openTempDir(tb testing.TB) *vfs.Dir {
	tb.Helper()
	d, err := vfs.OpenDir(tb.TempDir())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { d.Close() })
	return d
}

func TestConformance_Dir(t *testing.T) {
	vfstest.Run(t, func(tb testing.TB) vfs.FS { return openTempDir(tb) })
}

func TestConformance_Mem(t *testing.T) {
	vfstest.Run(t, func(testing.TB) vfs.FS { return vfs.NewMem() })
}

func TestConformance_MemWithCapacity(t *testing.T) {
	vfstest.Run(t, func(testing.TB) vfs.FS {
		m := vfs.NewMem()
		m.SetCapacity(16 << 20)
		return m
	})
}

// A Mem that comes out of a crash or a kill is as good as a new one.
func TestConformance_MemClone(t *testing.T) {
	vfstest.Run(t, func(testing.TB) vfs.FS { return vfs.NewMem().Clone() })
}

func TestConformance_Inject(t *testing.T) {
	vfstest.Run(t, func(testing.TB) vfs.FS {
		return vfs.Inject(vfs.NewMem(), func(vfs.Op) error { return nil })
	})
}
