package store_test

import (
	"errors"
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
