package store_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// expectError makes sure that err is of a kind and says what helps.
func expectError(tb testing.TB, what string, err, want error, says ...string) {
	tb.Helper()
	if !errors.Is(err, want) {
		tb.Errorf("%s: %v, want %v", what, err, want)
		return
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			tb.Errorf("%s: %q does not say %q", what, err, s)
		}
	}
}

func TestNames(t *testing.T) {
	s, m := newStore(t)
	ctx := t.Context()
	before := len(tree(t, m, "."))
	for _, name := range []string{
		"", ".", "..", "../v", "a/b", "/v", "-v", ".v", "_v", "v\x00", "v\n", "ü", "v v", "v@s", "clone:v", "images%2Fx",
		strings.Repeat("v", 129),
	} {
		_, createErr := s.CreateVolume(ctx, store.CreateVolumeRequest{Name: name})
		expectError(t, fmt.Sprintf("create %q", name), createErr, block.ErrInvalid)
		if _, err := store.ImageVolumeName("x"); err == nil && name == "images%2Fx" {
			continue // a name, but not for CreateVolume
		}
		_, volumeErr := s.Volume(ctx, name)
		_, snapErr := s.CreateSnapshot(ctx, name, "s")
		_, expandErr := s.Expand(ctx, name, 1, 0)
		_, publishErr := s.Publish(ctx, store.PublishRequest{Volume: name, Node: "n"})
		_, attachErr := s.Attach(ctx, name, store.AttachOptions{})
		for what, err := range map[string]error{
			"volume": volumeErr, "snapshot": snapErr, "expand": expandErr, "publish": publishErr, "attach": attachErr,
			"delete": s.DeleteVolume(ctx, name), "delete snapshot": s.DeleteSnapshot(ctx, name, "s"), "unpublish": s.Unpublish(ctx, name, ""),
		} {
			expectError(t, fmt.Sprintf("%s %q", what, name), err, block.ErrInvalid)
		}
	}
	volume(t, s, "v")
	for _, name := range []string{"", "..", "a/b", "clone:v", "s@t"} {
		_, err := s.CreateSnapshot(ctx, "v", name)
		expectError(t, fmt.Sprintf("snapshot %q", name), err, block.ErrInvalid)
	}
	for _, image := range []string{"", "..", "../store.json", "/etc/passwd", "a//b", "a/../../volumes/v/v.vmdk", strings.Repeat("i", 250)} {
		_, err := s.EnsureImageVolume(ctx, image)
		expectError(t, fmt.Sprintf("image %q", image), err, block.ErrInvalid)
		_, err = s.CreateVolume(ctx, store.CreateVolumeRequest{Name: "w", Source: store.Source{Image: image}})
		if image != "" && len(image) < 200 {
			expectError(t, fmt.Sprintf("source image %q", image), err, block.ErrInvalid)
		}
		if err == nil {
			must(t, s.DeleteVolume(ctx, "w"))
		}
	}
	must(t, s.DeleteVolume(ctx, "v"))
	if after := tree(t, m, "."); len(after) != before {
		t.Errorf("left: %v", after)
	}
	long := strings.Repeat("v", 128)
	volume(t, s, long)
	must(t, s.DeleteVolume(ctx, long))
}

func TestImageVolumeName(t *testing.T) {
	seen := map[string]string{}
	for _, file := range []string{"disk.vmdk", "a/b.vmdk", "a%2Fb.vmdk", "a b.vmdk", "ä.vmdk", "a+b", "A", "a"} {
		name, err := store.ImageVolumeName(file)
		must(t, err)
		if other, ok := seen[name]; ok || strings.ContainsAny(name, "/ \"") {
			t.Errorf("image %q is volume %q, as is %q", file, name, other)
		}
		seen[name] = file
	}
	if name := seen["images%2Fdisk.vmdk"]; name != "disk.vmdk" {
		t.Errorf("names: %v", seen)
	}
}

func TestCreateVolume_Again(t *testing.T) {
	s, m := newStore(t)
	putImage(t, m, "i.vmdk", "vmdk", 4*mib)
	first := store.CreateVolumeRequest{Name: "v", SizeBytes: 8*mib + 1, LimitBytes: 9 * mib, Parameters: store.Parameters{ClusterBytes: 32 << 10}}
	rec := create(t, s, first)
	if rec.SizeBytes != 8*mib+512 {
		t.Errorf("made %d bytes", rec.SizeBytes)
	}
	for _, c := range []struct {
		change func(*store.CreateVolumeRequest)
		says   string // "": the same volume
	}{
		{func(*store.CreateVolumeRequest) {}, ""},
		{func(r *store.CreateVolumeRequest) { r.SizeBytes = 4 * mib }, ""},
		{func(r *store.CreateVolumeRequest) { r.SizeBytes, r.LimitBytes = 0, 0 }, ""},
		{func(r *store.CreateVolumeRequest) { r.Format = "qcow2" }, ""},
		{func(r *store.CreateVolumeRequest) { r.SizeBytes = 9 * mib }, "size"},
		{func(r *store.CreateVolumeRequest) { r.SizeBytes, r.LimitBytes = mib, 4*mib }, "size"},
		{func(r *store.CreateVolumeRequest) { r.Format = "raw" }, "format"},
		{func(r *store.CreateVolumeRequest) { r.Parameters.ClusterBytes = 0 }, "parameters"},
		{func(r *store.CreateVolumeRequest) { r.Source.Image = "i.vmdk" }, "source"},
	} {
		req := first
		c.change(&req)
		again, err := s.CreateVolume(t.Context(), req)
		if c.says != "" {
			expectError(t, fmt.Sprintf("create %+v", req), err, block.ErrExists, c.says)
		} else if err != nil || !again.Created.Equal(rec.Created) {
			t.Errorf("create %+v: %+v, %v", req, again, err)
		}
	}
}

