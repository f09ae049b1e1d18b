package store_test

import (
	"errors"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Limits are seen by who has the volume open, and no reason to take a repeated creation
// for one of another volume.
func TestChangeLimits(t *testing.T) {
	onBoth(t, func(t *testing.T, s *store.Store, _ vfs.FS) {
		req := store.CreateVolumeRequest{Name: "v", SizeBytes: 16 << 20, Limits: store.Limits{IOPS: 100}}
		create(t, s, req)
		a := attach(t, s, "v", "n1")
		if got := a.Record().Limits; got != req.Limits {
			t.Errorf("attached with %+v, created with %+v", got, req.Limits)
		}
		want := store.Limits{IOPS: 200, BytesPerSecond: 1 << 20}
		rec, err := s.ChangeLimits(t.Context(), "v", func(l *store.Limits) { *l = want })
		if err != nil || rec.Limits != want {
			t.Fatalf("changed to %+v, %v", rec.Limits, err)
		}
		for start := time.Now(); a.Record().Limits != want; time.Sleep(10 * time.Millisecond) {
			if time.Since(start) > time.Minute {
				t.Fatalf("the holder sees %+v, want %+v", a.Record().Limits, want)
			}
		}
		if rec := create(t, s, req); rec.Limits != want {
			t.Errorf("creating it again made its limits %+v", rec.Limits)
		}
		detach(t, s, a)
		if _, err := s.ChangeLimits(t.Context(), "none", func(*store.Limits) {}); !errors.Is(err, block.ErrNotFound) {
			t.Errorf("limits of no volume: %v", err)
		}
	})
}
