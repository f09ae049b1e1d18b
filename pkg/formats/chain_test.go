package formats_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vmdk"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const chainUnit = 64 << 10 // a grain

// newChain makes a chain of VMDK layers, each with some grains of its own, and returns
// what it reads and the name of its top.
func newChain(t testing.TB, fsys vfs.FS, r *rand.Rand, depth, grains int) (want []byte, top string) {
	t.Helper()
	want = make([]byte, grains*chainUnit)
	for i := range depth {
		req := formats.CreateRequest{FS: fsys, Name: fmt.Sprintf("layer%02d.vmdk", i), SizeBytes: int64(len(want))}
		if i > 0 {
			parent := openVMDK(t, fsys, top)
			req.Parent = &formats.Parent{Name: top, Layer: parent.Layers()[0]}
		}
		if err := (vmdk.Format{}).Create(context.Background(), req); err != nil {
			t.Fatal(err)
		}
		if req.Parent != nil {
			if err := req.Parent.Layer.Close(); err != nil {
				t.Fatal(err)
			}
		}
		top = req.Name
		img := openVMDK(t, fsys, top)
		for range 1 + grains/depth {
			off := r.IntN(len(want))
			p := want[off:min(len(want), off+1+r.IntN(2*chainUnit))]
			fill := byte(1 + i)
			if r.IntN(4) == 0 {
				fill = 0
			}
			copy(p, bytes.Repeat([]byte{fill}, len(p)))
			if _, err := img.WriteAt(p, int64(off)); err != nil {
				t.Fatal(err)
			}
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return want, top
}

func openVMDK(t testing.TB, fsys vfs.FS, name string) *formats.Image {
	t.Helper()
	if _, err := formats.Lookup("vmdk"); err != nil {
		formats.Register(vmdk.Format{})
	}
	img, err := formats.Open(context.Background(), fsys, name, formats.OpenOptions{Format: "vmdk", Mode: vfs.ReadWrite})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// Whoever answers for a range is remembered, and forgotten when the top layer changes.
func TestChain_ReadsWhatLayersHoldWhileTheTopChanges(t *testing.T) {
	r, fsys := testenv.Rand(t), vfs.NewMem()
	want, top := newChain(t, fsys, r, 7, 40)
	img := openVMDK(t, fsys, top)
	defer img.Close()
	for step := range 2000 {
		off := r.IntN(len(want))
		n := 1 + r.IntN(min(len(want)-off, 3*chainUnit))
		if r.IntN(6) == 0 {
			n = min(n, 5000)
			copy(want[off:off+n], bytes.Repeat([]byte{byte(step) | 128}, n))
			if _, err := img.WriteAt(want[off:off+n], int64(off)); err != nil {
				t.Fatal(err)
			}
			continue
		}
		got := make([]byte, n)
		if _, err := img.ReadAt(got, int64(off)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want[off:off+n]) {
			t.Fatalf("step %d: %d bytes at %d differ", step, n, off)
		}
	}
}

func TestPull_MakesParentsSuperfluous(t *testing.T) {
	r, fsys := testenv.Rand(t), vfs.NewMem()
	want, top := newChain(t, fsys, r, 4, 40)
	img := openVMDK(t, fsys, top)
	size := int64(len(want))
	var copied int64
	for off := int64(0); off < size; off += 5*chainUnit + 512 {
		n, err := img.Pull(off, min(5*chainUnit+512, size-off), 3)
		if err != nil {
			t.Fatal(err)
		}
		copied += n
	}
	if copied == 0 {
		t.Error("nothing was copied")
	}
	if again, err := img.Pull(0, size, 3); err != nil || again != 0 && again >= copied {
		t.Errorf("pulled again: %d bytes, %v", again, err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	alone, err := formats.Open(context.Background(), fsys, top, formats.OpenOptions{Format: "vmdk", NoParents: true})
	if err != nil {
		t.Fatal(err)
	}
	defer alone.Close()
	got := make([]byte, size)
	if _, err := alone.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("without its parents the image reads otherwise")
	}
}

// BenchmarkChainRead reads 4 KiB blocks through chains whose layers each hold some of
// them, on a file system in memory.
func BenchmarkChainRead(b *testing.B) {
	for _, depth := range []int{1, 2, 8, 32} {
		b.Run(fmt.Sprintf("layers=%d", depth), func(b *testing.B) {
			fsys := benchDir(b)
			want, top := newChain(b, fsys, testenv.Rand(b), depth, 4096)
			img := openVMDK(b, fsys, top)
			defer img.Close()
			b.SetBytes(4096)
			p := make([]byte, 4096)
			r := rand.New(rand.NewPCG(1, 2))
			for b.Loop() {
				if _, err := img.ReadAt(p, r.Int64N(int64(len(want))/4096)*4096); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func benchDir(b *testing.B) vfs.FS {
	dir, err := os.MkdirTemp("/dev/shm", "chain")
	if err != nil {
		b.Skip(err)
	}
	fsys, err := vfs.OpenDir(dir)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		fsys.Close()
		os.RemoveAll(dir)
	})
	return fsys
}

// BenchmarkFirstWrite writes 4 KiB blocks where nothing is yet, from threads like those of a
// block server, to images on a file system in memory.
func BenchmarkFirstWrite(b *testing.B) {
	for _, format := range []string{"raw", "vmdk", "qcow2", "vdi", "vhdx", "vpc", "qcow"} {
		b.Run(format, func(b *testing.B) {
			const stride = 64 << 10
			fsys := benchDir(b)
			f, err := formats.Lookup(format)
			if err != nil {
				b.Fatal(err)
			}
			const size = 1 << 36
			if err := f.Create(context.Background(), formats.CreateRequest{FS: fsys, Name: "image", SizeBytes: size}); err != nil {
				b.Fatal(err)
			}
			img, err := formats.Open(context.Background(), fsys, "image", formats.OpenOptions{
				Format: format, Mode: vfs.ReadWrite, Journal: &engine.JournalFile{FS: fsys, Name: "journal"},
			})
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(4096)
			var next atomic.Int64
			b.SetParallelism(4)
			b.RunParallel(func(pb *testing.PB) {
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
				p := bytes.Repeat([]byte{1}, 4096)
				for pb.Next() {
					at := next.Add(1) * 40503 % (size / stride) * stride
					if _, err := img.WriteAt(p, at); err != nil {
						b.Error(err)
						return
					}
				}
			})
			b.StopTimer()
			if err := img.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}