// A volume restored or cloned with another format stands on the old one if it can, and else
// is a copy: what a storage class says of all its volumes holds for these, too.
func TestCreateVolume_AnotherFormat(t *testing.T) {
	onBoth(t, func(t *testing.T, s *store.Store, _ vfs.FS) {
		for _, origin := range []string{"raw", "vmdk", "qcow2"} {
			create(t, s, store.CreateVolumeRequest{Name: origin, SizeBytes: 4 * mib, Format: origin})
			withVolume(t, s, origin, store.AttachOptions{}, func(d block.Device) { writeStamp(t, d, mib, 3) })
			must(t, ignoreSnapshot(s.CreateSnapshot(t.Context(), origin, origin+"-snap")))
			for _, format := range []string{"", "raw", "vmdk", "qcow2"} {
				for kind, source := range map[string]store.Source{"restored": {Snapshot: origin + "@" + origin + "-snap"}, "cloned": {Volume: origin}} {
					name := fmt.Sprintf("%s-%s-as-%s", origin, kind, format)
					rec := create(t, s, store.CreateVolumeRequest{Name: name, Format: format, Source: source})
					if format != "" && rec.Format != format {
						t.Errorf("%s has format %s", name, rec.Format)
					}
					withVolume(t, s, name, store.AttachOptions{}, func(d block.Device) {
						expectStamp(t, d, mib, 3)
						writeStamp(t, d, mib, 4)
					})
				}
			}
			withVolume(t, s, origin, store.AttachOptions{}, func(d block.Device) { expectStamp(t, d, mib, 3) })
		}
		expectSound(t, s, "all formats")
	})
}

func TestCreateVolume_Refused(t *testing.T) {
	s, m := newStore(t)
	putImage(t, m, "i.vmdk", "vmdk", 4*mib)
	putImage(t, m, "i.img", "raw", 4*mib)
	putImage(t, m, "noise.VMDK", "raw", 4*mib)
	putImage(t, m, "flat.vhd", "raw", 4*mib)
	volume(t, s, "raw-source-less")
	create(t, s, store.CreateVolumeRequest{Name: "flat", SizeBytes: mib, Format: "raw"})
	before := tree(t, m, ".")
	for _, c := range []struct {
		req  store.CreateVolumeRequest
		want error
		says string
	}{
		{store.CreateVolumeRequest{SizeBytes: -1}, block.ErrInvalid, "size -1"},
		{store.CreateVolumeRequest{SizeBytes: 2, LimitBytes: 1}, block.ErrInvalid, "limit"},
		{store.CreateVolumeRequest{SizeBytes: 1, LimitBytes: 511}, block.ErrOutOfRange, "512"},
		{store.CreateVolumeRequest{SizeBytes: 1 << 62}, block.ErrOutOfRange, "qcow2"},
		{store.CreateVolumeRequest{Format: "floppy"}, block.ErrInvalid, "raw"},
		{store.CreateVolumeRequest{SizeBytes: mib, Parameters: store.Parameters{Subformat: "round"}}, nil, "round"},
		{store.CreateVolumeRequest{SizeBytes: mib, Parameters: store.Parameters{Preallocation: "some"}}, nil, "some"},
		{store.CreateVolumeRequest{SizeBytes: mib, Parameters: store.Parameters{ClusterBytes: -4}}, block.ErrInvalid, "clusterSize -4"},
		{store.CreateVolumeRequest{SizeBytes: mib, Parameters: store.Parameters{ClusterBytes: 1000}}, nil, "1000"},
		{store.CreateVolumeRequest{Source: store.Source{Image: "missing"}}, block.ErrNotFound, "missing"},
		{store.CreateVolumeRequest{Source: store.Source{Image: "noise.VMDK"}}, block.ErrCorrupt, "noise.VMDK: image is corrupt: it is named as a vmdk image"},
		{store.CreateVolumeRequest{Source: store.Source{Image: "flat.vhd", Mode: store.ImageCopy}}, block.ErrCorrupt, "named as a vhd image"},
		{store.CreateVolumeRequest{Format: "vmdk", Source: store.Source{Image: "i.img"}}, block.ErrUnsupported, "imageMode=copy"},
		{store.CreateVolumeRequest{Format: "raw", Source: store.Source{Image: "i.vmdk"}}, block.ErrUnsupported, "imageMode=copy"},
		{store.CreateVolumeRequest{Source: store.Source{Image: "i.vmdk", Mode: "guess"}}, block.ErrInvalid, "overlay or copy"},
		{store.CreateVolumeRequest{Source: store.Source{Image: "i.vmdk", Volume: "v"}}, block.ErrInvalid, "at most one"},
		{store.CreateVolumeRequest{Source: store.Source{Mode: "copy"}}, block.ErrInvalid, "no image"},
		{store.CreateVolumeRequest{SizeBytes: mib, Source: store.Source{Image: "i.vmdk"}}, block.ErrOutOfRange, "4194304"},
		{store.CreateVolumeRequest{Source: store.Source{Image: "i.vmdk"}, Parameters: store.Parameters{Preallocation: "full"}}, block.ErrInvalid, "preallocation"},
		{store.CreateVolumeRequest{Source: store.Source{Snapshot: "v"}}, block.ErrInvalid, "<volume>@<snapshot>"},
		{store.CreateVolumeRequest{Source: store.Source{Snapshot: "v@s"}}, block.ErrNotFound, "volume v"},
		{store.CreateVolumeRequest{Source: store.Source{Volume: "missing"}}, block.ErrNotFound, "missing"},
	} {
		c.req.Name = "new"
		_, err := s.CreateVolume(t.Context(), c.req)
		if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("create %+v: %v, want %v with %q", c.req, err, c.want, c.says)
		}
		if after := tree(t, m, "."); strings.Join(after, " ") != strings.Join(before, " ") {
			t.Fatalf("create %+v left %v of %v", c.req, after, before)
		}
	}
}

