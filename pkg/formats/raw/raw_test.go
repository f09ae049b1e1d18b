package raw_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/raw"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func TestMain(m *testing.M) {
	formats.Register(raw.Format{})
	m.Run()
}

func open(t *testing.T, fsys vfs.FS, name string, mode vfs.Mode) *formats.Image {
	t.Helper()
	img, err := formats.Open(context.Background(), fsys, name, formats.OpenOptions{Format: "raw", Mode: mode})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	})
	return img
}

// A file of any length is a disk of that length, down to the last byte.
func TestOpen_OddLength(t *testing.T) {
	for _, length := range []int64{0, 1, 511, 513, 1000003} {
		mem := vfs.NewMem()
		f, err := mem.Create("disk")
		if err == nil {
			_, err = f.WriteAt(bytes.Repeat([]byte{'a'}, int(length)), 0)
		}
		if err = errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		img := open(t, mem, "disk", vfs.ReadWrite)
		if got := img.Info().SizeBytes; got != length {
			t.Errorf("a file of %d bytes is a disk of %d", length, got)
		}
		if length == 0 {
			continue
		}
		b := []byte{'?'}
		if _, err := img.WriteAt([]byte{'b'}, length-1); err != nil {
			t.Error(err)
		}
		if _, err := img.ReadAt(b, length-1); err != nil || b[0] != 'b' {
			t.Errorf("last byte of %d: %q, %v", length, b, err)
		}
		if info, err := mem.Stat("disk"); err != nil || info.Size() != length {
			t.Errorf("the file has %d bytes now, had %d: %v", info.Size(), length, err)
		}
	}
}

// Growing makes an odd length even.
func TestResize_OddLength(t *testing.T) {
	mem := vfs.NewMem()
	f, err := mem.Create("disk")
	if err = errors.Join(err, f.Truncate(1000), f.Close()); err != nil {
		t.Fatal(err)
	}
	img := open(t, mem, "disk", vfs.ReadWrite)
	if err := img.Resize(1001); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("resize to 1001 bytes: %v, want %v", err, block.ErrInvalid)
	}
	if err := img.Resize(1024); err != nil || img.Info().SizeBytes != 1024 {
		t.Errorf("resize to 1024 bytes: %v, now %d", err, img.Info().SizeBytes)
	}
}

