package qcow_test

import (
	"bytes"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// A disk that is discarded and rewritten in turns does not grow for ever, although each close
// loses what was free.
func TestReclaim(t *testing.T) {
	for name, compressed := range map[string]bool{"plain": false, "compressed beside it": true} {
		t.Run(name, func(t *testing.T) { reclaim(t, compressed) })
	}
}

func reclaim(t *testing.T, compressed bool) {
	fsys := vfs.NewMem()
	const size, cluster = 4 << 20, 64 << 10
	create(t, fsys, formats.CreateRequest{Name: "a.qcow", SizeBytes: size + 2*cluster, ClusterBytes: cluster})
	disk := make([]byte, size+2*cluster)
	longest := 0
	for session := range 50 {
		image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
		if compressed && session == 0 {
			copy(disk[size:], bytes.Repeat([]byte("compress"), cluster/8))
			for off := size; off < len(disk); off += cluster {
				packed, err := image.Pack(bytes.Clone(disk[off:off+cluster]), int64(off))
				if err == nil {
					err = image.WritePacked(packed)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
		}
		for off := session % 2 * cluster; off < size; off += 2 * cluster {
			copy(disk[off:], bytes.Repeat([]byte{byte(session + 1)}, cluster))
			mustWrite(t, image, int64(off), disk[off:off+cluster])
		}
		for off := (session + 1) % 2 * cluster; off < size; off += 2 * cluster {
			clear(disk[off : off+cluster])
			if err := image.Discard(int64(off), cluster); err != nil {
				t.Fatal(err)
			}
		}
		mustClose(t, image)
		image = mustOpen(t, fsys, "a.qcow", vfs.ReadOnly)
		if !bytes.Equal(readGuest(t, image), disk) {
			t.Fatalf("session %d: the contents differ from what was written", session)
		}
		checkSound(t, image)
		mustClose(t, image)
		info, err := fsys.Stat("a.qcow")
		if err != nil {
			t.Fatal(err)
		}
		longest = max(longest, int(info.Size()))
	}
	if longest < 60<<20 || longest > 75<<20 {
		t.Errorf("the file was up to %d MiB long, want little more than 68", longest>>20)
	}
}

// In a damaged image, what looks free is left alone.
func TestReclaim_DamagedImage(t *testing.T) {
	fsys := newSmall(t, nil)
	poke64(t, fsys, "a.qcow", smallL2, 1<<40)
	const long = 80 << 20
	truncate(t, fsys, "a.qcow", long)
	image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
	mustWrite(t, image, 100*smallCluster, smallData(1))
	mustClose(t, image)
	if at := peek64(t, fsys, "a.qcow", smallL2+8*100); at < long {
		t.Errorf("a cluster was taken at %#x", at)
	}
}
