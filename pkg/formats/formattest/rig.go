package formattest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// rig is an image under test, with the chain it stands on, in one file system. Its
// methods return errors: some tests make them fail.
type rig struct {
	f     Factory
	fs    vfs.FS
	names []string // of the chain's main files, the top one last
	made  int      // images made: a name is not used twice
	img   *formats.Image
	// journal is where the redo journal is kept; nil: none.
	journal *engine.JournalFile
}

// newRig creates an image, not open: a chain of one layer, or one on the factory's base,
// which makeBase has made.
func newRig(f Factory, fsys vfs.FS, size int64) (*rig, error) {
	ctx := context.Background()
	if f.Base == nil {
		req := f.Create
		req.FS, req.Name, req.SizeBytes, req.Secret = fsys, f.fileName(0), size, f.Secret
		if err := f.Format.Create(ctx, req); err != nil {
			return nil, err
		}
		f.figures(1).Created.Add(1)
		return &rig{f: f, fs: fsys, names: []string{req.Name}, made: 1}, nil
	}
	base := f.Base.fileName()
	parent, err := f.Base.Format.Open(formats.OpenRequest{FS: fsys, Name: base, Mode: vfs.ReadOnly})
	if err != nil {
		return nil, err
	}
	defer parent.Close() // it was only read
	req := *f.Overlay
	req.FS, req.Name, req.SizeBytes, req.Secret = fsys, f.fileName(0), size, f.Secret
	req.Parent = &formats.Parent{Name: base, Layer: parent}
	if err := f.Format.Create(ctx, req); err != nil {
		return nil, err
	}
	f.figures(1).Created.Add(1)
	return &rig{f: f, fs: fsys, names: []string{base, req.Name}, made: 1}, nil
}

// makeBase makes the base that the factory's images stand on, if there is one, with
// something in it. It returns what a new image on it holds.
func (f Factory) makeBase(fsys vfs.FS, r *rand.Rand) (contents, error) {
	made := newContents(f.shape().size)
	if f.Base == nil {
		return made, nil
	}
	req := f.Base.Create
	req.FS, req.Name, req.SizeBytes = fsys, f.Base.fileName(), f.Base.SizeBytes
	if req.SizeBytes == 0 {
		req.SizeBytes = f.shape().size
	}
	ctx := context.Background()
	if err := f.Base.Format.Create(ctx, req); err != nil {
		return made, fmt.Errorf("create the base: %w", err)
	}
	img, err := formats.Open(ctx, fsys, req.Name, formats.OpenOptions{Format: f.Base.Format.Name(), Mode: vfs.ReadWrite})
	if err != nil {
		return made, fmt.Errorf("open the base: %w", err)
	}
	whole := newContents(req.SizeBytes)
	s := f.shape()
	s.size = req.SizeBytes
	for i, o := range newScript(r, s, mix{opWrite: 1}, 12) {
		ch := change{off: o.off, n: o.n, data: stamp(baseOp+i, o.off, o.n)}
		if _, err := img.WriteAt(ch.data, ch.off); err != nil {
			return made, errors.Join(fmt.Errorf("fill the base: %w", err), img.Close())
		}
		whole.set(ch)
	}
	whole.resize(f.shape().size)
	return whole, img.Close()
}

// baseOp tells what a base holds from what was written later.
const baseOp = 0xb00000

// on returns a rig for the same chain in another file system, not open, without journal.
func (r *rig) on(fsys vfs.FS) *rig {
	return &rig{f: r.f, fs: fsys, names: slices.Clone(r.names), made: r.made}
}

func (r *rig) top() string { return r.names[len(r.names)-1] }

func (r *rig) open(mode vfs.Mode) error {
	img, err := formats.Open(context.Background(), r.fs, r.top(), r.f.openOptions(r.top(), mode, r.journal))
	if err != nil {
		return err
	}
	r.img = img
	return nil
}

// openOptions returns how the chain with an image on top is opened.
func (f Factory) openOptions(top string, mode vfs.Mode, journal *engine.JournalFile) formats.OpenOptions {
	opts := formats.OpenOptions{Format: f.formatOf(top).Name(), Mode: mode, Journal: journal, Secret: f.Secret}
	if f.Base != nil && f.Base.Unnamed {
		opts.ParentFormats = map[string]string{f.Base.fileName(): f.Base.Format.Name()}
	}
	return opts
}