// An image is never written, whatever is done with the volumes that stand on it.
func TestImages(t *testing.T) {
	onBoth(t, func(t *testing.T, s *store.Store, fsys vfs.FS) {
		must(t, fsys.Mkdir("images/sub"))
		putImage(t, fsys, "sub/i.vmdk", "vmdk", 4*mib)
		putImage(t, fsys, "i.img", "raw", 4*mib)
		was := contents(t, fsys, "images/sub/i.vmdk")
		create(t, s, store.CreateVolumeRequest{Name: "over", SizeBytes: 8 * mib, Source: store.Source{Image: "sub/i.vmdk"}})
		create(t, s, store.CreateVolumeRequest{Name: "copied", Source: store.Source{Image: "i.img", Mode: store.ImageCopy}})
		static, err := s.EnsureImageVolume(t.Context(), "sub/i.vmdk")
		must(t, err)
		again, err := s.EnsureImageVolume(t.Context(), "sub/i.vmdk")
		must(t, err)
		if !again.Created.Equal(static.Created) {
			t.Errorf("two volumes for one image: %+v, %+v", static, again)
		}
		for _, name := range []string{"over", "copied", static.Name} {
			expectGeneration(t, s, name, "", 9)
			a := attach(t, s, name, "n")
			writeStamp(t, a, 0, 1)
			_, err := s.CreateSnapshot(t.Context(), name, "s-"+strings.ReplaceAll(name, "%", "-"))
			must(t, err)
			detach(t, s, a)
		}
		if contents(t, fsys, "images/sub/i.vmdk") != was {
			t.Error("the image was written")
		}
		expectClean(t, s)
	})
}

func contents(tb testing.TB, fsys vfs.FS, name string) string {
	tb.Helper()
	f, err := fsys.Open(name, vfs.ReadOnly)
	must(tb, err)
	defer f.Close()
	size, err := f.Size()
	must(tb, err)
	p := make([]byte, size)
	_, err = f.ReadAt(p, 0)
	must(tb, err)
	return string(p)
}

// A guest can write anything into its raw disk, and it stays a raw disk.
func TestFormatIsNotProbed(t *testing.T) {
	s, m := newStore(t)
	create(t, s, store.CreateVolumeRequest{Name: "v", SizeBytes: mib, Format: "raw"})
	putImage(t, m, "evil.vmdk", "vmdk", 4*mib)
	evil := []byte(contents(t, m, "images/evil.vmdk"))[:64<<10]
	withVolume(t, s, "v", store.AttachOptions{}, func(d block.Device) {
		_, err := d.WriteAt(evil, 0)
		must(t, err)
	})
	withVolume(t, s, "v", store.AttachOptions{}, func(d block.Device) {
		if d.Info().SizeBytes != mib {
			t.Errorf("the guest changed its disk's size to %d", d.Info().SizeBytes)
		}
	})
	expectClean(t, s)
}

func TestSnapshots_Rules(t *testing.T) {
	s, m := newStore(t)
	ctx := t.Context()
	volume(t, s, "v")
	volume(t, s, "w")
	create(t, s, store.CreateVolumeRequest{Name: "raw", SizeBytes: mib, Format: "raw"})
	first, err := s.CreateSnapshot(ctx, "v", "s")
	must(t, err)
	again, err := s.CreateSnapshot(ctx, "v", "s")
	must(t, err)
	if !again.Taken.Equal(first.Taken) || first.SizeBytes != 8*mib || !first.Ready {
		t.Errorf("taken %+v and %+v", first, again)
	}
	_, err = s.CreateSnapshot(ctx, "w", "s")
	expectError(t, "the same name on another volume", err, block.ErrExists, "volume v")
	must(t, ignoreSnapshot(s.CreateSnapshot(ctx, "raw", "r"))) // QCOW2 stands on it
	must(t, s.DeleteSnapshot(ctx, "raw", "r"))
	_, err = s.CreateSnapshot(ctx, "missing", "m")
	expectError(t, "snapshot of nothing", err, block.ErrNotFound, "missing")
	must(t, s.DeleteSnapshot(ctx, "missing", "m"))
	must(t, s.DeleteSnapshot(ctx, "v", "missing"))
	_, err = s.CreateSnapshot(ctx, "w", "t")
	must(t, err)
	list, err := s.Snapshots(ctx)
	must(t, err)
	if len(list) != 2 || list[0].Volume != "v" || list[1].Volume != "w" {
		t.Errorf("snapshots: %+v", list)
	}
	// They outlive their volume.
	must(t, s.DeleteVolume(ctx, "v"))
	if list, err = s.Snapshots(ctx); err != nil || len(list) != 2 {
		t.Errorf("snapshots: %+v, %v", list, err)
	}
	_, err = s.CreateVolume(ctx, store.CreateVolumeRequest{Name: "v"})
	expectError(t, "make a volume whose name is still needed", err, block.ErrExists, "deleted")
	create(t, s, store.CreateVolumeRequest{Name: "r", Source: store.Source{Snapshot: "v@s"}})
	must(t, s.DeleteSnapshot(ctx, "v", "s"))
	expectGeneration(t, s, "r", "", 0)
	deleteAll(t, s, m, "in the end")
}

