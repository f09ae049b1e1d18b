package store_test

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// scenario is an operation that is interrupted everywhere. op is what a caller repeats
// until it succeeds; check looks at what is there then.
type scenario struct {
	name  string
	setup func(t *testing.T, s *store.Store, fsys vfs.FS)
	op    func(ctx context.Context, s *store.Store) error
	check func(t *testing.T, s *store.Store)
}

// putImage makes images/<name> with a stamp at 0 and at 1 MiB.
func putImage(tb testing.TB, fsys vfs.FS, name, format string, size int64) {
	tb.Helper()
	f, err := formats.Lookup(format)
	must(tb, err)
	must(tb, f.Create(tb.Context(), formats.CreateRequest{FS: fsys, Name: "images/" + name, SizeBytes: size}))
	img, err := formats.Open(tb.Context(), fsys, "images/"+name, formats.OpenOptions{Format: format, Mode: vfs.ReadWrite})
	must(tb, err)
	writeStamp(tb, img, 0, 9)
	writeStamp(tb, img, mib, 9)
	must(tb, img.Close())
}

func ignoreRecord(_ store.Record, err error) error           { return err }
func ignoreSnapshot(_ store.SnapshotRecord, err error) error { return err }

// written makes a volume with generation 1 at 0 and at 1 MiB.
func written(tb testing.TB, s *store.Store, name string) {
	tb.Helper()
	volume(tb, s, name)
	rewrite(tb, s, name, 1)
}

func rewrite(tb testing.TB, s *store.Store, name string, generation byte) {
	tb.Helper()
	withVolume(tb, s, name, store.AttachOptions{}, func(d block.Device) {
		writeStamp(tb, d, 0, generation)
		writeStamp(tb, d, mib, generation)
	})
}

func expectGeneration(tb testing.TB, s *store.Store, name, snapshot string, generation byte) {
	tb.Helper()
	withVolume(tb, s, name, store.AttachOptions{Snapshot: snapshot, ReadOnly: true}, func(d block.Device) {
		expectStamp(tb, d, 0, generation)
		expectStamp(tb, d, mib, generation)
		expectStamp(tb, d, 2*mib, 0)
	})
}

func createOp(req store.CreateVolumeRequest) func(context.Context, *store.Store) error {
	return func(ctx context.Context, s *store.Store) error { return ignoreRecord(s.CreateVolume(ctx, req)) }
}

