package store

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func newLocker(fsys vfs.FS) *locker { return &locker{fs: fsys, local: map[string]chan struct{}{}} }

// Whoever opened the lock file before it was removed and made anew must not take the old
// file's lock for the new one's.
func TestLock_FileMadeAnew(t *testing.T) {
	for _, remake := range []bool{true, false} {
		m := vfs.NewMem()
		first, err := newLocker(m).lock(t.Context(), "lock")
		if err != nil {
			t.Fatal(err)
		}
		first.Unlock()
		var other *heldLock
		slow := newLocker(vfs.Inject(m, vfs.If(vfs.OfKind(vfs.OpLock), vfs.CrashPoint(0, func() {
			if err := m.Remove("lock"); err != nil {
				t.Error(err)
			}
			if !remake {
				return
			}
			if other, err = newLocker(m).lock(t.Context(), "lock"); err != nil {
				t.Error(err)
			}
		}))))
		f, err := slow.try("lock")
		if !errors.Is(err, block.ErrLocked) {
			t.Errorf("remake %t: locked %v, %v", remake, f, err)
		}
		other.Unlock()
		again, err := slow.lock(t.Context(), "lock")
		if err != nil {
			t.Fatal(err)
		}
		again.Unlock()
	}
}

func TestLock_Waits(t *testing.T) {
	m := vfs.NewMem()
	held, err := newLocker(m).lock(t.Context(), "lock")
	if err != nil {
		t.Fatal(err)
	}
	same := newLocker(m)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := same.lock(ctx, "lock"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a lock that is held: %v", err)
	}
	got := make(chan error)
	go func() {
		l, err := same.lock(t.Context(), "lock")
		l.Unlock()
		got <- err
	}()
	held.Unlock()
	held.Unlock()
	if err := <-got; err != nil {
		t.Error(err)
	}
}