func TestChainLimit(t *testing.T) {
	m := vfs.NewMem()
	openStore(t, m)
	opts := fast
	opts.MaxChain = 3
	s, err := store.Open(t.Context(), "test", m, opts)
	must(t, err)
	written(t, s, "v")
	for _, snap := range []string{"s1", "s2"} {
		must(t, ignoreSnapshot(s.CreateSnapshot(t.Context(), "v", snap)))
	}
	_, err = s.CreateSnapshot(t.Context(), "v", "s3")
	expectError(t, "one snapshot too many", err, block.ErrUnsupported, "3", "delete snapshots")
	_, err = s.CreateVolume(t.Context(), store.CreateVolumeRequest{Name: "c", Source: store.Source{Volume: "v"}})
	expectError(t, "one clone too many", err, block.ErrUnsupported, "3")
	// Merging makes room.
	must(t, s.DeleteSnapshot(t.Context(), "v", "s2"))
	result, err := s.GC(t.Context())
	must(t, err)
	if len(result.MergedVolumes) != 1 || len(result.Problems) != 0 {
		t.Errorf("collected %+v", result)
	}
	must(t, ignoreSnapshot(s.CreateSnapshot(t.Context(), "v", "s3")))
	expectGeneration(t, s, "v", "s3", 1)
	expectClean(t, s)
}

// A merge in progress gives way to whoever needs the volume.
func TestMerge_GivesWay(t *testing.T) {
	m := vfs.NewMem()
	mergeable(t, openStore(t, m), m)
	copying := make(chan struct{}, 1)
	slow := openStore(t, vfs.Inject(m, func(op vfs.Op) error {
		if op.Kind == vfs.OpWrite && strings.HasSuffix(op.Name, "-000004.qcow2") {
			select {
			case copying <- struct{}{}:
			default:
			}
			time.Sleep(20 * time.Millisecond)
		}
		return nil
	}))
	done := make(chan error)
	go func() {
		_, err := slow.GC(t.Context())
		done <- err
	}()
	<-copying
	s := openStore(t, m)
	a := attach(t, s, "v", "n")
	expectStamp(t, a, 0, 3)
	writeStamp(t, a, 0, 4)
	must(t, <-done)
	detach(t, s, a)
	_, err := s.GC(t.Context())
	must(t, err)
	withVolume(t, s, "v", store.AttachOptions{}, func(d block.Device) { expectStamp(t, d, 0, 4) })
	expectClean(t, s)
	deleteAll(t, s, m, "in the end")
}

func TestExpand_Rules(t *testing.T) {
	onBoth(t, func(t *testing.T, s *store.Store, fsys vfs.FS) {
		ctx := t.Context()
		for _, format := range []string{"raw", "vmdk", "qcow2"} {
			create(t, s, store.CreateVolumeRequest{Name: format, SizeBytes: mib, Format: format})
			for _, attached := range []bool{false, true} {
				var a *store.Attached
				if attached {
					a = attach(t, s, format, "n")
				}
				rec, err := s.Volume(ctx, format)
				must(t, err)
				rec, err = s.Expand(ctx, format, rec.SizeBytes+mib-1, 0)
				if err != nil || rec.SizeBytes%mib != 0 || rec.WantSizeBytes != 0 {
					t.Errorf("expand %s: %+v, %v", format, rec, err)
				}
				smaller, err := s.Expand(ctx, format, mib, 0)
				if err != nil || smaller.SizeBytes != rec.SizeBytes {
					t.Errorf("expand %s to less: %+v, %v", format, smaller, err)
				}
				_, err = s.Expand(ctx, format, 100*mib+1, 100*mib+1)
				expectError(t, "expand beyond the limit by rounding", err, block.ErrOutOfRange, "limit")
				if attached {
					if a.Info().SizeBytes != rec.SizeBytes {
						t.Errorf("the device has %d bytes, want %d", a.Info().SizeBytes, rec.SizeBytes)
					}
					writeStamp(t, a, rec.SizeBytes-512, 1)
					detach(t, s, a)
				}
			}
		}
		_, err := s.Expand(ctx, "missing", mib, 0)
		expectError(t, "expand nothing", err, block.ErrNotFound)
		expectClean(t, s)
	})
}

func TestPublish_Rules(t *testing.T) {
	s, _ := newStore(t)
	ctx := t.Context()
	volume(t, s, "v")
	publish := func(node string, readOnly, shared bool) (int64, error) {
		return s.Publish(ctx, store.PublishRequest{Volume: "v", Node: node, ReadOnly: readOnly, Shared: shared})
	}
	first, err := publish("n1", false, false)
	must(t, err)
	if again, err := publish("n1", false, false); err != nil || again != first {
		t.Errorf("again: epoch %d, %v; want %d", again, err, first)
	}
	_, err = publish("n1", true, false)
	expectError(t, "the same node in another way", err, block.ErrExists, "n1", "writing")
	_, err = publish("n2", false, false)
	expectError(t, "another node", err, block.ErrBusy, "n1")
	_, err = publish("n2", true, true)
	expectError(t, "a reader beside a writer", err, block.ErrBusy, "n1")
	_, err = publish("n2", false, true)
	expectError(t, "shared writers", err, block.ErrInvalid)
	_, err = publish("", false, false)
	expectError(t, "no node", err, block.ErrInvalid)
	must(t, s.Unpublish(ctx, "v", "n2"))
	must(t, s.Unpublish(ctx, "v", "n1"))
	must(t, s.Unpublish(ctx, "v", "n1"))
	must(t, s.Unpublish(ctx, "missing", "n1"))
	second, err := publish("n1", true, true)
	must(t, err)
	third, err := publish("n2", true, true)
	must(t, err)
	if second <= first || third <= second {
		t.Errorf("epochs %d, %d, %d do not rise", first, second, third)
	}
	_, err = publish("n3", true, false)
	expectError(t, "a lone reader beside others", err, block.ErrBusy, "n1")
	must(t, s.Unpublish(ctx, "v", "n1"))
	expectError(t, "delete while one is left", s.DeleteVolume(ctx, "v"), block.ErrBusy, "n2")
	_, err = s.Publish(ctx, store.PublishRequest{Volume: "missing", Node: "n"})
	expectError(t, "publish nothing", err, block.ErrNotFound)
}

