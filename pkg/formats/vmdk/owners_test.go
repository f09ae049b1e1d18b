package vmdk_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// An image two of whose entries refer to one grain, or to a part of one, is read and not
// written, until a repair has given each its own.
func TestOwners(t *testing.T) {
	for name, c := range map[string]struct {
		damage func(t *testing.T, fsys vfs.FS)
		two    bool
	}{
		"sound":             {func(*testing.T, vfs.FS) {}, false},
		"the same grain":    {func(t *testing.T, fsys vfs.FS) { poke32(t, fsys, "a.vmdk", gtOff+400, dataOff/512) }, true},
		"in another table":  {func(t *testing.T, fsys vfs.FS) { poke32(t, fsys, "a.vmdk", gtOff+secondTable+40, dataOff/512+8) }, true},
		"half a grain":      {func(t *testing.T, fsys vfs.FS) { poke32(t, fsys, "a.vmdk", gtOff+400, dataOff/512+4) }, true},
		"unaligned, sound":  {func(t *testing.T, fsys vfs.FS) { unalign(t, fsys) }, false},
		"unaligned, shared": {func(t *testing.T, fsys vfs.FS) { unalign(t, fsys); poke32(t, fsys, "a.vmdk", gtOff+400, dataOff/512+3) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := newSmall(t)
			c.damage(t, fsys)
			before := peek(t, fsys, "a.vmdk")
			image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
			contents := readGuest(t, image)
			for range 2 {
				_, err := image.WriteAt([]byte{1}, 3<<20)
				if c.two && (!errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "two grain table entries of a.vmdk")) || !c.two && err != nil {
					t.Errorf("write: error %v; two owners: %v", err, c.two)
				}
			}
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			if !c.two {
				return
			}
			if !bytes.Equal(before, peek(t, fsys, "a.vmdk")) {
				t.Error("the image has changed")
			}
			if fixed := checkMem(t, fsys, true); fixed.FixedProblems == 0 {
				t.Errorf("repair: %+v", fixed)
			}
			image = memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
			if !bytes.Equal(readGuest(t, image), contents) {
				t.Error("the repaired image reads as something else")
			}
			if _, err := image.WriteAt([]byte{1}, 3<<20); err != nil {
				t.Errorf("write after the repair: %v", err)
			}
		})
	}
}

// unalign moves the last grain of the small image by three sectors.
func unalign(t *testing.T, fsys vfs.FS) {
	t.Helper()
	p := peek(t, fsys, "a.vmdk")
	grain := bytes.Clone(p[dataOff+2*smallGrain : dataOff+3*smallGrain])
	poke(t, fsys, "a.vmdk", dataOff+2*smallGrain+3*512, grain...)
	for _, table := range []int64{gtOff, rgtOff} {
		poke32(t, fsys, "a.vmdk", table+8, dataOff/512+16+3)
	}
}

// What is between the grains of a stream and belongs to nothing is found; markers are not.
func TestCheck_StreamLeaks(t *testing.T) {
	disk := bytes.Repeat([]byte("text"), 64<<10)
	fsys := vfs.NewMem()
	convertToStream(t, fsys, disk, formats.CreateRequest{})
	if found := checkMem(t, fsys, false); found.Leaks != 0 || len(found.Problems) != 0 || found.Compressed != 4 {
		t.Errorf("sound: %+v", found)
	}
	p := peek(t, fsys, "a.vmdk")
	// The first table: behind four grains.
	gd := int64(binary.LittleEndian.Uint64(p[len(p)-1024+56:])) * 512
	gt := int64(binary.LittleEndian.Uint32(p[gd:])) * 512
	poke32(t, fsys, "a.vmdk", gt+4, 0)
	found := checkMem(t, fsys, false)
	if found.Leaks != 1 || len(found.Problems) != 1 || !strings.Contains(found.Problems[0].Text, "nothing refers to 1024 bytes") && !strings.Contains(found.Problems[0].Text, "nothing refers to 512 bytes") {
		t.Errorf("a lost grain: %+v", found)
	}
}

// A COWD header that would let others write over grains is found and repaired.
func TestCheck_FreeSector(t *testing.T) {
	fsys := vfs.NewMem()
	memCreate(t, fsys, formats.CreateRequest{Name: "a.vmdk", SizeBytes: 1 << 20, Subformat: "vmfsSparse"})
	image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
	for off := int64(0); off < 1<<20; off += 8 << 10 {
		if _, err := image.WriteAt([]byte("data"), off); err != nil {
			t.Fatal(err)
		}
		if err := image.Flush(); err != nil {
			t.Fatal(err)
		}
		if free := int64(peek32(t, fsys, "a-delta.vmdk", 28)); free < off/(8<<10)+4 {
			t.Fatalf("after a flush freeSector is %d", free)
		}
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	if free, end := int(peek32(t, fsys, "a-delta.vmdk", 28)), len(peek(t, fsys, "a-delta.vmdk"))/512; free != end {
		t.Errorf("closed, freeSector is %d, and the file has %d", free, end)
	}
	poke32(t, fsys, "a-delta.vmdk", 28, 60)
	if found := checkMem(t, fsys, false); len(found.Problems) != 1 || !strings.Contains(found.Problems[0].Text, "freeSector of a-delta.vmdk is 60") {
		t.Errorf("found %+v", found)
	}
	if fixed := checkMem(t, fsys, true); fixed.FixedProblems != 1 {
		t.Errorf("repaired %+v", fixed)
	}
	if left := checkMem(t, fsys, false); len(left.Problems) != 0 {
		t.Errorf("left %+v", left)
	}
}
