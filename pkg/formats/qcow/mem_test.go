package qcow_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/qcow"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Where things lie in the small image: 4 KiB clusters, 512 entries per level 2 table, and
// cluster 0, 1 and 2 written one after the other.
const (
	smallSize    = 4<<20 + 512
	smallCluster = 4 << 10
	smallL1      = 1 * smallCluster
	smallData0   = 2 * smallCluster
	smallL2      = 3 * smallCluster
	smallData1   = 4 * smallCluster
	smallData2   = 5 * smallCluster
	smallEnd     = 6 * smallCluster
)

// Where the header says what.
const (
	atBackingOffset = 8
	atBackingSize   = 16
	atMtime         = 20
	atSize          = 24
	atClusterBits   = 32
	atL2Bits        = 33
	atCrypt         = 36
	atL1            = 40
)

const compressedFlag = 1 << 63

// newSmall returns a file system with that image in a.qcow.
func newSmall(t testing.TB, extra map[string]string) *vfs.Mem {
	t.Helper()
	fsys := vfs.NewMem()
	create(t, fsys, formats.CreateRequest{Name: "a.qcow", SizeBytes: smallSize, ClusterBytes: smallCluster, Extra: extra})
	image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
	for i := range int64(3) {
		mustWrite(t, image, smallCluster*i, smallData(i))
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	for i, want := range []uint64{smallData0, smallData1, smallData2} {
		if got := peek64(t, fsys, "a.qcow", smallL2+8*int64(i)); got != want {
			t.Fatalf("cluster %d is at %#x, want %#x", i, got, want)
		}
	}
	return fsys
}

// smallData is what is in cluster i.
func smallData(i int64) []byte { return bytes.Repeat([]byte{'a' + byte(i)}, smallCluster) }

func mustWrite(t testing.TB, image *formats.Image, off int64, p []byte) {
	t.Helper()
	if _, err := image.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

func mustRead(t testing.TB, image *formats.Image, off, n int64) []byte {
	t.Helper()
	p := make([]byte, n)
	if _, err := image.ReadAt(p, off); err != nil {
		t.Fatal(err)
	}
	return p
}

func mustClose(t testing.TB, image *formats.Image) {
	t.Helper()
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
}

// poke overwrites bytes of a file, durably.
func poke(t testing.TB, fsys vfs.FS, name string, off int64, p ...byte) {
	t.Helper()
	f, err := fsys.Open(name, vfs.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

func poke64(t testing.TB, fsys vfs.FS, name string, off int64, v uint64) {
	t.Helper()
	poke(t, fsys, name, off, binary.BigEndian.AppendUint64(nil, v)...)
}

func peek(t testing.TB, fsys vfs.FS, name string) []byte {
	t.Helper()
	f, err := fsys.Open(name, vfs.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, size)
	if _, err := f.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func peek64(t testing.TB, fsys vfs.FS, name string, off int64) uint64 {
	t.Helper()
	return binary.BigEndian.Uint64(peek(t, fsys, name)[off:])
}

func truncate(t testing.TB, fsys vfs.FS, name string, size int64) {
	t.Helper()
	f, err := fsys.Open(name, vfs.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
}

func addFile(t testing.TB, fsys vfs.FS, name string, p []byte) {
	t.Helper()
	f, err := fsys.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
}

// checkImage checks an image that is not open, and repairs it if that is wanted.
func checkImage(t testing.TB, fsys vfs.FS, name string, repair bool) engine.CheckResult {
	t.Helper()
	mode := vfs.ReadOnly
	if repair {
		mode = vfs.ReadWrite
	}
	layer, err := qcow.Format{}.Open(formats.OpenRequest{FS: fsys, Name: name, Mode: mode, Secret: secret})
	if err != nil {
		t.Fatal(err)
	}
	defer layer.Close()
	result, err := engine.Check(context.Background(), layer, repair, nil)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// expectRepair repairs an image with so many corruptions, all of which can be repaired, and
// fails the test unless it is good afterwards.
func expectRepair(t testing.TB, fsys vfs.FS, name string, corruptions int64) {
	t.Helper()
	if found := checkImage(t, fsys, name, false); found.Corruptions != corruptions || found.FixedProblems != 0 {
		t.Errorf("check found %+v, want %d corruptions", found, corruptions)
	}
	if fixed := checkImage(t, fsys, name, true); fixed.Corruptions != 0 || fixed.FixedProblems < corruptions {
		t.Errorf("repair did %+v, want %d problems fixed", fixed, corruptions)
	}
	if left := checkImage(t, fsys, name, false); left.Corruptions != 0 {
		t.Errorf("after the repair, check found %+v", left)
	}
}

// sweepCrashes loses power before each change that do makes to a copy of the file system, some
// times each, and after it, and looks at what is left.
func sweepCrashes(t *testing.T, fsys *vfs.Mem, do func(vfs.FS), look func(left *vfs.Mem)) {
	t.Helper()
	r := testenv.Rand(t)
	mem := fsys.Clone()
	points := 0
	do(vfs.Inject(mem, vfs.If(vfs.Changing, func(vfs.Op) error {
		points++
		for range 5 {
			look(mem.Crash(r))
		}
		return nil
	})))
	look(mem.Crash(r))
	t.Logf("%d crash points", points)
	if points == 0 {
		t.Error("nothing was changed")
	}
}

type layer = engine.Layer

func mustOpenLayer(t testing.TB, fsys vfs.FS, name string) *layer {
	t.Helper()
	l, err := qcow.Format{}.Open(formats.OpenRequest{FS: fsys, Name: name, Secret: secret})
	if err != nil {
		t.Fatal(err)
	}
	return l
}