func TestCreate_Preallocation(t *testing.T) {
	const size = 3<<20 + 512
	for preallocation, wantAllocated := range map[formats.Preallocation]bool{
		"": false, formats.PreallocateOff: false, formats.PreallocateFalloc: true, formats.PreallocateFull: true,
	} {
		mem := vfs.NewMem()
		req := formats.CreateRequest{FS: mem, Name: "disk", SizeBytes: size, Preallocation: preallocation}
		if err := (raw.Format{}).Create(context.Background(), req); err != nil {
			t.Fatal(err)
		}
		f, err := mem.Open("disk", vfs.ReadOnly)
		if err != nil {
			t.Fatal(err)
		}
		length, err := f.Size()
		if err != nil || length != size {
			t.Errorf("preallocation %q: %d bytes, want %d: %v", preallocation, length, size, err)
		}
		allocated, err := f.AllocatedBytes()
		if err != nil || (allocated >= size) != wantAllocated {
			t.Errorf("preallocation %q: %d of %d bytes are allocated: %v", preallocation, allocated, size, err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestCreate_Refused(t *testing.T) {
	for field, req := range map[string]formats.CreateRequest{
		"size 0":               {},
		"size -512":            {SizeBytes: -512},
		"size 513":             {SizeBytes: 513},
		"size 1":               {SizeBytes: 1<<60 + 512},
		"subformat sparse":     {SizeBytes: 512, Subformat: "sparse"},
		"cluster size 65536":   {SizeBytes: 512, ClusterBytes: 64 << 10},
		"preallocation meta":   {SizeBytes: 512, Preallocation: formats.PreallocateMetadata},
		"parent base":          {SizeBytes: 512, Parent: &formats.Parent{Name: "base"}},
		"option hwversion raw": {SizeBytes: 512, Extra: map[string]string{"hwversion": "1"}},
	} {
		mem := vfs.NewMem()
		req.FS, req.Name = mem, "disk"
		err := (raw.Format{}).Create(context.Background(), req)
		named, _, _ := strings.Cut(field, " ")
		if !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), named) {
			t.Errorf("%s: %v, want %v that names it", field, err, block.ErrInvalid)
		}
		if _, err := mem.Stat("disk"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: there is a file now: %v", field, err)
		}
	}
}

// What is there already stays as it is.
func TestCreate_Exists(t *testing.T) {
	mem := vfs.NewMem()
	req := formats.CreateRequest{FS: mem, Name: "disk", SizeBytes: 1024}
	if err := (raw.Format{}).Create(context.Background(), req); err != nil {
		t.Fatal(err)
	}
	req.SizeBytes = 512
	if err := (raw.Format{}).Create(context.Background(), req); !errors.Is(err, fs.ErrExist) {
		t.Errorf("create again: %v, want %v", err, fs.ErrExist)
	}
	if info, err := mem.Stat("disk"); err != nil || info.Size() != 1024 {
		t.Errorf("the first one: %v, %v", info, err)
	}
}

func TestCreate_Cancelled(t *testing.T) {
	mem := vfs.NewMem()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	req := formats.CreateRequest{FS: mem, Name: "disk", SizeBytes: 1 << 20, Preallocation: formats.PreallocateFull}
	if err := (raw.Format{}).Create(ctx, req); !errors.Is(err, context.Canceled) {
		t.Errorf("create: %v, want %v", err, context.Canceled)
	}
	if _, err := mem.Stat("disk"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("there is a file now: %v", err)
	}
}

func TestMeasure(t *testing.T) {
	for _, data := range []int64{0, 4096, 1 << 20} {
		req := formats.CreateRequest{SizeBytes: 1 << 20}
		if n, err := (raw.Format{}).Measure(req, data); err != nil || n != 1<<20 {
			t.Errorf("with %d bytes of data: %d, %v, want %d", data, n, err, 1<<20)
		}
	}
	if _, err := (raw.Format{}).Measure(formats.CreateRequest{SizeBytes: 7}, 0); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("of 7 bytes: %v, want %v", err, block.ErrInvalid)
	}
}

func TestShrink(t *testing.T) {
	mem := vfs.NewMem()
	req := formats.CreateRequest{FS: mem, Name: "disk", SizeBytes: 1 << 20}
	if err := (raw.Format{}).Create(context.Background(), req); err != nil {
		t.Fatal(err)
	}
	img := open(t, mem, "disk", vfs.ReadWrite)
	want := bytes.Repeat([]byte{'a'}, 1<<20)
	if _, err := img.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{1<<20 + 512, 0, 1000} {
		if err := img.Shrink(size); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("shrink to %d bytes: %v, want %v", size, err, block.ErrInvalid)
		}
	}
	if err := img.Shrink(4096 + 512); err != nil || img.Info().SizeBytes != 4608 {
		t.Fatalf("shrink: %v, now %d bytes", err, img.Info().SizeBytes)
	}
	if info, err := mem.Stat("disk"); err != nil || info.Size() != 4608 {
		t.Errorf("the file: %v, %v", info.Size(), err)
	}
	if err := img.Resize(1 << 20); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 1<<20)
	clear(want[4608:])
	if _, err := img.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("what was cut off is there again: %v", err)
	}
}

// Nothing in a raw file could say what it stands on.
func TestSetParent_Refused(t *testing.T) {
	mem := vfs.NewMem()
	for _, name := range []string{"disk", "base"} {
		req := formats.CreateRequest{FS: mem, Name: name, SizeBytes: 1 << 20}
		if err := (raw.Format{}).Create(context.Background(), req); err != nil {
			t.Fatal(err)
		}
	}
	for _, unsafe := range []bool{false, true} {
		err := formats.Rebase(context.Background(), mem, "disk", formats.Rebasing{Parent: "base", Unsafe: unsafe}, nil)
		if !errors.Is(err, block.ErrUnsupported) || !strings.Contains(err.Error(), "raw images stand on nothing") {
			t.Errorf("rebase, unsafe %v: %v, want %v", unsafe, err, block.ErrUnsupported)
		}
	}
}

// A file that somebody has shortened meanwhile is not what it was.
func TestCheck_Shortened(t *testing.T) {
	mem := vfs.NewMem()
	req := formats.CreateRequest{FS: mem, Name: "disk", SizeBytes: 1024}
	if err := (raw.Format{}).Create(context.Background(), req); err != nil {
		t.Fatal(err)
	}
	img := open(t, mem, "disk", vfs.ReadOnly)
	for length, corruptions := range map[int64]int64{1024: 0, 512: 1} {
		f, err := mem.Open("disk", vfs.ReadWrite)
		if err = errors.Join(err, f.Truncate(length), f.Close()); err != nil {
			t.Fatal(err)
		}
		result, err := img.Layers()[0].Codec.Check(context.Background(), nil, nil)
		if err != nil || result.Corruptions != corruptions {
			t.Errorf("%d bytes: %d corruptions, want %d: %v", length, result.Corruptions, corruptions, err)
		}
	}
}
