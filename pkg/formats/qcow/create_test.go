package qcow_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/qcow"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func TestCreate_Refuses(t *testing.T) {
	const size = 1 << 20
	for name, c := range map[string]struct {
		req  formats.CreateRequest
		says string
	}{
		"no size":               {formats.CreateRequest{}, "size 0"},
		"size of half a sector": {formats.CreateRequest{SizeBytes: size + 256}, "multiple of 512"},
		"negative size":         {formats.CreateRequest{SizeBytes: -512}, "size -512"},
		"too large":             {formats.CreateRequest{SizeBytes: 1 << 62}, "multiple of 512"},
		"too many tables":       {formats.CreateRequest{SizeBytes: 9 << 40, ClusterBytes: 512}, "choose larger clusters"},
		"small clusters":        {formats.CreateRequest{SizeBytes: size, ClusterBytes: 256}, "cluster size 256"},
		"large clusters":        {formats.CreateRequest{SizeBytes: size, ClusterBytes: 128 << 10}, "cluster size 131072"},
		"odd clusters":          {formats.CreateRequest{SizeBytes: size, ClusterBytes: 3 << 10}, "cluster size 3072"},
		"negative clusters":     {formats.CreateRequest{SizeBytes: size, ClusterBytes: -4096}, "cluster size -4096"},
		"subformat":             {formats.CreateRequest{SizeBytes: size, Subformat: "sparse"}, "no subformats"},
		"preallocation":         {formats.CreateRequest{SizeBytes: size, Preallocation: "some"}, `preallocation "some"`},
		"option":                {formats.CreateRequest{SizeBytes: size, Extra: map[string]string{"x": "y"}}, "l2_bits"},
		"encryption":            {formats.CreateRequest{SizeBytes: size, Extra: map[string]string{"encrypt.format": "luks"}}, "want aes"},
		"l2_bits":               {formats.CreateRequest{SizeBytes: size, Extra: map[string]string{"l2_bits": "14"}}, "6 to 13"},
		"name":                  {formats.CreateRequest{SizeBytes: size, Name: "../a"}, "../a"},
		"encrypted falloc": {formats.CreateRequest{
			SizeBytes: size, Preallocation: formats.PreallocateFalloc, Extra: map[string]string{"encrypt.format": "aes"},
		}, "falloc"},
		"overlay of everything": {formats.CreateRequest{
			SizeBytes: size, Preallocation: formats.PreallocateFull, Parent: &formats.Parent{Name: "base"},
		}, "hide its parent"},
		"name of the parent too long": {formats.CreateRequest{
			SizeBytes: size, Parent: &formats.Parent{Name: strings.Repeat("d/", 512) + "b"},
		}, "1023"},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := vfs.NewMem()
			req := c.req
			req.FS, req.Secret = fsys, secret
			if req.Name == "" {
				req.Name = "a.qcow"
			}
			err := qcow.Format{}.Create(context.Background(), req)
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want an error that says %q", err, c.says)
			}
			if !errors.Is(err, block.ErrInvalid) && !errors.Is(err, fs.ErrInvalid) {
				t.Errorf("%v, want %v", err, block.ErrInvalid)
			}
			if entries, err := fsys.ReadDir("."); err != nil || len(entries) > 0 {
				t.Errorf("%v is left (%v)", entries, err)
			}
		})
	}
}

func TestCreate_NameTaken(t *testing.T) {
	fsys := newSmall(t, nil)
	before := peek(t, fsys, "a.qcow")
	err := qcow.Format{}.Create(context.Background(), formats.CreateRequest{FS: fsys, Name: "a.qcow", SizeBytes: 1 << 20})
	if !errors.Is(err, fs.ErrExist) {
		t.Errorf("%v, want %v", err, fs.ErrExist)
	}
	if !bytes.Equal(peek(t, fsys, "a.qcow"), before) {
		t.Error("the file that had the name was changed")
	}
}

