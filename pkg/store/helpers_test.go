package store_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/all"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func TestMain(m *testing.M) {
	all.Register()
	os.Exit(m.Run())
}

const (
	mib = 1 << 20
	// testWait bounds waits that end at once unless something is broken.
	testWait = 60 * time.Second
)

// fast are options under which nothing waits long.
var fast = store.Options{PollInterval: 5 * time.Millisecond, HolderWait: 5 * time.Second}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// openStore opens a store in fs, made if it is not there.
func openStore(tb testing.TB, fsys vfs.FS) *store.Store {
	tb.Helper()
	_, err := store.Init(fsys)
	must(tb, err)
	s, err := store.Open(context.Background(), "test", fsys, fast)
	must(tb, err)
	return s
}

func newStore(tb testing.TB) (*store.Store, *vfs.Mem) {
	m := vfs.NewMem()
	return openStore(tb, m), m
}

// newDirStore is a store in a directory of the host.
func newDirStore(tb testing.TB) (*store.Store, *vfs.Dir) {
	tb.Helper()
	d, err := vfs.OpenDir(tb.TempDir())
	must(tb, err)
	tb.Cleanup(func() { d.Close() })
	return openStore(tb, d), d
}

// onBoth runs a test on a store in memory and on one in a directory.
func onBoth(t *testing.T, test func(t *testing.T, s *store.Store, fsys vfs.FS)) {
	t.Run("Mem", func(t *testing.T) {
		s, m := newStore(t)
		test(t, s, m)
	})
	t.Run("Dir", func(t *testing.T) {
		s, d := newDirStore(t)
		test(t, s, d)
	})
}

func create(tb testing.TB, s *store.Store, req store.CreateVolumeRequest) store.Record {
	tb.Helper()
	rec, err := s.CreateVolume(tb.Context(), req)
	must(tb, err)
	return rec
}

// volume makes an empty volume of 8 MiB.
func volume(tb testing.TB, s *store.Store, name string) store.Record {
	tb.Helper()
	return create(tb, s, store.CreateVolumeRequest{Name: name, SizeBytes: 8 * mib})
}

// attach publishes a volume to a node and attaches it there.
func attach(tb testing.TB, s *store.Store, name, node string) *store.Attached {
	tb.Helper()
	epoch, err := s.Publish(tb.Context(), store.PublishRequest{Volume: name, Node: node})
	must(tb, err)
	a, err := s.Attach(tb.Context(), name, store.AttachOptions{Node: node, Epoch: epoch})
	must(tb, err)
	return a
}

// detach closes an attached volume and unpublishes it.
func detach(tb testing.TB, s *store.Store, a *store.Attached) {
	tb.Helper()
	must(tb, a.Close())
	must(tb, s.Unpublish(tb.Context(), a.Record().Name, ""))
}

// stamp is what tests write at an offset: recognisable, and never zero.
func stamp(off int64, generation byte) []byte {
	p := bytes.Repeat([]byte{generation}, 512)
	binary.LittleEndian.PutUint64(p, uint64(off)+1)
	return p
}

func writeStamp(tb testing.TB, d block.Device, off int64, generation byte) {
	tb.Helper()
	_, err := d.WriteAt(stamp(off, generation), off)
	must(tb, err)
}

// expectStamp compares the bytes at off with a generation's; 0 stands for zeroes.
func expectStamp(tb testing.TB, d block.Device, off int64, generation byte) {
	tb.Helper()
	want := make([]byte, 512)
	if generation != 0 {
		want = stamp(off, generation)
	}
	got := make([]byte, 512)
	_, err := d.ReadAt(got, off)
	must(tb, err)
	if !bytes.Equal(got, want) {
		tb.Errorf("at %d: generation %d, want %d", off, got[511], generation)
	}
}

// withVolume attaches a volume locally for a moment.
func withVolume(tb testing.TB, s *store.Store, name string, opts store.AttachOptions, f func(d block.Device)) {
	tb.Helper()
	a, err := s.Attach(tb.Context(), name, opts)
	must(tb, err)
	defer func() { must(tb, a.Close()) }()
	f(a.Device())
}

// tree lists all files of a store that are not its frame.
func tree(tb testing.TB, fsys vfs.FS, dir string) []string {
	tb.Helper()
	entries, err := fsys.ReadDir(dir)
	must(tb, err)
	var names []string
	for _, e := range entries {
		name := strings.TrimPrefix(dir+"/"+e.Name(), "./")
		switch name {
		case "spare":
			continue
		case "store.json", "store.lock", "volumes", "images":
		default:
			names = append(names, name)
		}
		if e.IsDir() {
			names = append(names, tree(tb, fsys, name)...)
		}
	}
	return names
}

// expectEmpty makes sure that nothing but the frame is left.
func expectEmpty(tb testing.TB, fsys vfs.FS) {
	tb.Helper()
	if left := tree(tb, fsys, "."); len(left) > 0 {
		tb.Errorf("left in the store: %v", left)
	}
}

// expectSound has Check find nothing that endangers data; leaks are what a crash may leave.
func expectSound(tb testing.TB, s *store.Store, when string) {
	tb.Helper()
	report, err := s.Check(tb.Context(), false)
	must(tb, err)
	for _, p := range report.Problems {
		if p.Corrupt {
			tb.Errorf("%s: check: volume %s: %s: %s", when, p.Volume, p.File, p.Text)
		}
	}
}

// expectClean has Check find nothing.
func expectClean(tb testing.TB, s *store.Store) {
	tb.Helper()
	report, err := s.Check(tb.Context(), false)
	must(tb, err)
	for _, p := range report.Problems {
		tb.Errorf("check: volume %s: %s: %s", p.Volume, p.File, p.Text)
	}
}
