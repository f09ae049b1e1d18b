package formattest

import (
	"fmt"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// testModel compares an image with a byte slice through random steps, alone and on a
// chain of others.
func testModel(t *testing.T, f Factory) {
	depths := []int{1, 2, 3}
	if f.Overlay == nil {
		depths = []int{1}
	}
	for _, depth := range depths {
		t.Run(fmt.Sprintf("depth=%d", depth), func(t *testing.T) {
			r := testenv.Rand(t)
			fsys := track(vfs.NewMem())
			p := newPlayer(t, f, fsys, r, depth)
			p.play(t, f.script(r, mix{
				opRead: 30, opWrite: 30, opZero: 10, opDiscard: 8, opMap: 8, opFlush: 3, opReopen: 1, opGrow: 1, opPush: 1,
			}, scaled(1500)))
			p.finish(t)
			p.rig.checkWithQEMU(t, p.m.live.bytes)
			if leaks := fsys.leaks(); leaks != "" {
				t.Error(leaks)
			}
		})
	}
}

// scaled returns how many of something a test does: n, or a fifth of it in short mode.
func scaled(n int) int {
	if testing.Short() {
		return max(n/5, 1)
	}
	return n
}