// Volumes, snapshots and clones in every order of deletion: what is left stays whole, and
// in the end nothing is left, without a collection.
func TestDelete_EveryOrder(t *testing.T) {
	base, m := newStore(t)
	ctx := t.Context()
	written(t, base, "v")
	must(t, ignoreSnapshot(base.CreateSnapshot(ctx, "v", "s1")))
	rewrite(t, base, "v", 2)
	must(t, ignoreSnapshot(base.CreateSnapshot(ctx, "v", "s2")))
	rewrite(t, base, "v", 3)
	create(t, base, store.CreateVolumeRequest{Name: "r", Source: store.Source{Snapshot: "v@s1"}})
	create(t, base, store.CreateVolumeRequest{Name: "c", Source: store.Source{Volume: "r"}})
	rewrite(t, base, "c", 4)

	type thing struct {
		volume, snapshot string
		generation       byte
	}
	things := []thing{{"v", "s1", 1}, {"v", "s2", 2}, {"v", "", 3}, {"r", "", 1}, {"c", "", 4}}
	orders := 0
	permute(len(things), func(order []int) {
		orders++
		left := m.Clone()
		s := openStore(t, left)
		for i, n := range order {
			if th := things[n]; th.snapshot != "" {
				must(t, s.DeleteSnapshot(ctx, th.volume, th.snapshot))
			} else {
				must(t, s.DeleteVolume(ctx, th.volume))
			}
			for _, k := range order[i+1:] {
				th := things[k]
				if _, err := s.Volume(ctx, th.volume); err != nil && th.snapshot != "" {
					continue // read by restoring only, as CSI does
				}
				expectGeneration(t, s, th.volume, th.snapshot, th.generation)
			}
		}
		if files := tree(t, left, "."); len(files) > 0 {
			t.Errorf("order %v leaves %v", order, files)
		}
	})
	if orders != 120 {
		t.Errorf("%d orders", orders)
	}
}

// permute calls f with every order of 0 to n-1.
func permute(n int, f func(order []int)) {
	order := make([]int, 0, n)
	var extend func()
	extend = func() {
		if len(order) == n {
			f(order)
			return
		}
	next:
		for i := range n {
			for _, have := range order {
				if have == i {
					continue next
				}
			}
			order = append(order, i)
			extend()
			order = order[:len(order)-1]
		}
	}
	extend()
}

// One unreadable record hides no other volume, and nothing is removed that it may need.
func TestCorruptRecord(t *testing.T) {
	for _, bad := range []string{
		"", "{", "[]", `{"layout":2,"name":"bad"}`, `{"layout":1,"name":"other"}`,
		`{"layout":1,"name":"bad","ready":true,"layers":[{"file":"../../etc/shadow","format":"raw"}]}`,
		`{"layout":1,"name":"bad","ready":true,"layers":[{"file":"store.json","format":"raw"}]}`,
		`{"layout":1,"name":"bad","ready":true,"layers":[]}`,
		`{"layout":1,"name":"bad","sizeBytes":-1}`,
		`{"layout":1,"name":"bad","merging":["volumes/good/good.vmdk"]}`,
		`{"layout":1,"name":"bad","snapshots":[{"name":"../x"}]}`,
		`{"layout":1,"name":"bad","snapshots":[{"name":"x","overlay":"volumes/good/good.vmdk"}]}`,
		`{"layout":1,"name":"bad","snapshots":[{"name":"x","ready":true,"layer":"volumes/good/good.vmdk"}]}`,
		strings.Repeat(" ", 2<<20),
	} {
		s, m := newStore(t)
		ctx := t.Context()
		written(t, s, "good")
		volume(t, s, "bad")
		must(t, m.Remove("volumes/bad/volume.json"))
		f, err := m.Create("volumes/bad/volume.json")
		must(t, err)
		_, err = f.WriteAt([]byte(bad), 0)
		must(t, errors.Join(err, f.Close()))

		list, err := s.Volumes(ctx)
		must(t, err)
		if len(list) != 2 || list[0].Name != "bad" || list[0].Err == nil || list[1].Err != nil {
			t.Errorf("%.90q: listed %+v", bad, list)
		}
		_, err = s.Volume(ctx, "bad")
		expectError(t, bad[:min(len(bad), 90)], err, block.ErrCorrupt, "bad")
		_, err = s.Attach(ctx, "bad", store.AttachOptions{})
		expectError(t, "attach it", err, block.ErrCorrupt)
		report, err := s.Check(ctx, true)
		must(t, err)
		if len(report.Problems) == 0 || !report.Problems[0].Corrupt {
			t.Errorf("%.90q: check found %+v", bad, report)
		}
		must(t, s.DeleteVolume(ctx, "good"))
		if len(tree(t, m, "volumes/good")) == 0 {
			t.Error("layers were removed that the unreadable record may need")
		}
		data, err := s.Tree(ctx)
		must(t, err)
		var b strings.Builder
		must(t, data.Draw(&b))
		if len(data.Problems) != 1 || !strings.Contains(b.String(), "! ") {
			t.Errorf("drawn without the problem:\n%s", b.String())
		}
	}
}

