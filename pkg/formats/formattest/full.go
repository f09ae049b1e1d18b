package formattest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// testFullStore lets the store run full under an image: its writers are told so, nothing
// else happens, and when there is space again, writing goes on without reopening.
func testFullStore(t *testing.T, f Factory) {
	for _, depth := range f.depths()[:min(2, len(f.depths()))] {
		t.Run(fmt.Sprintf("depth=%d", depth), func(t *testing.T) {
			fillStores(t, f, func(mem *vfs.Mem) vfs.FS { return mem }, depth)
		})
	}
	// NFS before 4.2 and SMB reserve nothing: there a flush may find the store full, and
	// has to be the last one.
	t.Run("no reservations", func(t *testing.T) {
		hook := vfs.If(vfs.OfKind(vfs.OpAllocate), func(vfs.Op) error { return errors.ErrUnsupported })
		fillStores(t, f, func(mem *vfs.Mem) vfs.FS { return vfs.Inject(mem, hook) }, 1)
	})
}

func fillStores(t *testing.T, f Factory, on func(*vfs.Mem) vfs.FS, depth int) {
	r := testenv.Rand(t)
	const most = 15
	refused, poisoned := 0, 0
	for i := 0; i < f.scaled(most) || refused == 0 && i < most; i++ {
		store := vfs.NewMem()
		s := fullStore{mem: store, p: newPlayer(t, f, on(store), r, depth), r: r, reserves: on(store) == vfs.FS(store)}
		refused += s.fill(t)
		if s.p.poisoned {
			poisoned++
		}
		s.makeSpace(t)
	}
	t.Logf("%d requests were refused for want of space, %d flushes failed", refused, poisoned)
	if refused == 0 && thin(f) {
		t.Error("the store never ran full")
	}
}

func thin(f Factory) bool {
	return f.Create.Preallocation == "" || f.Create.Preallocation == formats.PreallocateOff
}

// fullStore is a store with an image that is open.
type fullStore struct {
	mem      *vfs.Mem
	p        *player
	r        *rand.Rand
	reserves bool // it can reserve space
}

// fill fills the store, and returns how many requests were told that it is full.
func (s *fullStore) fill(t *testing.T) (refused int) {
	t.Helper()
	f := s.p.rig.f
	s.p.leaky = true      // what is reserved ahead stays when a flush fails
	if s.r.IntN(2) == 0 { // otherwise tables have no space yet, either
		s.p.play(t, f.script(s.r, mix{opWrite: 4, opDiscard: 1}, 5))
	}
	s.p.mustClose(t)
	if s.r.IntN(2) == 0 {
		s.p.rig.journal = &engine.JournalFile{FS: vfs.NewMem(), Name: journalName}
	}
	if err := s.p.rig.open(vfs.ReadWrite); err != nil {
		t.Fatal(err)
	}
	limitSpace(t, s.mem, s.r.Int64N(min(6*f.shape().cluster, f.shape().size/4)))

	script := f.script(s.r, mix{opRead: 4, opWrite: 12, opZero: 3, opDiscard: 2, opFlush: 3}, 40)
	for i, o := range script {
		ioErr, wrong := s.p.step(o)
		switch {
		case wrong != nil:
		case ioErr == nil || s.p.unsupported(o, ioErr):
			continue
		case s.p.poisoned && !s.reserves:
			return refused
		case o.kind != opFlush && block.Errno(ioErr) == syscall.ENOSPC:
			refused++
			continue
		}
		t.Fatalf("store full: step %d, %s: %v\nsteps until then:\n%s", i, o, errors.Join(ioErr, wrong), show(script, i))
	}
	if err := s.p.readBack(); err != nil {
		t.Fatalf("store full: %v", err)
	}
	if _, err := s.p.rig.on(s.mem.Clone()).inspect(); err != nil {
		t.Fatalf("opened in a full store: %v", err)
	}
	return refused
}

// makeSpace gives the store space again: everything works, at once if no flush failed,
// else when the image has been opened anew.
func (s *fullStore) makeSpace(t *testing.T) {
	t.Helper()
	s.mem.SetCapacity(-1)
	if s.p.poisoned {
		if err := s.p.close(); err == nil {
			t.Fatal("closed without an error after a failed flush")
		}
		s.p.rig = s.p.rig.on(s.p.rig.fs)
		if err := s.p.rig.open(vfs.ReadWrite); err != nil {
			t.Fatal(err)
		}
	}
	s.p.play(t, s.p.rig.f.script(s.r, mix{opRead: 2, opWrite: 8, opZero: 2, opDiscard: 1, opFlush: 1}, 10))
	s.p.finish(t)
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