func TestCreate_Interrupted(t *testing.T) {
	fsys := vfs.NewMem()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err := qcow.Format{}.Create(ctx, formats.CreateRequest{
		FS: fsys, Name: "a.qcow", SizeBytes: 1 << 20, Preallocation: formats.PreallocateFull,
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want %v", err, context.Canceled)
	}
	if _, err := fsys.Stat("a.qcow"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file is there: %v", err)
	}
}

// Images of all preallocations and shapes read as zeroes, are without problems, and can be
// written; the size of those that are full is what was measured.
func TestCreate_Preallocation(t *testing.T) {
	aes := map[string]string{"encrypt.format": "aes"}
	for _, how := range []formats.Preallocation{
		"", formats.PreallocateOff, formats.PreallocateMetadata, formats.PreallocateFalloc, formats.PreallocateFull,
	} {
		for _, extra := range []map[string]string{nil, {"l2_bits": "6"}, {"l2_bits": "13"}, aes} {
			for _, cluster := range []int64{512, 4 << 10, 64 << 10} {
				if how == formats.PreallocateFalloc && extra["encrypt.format"] != "" {
					continue
				}
				req := formats.CreateRequest{
					Name: "a.qcow", SizeBytes: 777 << 10, ClusterBytes: cluster, Preallocation: how, Extra: extra,
				}
				preallocated(t, req)
			}
		}
	}
}

func preallocated(t *testing.T, req formats.CreateRequest) {
	t.Helper()
	fsys := vfs.NewMem()
	create(t, fsys, req)
	made := int64(len(peek(t, fsys, "a.qcow")))
	image := mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
	if !bytes.Equal(readGuest(t, image), make([]byte, req.SizeBytes)) {
		t.Errorf("%+v: it does not read as zeroes", req)
	}
	checkClean(t, image)
	disk := bytes.Repeat([]byte("data"), int(req.SizeBytes/4))
	mustWrite(t, image, 0, disk)
	mustClose(t, image)
	filled := int64(len(peek(t, fsys, "a.qcow")))
	image = mustOpen(t, fsys, "a.qcow", vfs.ReadOnly)
	if !bytes.Equal(readGuest(t, image), disk) {
		t.Errorf("%+v: it does not read what was written", req)
	}
	checkClean(t, image)
	for _, c := range []struct{ data, want int64 }{{0, made}, {req.SizeBytes, filled}} {
		if got, err := (qcow.Format{}).Measure(req, c.data); err != nil || got != c.want {
			t.Errorf("%+v with %d bytes of data: measured %d (%v), want %d", req, c.data, got, err, c.want)
		}
	}
}

func TestMeasure_Refuses(t *testing.T) {
	_, err := qcow.Format{}.Measure(formats.CreateRequest{SizeBytes: 1 << 20, ClusterBytes: 3}, 0)
	expectRefused(t, err, block.ErrInvalid, "cluster size 3")
}

// A name that does not fit into the header's sector.
func TestCreate_LongBackingFileName(t *testing.T) {
	for _, cluster := range []int64{512, 64 << 10} {
		fsys := vfs.NewMem()
		dir := strings.Repeat("d", 200)
		deep := ""
		for range 4 {
			deep += dir + "/"
			if err := fsys.Mkdir(strings.TrimSuffix(deep, "/")); err != nil {
				t.Fatal(err)
			}
		}
		base := deep + "base.qcow"
		create(t, fsys, formats.CreateRequest{Name: base, SizeBytes: 100 << 10})
		image := mustOpen(t, fsys, base, vfs.ReadWrite)
		disk := make([]byte, 100<<10)
		scribble(t, testenv.Rand(t), image, disk, 5)
		mustClose(t, image)
		createOverlay(t, fsys, base, "qcow", formats.CreateRequest{Name: "a.qcow", ClusterBytes: cluster})
		image = mustOpen(t, fsys, "a.qcow", vfs.ReadWrite)
		scribble(t, testenv.Rand(t), image, disk, 5)
		mustClose(t, image)
		image = mustOpen(t, fsys, "a.qcow", vfs.ReadOnly)
		if !bytes.Equal(readGuest(t, image), disk) {
			t.Error("other contents")
		}
		checkSound(t, image)
	}
}

// An overlay whose size is not given is as large as its parent, to whole sectors.
func TestCreate_OverlayTakesTheParentsSize(t *testing.T) {
	fsys := newSmall(t, nil)
	poke64(t, fsys, "a.qcow", atSize, 10_000)
	createOverlay(t, fsys, "a.qcow", "qcow", formats.CreateRequest{Name: "b.qcow"})
	image := mustOpen(t, fsys, "b.qcow", vfs.ReadOnly)
	if n := image.Info().SizeBytes; n != 10_240 {
		t.Errorf("%d bytes, want 10240", n)
	}
	want := append(append(append(smallData(0), smallData(1)...), smallData(2)[:10_000-2*smallCluster]...), make([]byte, 240)...)
	if !bytes.Equal(readGuest(t, image), want) {
		t.Error("other contents")
	}
}
