package formattest

import (
	"context"
	"errors"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// testLocks: one writer, or any number of readers, and nobody writes to what an overlay
// stands on.
func testLocks(t *testing.T, f Factory) {
	fsys := track(vfs.NewMem())
	p := newPlayer(t, f, fsys, testenv.Rand(t), 1)
	name := p.rig.top()
	expect := func(when string, mode vfs.Mode, want error) {
		t.Helper()
		other := p.rig.on(fsys)
		other.names = []string{name}
		err := other.open(mode)
		if !errors.Is(err, want) || (err == nil) != (want == nil) {
			t.Errorf("%s, open for %s: %v, want %v", when, modeName(mode), err, want)
		}
		if err := other.close(); err != nil {
			t.Error(err)
		}
	}
	expect("while it is written", vfs.ReadWrite, block.ErrLocked)
	expect("while it is written", vfs.ReadOnly, block.ErrLocked)
	looking := f.openOptions(name, vfs.ReadOnly, nil)
	looking.NoLock = true
	looker, err := formats.Open(context.Background(), fsys, name, looking)
	if err != nil {
		t.Errorf("while it is written, open without locks: %v", err)
	} else if err := looker.Close(); err != nil {
		t.Error(err)
	}
	if f.Overlay != nil {
		p.mustStep(t, op{kind: opPush})
		expect("below the layer that is written", vfs.ReadOnly, nil)
		expect("below the layer that is written", vfs.ReadWrite, block.ErrLocked)
		p.mustClose(t)
		p.rig = p.rig.on(fsys)
		if err := p.rig.open(vfs.ReadOnly); err != nil {
			t.Fatal(err)
		}
		expect("below a layer that is read", vfs.ReadOnly, nil)
		expect("below a layer that is read", vfs.ReadWrite, block.ErrLocked)
		name = p.rig.top()
	} else {
		p.mustClose(t)
		if err := p.rig.open(vfs.ReadOnly); err != nil {
			t.Fatal(err)
		}
	}
	expect("while it is read", vfs.ReadOnly, nil)
	expect("while it is read", vfs.ReadWrite, block.ErrLocked)
	p.mustClose(t)
	expect("when it is closed", vfs.ReadWrite, nil)
	if leaks := fsys.leaks(); leaks != "" {
		t.Error(leaks)
	}
}

func modeName(mode vfs.Mode) string {
	if mode == vfs.ReadWrite {
		return "writing"
	}
	return "reading"
}
