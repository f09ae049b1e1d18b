package store

import (
	"context"
	"errors"
	"fmt"
	"path"
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// What is asked for while somebody else has the store's lock is done together: the records
// are read once, and not once for each. Of two who want one name for a snapshot, one gets it;
// who gives up while waiting gets nothing.
func TestWithAll_Together(t *testing.T) {
	const volumes = 30
	m := vfs.NewMem()
	var reads atomic.Int64
	counted := vfs.Inject(m, func(op vfs.Op) error {
		if op.Kind == vfs.OpOpen && path.Base(op.Name) == recordFile {
			reads.Add(1)
		}
		return nil
	})
	if _, err := Init(m); err != nil {
		t.Fatal(err)
	}
	s, err := Open(t.Context(), "test", counted, Options{})
	if err != nil {
		t.Fatal(err)
	}
	volume := func(i int) string { return fmt.Sprint("v", i) }
	for i := range volumes {
		if _, err := s.CreateVolume(t.Context(), CreateVolumeRequest{Name: volume(i), SizeBytes: 1 << 20}); err != nil {
			t.Fatal(err)
		}
	}
	held, err := newLocker(m).lock(t.Context(), storeLock)
	if err != nil {
		t.Fatal(err)
	}
	hurried, giveUp := context.WithCancel(t.Context())
	snapshot := func(i int) error {
		ctx, name := t.Context(), fmt.Sprint("snap", i)
		switch i {
		case 0, 1:
			name = "wanted-by-two"
		case 2:
			ctx = hurried
		}
		_, err := s.CreateSnapshot(ctx, volume(i), name)
		return err
	}
	results := make([]chan error, volumes)
	for i := range results {
		results[i] = make(chan error, 1)
		go func() { results[i] <- snapshot(i) }()
	}
	queued := func() int {
		s.batches.mu.Lock()
		defer s.batches.mu.Unlock()
		return len(s.batches.queue)
	}
	wait(t, func() bool { return queued() == volumes })
	giveUp()
	wait(t, func() bool { return queued() == volumes-1 })
	reads.Store(0)
	held.Unlock()
	var refused int
	for i, result := range results {
		err := <-result
		switch {
		case i == 2:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("who gave up got %v, want %v", err, context.Canceled)
			}
		case i < 2 && errors.Is(err, block.ErrExists):
			refused++
		case err != nil:
			t.Errorf("snapshot %d: %v", i, err)
		}
	}
	if refused != 1 {
		t.Errorf("of two who wanted one name %d were refused, want 1", refused)
	}
	if rec, err := s.Volume(t.Context(), volume(2)); err != nil || len(rec.Snapshots) > 0 {
		t.Errorf("who gave up has %+v, %v", rec.Snapshots, err)
	}
	// Each needs its own record a few times; one reading of all for each would be 900.
	if n := reads.Load(); n > volumes*volumes/2 {
		t.Errorf("%d records were read, want far fewer", n)
	}
	if again, err := newLocker(m).lock(t.Context(), storeLock); err != nil {
		t.Error(err)
	} else {
		again.Unlock()
	}
}

func wait(t *testing.T, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("still not after a minute")
		}
	}
}