// formatOf returns the format of a chain's image.
func (f Factory) formatOf(name string) formats.Format {
	if f.Base != nil && name == f.Base.fileName() {
		return f.Base.Format
	}
	return f.Format
}

// qemuOf returns what qemu-img calls the format of a chain's image.
func (f Factory) qemuOf(name string) string {
	if f.Base != nil && name == f.Base.fileName() {
		return f.Base.QEMU
	}
	return f.QEMU
}

// checkBase returns an error unless the image says what the factory says about the base.
func (r *rig) checkBase() error {
	b := r.f.Base
	if b == nil {
		return nil
	}
	want := engine.ParentLink{Name: b.fileName(), Format: b.Format.Name()}
	if b.Unnamed {
		want.Format = ""
	}
	got := r.img.Layers()[0].Parent
	if got == nil {
		return fmt.Errorf("%s says it stands on nothing, want %s", r.top(), want.Name)
	}
	if got.Name != want.Name || got.Format != want.Format {
		return fmt.Errorf("%s says it stands on %s (%q), want %s (%q)", r.top(), got.Name, got.Format, want.Name, want.Format)
	}
	return nil
}

// close closes the image; it is released whatever close returns.
func (r *rig) close() error {
	img := r.img
	r.img = nil
	if img == nil {
		return nil
	}
	return img.Close()
}

// createOverlay creates an overlay on the top image, which parent is.
func (r *rig) createOverlay(parent *engine.Layer) (name string, err error) {
	req := *r.f.Overlay
	req.FS, req.Name, req.Secret = r.fs, r.f.fileName(r.made), r.f.Secret
	req.Parent = &formats.Parent{Name: r.top(), Layer: parent}
	r.made++
	err = r.f.Format.Create(context.Background(), req)
	if err == nil {
		r.f.figures(2).Created.Add(1)
	}
	return req.Name, err
}

// push makes a new overlay the top of the open image. When it fails, the rig is where
// the image is.
func (r *rig) push() error {
	old, err := r.img.Base()
	if err != nil {
		return err
	}
	name, err := r.createOverlay(old)
	if err != nil {
		return err
	}
	layer, err := r.f.Format.Open(formats.OpenRequest{FS: r.fs, Name: name, Mode: vfs.ReadWrite, Secret: r.f.Secret})
	if err != nil {
		return err
	}
	err = r.img.Push(layer)
	if r.img.Layers()[0] == old {
		return errors.Join(err, layer.Close())
	}
	r.names = append(r.names, name)
	return err
}

// readAll reads the whole open disk.
func (r *rig) readAll() ([]byte, error) {
	p := make([]byte, r.img.Info().SizeBytes)
	if _, err := r.img.ReadAt(p, 0); err != nil {
		return nil, fmt.Errorf("read all %d bytes: %w", len(p), err)
	}
	return p, nil
}

// check has the format check every layer of a chain that is not open: corruption is an
// error, and so are leaks unless they are allowed.
func (r *rig) check(leaksAllowed bool) error {
	for _, name := range r.names {
		if err := checkLayer(r.fs, r.f, name, leaksAllowed); err != nil {
			return err
		}
	}
	return nil
}

func checkLayer(fsys vfs.FS, f Factory, name string, leaksAllowed bool) error {
	layer, err := f.formatOf(name).Open(formats.OpenRequest{FS: fsys, Name: name, Mode: vfs.ReadOnly, Secret: f.Secret})
	if err != nil {
		return err
	}
	result, err := layer.Codec.Check(context.Background(), nil, func(done, total int64) {})
	if err = errors.Join(err, layer.Close()); err != nil {
		return fmt.Errorf("check %s: %w", name, err)
	}
	if result.Corruptions == 0 && (leaksAllowed || result.Leaks == 0) {
		return nil
	}
	err = fmt.Errorf("check %s: %w: %d corruptions, %d leaks", name, block.ErrCorrupt, result.Corruptions, result.Leaks)
	for _, p := range result.Problems {
		err = fmt.Errorf("%w\n  %s", err, p.Text)
	}
	return err
}
