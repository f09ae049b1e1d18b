package vmdk_test

import (
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// A grain of zeroes is allocated at the end of the file without writing anything there.
// The longer file has to be durable before a table refers to it.
func TestFlush_SyncsAnExtensionNobodyWrote(t *testing.T) {
	mem := vfs.NewMem()
	memCreate(t, mem, formats.CreateRequest{Name: "base.vmdk", SizeBytes: 1 << 20})
	base := memOpen(t, mem, "base.vmdk", vfs.ReadWrite)
	if _, err := base.WriteAt([]byte("hidden by zeroes"), 0); err != nil {
		t.Fatal(err)
	}
	if err := base.Close(); err != nil {
		t.Fatal(err)
	}
	memCreateOverlay(t, mem, "base.vmdk", formats.CreateRequest{Name: "top.vmdk"})

	var flushing bool
	var first *vfs.Op
	watched := vfs.Inject(mem, vfs.If(vfs.Changing, func(op vfs.Op) error {
		if flushing && first == nil {
			first = &op
		}
		return nil
	}))
	top := memOpen(t, watched, "top.vmdk", vfs.ReadWrite)
	if err := top.Flush(); err != nil { // what an earlier process may have left
		t.Fatal(err)
	}
	if err := top.WriteZeroes(0, 64<<10, 0); err != nil {
		t.Fatal(err)
	}
	flushing = true
	if err := top.Flush(); err != nil {
		t.Fatal(err)
	}
	if first == nil || first.Kind != vfs.OpSync {
		t.Errorf("a flush began with %+v, want a sync", first)
	}
}
