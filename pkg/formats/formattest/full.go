package formattest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// testFullStore lets the store run full under an image: its writers are told so, nothing
// else happens, and when there is space again, writing goes on without reopening.
func testFullStore(t *testing.T, f Factory) {
	for _, depth := range f.depths()[:min(2, len(f.depths()))] {
		t.Run(fmt.Sprintf("depth=%d", depth), func(t *testing.T) {
			r := testenv.Rand(t)
			refused := 0
			for range scaled(15) {
				refused += fillStore(t, f, depth, r)
			}
			t.Logf("%d requests were refused for want of space", refused)
			if refused == 0 && thin(f) {
				t.Error("the store never ran full")
			}
		})
	}
}

func thin(f Factory) bool {
	return f.Create.Preallocation == "" || f.Create.Preallocation == formats.PreallocateOff
}

// fillStore returns how many requests found the store full.
func fillStore(t *testing.T, f Factory, depth int, r *rand.Rand) (refused int) {
	t.Helper()
	mem := vfs.NewMem()
	p := newPlayer(t, f, mem, r, depth)
	p.play(t, f.script(r, mix{opWrite: 4, opDiscard: 1}, 5))
	p.mustClose(t)
	if r.IntN(2) == 0 {
		p.rig.journal = &engine.JournalFile{FS: vfs.NewMem(), Name: journalName}
	}
	if err := p.rig.open(vfs.ReadWrite); err != nil {
		t.Fatal(err)
	}
	limitSpace(t, mem, r.Int64N(6*f.shape().cluster))

	script := f.script(r, mix{opRead: 4, opWrite: 12, opZero: 3, opDiscard: 2, opFlush: 3}, 40)
	for i, o := range script {
		ioErr, wrong := p.step(o)
		switch {
		case wrong == nil && ioErr == nil || unsupported(o, ioErr):
			continue
		case wrong == nil && o.kind != opFlush && block.Errno(ioErr) == syscall.ENOSPC:
			refused++
			continue
		}
		t.Fatalf("store full: step %d, %s: %v\nsteps until then:\n%s", i, o, errors.Join(ioErr, wrong), show(script, i))
	}
	if err := p.readBack(); err != nil {
		t.Fatalf("store full: %v", err)
	}
	left := p.rig.on(mem.Clone())
	if _, err := left.inspect(); err != nil {
		t.Fatalf("opened in a full store: %v", err)
	}
	mem.SetCapacity(-1)
	p.play(t, f.script(r, mix{opRead: 2, opWrite: 8, opZero: 2, opDiscard: 1, opFlush: 1}, 10))
	p.finish(t)
	return refused
}

// limitSpace leaves free bytes in the store.
func limitSpace(t *testing.T, mem *vfs.Mem, free int64) {
	t.Helper()
	const plenty = 1 << 40
	mem.SetCapacity(plenty)
	usage, err := mem.Usage()
	if err != nil {
		t.Fatal(err)
	}
	mem.SetCapacity(plenty - usage.FreeBytes + free)
}
