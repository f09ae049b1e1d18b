package formattest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/raw"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// testConvert makes images with contents, compressed where that is possible: they read the
// same, here and by qemu-img, are durable, and when making one fails, nothing is left.
func testConvert(t *testing.T, f Factory) {
	if f.Base != nil {
		t.Skip("conversion makes images that stand on nothing")
	}
	r := testenv.Rand(t)
	for i := range f.scaled(10) {
		compress := f.FilledOnly || f.Compressed && i%2 == 0
		convertOnce(t, f, r, compress)
	}
	t.Run("errors", func(t *testing.T) {
		f.counted(t, "failed operations", func(f *Figures) *atomic.Int64 { return &f.InjectedErrors })
		for _, how := range failures[:3] {
			failConvert(t, f, how)
		}
	})
}

// randomContents returns a disk with data, noise, and stretches and clusters of zeroes.
func (f Factory) randomContents(r *rand.Rand) []byte {
	s := f.shape()
	c := newContents(s.size)
	for i := range 12 {
		off, n := s.pickRange(r)
		ch := change{off: off, n: n}
		switch r.IntN(6) {
		case 0:
			ch.data = noise(i, n)
		case 1: // zeroes
		default:
			ch.data = stamp(i, off, n)
		}
		c.set(ch)
	}
	return c.bytes
}

// convert makes an image of the factory's kind that holds want.
func (f Factory) convert(fsys vfs.FS, want []byte, compress bool) (err error) {
	source, err := diskOf(want)
	if err != nil {
		return err
	}
	defer source.Close()
	req := f.Create
	req.FS, req.Name, req.SizeBytes, req.Secret = fsys, f.fileName(0), int64(len(want)), f.Secret
	conversion := formats.Conversion{Copying: formats.Copying{Compress: compress}}
	err = conversion.Convert(context.Background(), source, f.Format, req, nil)
	if err == nil {
		f.figures(1).Created.Add(1)
	}
	return err
}

// converted returns the rig of an image that convert made.
func (f Factory) converted(fsys vfs.FS) *rig {
	return &rig{f: f, fs: fsys, names: []string{f.fileName(0)}, made: 1}
}

// diskOf returns a disk that holds p, open for reading.
func diskOf(p []byte) (*engine.Disk, error) {
	mem := vfs.NewMem()
	file, err := mem.Create("source")
	if err != nil {
		return nil, err
	}
	const piece = 4096
	for off := 0; off < len(p) && err == nil; off += piece {
		if b := p[off:min(off+piece, len(p))]; len(bytes.Trim(b, "\x00")) > 0 {
			_, err = file.WriteAt(b, int64(off))
		}
	}
	if err = errors.Join(err, file.Truncate(int64(len(p))), file.Close()); err != nil {
		return nil, err
	}
	layer, err := raw.Format{}.Open(formats.OpenRequest{FS: mem, Name: "source"})
	if err != nil {
		return nil, err
	}
	return engine.New([]*engine.Layer{layer}, engine.Options{})
}

func convertOnce(t *testing.T, f Factory, r *rand.Rand, compress bool) {
	t.Helper()
	mem := vfs.NewMem()
	fsys := track(mem)
	want := f.randomContents(r)
	if err := f.convert(fsys, want, compress); err != nil {
		t.Fatalf("convert: %v", err)
	}
	if leaks := fsys.leaks(); leaks != "" {
		t.Fatal(leaks)
	}
	made := f.converted(fsys)
	p := &player{rig: made, m: newModel(contents{bytes: want}), sizes: []int64{int64(len(want))}}
	if err := made.open(vfs.ReadOnly); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(p.readBack(), made.close(), made.check(false)); err != nil {
		t.Fatalf("converted: %v", err)
	}
	if f.FilledOnly {
		expectFilledOnly(t, made)
	}
	made.checkWithQEMU(t, want, false)

	crashed := f.converted(mem.Crash(r))
	if err := crashed.open(vfs.ReadOnly); err != nil {
		t.Fatalf("power lost after it had been converted: %v", err)
	}
	got, err := crashed.readAll()
	if err = errors.Join(err, crashed.close()); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("power lost after it had been converted: it reads other bytes, or none (%v)", err)
	}
}

// expectFilledOnly opens an image for writing, which can only be read.
func expectFilledOnly(t *testing.T, r *rig) {
	t.Helper()
	if err := r.open(vfs.ReadWrite); err != nil {
		if !errors.Is(err, block.ErrReadOnly) && !errors.Is(err, block.ErrUnsupported) {
			t.Errorf("open for writing: %v, want %v", err, block.ErrReadOnly)
		}
		return
	}
	if !r.img.Info().ReadOnly {
		t.Error("an image that cannot be changed does not say so")
	}
	expectRefused(t, r.img, op{n: 512}, block.ErrReadOnly)
	if err := r.close(); err != nil {
		t.Error(err)
	}
}

// failConvert fails each operation of a conversion.
func failConvert(t *testing.T, f Factory, how failure) {
	r := testenv.Rand(t)
	want := f.randomContents(r)
	stride := uint64(f.stride(1))
	for n := r.Uint64N(stride); ; n += stride {
		mem := vfs.NewMem()
		failed := ""
		hook := how.hook(n, r)
		fsys := track(vfs.Inject(mem, func(at vfs.Op) error {
			err := hook(at)
			if err != nil && failed == "" {
				failed = showFSOp(at)
			}
			return err
		}))
		err := f.convert(fsys, want, f.FilledOnly || f.Compressed)
		if err := checkFailedConvert(f, mem, err, how, want); err != nil {
			t.Fatalf("%s, number %d (%s): %v", how.name, n, failed, err)
		}
		if leaks := fsys.leaks(); leaks != "" {
			t.Fatalf("%s, number %d (%s): %s", how.name, n, failed, leaks)
		}
		if failed == "" {
			return
		}
		f.figures(1).InjectedErrors.Add(1)
	}
}

// checkFailedConvert returns an error unless there is the image that was to be made, or err
// says why not and nothing is there.
func checkFailedConvert(f Factory, mem *vfs.Mem, err error, how failure, want []byte) error {
	if err == nil {
		made := f.converted(mem)
		if err := made.open(vfs.ReadOnly); err != nil {
			return err
		}
		got, err := made.readAll()
		if err = errors.Join(err, made.close(), made.check(true)); err == nil && !bytes.Equal(got, want) {
			err = errors.New("it reads other bytes")
		}
		return err
	}
	if !errors.Is(err, how.errno) {
		return fmt.Errorf("the error does not say why (%w): %w", how.errno, err)
	}
	left, readErr := mem.ReadDir(".")
	if len(left) > 0 {
		return fmt.Errorf("a failed conversion left %v", left)
	}
	return readErr
}