func scenarios() []scenario {
	return []scenario{
		{
			name:  "CreateEmpty",
			op:    createOp(store.CreateVolumeRequest{Name: "v", SizeBytes: 4 * mib}),
			check: func(t *testing.T, s *store.Store) { expectGeneration(t, s, "v", "", 0) },
		},
		{
			name:  "CreateRaw",
			op:    createOp(store.CreateVolumeRequest{Name: "v", SizeBytes: 4 * mib, Format: "raw"}),
			check: func(t *testing.T, s *store.Store) { expectGeneration(t, s, "v", "", 0) },
		},
		{
			name:  "CreateFlat",
			op:    createOp(store.CreateVolumeRequest{Name: "v", SizeBytes: 4 * mib, Format: "vmdk", Parameters: store.Parameters{Subformat: "monolithicFlat"}}),
			check: func(t *testing.T, s *store.Store) { expectGeneration(t, s, "v", "", 0) },
		},
		{
			name:  "CreateOverlay",
			setup: func(t *testing.T, _ *store.Store, fsys vfs.FS) { putImage(t, fsys, "i.vmdk", "vmdk", 4*mib) },
			op:    createOp(store.CreateVolumeRequest{Name: "v", Source: store.Source{Image: "i.vmdk"}}),
			check: func(t *testing.T, s *store.Store) { expectGeneration(t, s, "v", "", 9) },
		},
		{
			name:  "CreateCopy",
			setup: func(t *testing.T, _ *store.Store, fsys vfs.FS) { putImage(t, fsys, "i.img", "raw", 4*mib) },
			op:    createOp(store.CreateVolumeRequest{Name: "v", Source: store.Source{Image: "i.img", Mode: store.ImageCopy}}),
			check: func(t *testing.T, s *store.Store) { expectGeneration(t, s, "v", "", 9) },
		},
		{
			name:  "EnsureImage",
			setup: func(t *testing.T, _ *store.Store, fsys vfs.FS) { putImage(t, fsys, "i 1.vmdk", "vmdk", 4*mib) },
			op: func(ctx context.Context, s *store.Store) error {
				return ignoreRecord(s.EnsureImageVolume(ctx, "i 1.vmdk"))
			},
			check: func(t *testing.T, s *store.Store) { expectGeneration(t, s, "images%2Fi%201.vmdk", "", 9) },
		},
		{
			name:  "Snapshot",
			setup: func(t *testing.T, s *store.Store, _ vfs.FS) { written(t, s, "v") },
			op: func(ctx context.Context, s *store.Store) error {
				return ignoreSnapshot(s.CreateSnapshot(ctx, "v", "s"))
			},
			check: func(t *testing.T, s *store.Store) {
				expectGeneration(t, s, "v", "", 1)
				rewrite(t, s, "v", 2)
				expectGeneration(t, s, "v", "s", 1)
				expectGeneration(t, s, "v", "", 2)
			},
		},
		{
			name: "Restore",
			setup: func(t *testing.T, s *store.Store, _ vfs.FS) {
				written(t, s, "v")
				must(t, ignoreSnapshot(s.CreateSnapshot(t.Context(), "v", "s")))
				rewrite(t, s, "v", 2)
			},
			op: createOp(store.CreateVolumeRequest{Name: "r", SizeBytes: 12 * mib, Source: store.Source{Snapshot: "v@s"}}),
			check: func(t *testing.T, s *store.Store) {
				expectGeneration(t, s, "r", "", 1)
				rewrite(t, s, "r", 3)
				expectGeneration(t, s, "v", "", 2)
			},
		},
		{
			name:  "Clone",
			setup: func(t *testing.T, s *store.Store, _ vfs.FS) { written(t, s, "v") },
			op:    createOp(store.CreateVolumeRequest{Name: "c", Source: store.Source{Volume: "v"}}),
			check: func(t *testing.T, s *store.Store) {
				rewrite(t, s, "v", 2)
				expectGeneration(t, s, "c", "", 1)
				rewrite(t, s, "c", 3)
				expectGeneration(t, s, "v", "", 2)
			},
		},
		{
			name:  "Expand",
			setup: func(t *testing.T, s *store.Store, _ vfs.FS) { written(t, s, "v") },
			op: func(ctx context.Context, s *store.Store) error {
				return ignoreRecord(s.Expand(ctx, "v", 20*mib, 0))
			},
			check: func(t *testing.T, s *store.Store) {
				expectGeneration(t, s, "v", "", 1)
				withVolume(t, s, "v", store.AttachOptions{}, func(d block.Device) { writeStamp(t, d, 19*mib, 1) })
			},
		},
		{
			name:  "Delete",
			setup: func(t *testing.T, s *store.Store, _ vfs.FS) { written(t, s, "v") },
			op:    func(ctx context.Context, s *store.Store) error { return s.DeleteVolume(ctx, "v") },
			check: func(t *testing.T, s *store.Store) {
				if _, err := s.Volume(t.Context(), "v"); !errors.Is(err, block.ErrNotFound) {
					t.Errorf("a deleted volume: %v", err)
				}
			},
		},
		{
			name: "DeleteUnderClone",
			setup: func(t *testing.T, s *store.Store, _ vfs.FS) {
				written(t, s, "v")
				create(t, s, store.CreateVolumeRequest{Name: "c", Source: store.Source{Volume: "v"}})
			},
			op:    func(ctx context.Context, s *store.Store) error { return s.DeleteVolume(ctx, "v") },
			check: func(t *testing.T, s *store.Store) { expectGeneration(t, s, "c", "", 1) },
		},
		{
			name: "DeleteLastClone",
			setup: func(t *testing.T, s *store.Store, _ vfs.FS) {
				written(t, s, "v")
				create(t, s, store.CreateVolumeRequest{Name: "c", Source: store.Source{Volume: "v"}})
				must(t, s.DeleteVolume(t.Context(), "v"))
			},
			op: func(ctx context.Context, s *store.Store) error { return s.DeleteVolume(ctx, "c") },
		},
		{
			name: "DeleteSnapshot",
			setup: func(t *testing.T, s *store.Store, _ vfs.FS) {
				written(t, s, "v")
				must(t, ignoreSnapshot(s.CreateSnapshot(t.Context(), "v", "s")))
				rewrite(t, s, "v", 2)
			},
			op:    func(ctx context.Context, s *store.Store) error { return s.DeleteSnapshot(ctx, "v", "s") },
			check: func(t *testing.T, s *store.Store) { expectGeneration(t, s, "v", "", 2) },
		},
		{
			name:  "Merge",
			setup: mergeable,
			op: func(ctx context.Context, s *store.Store) error {
				_, err := s.GC(ctx)
				return err
			},
			check: func(t *testing.T, s *store.Store) {
				expectGeneration(t, s, "v", "", 3)
				expectGeneration(t, s, "v", "s1", 1)
				rec, err := s.Volume(t.Context(), "v")
				must(t, err)
				if len(rec.Layers) != 2 {
					t.Errorf("%d layers are left, want 2", len(rec.Layers))
				}
			},
		},
		{
			name: "MergeBelowSnapshot",
			setup: func(t *testing.T, s *store.Store, fsys vfs.FS) {
				mergeable(t, s, fsys)
				must(t, ignoreSnapshot(s.CreateSnapshot(t.Context(), "v", "s4")))
				rewrite(t, s, "v", 4)
				must(t, s.DeleteSnapshot(t.Context(), "v", "s1"))
			},
			op: func(ctx context.Context, s *store.Store) error {
				_, err := s.GC(ctx)
				return err
			},
			check: func(t *testing.T, s *store.Store) {
				expectGeneration(t, s, "v", "", 4)
				expectGeneration(t, s, "v", "s4", 3)
				rec, err := s.Volume(t.Context(), "v")
				must(t, err)
				if len(rec.Layers) != 2 {
					t.Errorf("%d layers are left, want 2", len(rec.Layers))
				}
			},
		},
		{
			name:  "Publish",
			setup: func(t *testing.T, s *store.Store, _ vfs.FS) { written(t, s, "v") },
			op: func(ctx context.Context, s *store.Store) error {
				_, err := s.Publish(ctx, store.PublishRequest{Volume: "v", Node: "n"})
				return err
			},
			check: func(t *testing.T, s *store.Store) {
				rec, err := s.Volume(t.Context(), "v")
				must(t, err)
				if len(rec.Attachments) != 1 || rec.Attachments[0].Epoch != rec.Epoch {
					t.Errorf("published %+v", rec)
				}
			},
		},
	}
}