func TestCheck(t *testing.T) {
	s, m := newStore(t)
	ctx := t.Context()
	written(t, s, "v")
	must(t, ignoreSnapshot(s.CreateSnapshot(ctx, "v", "s")))
	expectClean(t, s)
	for _, name := range []string{"volumes/v/v-000009.vmdk", "volumes/v/v-000009-s001.vmdk", "volumes/v/notes.txt", "volumes/stray"} {
		f, err := m.Create(name)
		must(t, err)
		must(t, f.Close())
	}
	must(t, m.Mkdir("volumes/empty"))
	report, err := s.Check(ctx, true)
	must(t, err)
	found := map[string]store.CheckProblem{}
	for _, p := range report.Problems {
		found[p.Volume+" "+p.File] = p
	}
	for key, fixed := range map[string]bool{
		"v volumes/v/v-000009.vmdk": true, "v volumes/v/v-000009-s001.vmdk": true, "v volumes/v/notes.txt": false,
		" volumes/stray": false, "empty ": true,
	} {
		if p, ok := found[key]; !ok || p.Fixed != fixed || p.Corrupt {
			t.Errorf("%s: %+v, want it reported, fixed=%t", key, p, fixed)
		}
	}
	if len(found) != 5 || report.Volumes != 1 || report.Layers != 2 {
		t.Errorf("found %+v", report)
	}
	must(t, m.Remove("volumes/v/v.qcow2"))
	report, err = s.Check(ctx, false)
	must(t, err)
	corrupt := false
	for _, p := range report.Problems {
		corrupt = corrupt || p.Corrupt && strings.Contains(p.Text, "v.qcow2")
	}
	if !corrupt {
		t.Errorf("a missing layer: %+v", report)
	}
	_, err = s.Attach(ctx, "v", store.AttachOptions{})
	if err == nil || !strings.Contains(err.Error(), "volumes/v/v.qcow2") {
		t.Errorf("attach without a layer: %v", err)
	}
	must(t, s.DeleteVolume(ctx, "v"))
}

func TestOpen_Refused(t *testing.T) {
	ctx := t.Context()
	m := vfs.NewMem()
	_, err := store.Open(ctx, "test", m, store.Options{})
	expectError(t, "no store", err, block.ErrNotFound, "store init")
	id, err := store.Init(m)
	must(t, err)
	if again, err := store.Init(m); err != nil || again != id || id == "" {
		t.Errorf("made again: %q, %v; want %q", again, err, id)
	}
	_, err = store.Open(ctx, "a/b", m, store.Options{})
	expectError(t, "a bad name", err, block.ErrInvalid)

	failing := func(kind vfs.OpKind, err error) vfs.FS {
		return vfs.Inject(m, vfs.If(vfs.OfKind(kind), func(vfs.Op) error { return err }))
	}
	_, err = store.Open(ctx, "test", failing(vfs.OpCreate, syscall.EROFS), store.Options{})
	expectError(t, "a read-only file system", err, block.ErrReadOnly, "cannot be written")
	_, err = store.Open(ctx, "test", failing(vfs.OpLock, errors.ErrUnsupported), store.Options{})
	expectError(t, "no locks", err, block.ErrUnsupported, "locks do not work")
	_, err = store.Open(ctx, "test", lockless{m}, store.Options{})
	expectError(t, "locks that keep nobody out", err, block.ErrUnsupported, "locked twice")
	expectEmpty(t, m)

	s, err := store.Open(ctx, "test", failing(vfs.OpCreate, syscall.EROFS), store.Options{ReadOnly: true})
	must(t, err)
	if s.ID() != id || s.Name() != "test" {
		t.Errorf("opened %s %s", s.Name(), s.ID())
	}
	_, err = s.Volumes(ctx)
	must(t, err)
	_, err = s.CreateVolume(ctx, store.CreateVolumeRequest{Name: "v"})
	expectError(t, "create in a store open for looking", err, block.ErrReadOnly)
	expectError(t, "delete in it", s.DeleteVolume(ctx, "v"), block.ErrReadOnly)
}

// lockless is a file system whose locks are granted to everybody.
type lockless struct{ vfs.FS }

func (l lockless) Open(name string, mode vfs.Mode) (vfs.File, error) {
	f, err := l.FS.Open(name, mode)
	return locklessFile{f}, err
}

func (l lockless) Create(name string) (vfs.File, error) {
	f, err := l.FS.Create(name)
	return locklessFile{f}, err
}

type locklessFile struct{ vfs.File }

func (locklessFile) Lock(vfs.LockKind) error { return nil }
func (locklessFile) Unlock() error           { return nil }

// What a crash leaks is found, and repaired where nobody uses the image.
func TestCheck_Repair(t *testing.T) {
	s, m := newStore(t)
	create(t, s, store.CreateVolumeRequest{Name: "v", SizeBytes: 8 * mib, Format: "vmdk"})
	a := attach(t, s, "v", "n")
	writeStamp(t, a, 0, 1)
	must(t, a.Flush())
	for off := int64(mib); off < 4*mib; off += 64 << 10 {
		writeStamp(t, a, off, 1)
	}
	left := m.Clone() // killed: what was not flushed is leaked, without the journal
	must(t, a.Close())
	s = openStore(t, left)
	problems := func(repair bool) (open, fixed int) {
		report, err := s.Check(t.Context(), repair)
		must(t, err)
		for _, p := range report.Problems {
			if p.Fixed {
				fixed++
			} else {
				open++
			}
		}
		return open, fixed
	}
	if open, fixed := problems(true); open == 0 || fixed != 0 {
		t.Errorf("%d problems are open and %d fixed of a volume that is being served", open, fixed)
	}
	must(t, s.Unpublish(t.Context(), "v", "n"))
	if open, fixed := problems(true); open != 0 || fixed == 0 {
		t.Errorf("%d problems are open and %d fixed", open, fixed)
	}
	expectClean(t, s)
	withVolume(t, s, "v", store.AttachOptions{}, func(d block.Device) { expectStamp(t, d, 0, 1) })
}

