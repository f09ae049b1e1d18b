package store_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// relinkable returns the formats whose volumes are merged while they are in use: all that
// can have snapshots.
func relinkable() (names []string) {
	for _, f := range formats.All() {
		if len(f.Options().OverlaySubformats) > 0 {
			names = append(names, f.Name())
		}
	}
	return names
}

// openEagerStore opens a store whose holders merge as soon as there is something to merge.
func openEagerStore(tb testing.TB, fsys vfs.FS) *store.Store {
	tb.Helper()
	_, err := store.Init(fsys)
	must(tb, err)
	eager := fast
	eager.MergeInterval = time.Millisecond
	s, err := store.Open(tb.Context(), "test", fsys, eager)
	must(tb, err)
	return s
}

func attachNew(tb testing.TB, s *store.Store, format string) *store.Attached {
	tb.Helper()
	create(tb, s, store.CreateVolumeRequest{Name: "v", SizeBytes: 8 * mib, Format: format})
	return attach(tb, s, "v", "n1")
}

func waitForLayers(tb testing.TB, s *store.Store, most int) {
	tb.Helper()
	waitFor(tb, func() bool {
		_, err := s.GC(tb.Context())
		must(tb, err)
		rec, err := s.Volume(tb.Context(), "v")
		must(tb, err)
		return len(rec.Layers) <= most && rec.Relink == nil
	})
}

// A volume that is never detached and has a snapshot taken every day, of which the last
// few are kept, stays as short as that.
func TestMergeLive_ChainStaysShort(t *testing.T) {
	for _, format := range relinkable() {
		t.Run(format, func(t *testing.T) {
			m := vfs.NewMem()
			s := openEagerStore(t, m)
			a := attachNew(t, s, format)
			stop := make(chan struct{})
			load := &counter{device: a, off: 4 * mib}
			var running sync.WaitGroup
			running.Go(func() {
				if err := load.run(stop); err != nil {
					t.Error(err)
				}
			})
			const days, kept = 12, 2
			for day := range days {
				generation := byte(day + 1)
				writeStamp(t, a, 0, generation)
				writeStamp(t, a, int64(day%3+1)*mib, generation)
				_, err := s.CreateSnapshot(t.Context(), "v", fmt.Sprintf("day%d", day))
				must(t, err)
				if day >= kept {
					must(t, s.DeleteSnapshot(t.Context(), "v", fmt.Sprintf("day%d", day-kept)))
				}
				waitForLayers(t, s, kept+2)
				expectStamp(t, a, 0, generation)
				for back := range min(day+1, kept) {
					withVolume(t, s, "v", store.AttachOptions{Snapshot: fmt.Sprintf("day%d", day-back), ReadOnly: true}, func(d block.Device) {
						expectStamp(t, d, 0, generation-byte(back))
						expectStamp(t, d, int64((day-back)%3+1)*mib, generation-byte(back))
					})
				}
			}
			close(stop)
			running.Wait()
			if first, second := readCounter(t, a, load.off); first != second || first != load.completed.Load() {
				t.Errorf("the volume holds %d and %d, want %d", first, second, load.completed.Load())
			}
			expectSound(t, s, "merged")
			for day := days - kept; day < days; day++ {
				must(t, s.DeleteSnapshot(t.Context(), "v", fmt.Sprintf("day%d", day)))
			}
			waitForLayers(t, s, 1)
			expectStamp(t, a, 0, days)
			detach(t, s, a)
			_, err := s.GC(t.Context()) // of a merge that the detach may have ended
			must(t, err)
			if format == "vpc" {
				// Between the tables that changed parents leave behind there can be space for a
				// block, which is only found, and used again, when the image is opened next.
				expectSound(t, s, "detached")
			} else {
				expectClean(t, s)
			}
		})
	}
}

// Power lost, or the process killed, at any change of the store during a live merge:
// volume and snapshots hold what they held, and the next holder goes on.
func TestMergeLive_Interrupted(t *testing.T) {
	for _, format := range relinkable() {
		t.Run(format, func(t *testing.T) { interruptMergeLive(t, format) })
	}
}

func interruptMergeLive(t *testing.T, format string) {
	r := testenv.Rand(t)
	m := vfs.NewMem()
	var mu sync.Mutex
	var lefts []*vfs.Mem
	armed := false
	s := openEagerStore(t, vfs.Inject(m, vfs.If(vfs.Changing, func(vfs.Op) error {
		mu.Lock()
		defer mu.Unlock()
		if armed {
			lefts = append(lefts, m.Crash(r))
			if len(lefts)%3 == 0 {
				lefts = append(lefts, m.Clone())
			}
		}
		return nil
	})))
	arm := func(on bool) {
		mu.Lock()
		defer mu.Unlock()
		armed = on
	}
	a := attachNew(t, s, format)
	for n := range 4 {
		writeStamp(t, a, 0, byte(n+1))
		writeStamp(t, a, int64(n+1)*mib, byte(n+1))
		_, err := s.CreateSnapshot(t.Context(), "v", fmt.Sprintf("s%d", n+1))
		must(t, err)
	}
	writeStamp(t, a, 0, 5)
	must(t, a.Flush())
	arm(true)
	for _, n := range []int{1, 2, 4} { // what is left is s3, with 1 and 2 in it, and the volume
		must(t, s.DeleteSnapshot(t.Context(), "v", fmt.Sprintf("s%d", n)))
	}
	waitForLayers(t, s, 2)
	arm(false)
	must(t, a.Close())

	check := func(s *store.Store, d block.Device) {
		for n := range 4 {
			expectStamp(t, d, int64(n+1)*mib, byte(n+1))
		}
		withVolume(t, s, "v", store.AttachOptions{Snapshot: "s3", ReadOnly: true}, func(d block.Device) {
			expectStamp(t, d, 0, 3)
			for n := range 3 {
				expectStamp(t, d, int64(n+1)*mib, byte(n+1))
			}
		})
	}
	for i, left := range lefts {
		s := openEagerStore(t, left)
		must(t, s.Unpublish(t.Context(), "v", ""))
		b := attach(t, s, "v", "n2")
		check(s, b)
		expectStamp(t, b, 0, 5)
		writeStamp(t, b, 0, 6)
		for _, n := range []int{1, 2, 4} {
			must(t, s.DeleteSnapshot(t.Context(), "v", fmt.Sprintf("s%d", n)))
		}
		waitForLayers(t, s, 2)
		check(s, b)
		expectStamp(t, b, 0, 6)
		must(t, b.Close())
		expectSound(t, s, fmt.Sprintf("point %d", i))
		deleteAll(t, s, left, fmt.Sprintf("point %d", i))
		if t.Failed() {
			t.Fatalf("at point %d of %d", i, len(lefts))
		}
	}
	t.Logf("%d points", len(lefts))
}