// mergeable makes a volume whose second and third snapshot were deleted.
func mergeable(t *testing.T, s *store.Store, _ vfs.FS) {
	written(t, s, "v")
	for i, snap := range []string{"s1", "s2", "s3"} {
		must(t, ignoreSnapshot(s.CreateSnapshot(t.Context(), "v", snap)))
		rewrite(t, s, "v", byte(min(i+2, 3)))
	}
	must(t, s.DeleteSnapshot(t.Context(), "v", "s2"))
	must(t, s.DeleteSnapshot(t.Context(), "v", "s3"))
}

// prepare returns a store in which the scenario can begin.
func (sc scenario) prepare(t *testing.T) *vfs.Mem {
	s, m := newStore(t)
	if sc.setup != nil {
		sc.setup(t, s, m)
	}
	return m
}

// finish repeats the operation on what an interruption left, and looks at the result.
func (sc scenario) finish(t *testing.T, when string, m *vfs.Mem) {
	t.Helper()
	s := openStore(t, m)
	expectSound(t, s, when)
	if err := sc.op(t.Context(), s); err != nil {
		t.Fatalf("%s: again: %v", when, err)
	}
	if sc.check != nil {
		sc.check(t, s)
	}
	deleteAll(t, s, m, when)
}

// deleteAll deletes everything, and makes sure that nothing is left.
func deleteAll(t *testing.T, s *store.Store, m *vfs.Mem, when string) {
	t.Helper()
	ctx := t.Context()
	volumes, err := s.Volumes(ctx)
	must(t, err)
	for _, v := range volumes {
		must(t, s.Unpublish(ctx, v.Name, ""))
		if err := s.DeleteVolume(ctx, v.Name); err != nil {
			t.Fatalf("%s: delete %s: %v", when, v.Name, err)
		}
	}
	snapshots, err := s.Snapshots(ctx)
	must(t, err)
	for _, snap := range snapshots {
		must(t, s.DeleteSnapshot(ctx, snap.Volume, snap.Name))
	}
	result, err := s.GC(ctx)
	must(t, err)
	for _, p := range result.Problems {
		t.Errorf("%s: collect: %s", when, p)
	}
	left := slices.DeleteFunc(tree(t, m, "."), func(name string) bool {
		return strings.HasPrefix(name, "images/") || strings.HasPrefix(name, ".lock-probe-")
	})
	if len(left) > 0 {
		t.Fatalf("%s: left in the store: %v", when, left)
	}
}

