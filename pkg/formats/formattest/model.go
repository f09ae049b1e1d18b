package formattest

import (
	"fmt"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// testModel compares an image with a byte slice through random steps, alone and on a
// chain of others.
func testModel(t *testing.T, f Factory) {
	everything := mix{
		opRead: 30, opWrite: 30, opZero: 10, opDiscard: 8, opMap: 8, opFlush: 3, opReopen: 1, opGrow: 1, opPush: 1, opShrink: 1,
	}
	for _, depth := range f.depths() {
		t.Run(fmt.Sprintf("depth=%d", depth), func(t *testing.T) {
			playModel(t, f, vfs.NewMem(), depth, everything, f.scaled(1500))
		})
	}
	// Nothing is given back, so nothing may leak.
	t.Run("writes", func(t *testing.T) {
		playModel(t, f, vfs.NewMem(), 1, mix{opRead: 2, opWrite: 10, opFlush: 1, opReopen: 1}, f.scaled(1500))
	})
	t.Run("directory", func(t *testing.T) {
		dir, err := vfs.OpenDir(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		depths := f.depths()
		playModel(t, f, dir, depths[len(depths)-1], everything, f.scaled(300))
	})
}

func playModel(t *testing.T, f Factory, on vfs.FS, depth int, steps mix, count int) {
	r := testenv.Rand(t)
	fsys := track(on)
	p := newPlayer(t, f, fsys, r, depth)
	p.play(t, f.script(r, steps, count))
	p.finish(t)
	p.rig.checkWithQEMU(t, p.m.live.bytes, p.leaky)
	if leaks := fsys.leaks(); leaks != "" {
		t.Error(leaks)
	}
}

// depths returns the lengths of the chains to test on.
func (f Factory) depths() []int {
	if f.Overlay == nil {
		return []int{1}
	}
	return []int{1, 2, 3}
}
