package wire

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// calls are all methods of a store that need it.
func calls(ctx context.Context, s driver.Store) map[string]error {
	errs := map[string]error{}
	note := func(method string, err error) { errs[method] = err }
	_, err := s.CreateVolume(ctx, driver.VolumeSpec{Name: "v", SizeBytes: 1 << 20})
	note("CreateVolume", err)
	_, err = s.Volume(ctx, "v")
	note("Volume", err)
	_, err = s.Volumes(ctx)
	note("Volumes", err)
	_, err = s.EnsureImageVolume(ctx, "none.vmdk")
	note("EnsureImageVolume", err)
	note("ChangeLimits", s.ChangeLimits(ctx, "v", driver.LimitsChange{}))
	_, err = s.Expand(ctx, "v", 2<<20, 0)
	note("Expand", err)
	_, err = s.CreateSnapshot(ctx, "v", "s")
	note("CreateSnapshot", err)
	_, err = s.Snapshot(ctx, "v", "s")
	note("Snapshot", err)
	_, err = s.Snapshots(ctx)
	note("Snapshots", err)
	note("DeleteSnapshot", s.DeleteSnapshot(ctx, "v", "s"))
	_, err = s.Publish(ctx, driver.Publication{Volume: "v", Node: "n"})
	note("Publish", err)
	note("Unpublish", s.Unpublish(ctx, "v", "n"))
	note("DeleteVolume", s.DeleteVolume(ctx, "v"))
	_, err = s.AvailableBytes(ctx)
	note("AvailableBytes", err)
	return errs
}

func TestLateStore(t *testing.T) {
	ctx := context.Background()
	late := &LateStore{}
	for _, says := range []string{"being opened", "mount nas:/x: Connection refused"} {
		for method, err := range calls(ctx, late) {
			// Not found would have a caller forget the volume.
			if !errors.Is(err, driver.ErrUnavailable) || errors.Is(err, block.ErrNotFound) || !strings.Contains(err.Error(), says) {
				t.Errorf("%s before the store is there: %v, want that it is unavailable: %s", method, err, says)
			}
		}
		if late.Problem() == nil {
			t.Error("there is no problem before the store is there")
		}
		late.SetProblem(fmt.Errorf("mount nas:/x: Connection refused (%w)", block.ErrNotFound))
	}
	fsys := vfs.NewMem()
	if _, err := store.Init(fsys); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(ctx, "main", fsys, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	late.Set(Store(s))
	if err := late.Problem(); err != nil {
		t.Errorf("the store is there: %v", err)
	}
	for method, err := range calls(ctx, late) {
		if errors.Is(err, driver.ErrUnavailable) {
			t.Errorf("%s once the store is there: %v", method, err)
		}
	}
	if _, err := late.Volumes(ctx); err != nil {
		t.Errorf("volumes once the store is there: %v", err)
	}
}
