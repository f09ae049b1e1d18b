package qcow_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func TestCheck_CleanImage(t *testing.T) {
	got := checkImage(t, newSmall(t, nil), "a.qcow", false)
	if len(got.Problems) > 0 || got.TotalClusters != 1025 || got.AllocatedCount != 3 || got.ImageEndOffset != smallEnd ||
		got.Compressed != 0 || got.Fragmented != 1 {
		t.Errorf("%+v", got)
	}
}

// badEntries lead nowhere.
var badEntries = map[string]uint64{
	"past the end of the file":    smallEnd,
	"far past it":                 1<<63 - 512,
	"the header":                  1, // not at a sector, either
	"not at a sector":             smallData2 + 8,
	"a level 2 table":             smallL2,
	"into a level 2 table":        smallL2 - 512,
	"the level 1 table":           smallL1,
	"behind the level 1 table":    smallL1 + 1024,
	"cut off":                     smallData2 + 512,
	"compressed, of no bytes":     compressedFlag | smallData2,
	"compressed, past the end":    compressedFlag | 100<<51 | (smallEnd - 50),
	"compressed, the header":      compressedFlag | 100<<51,
	"compressed, into a table":    compressedFlag | 100<<51 | (smallL2 - 50),
	"compressed, far past it":     compressedFlag | 100<<51 | (1<<51 - 1),
	"compressed, everything set":  1<<64 - 1,
	"compressed, level 1 table's": compressedFlag | 8<<51 | smallL1,
}

func TestLookup_BadEntries(t *testing.T) {
	for name, entry := range badEntries {
		t.Run(name, func(t *testing.T) {
			fsys := newSmall(t, nil)
			poke64(t, fsys, "a.qcow", smallL2, entry)
			image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
			p := make([]byte, 10)
			_, err := image.ReadAt(p, 100)
			expectRefused(t, err, block.ErrCorrupt, "a.qcow", "cluster 0")
			_, err = image.WriteAt(p, 100)
			expectRefused(t, err, block.ErrCorrupt)
			if got := mustRead(t, image, smallCluster, 2*smallCluster); !bytes.Equal(got, append(smallData(1), smallData(2)...)) {
				t.Error("the next clusters have other contents")
			}
			mustClose(t, image)

			expectRepair(t, fsys, "a.qcow", 1)
			image = mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
			want := append(append(make([]byte, smallCluster), smallData(1)...), smallData(2)...)
			if !bytes.Equal(mustRead(t, image, 0, 3*smallCluster), want) {
				t.Error("after the repair, it does not read as zeroes, or others changed")
			}
			mustWrite(t, image, 0, smallData(7))
			mustClose(t, image)
			if found := checkImage(t, fsys, "a.qcow", false); found.Corruptions > 0 {
				t.Errorf("check found %+v", found)
			}
		})
	}
}

// In an overlay, a cluster that is lost must not become the parent's.
func TestRepair_HidesTheParent(t *testing.T) {
	for _, extra := range []map[string]string{nil, {"encrypt.format": "aes"}} {
		fsys := newSmall(t, nil)
		createOverlay(t, fsys, "a.qcow", "qcow", formats.CreateRequest{Name: "top.qcow", ClusterBytes: smallCluster, Extra: extra})
		image := mustOpen(t, fsys, "top.qcow", vfs.ReadWrite)
		mustWrite(t, image, 0, smallData(9))
		mustClose(t, image)
		const table = 3 * smallCluster
		poke64(t, fsys, "top.qcow", table, 1<<40)
		expectRepair(t, fsys, "top.qcow", 1)
		image = mustOpen(t, fsys, "top.qcow", vfs.ReadOnly)
		if !bytes.Equal(mustRead(t, image, 0, 2*smallCluster), append(make([]byte, smallCluster), smallData(1)...)) {
			t.Error("what was lost does not read as zeroes, or the parent is hidden elsewhere")
		}
	}
}

// Two clusters at one place: both read what is there. A repair gives one its own, so that
// writing to one does not change the other.
func TestRepair_SharedCluster(t *testing.T) {
	fsys := newSmall(t, nil)
	poke64(t, fsys, "a.qcow", smallL2+8*5, smallData1)
	poke64(t, fsys, "a.qcow", smallL2+8*300, smallData2-512) // overlaps two
	overlapping := append(smallData(1)[:512:512], smallData(2)[512:]...)
	expectRepair(t, fsys, "a.qcow", 2)
	image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
	mustWrite(t, image, 5*smallCluster, []byte("changed"))
	mustWrite(t, image, 300*smallCluster, []byte("changed"))
	want := append(append(smallData(0), smallData(1)...), smallData(2)...)
	if !bytes.Equal(mustRead(t, image, 0, 3*smallCluster), want) {
		t.Error("writing to one changed the other")
	}
	if !bytes.Equal(mustRead(t, image, 5*smallCluster+7, smallCluster-7), smallData(1)[7:]) {
		t.Error("the copy has other contents")
	}
	if !bytes.Equal(mustRead(t, image, 300*smallCluster+7, smallCluster-7), overlapping[7:]) {
		t.Error("the copy of a part of two has other contents")
	}
	mustClose(t, image)
}

