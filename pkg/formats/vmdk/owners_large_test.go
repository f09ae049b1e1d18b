package vmdk

import (
	"context"
	"runtime"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// All tables of a large disk that is in use throughout are judged quickly, and in little
// memory, before the first write.
func TestOwners_Large(t *testing.T) {
	fsys, err := vfs.OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer fsys.Close()
	const size = 512 << 30
	if err := (Format{}).Create(context.Background(), formats.CreateRequest{FS: fsys, Name: "a.vmdk", SizeBytes: size}); err != nil {
		t.Fatal(err)
	}
	layer, err := Format{}.Open(formats.OpenRequest{FS: fsys, Name: "a.vmdk", Mode: vfs.ReadWrite})
	if err != nil {
		t.Fatal(err)
	}
	defer layer.Close()
	s := imageOf(layer.Codec).extents[0].sparse
	h := &s.header
	if err := writeTables(context.Background(), s.f, h, h.gdOffset+h.gdSectors(), uint64(s.grains())); err != nil {
		t.Fatal(err)
	}
	s.fileEnd = int64(h.overHead)*sectorBytes + size
	if err := s.f.Truncate(s.fileEnd); err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	began := time.Now()
	if err := imageOf(layer.Codec).judgeOwners(); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	runtime.ReadMemStats(&after)
	n := after.TotalAlloc - before.TotalAlloc
	t.Logf("%d grains judged in %v with %d KiB allocated", s.grains(), took, n>>10)
	if n > 32<<20 || took > 5*time.Second {
		t.Errorf("judging took %v and %d MiB", took, n>>20)
	}
}
