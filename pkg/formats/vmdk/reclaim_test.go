package vmdk_test

import (
	"bytes"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// A disk that is discarded and rewritten in turns does not grow for ever, although each
// close loses what was free.
func TestReclaim(t *testing.T) {
	fsys := vfs.NewMem()
	const size, grain = 4 << 20, 64 << 10
	memCreate(t, fsys, formats.CreateRequest{Name: "a.vmdk", SizeBytes: size})
	disk := make([]byte, size)
	longest := 0
	for session := range 50 {
		image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
		for off := session % 2 * grain; off < size; off += 2 * grain {
			copy(disk[off:], bytes.Repeat([]byte{byte(session + 1)}, grain))
			if _, err := image.WriteAt(disk[off:off+grain], int64(off)); err != nil {
				t.Fatal(err)
			}
		}
		for off := (session + 1) % 2 * grain; off < size; off += 2 * grain {
			clear(disk[off : off+grain])
			if err := image.Discard(int64(off), grain); err != nil {
				t.Fatal(err)
			}
		}
		if err := image.Close(); err != nil {
			t.Fatal(err)
		}
		image = memOpen(t, fsys, "a.vmdk", vfs.ReadOnly)
		if !bytes.Equal(readGuest(t, image), disk) {
			t.Fatalf("session %d: the contents differ from what was written", session)
		}
		checkSound(t, image)
		if err := image.Close(); err != nil {
			t.Fatal(err)
		}
		info, err := fsys.Stat("a.vmdk")
		if err != nil {
			t.Fatal(err)
		}
		longest = max(longest, int(info.Size()))
	}
	if longest < 60<<20 || longest > 75<<20 {
		t.Errorf("the file was up to %d MiB long, want little more than 68", longest>>20)
	}
}
