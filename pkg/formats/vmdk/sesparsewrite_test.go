package vmdk_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vmdk"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// addSESparse makes an empty seSparse image of a size in a.vmdk, whose extents of so many
// bytes each are e0.vmdk and so on, durably.
func addSESparse(t testing.TB, fsys *vfs.Mem, sizes ...int64) {
	t.Helper()
	text := header("seSparse")
	for i, size := range sizes {
		name := fmt.Sprintf("e%d.vmdk", i)
		addFile(t, fsys, name, newSELayout(size).extent())
		text += fmt.Sprintf("RW %d SESPARSE \"%s\"\n", size/512, name)
		if err := changeFile(fsys, name, func(vfs.File) error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	addFile(t, fsys, "a.vmdk", []byte(text))
	if err := changeFile(fsys, "a.vmdk", func(vfs.File) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if err := fsys.SyncDir("."); err != nil {
		t.Fatal(err)
	}
}

// Grain tables are added one after the other, while power is lost at every change: no two
// directory entries ever name one table, and no table's number is lost for good.
func TestSESparse_NewTables(t *testing.T) {
	const tables, table = 4, 16 << 20
	r := testenv.Rand(t)
	mem := vfs.NewMem()
	addSESparse(t, mem, tables*table)
	flushed, points := 0, 0
	order := r.Perm(tables)
	hook := func(vfs.Op) error {
		points++
		for range 3 {
			left := mem.Crash(r)
			if found := checkMem(t, left, false); found.Corruptions != 0 {
				t.Fatalf("at change %d: %+v", points, found.Problems)
			}
			image := memOpen(t, left, "a.vmdk", vfs.ReadWrite)
			for i, where := range order {
				off := int64(where)*table + 5*seGrain
				if i < flushed {
					wantByte(t, image, off, byte('a'+i))
				}
				if _, err := image.WriteAt([]byte{'z'}, off+seGrain); err != nil {
					t.Fatalf("at change %d: %v", points, err)
				}
			}
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			if found := checkMem(t, left, false); found.Corruptions != 0 {
				t.Fatalf("at change %d, once used: %+v", points, found.Problems)
			}
		}
		return nil
	}
	image := memOpen(t, vfs.Inject(mem, vfs.If(vfs.Changing, hook)), "a.vmdk", vfs.ReadWrite)
	for i, where := range order {
		if _, err := image.WriteAt(bytes.Repeat([]byte{byte('a' + i)}, seGrain), int64(where)*table+5*seGrain); err != nil {
			t.Fatal(err)
		}
		if err := image.Flush(); err != nil {
			t.Fatal(err)
		}
		flushed++
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, memOpen(t, mem, "a.vmdk", vfs.ReadOnly))
	if size := len(peek(t, mem, "e0.vmdk")); int64(size) != newSELayout(tables*table).grains*512+4097*seGrain {
		t.Errorf("the file has %d bytes, want as many as ESXi would have given it", size)
	}
}

func wantByte(t *testing.T, d block.Device, off int64, want byte) {
	t.Helper()
	p := make([]byte, 1)
	if _, err := d.ReadAt(p, off); err != nil || p[0] != want {
		t.Fatalf("at %#x: %q, %v; want %q", off, p, err, want)
	}
}

// Several extents: what spans them is split.
func TestSESparse_Extents(t *testing.T) {
	r := testenv.Rand(t)
	fsys := vfs.NewMem()
	addSESparse(t, fsys, 50*seGrain, 70*seGrain+512, 30*seGrain)
	image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
	disk := make([]byte, 150*seGrain+512)
	for range 20 {
		scribble(t, r, image, disk, 10)
		off, n := r.IntN(len(disk)), r.IntN(100*seGrain)
		n = min(n, len(disk)-off)
		if err := image.Discard(int64(off), int64(n)); err != nil {
			t.Fatal(err)
		}
		copy(disk[off:], readGuest(t, image)[off:off+n]) // zeroes, or as it was
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	image = memOpen(t, fsys, "a.vmdk", vfs.ReadOnly)
	if !bytes.Equal(readGuest(t, image), disk) {
		t.Error("it reads as something else than was written")
	}
	checkClean(t, image)
}

// A word of the bitmap of which only some bits are set, as ESXi may leave it, is taken as a
// whole, and nothing that is in use is taken.
func TestSESparse_PartialWord(t *testing.T) {
	for _, word := range []uint64{7, 7 << 61, 0x8040200000000000} {
		fsys := newSESparse(t)
		poke(t, fsys, "e.vmdk", seBitmap, le64(word)...)
		image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
		checkClean(t, image)
		want := seContents()
		for grain := 6; grain < 100; grain++ {
			copy(want[grain*seGrain:], bytes.Repeat([]byte{byte(grain)}, seGrain))
			if _, err := image.WriteAt(want[grain*seGrain:][:seGrain], int64(grain*seGrain)); err != nil {
				t.Fatal(err)
			}
		}
		if err := image.Close(); err != nil {
			t.Fatal(err)
		}
		image = memOpen(t, fsys, "a.vmdk", vfs.ReadOnly)
		if !bytes.Equal(readGuest(t, image), want) {
			t.Error("it reads as something else than was written")
		}
		checkClean(t, image)
		if p := peek(t, fsys, "e.vmdk")[seBitmap:]; !bytes.Equal(p[:24], le64(1<<64-1, 1<<64-1, 0)) {
			t.Errorf("the bitmap is %x", p[:24])
		}
	}
}

// A word is cleared once all of its grains are free, and not before.
func TestSESparse_Discard(t *testing.T) {
	fsys := newSESparse(t)
	image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
	for i, want := range []uint64{1<<64 - 1, 1<<64 - 1, 0} {
		if err := image.Discard(int64([]int{0, 5, 1}[i]*seGrain), seGrain); err != nil {
			t.Fatal(err)
		}
		for range 2 { // what one flush frees, the next one notes
			if err := image.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		if got := peek(t, fsys, "e.vmdk")[seBitmap:][:8]; !bytes.Equal(got, le64(want)) {
			t.Errorf("after %d discards the word is %x, want %x", i+1, got, want)
		}
	}
	if got := peek(t, fsys, "e.vmdk")[seBackMap:][:24]; !bytes.Equal(got, make([]byte, 24)) {
		t.Errorf("the back map is %x", got)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, memOpen(t, fsys, "a.vmdk", vfs.ReadOnly))
}

// A grain whose owner the guest has unmapped may still be ESXi's to give back.
func TestSESparse_Unmapped(t *testing.T) {
	for name, entry := range map[string]uint64{"named": 0x1003000000000000, "only by the back map": 0x1000000000000000} {
		t.Run(name, func(t *testing.T) {
			fsys := newSESparse(t)
			poke(t, fsys, "e.vmdk", seTables+8*3, le64(entry)...)
			poke(t, fsys, "e.vmdk", seBackMap+8*3, le64(0x1003000000000000)...)
			image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
			checkClean(t, image)
			for grain := range int64(70) {
				if _, err := image.WriteAt([]byte{'w'}, (10+grain)*seGrain); err != nil {
					t.Fatal(err)
				}
			}
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			if got := peek(t, fsys, "e.vmdk")[seBackMap+8*3:][:8]; !bytes.Equal(got, le64(0x1003000000000000)) {
				t.Errorf("the grain has the owner %x now", got)
			}
		})
	}
}

// Every kind of damage is found, writing refused, and what the tables tell repaired.
func TestSESparse_Check(t *testing.T) {
	put := func(off int64, values ...uint64) func(*testing.T, vfs.FS) {
		return func(t *testing.T, fsys vfs.FS) { poke(t, fsys, "e.vmdk", off, le64(values...)...) }
	}
	for name, c := range map[string]struct {
		damage             func(*testing.T, vfs.FS)
		corruptions, leaks int64
		repaired           bool
		problem            string
	}{
		"nothing":              {put(seBitmap, 1<<64-1), 0, 0, true, ""},
		"not marked":           {put(seBitmap, 0), 1, 0, true, "0 of the grains 0 to 63 of e.vmdk are marked as in use, but 3 are"},
		"marked too few":       {put(seBitmap, 6), 1, 0, true, "2 of the grains 0 to 63"},
		"no owner":             {put(seBackMap, 0), 1, 0, true, "grain 1 of e.vmdk: the back map of its grain number 0 is 0x0"},
		"other owner":          {put(seBackMap+8, 0x1000000000000000), 1, 0, true, "the back map of its grain number 1 is"},
		"owner of another":     {put(seBackMap+8*3, 0x1007000000000000), 0, 1, true, "nothing refers to 1 grains of e.vmdk"},
		"unknown owner":        {put(seBackMap+8*3, 0x5000000000000000), 0, 0, false, "the back map of grain number 3 of e.vmdk is 0x5000000000000000, of an unknown kind"},
		"next table":           {put(seVolatile+8, 0), 1, 0, true, "says that grain table 0 is free, but the directory names it"},
		"next table outside":   {put(seVolatile+8, 9), 1, 0, true, "says that grain table 9 is the next, but there are 2"},
		"two owners":           {put(seTables+8, 0x3002000000000000), 1, 0, false, "grain number 2 is another's, too"},
		"one table twice":      {put(seDirectory+8, 0x1000000000000000), 1, 0, false, "grain table 0 is another's, too"},
		"overlapping":          {put(160, seBackMap/512), 1, 0, false, "the seSparse free bitmap and back map overlap"},
		"bitmap outside":       {put(160, 1<<40), 1, 0, false, "the seSparse free bitmap, 8 sectors at sector 1099511627776, lies outside"},
		"grains in the tables": {put(192, seTables/512), 1, 0, false, "the seSparse grain tables and the grains overlap"},
		"lost grains": {func(t *testing.T, fsys vfs.FS) {
			put(seTables, 0, 0, 0, 0, 0, 0)(t, fsys)
		}, 0, 64, true, "nothing refers to 64 grains of e.vmdk"},
		"lost grain": {put(seTables, 0), 0, 1, true, "nothing refers to 1 grains of e.vmdk"},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := newSESparse(t)
			c.damage(t, fsys)
			found := checkMem(t, fsys, false)
			if found.Corruptions != c.corruptions && c.repaired || c.corruptions > 0 && found.Corruptions == 0 {
				t.Errorf("found %+v, want %d corruptions", found, c.corruptions)
			}
			if strings.HasPrefix(c.problem, "nothing refers") && found.Leaks != c.leaks {
				t.Errorf("found %d leaks, want %d", found.Leaks, c.leaks)
			}
			if c.problem != "" && (len(found.Problems) == 0 || !strings.Contains(found.Problems[0].Text, c.problem)) {
				t.Errorf("problems %+v, want one that says %q", found.Problems, c.problem)
			}
			image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
			if _, err := image.WriteAt([]byte{1}, 8*seGrain); (err == nil) != (c.corruptions == 0) {
				t.Errorf("write: %v", err)
			}
			image.Close()
			if !c.repaired {
				return
			}
			checkMem(t, fsys, true)
			if left := checkMem(t, fsys, false); left.Corruptions != 0 || left.Leaks != 0 {
				t.Errorf("left after the repair: %+v", left)
			}
		})
	}
}

// A back map that names guest grains, not entries of tables, is read but not written: it is
// not what is known. The two only differ once a table is not its directory entry's number.
func TestSESparse_OtherOwners(t *testing.T) {
	fsys := newSESparse(t)
	poke(t, fsys, "e.vmdk", seDirectory, le64(0, 0x1000000000000000)...)
	poke(t, fsys, "e.vmdk", seBackMap, le64(0x1001000000000001, 0x1005000000000001, 0x1000000000000001)...)
	image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
	checkClean(t, image)
	if _, err := image.WriteAt([]byte{1}, 0); !errors.Is(err, block.ErrUnsupported) || !strings.Contains(err.Error(), "in another way than is known") {
		t.Errorf("write: %v", err)
	}
}

// A guest that has written everything discards and writes on without ever flushing: there
// are no more grains than it has, and it takes those again that it gave back, or waits until
// they are free.
func TestSESparse_Full(t *testing.T) {
	for _, most := range []int{1 << 10, 7, 0} {
		t.Run(fmt.Sprintf("leaving=%d", most), func(t *testing.T) {
			defer vmdk.SetSEMaxLeaving(most)()
			rewriteFull(t)
		})
	}
}

func rewriteFull(t *testing.T) {
	const grains = 130
	fsys := vfs.NewMem()
	addSESparse(t, fsys, grains*seGrain)
	image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
	disk := make([]byte, grains*seGrain)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range disk {
		disk[i] = byte(r.Uint32())
	}
	for range 3 {
		for off := 0; off < len(disk); off += 10 * seGrain {
			if err := image.Discard(int64(off), 10*seGrain); err != nil {
				t.Fatal(err)
			}
			if _, err := image.WriteAt(disk[off:off+10*seGrain], int64(off)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !bytes.Equal(readGuest(t, image), disk) {
		t.Error("it reads as something else than was written")
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, memOpen(t, fsys, "a.vmdk", vfs.ReadOnly))
}
