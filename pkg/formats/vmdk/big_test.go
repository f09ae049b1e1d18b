package vmdk_test

import (
	"runtime"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vmdk"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// The largest images are made and opened quickly and in little memory, and written up to
// their ends.
func TestLargest(t *testing.T) {
	for name, cluster := range map[string]int64{"64 KiB": 64 << 10, "4 KiB": 4 << 10} {
		t.Run(name, func(t *testing.T) {
			fsys, err := vfs.OpenDir(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer fsys.Close()
			size := vmdk.Format{}.Options().MaxSizeBytes
			memCreate(t, fsys, formats.CreateRequest{Name: "a.vmdk", SizeBytes: size, ClusterBytes: cluster})
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			began := time.Now()
			image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
			took := time.Since(began)
			runtime.ReadMemStats(&after)
			n := after.TotalAlloc - before.TotalAlloc
			t.Logf("opened in %v with %d KiB allocated", took, n>>10)
			if n > 64<<20 || took > 5*time.Second {
				t.Errorf("opening took %v and %d MiB", took, n>>20)
			}
			if _, err := image.WriteAt([]byte("the end"), size-7); err != nil {
				t.Fatal(err)
			}
			p := make([]byte, 7)
			if _, err := image.ReadAt(p, size-7); err != nil || string(p) != "the end" {
				t.Errorf("read %q, %v", p, err)
			}
		})
	}
}
