package formattest

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// testSecret: nothing that a guest wrote to an encrypted image is in its files, and who
// has no password, or a wrong one, does not read it.
func testSecret(t *testing.T, f Factory) {
	if f.Secret == nil {
		t.Skip("images of this kind are not encrypted")
	}
	r := testenv.Rand(t)
	fsys := track(vfs.NewMem())
	f.Overlay = nil // one layer: parents may be plain
	f.Base = nil
	p := newPlayer(t, f, fsys, r, 1)
	p.play(t, f.script(r, mix{opWrite: 6, opFlush: 1}, 20))
	p.mustStep(t, op{kind: opWrite, n: p.m.size()})
	p.finish(t)
	files, err := readFiles(fsys)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range files {
		if at := bytes.Index(b, []byte("@0000")); at >= 0 {
			t.Errorf("%s has at %#x what the guest wrote", name, at)
		}
	}

	ctx := context.Background()
	opts := f.openOptions(p.rig.top(), vfs.ReadOnly, nil)
	opts.Secret = nil
	if img, err := formats.Open(ctx, fsys, p.rig.top(), opts); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("opened without a password: %v, want %v", err, block.ErrInvalid)
		if err == nil {
			img.Close()
		}
	}
	opts.Secret = func(string) ([]byte, error) { return []byte("not the password"), nil }
	if img, err := formats.Open(ctx, fsys, p.rig.top(), opts); err == nil { // some formats cannot tell
		got := make([]byte, p.m.size())
		if _, err := img.ReadAt(got, 0); err == nil && bytes.Contains(got, []byte("@0000")) {
			t.Error("opened with a wrong password, it reads what the guest wrote")
		}
		img.Close()
	}
	create := f.Create
	create.FS, create.Name, create.SizeBytes = fsys, "other."+f.Format.Name(), f.shape().size
	if err := f.Format.Create(ctx, create); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("created without a password: %v, want %v", err, block.ErrInvalid)
	}
	if left, err := readFiles(fsys); err != nil || len(left) != len(files) {
		t.Errorf("a failed create left files (%v)", err)
	}
	if leaks := fsys.leaks(); leaks != "" {
		t.Error(leaks)
	}
}
