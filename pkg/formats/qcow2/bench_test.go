package qcow2_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/qcow2"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// createHalfMapped makes an image of 2 TiB of which the first half is mapped: data clusters
// are holes of the file, refcounts and L2 tables are as if they had been written.
func createHalfMapped(t testing.TB, dir string) {
	t.Helper()
	const mapped, cluster = 1 << 40, 64 << 10
	d, err := vfs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	err = qcow2.Format{}.Create(context.Background(), formats.CreateRequest{
		FS: d, Name: "big.qcow2", SizeBytes: mapped, Preallocation: formats.PreallocateMetadata,
	})
	if err != nil {
		t.Fatal(err)
	}
	// A larger guest needs no more than a larger number in the header: the L1 table of half
	// the size takes a fourth of its cluster.
	f, err := os.OpenFile(filepath.Join(dir, "big.qcow2"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(binary.BigEndian.AppendUint64(nil, 2*mapped), 24); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(binary.BigEndian.AppendUint32(nil, 2*mapped/cluster/(cluster/8)), 36); err != nil {
		t.Fatal(err)
	}
}

// Opening reads no refcounts, and the first allocations do not look for free space for long.
func TestOpen_HugeImage(t *testing.T) {
	if testing.Short() {
		t.Skip("making the image takes long")
	}
	dir := t.TempDir()
	createHalfMapped(t, dir)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	began := time.Now()
	image := mustOpen(t, dir, "big.qcow2", vfs.ReadWrite)
	opened := time.Since(began)
	runtime.GC()
	runtime.ReadMemStats(&after)
	t.Logf("opened in %v, with %d KiB", opened, (int64(after.HeapAlloc)-int64(before.HeapAlloc))>>10)
	if n := int64(after.HeapAlloc) - int64(before.HeapAlloc); n > 16<<20 {
		t.Errorf("%d MiB are in use after opening", n>>20)
	}
	if opened > 5*time.Second { // 50 ms on a quiet machine
		t.Errorf("opened in %v", opened)
	}
	began = time.Now()
	for i := range int64(1000) {
		if _, err := image.WriteAt([]byte("x"), 1<<40+i<<16); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("1000 clusters allocated in %v", time.Since(began))
	mustClose(t, image)
}

// BenchmarkFirstWrite writes 4 KiB to clusters that have no place yet, in random order.
func BenchmarkFirstWrite(b *testing.B) {
	for _, cluster := range []int64{4 << 10, 64 << 10} {
		b.Run(fmt.Sprint(cluster), func(b *testing.B) {
			dir := b.TempDir()
			size := int64(b.N+1) * cluster
			create(b, dir, formats.CreateRequest{Name: "a.qcow2", SizeBytes: size, ClusterBytes: cluster})
			image := mustOpen(b, dir, "a.qcow2", vfs.ReadWrite)
			defer image.Close()
			p := make([]byte, 4<<10)
			step := int64(7919)
			for step%2 == 0 || int64(b.N+1)%step == 0 {
				step++
			}
			b.SetBytes(int64(len(p)))
			b.ResetTimer()
			at := int64(0)
			for range b.N {
				if _, err := image.WriteAt(p, at*cluster); err != nil {
					b.Fatal(err)
				}
				at = (at + step) % int64(b.N+1)
			}
		})
	}
}

// BenchmarkRead reads 4 KiB at random from an image all of whose clusters have their place.
func BenchmarkRead(b *testing.B) {
	const size = 256 << 20
	dir := b.TempDir()
	create(b, dir, formats.CreateRequest{Name: "a.qcow2", SizeBytes: size, Preallocation: formats.PreallocateMetadata})
	image := mustOpen(b, dir, "a.qcow2", vfs.ReadOnly)
	defer image.Close()
	p := make([]byte, 4<<10)
	b.SetBytes(int64(len(p)))
	at := int64(0)
	for b.Loop() {
		if _, err := image.ReadAt(p, at); err != nil {
			b.Fatal(err)
		}
		at = (at + 7919*4096) % size
	}
}