// A process killed, or a node that lost power, between any two changes of the store: the
// same call, on another node, finishes what was begun, and nothing is left in the end.
func TestInterrupted(t *testing.T) {
	for _, sc := range scenarios() {
		t.Run(sc.name, func(t *testing.T) {
			r := testenv.Rand(t)
			m := sc.prepare(t)
			type left struct {
				when      string
				killed    *vfs.Mem
				collected *vfs.Mem
				crashed   [3]*vfs.Mem // of what power loss may leave
			}
			var mu sync.Mutex
			var lefts []left
			look := vfs.If(vfs.Changing, func(op vfs.Op) error {
				mu.Lock()
				defer mu.Unlock()
				lefts = append(lefts, left{
					fmt.Sprintf("before change %d, %s %s", len(lefts), op.Kind, op.Name), m.Clone(), m.Clone(),
					[3]*vfs.Mem{m.Crash(r), m.Crash(r), m.Crash(r)},
				})
				return nil
			})
			s := openStore(t, vfs.Inject(m, look))
			lefts = nil // of opening
			must(t, sc.op(t.Context(), s))
			for i, l := range lefts {
				if testing.Short() && i%3 != 0 {
					continue
				}
				sc.finish(t, "killed "+l.when, l.killed)
				_, err := openStore(t, l.collected).GC(t.Context())
				must(t, err)
				sc.finish(t, "killed and collected "+l.when, l.collected)
				for _, crashed := range l.crashed {
					sc.finish(t, "crashed "+l.when, crashed)
				}
			}
			t.Logf("%d points", len(lefts))
		})
	}
}

// Every operation of the store's file system fails once: the call fails and says why, or
// succeeds all the same; either way it can be repeated, and nothing is left in the end.
func TestFailed(t *testing.T) {
	for _, sc := range scenarios() {
		t.Run(sc.name, func(t *testing.T) {
			base := sc.prepare(t)
			failures := 0
			for n := uint64(0); ; n++ {
				m := base.Clone()
				reached := ""
				armed := false
				var mu sync.Mutex
				var seen uint64
				s := openStore(t, vfs.Inject(m, func(op vfs.Op) error {
					mu.Lock()
					defer mu.Unlock()
					if !armed || op.Kind == vfs.OpClose || op.Kind == vfs.OpUnlock {
						return nil
					}
					seen++
					if seen-1 != n {
						return nil
					}
					reached = fmt.Sprintf("with operation %d, %s %s, failing", n, op.Kind, op.Name)
					return fmt.Errorf("%s %s: %w", op.Kind, op.Name, syscall.ENOSPC)
				}))
				armed = true
				err := sc.op(t.Context(), s)
				armed = false
				if reached == "" {
					must(t, err)
					break
				}
				if err != nil {
					failures++
					if !errors.Is(err, syscall.ENOSPC) {
						t.Errorf("%s: %v", reached, err)
					}
					expectNothingHalfMade(t, reached, base, m)
				}
				sc.finish(t, reached, m)
			}
			if failures == 0 {
				t.Error("no failure was ever reported")
			}
		})
	}
}

// expectNothingHalfMade makes sure that a failed creation left no volume, or a whole one.
func expectNothingHalfMade(t *testing.T, when string, before, after *vfs.Mem) {
	t.Helper()
	was, is := tree(t, before, "."), tree(t, after, ".")
	for _, name := range is {
		dir, file := path.Split(name)
		if file == "volume.json" && !slices.Contains(was, name) {
			if _, err := openStore(t, after).Volume(t.Context(), path.Base(dir)); err != nil {
				t.Errorf("%s: half a volume is left: %v (%v)", when, is, err)
			}
		}
	}
}
