package vhdx_test

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// BenchmarkOpen opens a disk of 2 TiB, of which 1 TiB is mapped, for reading, and for
// writing with a first write, which finds out which space is free.
func BenchmarkOpen(b *testing.B) {
	dir := b.TempDir()
	createIn(b, dir, formats.CreateRequest{Name: "a.vhdx", SizeBytes: 2 << 40, ClusterBytes: 1 << 20})
	f, err := os.OpenFile(filepath.Join(dir, "a.vhdx"), os.O_RDWR, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	const mapped = 1 << 20
	table := make([]byte, 0, mapped*8+mapped/512)
	first := uint64(3 + 17) // MiB: behind the table
	for i := range uint64(mapped) {
		if i > 0 && i%4096 == 0 {
			table = binary.LittleEndian.AppendUint64(table, 0)
		}
		table = binary.LittleEndian.AppendUint64(table, (first+i)<<20|6)
	}
	if _, err := f.WriteAt(table, batAt); err != nil {
		b.Fatal(err)
	}
	if err := f.Truncate(int64(first+mapped) << 20); err != nil {
		b.Fatal(err)
	}
	for name, mode := range map[string]vfs.Mode{"reading": vfs.ReadOnly, "writing": vfs.ReadWrite} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				image := openDir(b, dir, "a.vhdx", mode)
				if mode == vfs.ReadWrite {
					if _, err := image.WriteAt([]byte("x"), 0); err != nil {
						b.Fatal(err)
					}
				}
				if err := image.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
