package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/all"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// A VMDK whose grains were mapped by hand is one that others find in order.
func TestMapGrains(t *testing.T) {
	all.Register()
	dir := t.TempDir()
	tree, err := vfs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	format, err := formats.Lookup(vmdkName)
	if err != nil {
		t.Fatal(err)
	}
	const size, mapped = 200 << 20, 77 << 20
	if err := format.Create(t.Context(), formats.CreateRequest{FS: tree, Name: "x.vmdk", SizeBytes: size}); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "x.vmdk"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := mapGrains(f, mapped); err != nil {
		t.Fatal(err)
	}
	img, err := formats.Open(t.Context(), tree, "x.vmdk", formats.OpenOptions{Mode: vfs.ReadOnly})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	for off, want := range map[int64]block.State{0: block.Data, mapped - 1: block.Data, mapped: block.Unallocated, size - 1: block.Unallocated} {
		if e, err := img.Map(off, 1); err != nil || e.State != want {
			t.Errorf("offset %d: %+v, %v, want %v", off, e, err, want)
		}
	}
	if out, err := exec.Command(testenv.Oracle(t, "qemu-img"), "check", filepath.Join(dir, "x.vmdk")).CombinedOutput(); err != nil {
		t.Errorf("qemu-img check: %v: %s", err, out)
	}
}

func TestMapGrains_NoVMDK(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "x"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := mapGrains(f, mib1); err == nil {
		t.Error("an empty file is no error")
	}
	if err := f.Truncate(mib1); err != nil {
		t.Fatal(err)
	}
	if err := mapGrains(f, mib1); err == nil {
		t.Error("zeroes are no error")
	}
}

// The disk that is converted is the same in every run, and neither all zeroes nor all
// noise.
func TestWriteDisk(t *testing.T) {
	var contents [2][]byte
	const size = 8<<20 + 512
	for i := range contents {
		path := filepath.Join(t.TempDir(), "disk")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := writeDisk(f, size); err != nil {
			t.Fatal(err)
		}
		if contents[i], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	if len(contents[0]) != size || !bytes.Equal(contents[0], contents[1]) {
		t.Errorf("%d and %d bytes, want %d that are equal", len(contents[0]), len(contents[1]), size)
	}
	holes := 0
	for chunk := contents[0]; len(chunk) > 0; chunk = chunk[min(chunkBytes, len(chunk)):] {
		if len(bytes.Trim(chunk[:min(chunkBytes, len(chunk))], "\x00")) == 0 {
			holes++
		}
	}
	if chunks := size / chunkBytes; holes < chunks/10 || holes > chunks/2 {
		t.Errorf("%d holes among %d chunks", holes, chunks)
	}
}

// Servers are ready when they have answered, and are seen to end.
func TestServe(t *testing.T) {
	testenv.Oracle(t, "qemu-nbd")
	b := &bench{dir: t.TempDir()}
	content := bytes.Repeat([]byte("0123456789abcdef"), 4<<10)
	if err := os.WriteFile(filepath.Join(b.dir, "x.raw"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := b.serve(t.Context(), qemuNBD, rawName, "x.raw")
	if err != nil {
		t.Fatal(err)
	}
	defer s.stop()
	if s.client.sizeBytes != int64(len(content)) {
		t.Errorf("the export has %d bytes, want %d", s.client.sizeBytes, len(content))
	}
	got := make([]byte, 4096)
	if err := s.client.read(got, 8192); err != nil || !bytes.Equal(got, content[8192:][:4096]) {
		t.Errorf("read: %v, %.32q", err, got)
	}
	if err := s.client.read(got, int64(len(content))); err == nil {
		t.Error("a read past the end is no error")
	}
	if n, err := resident([]int{s.cmd.Process.Pid}, residentNow); err != nil || n < 1<<20 {
		t.Errorf("resident: %d bytes, %v", n, err)
	}
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	start := time.Now()
	if _, err := b.serve(t.Context(), qemuNBD, rawName, "none.raw"); err == nil {
		t.Error("a server without an image is no error")
	}
	if took := time.Since(start); took > startPatience/2 {
		t.Errorf("that a server has ended was seen after %v", took)
	}
}

// Every layer of a chain has something of its own, and the base what is left.
func TestChain(t *testing.T) {
	testenv.Oracle(t, "qemu-io")
	all.Register()
	for _, format := range chainFormats {
		t.Run(format, func(t *testing.T) {
			b := &bench{config: config{sizeMiB: 64}, dir: t.TempDir()}
			base := "base." + format
			if err := b.program(t.Context(), testenv.Oracle(t, "qemu-img"), "create", "-q", "-f", format, base, "64M"); err != nil {
				t.Fatal(err)
			}
			images := imageSet{dir: b.dir, full: base}
			const layers = 3
			top, err := images.getChain(t.Context(), b, format, layers)
			if err != nil {
				t.Fatal(err)
			}
			if again, err := images.getChain(t.Context(), b, format, 1); err != nil || again != base {
				t.Errorf("a chain of one layer is %s, %v, want %s", again, err, base)
			}
			tree, err := vfs.OpenDir(b.dir)
			if err != nil {
				t.Fatal(err)
			}
			defer tree.Close()
			img, err := formats.Open(t.Context(), tree, top, formats.OpenOptions{Mode: vfs.ReadOnly})
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			if n := len(img.Layers()); n != layers {
				t.Errorf("%d layers, want %d", n, layers)
			}
			for chunk, want := range map[int64]byte{0: 0, 1: 0, 2: 1, 4: 2, 6: 0, chunkStride + 4: 2} {
				p := make([]byte, 1)
				if _, err := img.ReadAt(p, chunk*chunkBytes); err != nil || p[0] != want {
					t.Errorf("chunk %d has %d, %v, want %d", chunk, p[0], err, want)
				}
			}
			images.remove()
			if left, err := filepath.Glob(filepath.Join(b.dir, "layer-*")); err != nil || len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
		})
	}
}
