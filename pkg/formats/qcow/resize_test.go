package qcow_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// newTight returns an image as QEMU makes it, with the level 1 table right behind the header,
// and almost full: a table maps 32 KiB, and 57 of the 58 entries that the first cluster has
// room for are used.
func newTight(t testing.TB) (*vfs.Mem, []byte) {
	t.Helper()
	const size = 57 * 32 << 10
	fsys := vfs.NewMem()
	create(t, fsys, formats.CreateRequest{
		Name: "a.qcow", SizeBytes: size - 512, ClusterBytes: 512, Extra: map[string]string{"l2_bits": "6"},
	})
	poke64(t, fsys, "a.qcow", atL1, 48)
	truncate(t, fsys, "a.qcow", 512)
	image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
	disk := make([]byte, size-512)
	scribble(t, testenv.Rand(t), image, disk, 5)
	mustClose(t, image)
	return fsys, disk
}

func TestResize_MovesTheLevel1Table(t *testing.T) {
	fsys, disk := newTight(t)
	image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
	grow := func(size int, wantL1 uint64) {
		t.Helper()
		if err := image.Resize(int64(size)); err != nil {
			t.Fatal(err)
		}
		disk = append(disk, make([]byte, size-len(disk))...)
		if at := peek64(t, fsys, "a.qcow", atL1); (at == 48) != (wantL1 == 48) {
			t.Errorf("of %d bytes, the level 1 table is at %#x", size, at)
		}
		mustWrite(t, image, int64(size)-100, []byte("the end"))
		copy(disk[size-100:], "the end")
		if !bytes.Equal(readGuest(t, image), disk) {
			t.Errorf("grown to %d bytes, it reads other bytes", size)
		}
	}
	grow(57*32<<10, 48)
	grow(58*32<<10, 48)
	grow(59*32<<10, 0) // from 58 entries to 59
	first := peek64(t, fsys, "a.qcow", atL1)
	grow(64*32<<10, 0)
	if at := peek64(t, fsys, "a.qcow", atL1); at != first {
		t.Error("the table was moved although its cluster had room")
	}
	grow(65*32<<10, 0)
	if at := peek64(t, fsys, "a.qcow", atL1); at == first {
		t.Error("the table was not moved although its cluster had no room")
	}
	mustClose(t, image)
	// The cluster that it left is used again, or cut off.
	if found := checkImage(t, fsys, "a.qcow", false); found.Corruptions > 0 {
		t.Errorf("check found %+v", found)
	}
	image = mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
	if !bytes.Equal(readGuest(t, image), disk) {
		t.Error("opened again, it reads other bytes")
	}
	// Back to one table, and up again: no entry of old may come up.
	if err := image.Shrink(512); err != nil {
		t.Fatal(err)
	}
	disk = disk[:512:512]
	grow(66*32<<10, 0)
	mustClose(t, image)
	if found := checkImage(t, fsys, "a.qcow", false); found.Corruptions > 0 {
		t.Errorf("check found %+v", found)
	}
}

// Losing power at any point of a resize leaves the old or the new size, and the contents.
func TestResize_Crash(t *testing.T) {
	fsys, disk := newTight(t)
	for _, size := range []int64{57 * 32 << 10, 60 * 32 << 10, 200 * 32 << 10, 3 * 32 << 10, 512} {
		sweepCrashes(t, fsys, func(fsys vfs.FS) {
			image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
			resize := image.Resize
			if size < int64(len(disk)) {
				resize = image.Shrink
			}
			if err := resize(size); err != nil {
				t.Fatal(err)
			}
			mustClose(t, image)
		}, func(left *vfs.Mem) {
			image := mustOpen(t, left, "a.qcow", vfs.ReadOnly)
			checkSound(t, image)
			got := readGuest(t, image)
			mustClose(t, image)
			n := min(len(disk), int(size))
			if len(got) != len(disk) && len(got) != int(size) {
				t.Errorf("%d bytes", len(got))
			} else if !bytes.Equal(got[:n], disk[:n]) || len(got) > len(disk) && strings.Trim(string(got[n:]), "\x00") != "" {
				t.Error("other contents")
			}
		})
	}
}