func TestRepair_SharedCompressedClusters(t *testing.T) {
	fsys := vfs.NewMem()
	create(t, fsys, formats.CreateRequest{Name: "a.qcow", SizeBytes: smallSize, ClusterBytes: smallCluster})
	image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
	disk := make([]byte, smallSize)
	for i := range int64(8) {
		copy(disk[i*smallCluster:], smallData(i))
		disk[i*smallCluster] = 0
	}
	compress(t, image, disk[:8*smallCluster])
	mustWrite(t, image, 8*smallCluster, smallData(8))
	copy(disk[8*smallCluster:], smallData(8))
	mustClose(t, image)
	table := int64(peek64(t, fsys, "a.qcow", smallL1))
	entry := func(cluster int64) uint64 { return peek64(t, fsys, "a.qcow", table+8*cluster) }
	if entry(3)&compressedFlag == 0 || entry(8)&compressedFlag != 0 {
		t.Fatalf("entries %#x and %#x", entry(3), entry(8))
	}
	// Cluster 20 shares 3's place. Cluster 21's place begins with 4's, and ends in 5's.
	// Cluster 22's bytes are among the plain ones of cluster 8.
	poke64(t, fsys, "a.qcow", table+8*20, entry(3))
	copy(disk[20*smallCluster:], disk[3*smallCluster:4*smallCluster])
	poke64(t, fsys, "a.qcow", table+8*21, entry(4)+4<<51)
	copy(disk[21*smallCluster:], disk[4*smallCluster:5*smallCluster])
	stored := entry(3) &^ (1<<51 - 1)
	at := int64(entry(3) & (1<<51 - 1))
	bytesOf3 := peek(t, fsys, "a.qcow")[at : at+int64(stored>>51&(1<<12-1))]
	poke(t, fsys, "a.qcow", int64(entry(8))+100, bytesOf3...)
	copy(disk[8*smallCluster+100:], bytesOf3)
	poke64(t, fsys, "a.qcow", table+8*22, stored|(entry(8)+100))
	copy(disk[22*smallCluster:], disk[3*smallCluster:4*smallCluster])

	// Of those that share the very same place, all are reported.
	found := checkImage(t, fsys, "a.qcow", false)
	if found.Corruptions < 4 {
		t.Errorf("check found %+v", found)
	}
	expectRepair(t, fsys, "a.qcow", found.Corruptions)
	image = mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
	if !bytes.Equal(readGuest(t, image), disk) {
		t.Error("after the repair, it reads other bytes")
	}
	for _, cluster := range []int64{3, 4, 8, 20, 21, 22} {
		mustWrite(t, image, cluster*smallCluster, smallData(20))
		copy(disk[cluster*smallCluster:], smallData(20))
		if err := image.Flush(); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, image, 600*smallCluster, smallData(21)) // into what was freed, perhaps
		copy(disk[600*smallCluster:], smallData(21))
		if !bytes.Equal(readGuest(t, image), disk) {
			t.Errorf("writing to cluster %d changed another one", cluster)
		}
	}
	mustClose(t, image)
}

func TestCheck_EntriesPastTheEnd(t *testing.T) {
	fsys := newSmall(t, nil)
	// The last table has one entry for the disk.
	image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
	mustWrite(t, image, smallSize-1, []byte{1})
	mustClose(t, image)
	table := int64(peek64(t, fsys, "a.qcow", smallL1+8*2))
	poke64(t, fsys, "a.qcow", table+8, smallData0)
	found := checkImage(t, fsys, "a.qcow", false)
	if len(found.Problems) != 1 || found.Corruptions > 0 || !strings.Contains(found.Problems[0].Text, "past the end of the disk") {
		t.Errorf("check found %+v", found)
	}
	checkImage(t, fsys, "a.qcow", true)
	if left := checkImage(t, fsys, "a.qcow", false); len(left.Problems) > 0 {
		t.Errorf("after the repair, check found %+v", left)
	}

	// Growing must not bring them up.
	poke64(t, fsys, "a.qcow", table+8, smallData0)
	image = mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
	if err := image.Resize(5 << 20); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(mustRead(t, image, smallSize, 1<<20-512), make([]byte, 1<<20-512)) {
		t.Error("what was past the end came up")
	}
	mustClose(t, image)
}