// A full store tells the caller, spoils nothing, and goes on once there is space.
func TestFullStore(t *testing.T) {
	m := vfs.NewMem()
	s := openStore(t, m)
	written(t, s, "v")
	usage, err := s.Usage()
	must(t, err)
	m.SetCapacity(usage.TotalBytes - usage.FreeBytes)
	_, err = s.CreateVolume(t.Context(), store.CreateVolumeRequest{Name: "w", SizeBytes: mib})
	expectError(t, "create", err, syscall.ENOSPC)
	_, err = s.CreateSnapshot(t.Context(), "v", "s")
	expectError(t, "snapshot", err, syscall.ENOSPC)
	m.SetCapacity(-1)
	a := attach(t, s, "v", "n")
	writeStamp(t, a, 2*mib, 1)
	usage, err = s.Usage()
	must(t, err)
	m.SetCapacity(usage.TotalBytes - usage.FreeBytes)
	full := false
	for off := int64(3 * mib); off < 8*mib && !full; off += 64 << 10 {
		_, err := a.WriteAt(stamp(off, 1), off)
		full = block.Errno(err) == syscall.ENOSPC
		if err != nil && !full {
			t.Fatal(err)
		}
	}
	if !full {
		t.Error("the store never was full")
	}
	for range 20 { // what asks for more does not use up what is spare
		_, err = s.CreateVolume(t.Context(), store.CreateVolumeRequest{Name: "w", SizeBytes: mib})
		expectError(t, "create", err, syscall.ENOSPC)
	}
	_, err = s.CreateSnapshot(t.Context(), "v", "s")
	expectError(t, "snapshot", err, syscall.ENOSPC)
	// Everything can be let go all the same.
	expectStamp(t, a, 2*mib, 1)
	must(t, a.Flush())
	detach(t, s, a)
	expectSound(t, s, "full")
	left := m.Clone()
	must(t, s.DeleteVolume(t.Context(), "v"))
	expectEmpty(t, m)

	// With space again, everything goes on.
	left.SetCapacity(-1)
	s = openStore(t, left)
	must(t, ignoreSnapshot(s.CreateSnapshot(t.Context(), "v", "s")))
	withVolume(t, s, "v", store.AttachOptions{}, func(d block.Device) { expectStamp(t, d, 2*mib, 1) })
	expectSound(t, s, "afterwards")
	deleteAll(t, s, left, "in the end")
}

// The holder's failure reaches who waits, with its kind, and the wish is taken back.
func TestCreateSnapshot_HolderFails(t *testing.T) {
	m := vfs.NewMem()
	s := openStore(t, m)
	full := false
	holder := openStore(t, vfs.Inject(m, func(op vfs.Op) error {
		if full && op.Kind == vfs.OpCreate && strings.HasSuffix(op.Name, ".qcow2") {
			return syscall.ENOSPC
		}
		return nil
	}))
	volume(t, s, "v")
	full = true
	a := attach(t, holder, "v", "n")
	_, err := s.CreateSnapshot(t.Context(), "v", "s")
	expectError(t, "snapshot by a holder without space", err, block.ErrNoSpace)
	list, err := s.Snapshots(t.Context())
	if err != nil || len(list) != 0 {
		t.Errorf("the wish is still there: %+v, %v", list, err)
	}
	detach(t, s, a)
}

// When the caller goes away, the wish stays, and is carried out later.
func TestCreateSnapshot_Later(t *testing.T) {
	m := vfs.NewMem()
	s := openStore(t, m)
	written(t, s, "v")
	epoch, err := s.Publish(t.Context(), store.PublishRequest{Volume: "v", Node: "n"})
	must(t, err)
	a, err := s.Attach(t.Context(), "v", store.AttachOptions{Node: "n", Epoch: epoch})
	must(t, err)
	left := m.Clone() // the server is dead, and what it had in its journal is needed
	s = openStore(t, left)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err = s.CreateSnapshot(ctx, "v", "s")
	expectError(t, "nobody takes it", err, context.DeadlineExceeded)
	_, err = s.Expand(ctx, "v", 16*mib, 0)
	expectError(t, "nobody grows it", err, context.DeadlineExceeded)
	b, err := s.Attach(t.Context(), "v", store.AttachOptions{Node: "n", Epoch: epoch})
	must(t, err)
	waitFor(t, func() bool {
		snap, err := s.Snapshot(t.Context(), "v", "s")
		must(t, err)
		return snap.Ready
	})
	must(t, b.Close())
	must(t, a.Close())
}

// Two overlays may not be mistaken for one another, whatever names volumes have.
func TestNamesLikeLayers(t *testing.T) {
	s, m := newStore(t)
	r := testenv.Rand(t)
	names := []string{"v", "v-000001", "v-000001.vmdk", "volume", "volume.json", "v-flat"}
	r.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	for i, name := range names {
		create(t, s, store.CreateVolumeRequest{Name: name, SizeBytes: 4 * mib, Format: "vmdk", Parameters: store.Parameters{Subformat: "monolithicFlat"}})
		must(t, ignoreSnapshot(s.CreateSnapshot(t.Context(), name, fmt.Sprintf("s%d", i))))
		rewrite(t, s, name, byte(i+1))
	}
	_, err := s.GC(t.Context())
	must(t, err)
	for i, name := range names {
		expectGeneration(t, s, name, "", byte(i+1))
		expectGeneration(t, s, name, fmt.Sprintf("s%d", i), 0)
	}
	expectClean(t, s)
	deleteAll(t, s, m, "in the end")
}