// What QEMU, or whoever made the image, left past the end of the last cluster must not come up
// when the disk grows.
func TestResize_ClearsWhatWasPastTheEnd(t *testing.T) {
	for name, prepare := range map[string]func(t *testing.T) *vfs.Mem{
		"plain":     func(t *testing.T) *vfs.Mem { return newSmall(t, nil) },
		"encrypted": func(t *testing.T) *vfs.Mem { return newSmall(t, map[string]string{"encrypt.format": "aes"}) },
		"compressed": func(t *testing.T) *vfs.Mem {
			fsys := vfs.NewMem()
			create(t, fsys, formats.CreateRequest{Name: "a.qcow", SizeBytes: smallSize, ClusterBytes: smallCluster})
			image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
			compress(t, image, bytes.Repeat([]byte("abcdefgh"), 3*smallCluster/8))
			mustClose(t, image)
			return fsys
		},
	} {
		for _, in := range []uint64{1, 511, 512, 1000, smallCluster - 1} {
			t.Run(name, func(t *testing.T) {
				fsys := prepare(t)
				full := readGuest(t, mustOpen(t, fsys.Clone(), "a.qcow", vfs.ReadOnly))
				poke64(t, fsys, "a.qcow", atSize, 2*smallCluster+in)
				image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
				if err := image.Resize(4 * smallCluster); err != nil {
					t.Fatal(err)
				}
				want := append(full[:2*smallCluster+in:2*smallCluster+in], make([]byte, 2*smallCluster-in)...)
				for range 2 {
					if !bytes.Equal(readGuest(t, image), want) {
						t.Error("other contents")
					}
					mustClose(t, image)
					image = mustOpen(t, fsys, "a.qcow", vfs.ReadOnly)
				}
				checkSound(t, image)
			})
		}
	}
}

func TestResize_Refuses(t *testing.T) {
	fsys := newSmall(t, nil)
	image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
	for _, size := range []int64{smallSize + 1, 8<<40 + 512, 1 << 60} {
		expectRefused(t, image.Resize(size), block.ErrInvalid, "a.qcow", "want")
	}
	mustWrite(t, image, 0, smallData(3))
	mustClose(t, image)
	if found := checkImage(t, fsys, "a.qcow", false); len(found.Problems) > 0 {
		t.Errorf("check found %+v", found)
	}
}

