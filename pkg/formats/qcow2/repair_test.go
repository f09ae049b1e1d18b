package qcow2_test

import (
	"context"
	"encoding/binary"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/qcow2"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// An entry that leads to where the file does not reach must not come to refer to what a
// repair puts there: then nothing is put there.
func TestRepair_EntryPastTheEnd(t *testing.T) {
	be := binary.BigEndian
	for name, damage := range map[string]func(p []byte, end uint64){
		"L1 to a refcount table":  func(p []byte, end uint64) { be.PutUint64(p[be.Uint64(p[40:])+8:], end|1<<63) },
		"L1 to a refcount block":  func(p []byte, end uint64) { be.PutUint64(p[be.Uint64(p[40:])+8:], end+512|1<<63) },
		"L1 to where nothing is":  func(p []byte, end uint64) { be.PutUint64(p[be.Uint64(p[40:])+8:], end<<20|1<<63) },
		"L2 to a refcount block":  func(p []byte, end uint64) { be.PutUint64(p[l2Of(p)+8:], end+512|1<<63) },
		"L2, kept for a zero one": func(p []byte, end uint64) { be.PutUint64(p[l2Of(p)+8:], end+512|1<<63|1) },
	} {
		t.Run(name, func(t *testing.T) {
			fsys := vfs.NewMem()
			memCreate(t, fsys, qcow2.Format{}, formats.CreateRequest{Name: "a.qcow2", SizeBytes: 1 << 20, ClusterBytes: 512})
			allocate(t, fsys)
			p := peek(t, fsys, "a.qcow2")
			damage(p, uint64(len(p)+511)&^511)
			be.PutUint64(p[be.Uint64(p[48:]):], 0) // no refcount block: all have to be made anew
			poke(t, fsys, "a.qcow2", 0, p...)

			check := func(repair bool) engine.CheckResult {
				layer, err := qcow2.Format{}.Open(formats.OpenRequest{FS: fsys, Name: "a.qcow2", Mode: vfs.ReadWrite})
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
			repaired := check(true)
			if after := check(false); after.Corruptions > repaired.Corruptions {
				t.Errorf("%d corruptions are left, it said; now there are %d:\nrepair %+v\ncheck  %+v",
					repaired.Corruptions, after.Corruptions, repaired.Problems, after.Problems)
			}
		})
	}
}

// l2Of returns where the first L2 table of an image is.
func l2Of(p []byte) uint64 {
	return binary.BigEndian.Uint64(p[binary.BigEndian.Uint64(p[40:]):]) & (1<<56 - 1)
}
