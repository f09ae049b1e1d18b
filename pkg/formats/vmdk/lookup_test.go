package vmdk_test

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Runs are as long as what they describe, over the edges of grains and of grain tables.
func TestLookup_LongRuns(t *testing.T) {
	fsys := vfs.NewMem()
	memCreate(t, fsys, formats.CreateRequest{
		Name: "a.vmdk", SizeBytes: 60 << 20, ClusterBytes: smallGrain,
		Preallocation: formats.PreallocateFalloc,
	})
	codec := memOpen(t, fsys, "a.vmdk", vfs.ReadOnly).Layers()[0].Codec
	wantRun(t, codec, 0, 60<<20, engine.Data, 60<<20)
	wantRun(t, codec, 5<<20+100, 50<<20, engine.Data, 50<<20)
	wantRun(t, codec, 59<<20, 100<<20, engine.Data, 1<<20)
	wantRun(t, codec, 4097, 1, engine.Data, 1)

	codec = memOpen(t, newSmall(t), "a.vmdk", vfs.ReadOnly).Layers()[0].Codec
	wantRun(t, codec, 100, smallSize, engine.Data, int64(len(smallData()))-100)
	wantRun(t, codec, smallGrain, 10, engine.Data, 10)
	wantRun(t, codec, int64(len(smallData())), smallSize, engine.Absent, smallSize-int64(len(smallData())))
	wantRun(t, codec, smallSize-1, 1, engine.Absent, 1)
}

func wantRun(t *testing.T, codec engine.Codec, off, n int64, state engine.State, length int64) {
	t.Helper()
	run, err := codec.Lookup(off, n)
	if err != nil || run.State != state || run.Len != length {
		t.Errorf("Lookup(%d, %d) is %+v, %v; want state %d and %d bytes", off, n, run, err, state, length)
	}
}

// A run is never longer than what single lookups of its bytes say.
func TestLookup_RunsAgreeWithGrains(t *testing.T) {
	r := testenv.Rand(t)
	for _, option := range []string{"on", "off"} {
		const size = 5<<20 + 512
		fsys := vfs.NewMem()
		memCreate(t, fsys, formats.CreateRequest{Name: "base.vmdk", SizeBytes: size})
		base := memOpen(t, fsys, "base.vmdk", vfs.ReadWrite)
		if _, err := base.WriteAt(bytes.Repeat([]byte("base"), size/4), 0); err != nil {
			t.Fatal(err)
		}
		if err := base.Close(); err != nil {
			t.Fatal(err)
		}
		memCreateOverlay(t, fsys, "base.vmdk", formats.CreateRequest{
			Name: "a.vmdk", ClusterBytes: smallGrain, Extra: map[string]string{"zeroed_grain": option},
		})
		image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
		scribble(t, r, image, make([]byte, size), 240)
		codec := image.Layers()[0].Codec
		states := map[engine.State]int{}
		for off := int64(0); off < size; {
			run, err := codec.Lookup(off, size-off)
			if err != nil || run.Len < 1 || run.Len > size-off {
				t.Fatalf("Lookup(%d, %d) is %+v, %v", off, size-off, run, err)
			}
			states[run.State]++
			for at := off; at < off+run.Len; at += smallGrain {
				one, err := codec.Lookup(at, 1)
				if err != nil || one.State != run.State || run.State == engine.Data && one.FileOff != run.FileOff+at-off {
					t.Fatalf("at %d: %+v, %v in a run of %+v from %d on", at, one, err, run, off)
				}
			}
			off += run.Len
		}
		if states[engine.Data] < 2 || option == "on" && states[engine.Zero] < 2 {
			t.Errorf("only runs of %v", states)
		}
	}
}

func BenchmarkLookup(b *testing.B) {
	fsys := vfs.NewMem()
	const size = 16 << 30
	memCreate(b, fsys, formats.CreateRequest{Name: "a.vmdk", SizeBytes: size})
	image := memOpen(b, fsys, "a.vmdk", vfs.ReadWrite)
	for off := int64(0); off < size; off += 32 << 20 {
		if _, err := image.WriteAt([]byte{1}, off); err != nil {
			b.Fatal(err)
		}
	}
	codec := image.Layers()[0].Codec
	for _, length := range []int64{4 << 10, 1 << 20, size} {
		b.Run(fmt.Sprint(length), func(b *testing.B) {
			b.ReportAllocs()
			off := int64(0)
			for b.Loop() {
				off = (off + 977<<25 + 4096) % (size - length + 1)
				if _, err := codec.Lookup(off, length); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// A long run of nothing is found out by where the file has holes, and ends where a table
// has an entry, in the file or in memory.
func TestLookup_Holes(t *testing.T) {
	const size = 1 << 40
	fsys := vfs.NewMem()
	memCreate(t, fsys, formats.CreateRequest{Name: "a.vmdk", SizeBytes: size, ClusterBytes: smallGrain})
	image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
	wantMap := func(off, length int64) {
		t.Helper()
		began := time.Now()
		if e, err := image.Map(off, size-off); err != nil || e.State != block.Unallocated || e.Len != length {
			t.Errorf("at %d is %+v, %v; want %d bytes of nothing", off, e, err, length)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("it took %v to find that out", took)
		}
	}
	wantMap(0, size)
	wantMap(123<<20, size-123<<20)
	marks := []int64{700 << 30, 300<<30 + 5*smallGrain, 300 << 30, 64 << 20}
	for _, at := range marks { // first in memory only, then in the file, with others in memory
		if _, err := image.WriteAt([]byte{1}, at); err != nil {
			t.Fatal(err)
		}
		wantMap(0, at)
		if err := image.Flush(); err != nil {
			t.Fatal(err)
		}
		wantMap(0, at)
	}
	wantMap(300<<30+smallGrain, 4*smallGrain)
	wantMap(700<<30+smallGrain, size-(700<<30+smallGrain))
	if err := image.Discard(300<<30, 6*smallGrain); err != nil {
		t.Fatal(err)
	}
	wantMap(64<<20+smallGrain, 700<<30-(64<<20+smallGrain))
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	image = memOpen(t, fsys, "a.vmdk", vfs.ReadOnly)
	wantMap(0, 64<<20)
	wantMap(64<<20+smallGrain, 700<<30-(64<<20+smallGrain))
}