// If writing the header fails, the old one is put back. If that fails, too, nobody is told
// later that anything is durable.
func TestResize_HeaderFails(t *testing.T) {
	for _, failures := range []int{1, 2} {
		fsys, disk := newTight(t)
		failed, left := 0, 0
		image := mustOpen(t, vfs.Inject(fsys, vfs.If(vfs.OfKind(vfs.OpWrite), func(at vfs.Op) error {
			if left > 0 && at.Off == 0 {
				left--
				failed++
				return errors.New("injected")
			}
			return nil
		})), "a.qcow", vfs.ReadWrite)
		mustWrite(t, image, 0, []byte{1})
		disk[0] = 1
		if err := image.Flush(); err != nil { // it may have an entry in the header's sector
			t.Fatal(err)
		}
		left = failures
		if err := image.Resize(100 * 32 << 10); err == nil || failed != failures {
			t.Fatalf("%d writes failed, resize: %v", failed, err)
		}
		mustWrite(t, image, int64(len(disk))-512, bytes.Repeat([]byte{2}, 512))
		copy(disk[len(disk)-512:], bytes.Repeat([]byte{2}, 512))
		err := image.Close()
		if failures == 2 {
			if err == nil {
				t.Error("closed without an error although nobody knows which header the disk has")
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		image = mustOpen(t, fsys, "a.qcow", vfs.ReadOnly)
		if !bytes.Equal(readGuest(t, image), disk) {
			t.Error("other contents")
		}
		checkSound(t, image)
	}
}

// newChain returns QEMU's layout of an overlay: the name right behind the header, the level 1
// table right behind the name.
func newChain(t testing.TB) *vfs.Mem {
	t.Helper()
	fsys := newSmall(t, nil)
	create(t, fsys, formats.CreateRequest{Name: "top.qcow", SizeBytes: smallSize, ClusterBytes: 512})
	poke64(t, fsys, "top.qcow", atBackingOffset, 48)
	poke(t, fsys, "top.qcow", atBackingSize, 0, 0, 0, 6)
	poke(t, fsys, "top.qcow", 48, []byte("a.qcow\x00\x00")...)
	poke64(t, fsys, "top.qcow", atL1, 56)
	truncate(t, fsys, "top.qcow", 512)
	return fsys
}

func TestSetParent(t *testing.T) {
	const near, far = "b.qcow", "a-name-that-is-longer-than-what-fits-there.qcow"
	long := strings.Repeat("d/", 480) + "b.qcow"
	for _, to := range [][]string{{near}, {far}, {near, far, near}, {far, ""}, {""}, {"", near}, {long}, {long, far, long, ""}} {
		t.Run(strings.Join(to, " "), func(t *testing.T) {
			fsys := newChain(t)
			image := mustOpen(t, fsys, "top.qcow", vfs.ReadWrite)
			mustWrite(t, image, smallCluster, []byte("the overlay's"))
			for _, name := range to {
				setParent(t, image, name)
				mustWrite(t, image, 2*smallCluster, []byte("also"))
			}
			mustClose(t, image)
			expectParent(t, fsys, to[len(to)-1])
		})
	}
}

// setParent lets an image stand on an empty one of that name; "" for none. There need not be
// a file of that name.
func setParent(t testing.TB, image *formats.Image, name string) {
	t.Helper()
	if name == "" {
		if _, err := image.SetParent(nil, nil); err != nil {
			t.Fatal(err)
		}
		return
	}
	fsys := newSmall(t, nil)
	below := mustOpenLayer(t, fsys, "a.qcow")
	if _, err := image.SetParent(&formats.Parent{Name: name, Layer: below}, []*layer{below}); err != nil {
		t.Fatal(err)
	}
}

// expectParent checks top.qcow, and opens it by itself to see what it stands on.
func expectParent(t testing.TB, fsys vfs.FS, want string) {
	t.Helper()
	l := mustOpenLayer(t, fsys, "top.qcow")
	defer l.Close()
	got := ""
	if l.Parent != nil {
		got = l.Parent.Name
	}
	if got != want {
		t.Errorf("it stands on %q, want %q", got, want)
	}
	if found := check(t, l); found.Corruptions > 0 {
		t.Errorf("check found %+v", found)
	}
	off := int64(binary.BigEndian.Uint64(peek(t, fsys, "top.qcow")[atL1:]))
	if off == 0 {
		t.Error("no level 1 table")
	}
}

// Losing power at any point leaves the old or the new parent.
func TestSetParent_Crash(t *testing.T) {
	for _, name := range []string{"b.qcow", "a-name-that-is-longer-than-what-fits-there.qcow", ""} {
		fsys := newChain(t)
		sweepCrashes(t, fsys, func(fsys vfs.FS) {
			image := mustOpen(t, fsys, "top.qcow", vfs.ReadWrite)
			setParent(t, image, name)
			mustClose(t, image)
		}, func(left *vfs.Mem) {
			l := mustOpenLayer(t, left, "top.qcow")
			defer l.Close()
			got := ""
			if l.Parent != nil {
				got = l.Parent.Name
			}
			if got != "a.qcow" && got != name {
				t.Errorf("it stands on %q, want a.qcow or %q", got, name)
			}
			if found := check(t, l); found.Corruptions > 0 {
				t.Errorf("check found %+v", found)
			}
		})
	}
}

func TestSetParent_NameTooLong(t *testing.T) {
	fsys := newChain(t)
	image := mustOpen(t, fsys, "top.qcow", vfs.ReadWrite)
	below := mustOpenLayer(t, newSmall(t, nil), "a.qcow")
	defer below.Close()
	_, err := image.SetParent(&formats.Parent{Name: strings.Repeat("d/", 512), Layer: below}, []*layer{below})
	expectRefused(t, err, block.ErrInvalid, "1023")
	mustClose(t, image)
	expectParent(t, fsys, "a.qcow")
}

// TestLookup_MissingTables: of an image with few tables among very many that are missing, what
// is said is right, and said at once.
func TestLookup_MissingTables(t *testing.T) {
	const span = 32 << 10 // what a table maps
	fsys := vfs.NewMem()
	create(t, fsys, formats.CreateRequest{
		Name: "a.qcow", SizeBytes: 3000 * span, ClusterBytes: 512, Extra: map[string]string{"l2_bits": "6"},
	})
	image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
	tables := []int64{0, 5, 1023, 1024, 2047, 2999}
	for reopened := range 2 {
		for _, ti := range tables {
			mustWrite(t, image, ti*span+1024, []byte{1})
		}
		var data []int64
		calls := 0
		for off := int64(0); off < 3000*span; calls++ {
			e, err := image.Map(off, 3000*span-off)
			if err != nil {
				t.Fatal(err)
			}
			if e.State == block.Data {
				if e.Len != 512 || (e.Off-1024)%span != 0 {
					t.Errorf("data at %+v", e)
				}
				data = append(data, e.Off/span)
			}
			off += e.Len
		}
		if !slices.Equal(data, tables) || calls > 3*len(tables) {
			t.Errorf("data in tables %v after %d calls, want %v", data, calls, tables)
		}
		mustClose(t, image)
		if reopened == 0 {
			image = mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
		}
	}
}
