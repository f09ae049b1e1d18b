package store_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func TestLife(t *testing.T) {
	onBoth(t, func(t *testing.T, s *store.Store, fsys vfs.FS) {
		ctx := t.Context()
		rec := volume(t, s, "v")
		if rec.SizeBytes != 8*mib || rec.Format != "qcow2" {
			t.Errorf("made %+v", rec)
		}
		a := attach(t, s, "v", "n1")
		writeStamp(t, a, 0, 1)
		writeStamp(t, a, 4*mib, 1)
		_, err := s.CreateSnapshot(ctx, "v", "s1")
		must(t, err)
		writeStamp(t, a, 0, 2)
		expectStamp(t, a, 4*mib, 1)
		_, err = s.Expand(ctx, "v", 16*mib, 0)
		must(t, err)
		if size := a.Info().SizeBytes; size != 16*mib {
			t.Errorf("the device has %d bytes after growing", size)
		}
		writeStamp(t, a, 12*mib, 2)
		create(t, s, store.CreateVolumeRequest{Name: "restored", Source: store.Source{Snapshot: "v@s1"}})
		create(t, s, store.CreateVolumeRequest{Name: "clone", Source: store.Source{Volume: "v"}})
		writeStamp(t, a, 0, 3)
		withVolume(t, s, "restored", store.AttachOptions{}, func(d block.Device) {
			expectStamp(t, d, 0, 1)
			expectStamp(t, d, 4*mib, 1)
			if d.Info().SizeBytes != 8*mib {
				t.Errorf("restored %d bytes", d.Info().SizeBytes)
			}
		})
		withVolume(t, s, "clone", store.AttachOptions{}, func(d block.Device) {
			expectStamp(t, d, 0, 2)
			expectStamp(t, d, 12*mib, 2)
		})
		withVolume(t, s, "v", store.AttachOptions{Snapshot: "s1", ReadOnly: true}, func(d block.Device) { expectStamp(t, d, 0, 1) })
		data, err := s.Tree(ctx)
		must(t, err)
		var b strings.Builder
		must(t, data.Draw(&b))
		t.Logf("\n%s", b.String())
		if err := s.DeleteVolume(ctx, "v"); !errors.Is(err, block.ErrBusy) || !strings.Contains(err.Error(), "n1") {
			t.Errorf("delete a published volume: %v", err)
		}
		detach(t, s, a)
		expectClean(t, s)
		must(t, s.DeleteVolume(ctx, "v"))
		must(t, s.DeleteSnapshot(ctx, "v", "s1"))
		must(t, s.DeleteVolume(ctx, "clone"))
		expectClean(t, s)
		must(t, s.DeleteVolume(ctx, "restored"))
		expectEmpty(t, fsys)
	})
}

// Records are read by several at once when there are many; none is lost or twice there, and
// one that cannot be read is told with the others.
func TestVolumes_Many(t *testing.T) {
	s, m := newStore(t)
	const volumes = 50
	for i := range volumes {
		create(t, s, store.CreateVolumeRequest{Name: fmt.Sprintf("v%02d", i), SizeBytes: mib})
	}
	f, err := m.Open("volumes/v17/volume.json", vfs.ReadWrite)
	must(t, err)
	must(t, f.Truncate(1))
	must(t, f.Close())
	all, err := s.Volumes(t.Context())
	must(t, err)
	for i, e := range all {
		if want := fmt.Sprintf("v%02d", i); e.Name != want || (e.Err != nil) != (i == 17) || e.Err == nil && e.Record.Name != want {
			t.Errorf("volume %d is %s (record of %q, %v), want %s", i, e.Name, e.Record.Name, e.Err, want)
		}
	}
	if len(all) != volumes {
		t.Errorf("%d volumes are listed, want %d", len(all), volumes)
	}
}
