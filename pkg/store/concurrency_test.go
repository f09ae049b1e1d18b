package store_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// call is one of the store's operations, on volume v and what was made from it. Whatever
// runs beside it, it succeeds or fails in one of the ways that are allowed.
type call struct {
	name    string
	do      func(ctx context.Context, s *store.Store) error
	allowed []error
}

func calls() []call {
	gone := []error{block.ErrNotFound, block.ErrBusy}
	return []call{
		{"create", createOp(store.CreateVolumeRequest{Name: "v", SizeBytes: 8 * mib}), []error{block.ErrExists}},
		{"create another", createOp(store.CreateVolumeRequest{Name: "w", SizeBytes: 4 * mib}), nil},
		{"delete", func(ctx context.Context, s *store.Store) error { return s.DeleteVolume(ctx, "v") }, []error{block.ErrBusy}},
		{"snapshot", func(ctx context.Context, s *store.Store) error {
			return ignoreSnapshot(s.CreateSnapshot(ctx, "v", "s"))
		}, gone},
		{"another snapshot", func(ctx context.Context, s *store.Store) error {
			return ignoreSnapshot(s.CreateSnapshot(ctx, "v", "t"))
		}, gone},
		{"delete snapshot", func(ctx context.Context, s *store.Store) error { return s.DeleteSnapshot(ctx, "v", "s") }, nil},
		{"restore", createOp(store.CreateVolumeRequest{Name: "r", Source: store.Source{Snapshot: "v@s"}}), gone},
		{"clone", createOp(store.CreateVolumeRequest{Name: "c", Source: store.Source{Volume: "v"}}), gone},
		{"delete clone", func(ctx context.Context, s *store.Store) error { return s.DeleteVolume(ctx, "c") }, []error{block.ErrBusy}},
		{"expand", func(ctx context.Context, s *store.Store) error {
			return ignoreRecord(s.Expand(ctx, "v", 12*mib, 0))
		}, gone},
		{"use", useLocally, []error{block.ErrNotFound, block.ErrBusy, block.ErrLocked}},
		{"publish and attach", useOnNode, []error{block.ErrNotFound, block.ErrBusy, block.ErrLocked, block.ErrFenced}},
		{"collect", func(ctx context.Context, s *store.Store) error {
			_, err := s.GC(ctx)
			return err
		}, nil},
		{"list", func(ctx context.Context, s *store.Store) error {
			_, err := s.Volumes(ctx)
			_, snapErr := s.Snapshots(ctx)
			_, treeErr := s.Tree(ctx)
			return errors.Join(err, snapErr, treeErr)
		}, nil},
	}
}

func useLocally(ctx context.Context, s *store.Store) error {
	a, err := s.Attach(ctx, "v", store.AttachOptions{})
	if err != nil {
		return err
	}
	_, err = a.WriteAt(stamp(0, 1), 0)
	return errors.Join(err, a.Close())
}

func useOnNode(ctx context.Context, s *store.Store) error {
	epoch, err := s.Publish(ctx, store.PublishRequest{Volume: "v", Node: "n"})
	if err != nil {
		return err
	}
	a, err := s.Attach(ctx, "v", store.AttachOptions{Node: "n", Epoch: epoch})
	if err == nil {
		_, err = a.WriteAt(stamp(mib, 1), mib)
		err = errors.Join(err, a.Close())
	}
	return errors.Join(err, s.Unpublish(ctx, "v", "n"))
}

// Every pair of calls at once, by two processes with a store each: both come to an end,
// in ways that are allowed, the store is sound, and nothing is left after deleting all.
func TestConcurrentPairs(t *testing.T) {
	all := calls()
	for i, first := range all {
		for _, second := range all[i:] {
			t.Run(first.name+" and "+second.name, func(t *testing.T) {
				m := vfs.NewMem()
				s := openStore(t, m)
				written(t, s, "v")
				must(t, ignoreSnapshot(s.CreateSnapshot(t.Context(), "v", "s")))
				ctx, cancel := context.WithTimeout(t.Context(), testWait)
				defer cancel()
				var both sync.WaitGroup
				for _, c := range []call{first, second} {
					other := openStore(t, m)
					both.Go(func() { c.run(ctx, t, other) })
				}
				both.Wait()
				expectSound(t, s, "afterwards")
				deleteAll(t, s, m, "in the end")
			})
		}
	}
}

func (c call) run(ctx context.Context, t *testing.T, s *store.Store) {
	err := c.do(ctx, s)
	if err != nil && !slices.ContainsFunc(c.allowed, func(allowed error) bool { return errors.Is(err, allowed) }) {
		t.Errorf("%s: %v", c.name, err)
	}
}