// What somebody reads stays until he is done, whatever is deleted.
func TestDelete_WhileRead(t *testing.T) {
	onBoth(t, func(t *testing.T, s *store.Store, fsys vfs.FS) {
		ctx := t.Context()
		written(t, s, "v")
		must(t, ignoreSnapshot(s.CreateSnapshot(ctx, "v", "s")))
		rewrite(t, s, "v", 2)
		reader := openSnapshot(t, s, "v", "s")
		must(t, s.DeleteSnapshot(ctx, "v", "s"))
		must(t, s.DeleteVolume(ctx, "v"))
		expectStamp(t, reader, 0, 1)
		if len(tree(t, fsys, ".")) == 0 {
			t.Error("the layer is gone")
		}
		must(t, reader.Close())
		result, err := s.GC(ctx)
		must(t, err)
		if len(result.RemovedVolumes) != 1 || len(result.Problems) != 0 {
			t.Errorf("collected %+v", result)
		}
		expectEmpty(t, fsys)
	})
}

// A deletion that is repeated after its process was killed leaves nothing, also when that
// process still holds the image.
func TestDeleteVolume_OfAKilledProcess(t *testing.T) {
	s, m := newStore(t)
	ctx := t.Context()
	written(t, s, "v")
	rec, err := s.Volume(ctx, "v")
	must(t, err)
	image := rec.Layers[len(rec.Layers)-1].File
	var dead atomic.Bool
	killed := openStore(t, vfs.Inject(m, vfs.If(vfs.OfKind(vfs.OpRemove), func(op vfs.Op) error {
		if dead.Load() && op.Name == image {
			return syscall.EIO
		}
		return nil
	})))
	dead.Store(true)
	expectError(t, "the killed deletion", killed.DeleteVolume(ctx, "v"), syscall.EIO)

	held, err := m.Open(image, vfs.ReadWrite)
	must(t, err)
	must(t, held.Lock(vfs.LockWrite))
	deleted := make(chan error)
	go func() { deleted <- s.DeleteVolume(ctx, "v") }()
	select {
	case err := <-deleted:
		t.Errorf("the repeated deletion did not wait: %v", err)
		return
	case <-time.After(50 * time.Millisecond):
	}
	must(t, held.Close())
	must(t, <-deleted)
	expectEmpty(t, m)
}

// A volume with a snapshot every so often, of which the oldest is deleted each time, stays
// short.
func TestMerge_RollingSnapshots(t *testing.T) {
	s, m := newStore(t)
	ctx := t.Context()
	volume(t, s, "v")
	const kept = 3
	for n := byte(1); n <= 12; n++ {
		rewrite(t, s, "v", n)
		must(t, ignoreSnapshot(s.CreateSnapshot(ctx, "v", fmt.Sprintf("s%d", n))))
		if n > kept {
			must(t, s.DeleteSnapshot(ctx, "v", fmt.Sprintf("s%d", n-kept)))
		}
		result, err := s.GC(ctx)
		must(t, err)
		rec, err := s.Volume(ctx, "v")
		must(t, err)
		if len(rec.Layers) > kept+1 || len(result.Problems) > 0 {
			t.Fatalf("after %d snapshots: %d layers, %+v", n, len(rec.Layers), result)
		}
		for k := max(1, int(n)-kept+1); k <= int(n); k++ {
			expectGeneration(t, s, "v", fmt.Sprintf("s%d", k), byte(k))
		}
	}
	expectClean(t, s)
	deleteAll(t, s, m, "in the end")
}

// slowStore makes layers slowly, and says when it has begun.
func slowStore(t *testing.T, m *vfs.Mem, opts store.Options) (s *store.Store, copying chan struct{}) {
	t.Helper()
	copying = make(chan struct{}, 1)
	s, err := store.Open(t.Context(), "test", vfs.Inject(m, func(op vfs.Op) error {
		if op.Kind == vfs.OpWrite && strings.HasSuffix(op.Name, ".qcow2") {
			select {
			case copying <- struct{}{}:
			default:
			}
			time.Sleep(10 * time.Millisecond)
		}
		return nil
	}), opts)
	must(t, err)
	return s, copying
}

// A copy that takes longer than its caller waits is finished all the same in a service,
// and removed elsewhere.
func TestCreateVolume_CallerGoesAway(t *testing.T) {
	req := store.CreateVolumeRequest{Name: "v", Source: store.Source{Image: "i.img", Mode: store.ImageCopy}}
	for _, finish := range []bool{true, false} {
		m := vfs.NewMem()
		quick := openStore(t, m)
		putImage(t, m, "i.img", "raw", 4*mib)
		opts := fast
		opts.FinishCreations = finish
		s, copying := slowStore(t, m, opts)
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			<-copying
			cancel()
		}()
		_, err := s.CreateVolume(ctx, req)
		expectError(t, "the caller goes away", err, context.Canceled)
		if !finish {
			if files := tree(t, m, "volumes"); len(files) > 0 {
				t.Errorf("left: %v", files)
			}
			continue
		}
		rec, err := s.CreateVolume(t.Context(), req)
		must(t, err)
		if again, err := quick.CreateVolume(t.Context(), req); err != nil || !again.Created.Equal(rec.Created) {
			t.Errorf("made %+v and %+v, %v", rec, again, err)
		}
		expectGeneration(t, quick, "v", "", 9)
		must(t, s.Close())
	}
}

// Deleting a volume ends its creation.
func TestDeleteVolume_BeingMade(t *testing.T) {
	m := vfs.NewMem()
	openStore(t, m)
	putImage(t, m, "i.img", "raw", 4*mib)
	opts := fast
	opts.FinishCreations = true
	s, copying := slowStore(t, m, opts)
	made := make(chan error)
	go func() {
		_, err := s.CreateVolume(t.Context(), store.CreateVolumeRequest{Name: "v", Source: store.Source{Image: "i.img", Mode: store.ImageCopy}})
		made <- err
	}()
	<-copying
	must(t, s.DeleteVolume(t.Context(), "v"))
	expectError(t, "its creation", <-made, context.Canceled)
	if files := tree(t, m, "volumes"); len(files) > 0 {
		t.Errorf("left: %v", files)
	}
	must(t, s.Close())
}