func TestRepair_CutsOffLeaks(t *testing.T) {
	fsys := newSmall(t, nil)
	truncate(t, fsys, "a.qcow", smallEnd+3*smallCluster+100)
	if found := checkImage(t, fsys, "a.qcow", false); found.Leaks != 4 || found.Corruptions != 0 {
		t.Errorf("check found %+v, want 4 leaks", found)
	}
	if fixed := checkImage(t, fsys, "a.qcow", true); fixed.Leaks != 0 || fixed.FixedLeaks != 4 {
		t.Errorf("repair did %+v", fixed)
	}
	if n := len(peek(t, fsys, "a.qcow")); n != smallEnd {
		t.Errorf("the file has %d bytes, want %d", n, smallEnd)
	}
	// In the middle of the file nothing can be cut off.
	poke64(t, fsys, "a.qcow", smallL2+8, 0)
	if fixed := checkImage(t, fsys, "a.qcow", true); fixed.Leaks != 1 || fixed.FixedLeaks != 0 {
		t.Errorf("repair did %+v", fixed)
	}
	p := peek(t, fsys, "a.qcow")
	if !bytes.Equal(p[smallData1:smallData1+smallCluster], make([]byte, smallCluster)) {
		t.Error("its space was not given back")
	}
	if !bytes.Equal(p[smallData2:], smallData(2)) || !bytes.Equal(p[smallData0:smallL2], smallData(0)) {
		t.Error("what is next to it has changed")
	}
}

// badTables are level 1 entries.
var badTables = map[string]struct {
	entry    uint64
	repaired bool // without losing anything
}{
	"past the end of the file": {smallEnd, true},
	"partly past it":           {smallEnd - 512, true},
	"far past it":              {1 << 62, true},
	"all ones":                 {1<<64 - 1, true},
	"not at a sector":          {smallData1 + 8, false},
	"the header":               {1, false},
	"the level 1 table":        {smallL1, false},
	"another table":            {smallL2, false},
	"overlaps another table":   {smallL2 + 512, false},
}

func TestOpen_BadTables(t *testing.T) {
	for name, c := range badTables {
		t.Run(name, func(t *testing.T) {
			fsys := newSmall(t, nil)
			poke64(t, fsys, "a.qcow", smallL1+8, c.entry)
			image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
			p := make([]byte, 10)
			_, err := image.ReadAt(p, 2<<20)
			expectRefused(t, err, block.ErrCorrupt, "level 1 entry 1")
			_, err = image.WriteAt(p, 2<<20)
			expectRefused(t, err, block.ErrCorrupt, "level 1 entry 1")
			if err := image.Discard(2<<20, 1<<20); err == nil {
				t.Error("discarded without an error")
			}
			mustClose(t, image)
			before := peek(t, fsys, "a.qcow")
			fixed := checkImage(t, fsys, "a.qcow", true)
			if (fixed.Corruptions == 0) != c.repaired {
				t.Errorf("repair did %+v", fixed)
			}
			if !c.repaired && !bytes.Equal(before[100:], peek(t, fsys, "a.qcow")[100:]) {
				t.Error("what could not be repaired was changed")
			}
			if left := checkImage(t, fsys, "a.qcow", false); left.Corruptions != fixed.Corruptions {
				t.Errorf("after the repair, check found %+v", left)
			}
		})
	}
}

// A repair that is interrupted at any point, with whatever the disk has of it, harms nothing
// and can be repeated.
func TestRepair_Crash(t *testing.T) {
	damaged := newSmall(t, nil)
	poke64(t, damaged, "a.qcow", smallL2+8*5, smallData1)
	poke64(t, damaged, "a.qcow", smallL2+8*6, smallData2)
	poke64(t, damaged, "a.qcow", smallL2+8*7, 1<<40)
	poke64(t, damaged, "a.qcow", smallL1+8*2, 1<<40)
	sweepCrashes(t, damaged, func(fsys vfs.FS) { checkImage(t, fsys, "a.qcow", true) }, func(left *vfs.Mem) {
		checkImage(t, left, "a.qcow", true)
		if found := checkImage(t, left, "a.qcow", false); found.Corruptions > 0 {
			t.Errorf("after a second repair, check found %+v", found)
		}
		image := mustOpen(t, left, "a.qcow", vfs.ReadOnly)
		for cluster, want := range map[int64][]byte{
			0: smallData(0), 1: smallData(1), 2: smallData(2), 5: smallData(1), 6: smallData(2), 7: make([]byte, smallCluster),
		} {
			if !bytes.Equal(mustRead(t, image, cluster*smallCluster, smallCluster), want) {
				t.Errorf("cluster %d has other contents", cluster)
			}
		}
		mustClose(t, image)
	})
}