// Many processes at many things for a while.
func TestConcurrentAtRandom(t *testing.T) {
	r := testenv.Rand(t)
	m := vfs.NewMem()
	s := openStore(t, m)
	written(t, s, "v")
	ctx, cancel := context.WithTimeout(t.Context(), testWait)
	defer cancel()
	rounds := 40
	if testing.Short() {
		rounds = 10
	}
	var workers sync.WaitGroup
	for range 4 {
		other := openStore(t, m)
		plan := r.Perm(rounds)
		workers.Go(func() {
			all := calls()
			for _, n := range plan {
				c := all[n%len(all)]
				c.allowed = append(c.allowed, block.ErrExists)
				c.run(ctx, t, other)
			}
		})
	}
	workers.Wait()
	expectSound(t, s, "afterwards")
	deleteAll(t, s, m, "in the end")
}

// The same call from many at once makes one thing.
func TestCreateVolume_ManyAtOnce(t *testing.T) {
	onBoth(t, func(t *testing.T, s *store.Store, fsys vfs.FS) {
		records := make([]store.Record, 8)
		var all sync.WaitGroup
		for i := range records {
			all.Go(func() {
				var err error
				records[i], err = s.CreateVolume(t.Context(), store.CreateVolumeRequest{Name: "v", SizeBytes: mib})
				if err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		for _, rec := range records {
			if !rec.Created.Equal(records[0].Created) || !rec.Ready {
				t.Errorf("two volumes were made: %+v and %+v", rec, records[0])
			}
		}
	})
}

// A lock file that vanishes with its volume and comes back is not mistaken for the old.
func TestVolumeMadeAnewAllTheTime(t *testing.T) {
	onBoth(t, func(t *testing.T, s *store.Store, fsys vfs.FS) {
		ctx, cancel := context.WithTimeout(t.Context(), testWait)
		defer cancel()
		end := time.Now().Add(300 * time.Millisecond)
		var workers sync.WaitGroup
		for i := range 4 {
			other, err := store.Open(ctx, "other", fsys, fast)
			must(t, err)
			workers.Go(func() {
				for n := 0; time.Now().Before(end); n++ {
					if _, err := other.CreateVolume(ctx, store.CreateVolumeRequest{Name: "v", SizeBytes: mib}); err != nil && !errors.Is(err, block.ErrExists) {
						t.Error(fmt.Errorf("worker %d: %w", i, err))
					}
					if err := other.DeleteVolume(ctx, "v"); err != nil {
						t.Error(fmt.Errorf("worker %d: %w", i, err))
					}
				}
			})
		}
		workers.Wait()
		must(t, s.DeleteVolume(ctx, "v"))
		_, err := s.GC(ctx)
		must(t, err)
		expectEmpty(t, fsys)
	})
}

// Whoever makes a volume from a snapshot and whoever deletes that one agree: either the
// layers are referred to, or they are gone and that is said.
func TestCreateVolume_SourceDeletedMeanwhile(t *testing.T) {
	m := vfs.NewMem()
	setup := openStore(t, m)
	written(t, setup, "v")
	// Two layers: the upper one is also kept by the lock of whoever has opened it.
	must(t, ignoreSnapshot(setup.CreateSnapshot(t.Context(), "v", "s0")))
	must(t, ignoreSnapshot(setup.CreateSnapshot(t.Context(), "v", "s")))
	req := store.CreateVolumeRequest{Name: "r", Source: store.Source{Snapshot: "v@s"}}
	outcomes := map[bool]int{}
	for n := uint64(0); ; n++ {
		left := m.Clone()
		deleted := make(chan error, 1)
		reached := false
		s, err := store.Open(t.Context(), "test", vfs.Inject(left, vfs.If(func(op vfs.Op) bool { return strings.HasPrefix(op.Name, "volumes/") }, vfs.CrashPoint(n, func() {
			reached = true
			returnsSoon(func() {
				other := openStore(t, left)
				ctx := context.Background()
				deleted <- errors.Join(other.DeleteSnapshot(ctx, "v", "s0"), other.DeleteSnapshot(ctx, "v", "s"), other.DeleteVolume(ctx, "v"))
			})
		}))), fast)
		must(t, err)
		_, err = s.CreateVolume(t.Context(), req)
		if !reached {
			must(t, err)
			break
		}
		must(t, <-deleted)
		outcomes[err == nil]++
		if err == nil {
			expectGeneration(t, s, "r", "", 1)
		} else if !errors.Is(err, block.ErrNotFound) && !errors.Is(err, block.ErrBusy) {
			t.Errorf("operation %d: %v", n, err)
		}
		expectSound(t, s, fmt.Sprintf("operation %d", n))
		deleteAll(t, s, left, fmt.Sprintf("operation %d", n))
	}
	if outcomes[true] == 0 || outcomes[false] == 0 {
		t.Errorf("outcomes: %v", outcomes)
	}
}
