package wire_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

// TestBadImages makes volumes from images that are damaged or lie.
func TestBadImages(t *testing.T) {
	qemuImg := testenv.Oracle(t, "qemu-img")
	w := newWorld(t)
	good := w.path("good.vmdk")
	if out, err := exec.Command(qemuImg, "create", "-f", "vmdk", good, "16M").CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v: %s", err, out)
	}
	image, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	damaged := slices.Clone(image)
	copy(damaged[12:20], []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f}) // capacity
	descriptor := "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 32768 FLAT \"../../../etc/passwd\" 0\n"
	for name, contents := range map[string][]byte{
		"truncated.vmdk": image[:700], "damaged.vmdk": damaged, "escaping.vmdk": []byte(descriptor),
	} {
		if err := os.MkdirAll(w.path("store/images"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(w.path("store/images"), name), contents, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, mode := range []string{"overlay", "copy"} {
			v := w.volume(strings.TrimSuffix(name, ".vmdk")+"-"+mode, "block")
			err := v.create(64*mib, nil, map[string]string{"image": name, "imageMode": mode})
			t.Logf("%s, %s: %v", name, mode, err)
			code := status.Code(err)
			if code != codes.DataLoss && code != codes.InvalidArgument && code != codes.NotFound {
				t.Errorf("%s, %s: %v", name, mode, err)
			}
			if !strings.Contains(fmt.Sprint(err), name) {
				t.Errorf("%v does not name the image", err)
			}
			v.must("delete what was not made", v.remove())
		}
	}
	w.wantEmptyStore()
}

// TestFullStore makes a volume that does not fit.
func TestFullStore(t *testing.T) {
	testenv.Root(t)
	store := t.TempDir()
	if err := unix.Mount("tmpfs", store, "tmpfs", 0, "size=24m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(store, 0); err != nil {
			t.Error(err)
		}
	})
	w := newWorldOn(t, store)
	v := w.volume("large", "block")
	err := v.create(64*mib, nil, map[string]string{"format": "vmdk", "preallocation": "full", "subformat": "monolithicFlat"})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a volume that does not fit: %v", err)
	}
	small := w.volume("small", "block")
	small.must("create one that fits", small.create(8*mib, nil, nil))
	small.must("delete", small.remove())
	v.must("delete what was not made", v.remove())
	w.wantEmptyStore()
}

// TestConcurrentClients issues every call several times at once, as a controller does
// that was restarted, for several volumes at once.
func TestConcurrentClients(t *testing.T) {
	w := newWorld(t)
	var all sync.WaitGroup
	for i, fsType := range []string{"ext4", "xfs", "block"} {
		v := w.volume(fmt.Sprintf("v%d", i), fsType)
		all.Go(func() {
			for _, step := range []func(*volume) error{
				func(v *volume) error { return v.create(320*mib, nil, nil) },
				(*volume).controllerPublish, (*volume).stage, (*volume).publish,
				func(v *volume) error { return v.snapshot("s-" + v.name()) },
				(*volume).unpublish, (*volume).unstage, (*volume).controllerUnpublish,
				func(v *volume) error { return v.removeSnapshot("s-" + v.name()) },
				(*volume).remove,
			} {
				if err := atOnce(v, step); err != nil {
					t.Errorf("%s: %v", v.id, err)
					return
				}
			}
		})
	}
	all.Wait()
	w.wantEmptyStore()
}

// atOnce does a step several times at once. A call may be refused because another is
// under way; then it is repeated.
func atOnce(v *volume, step func(*volume) error) error {
	const calls = 3
	copies := make([]volume, calls)
	errs := make([]error, calls)
	var wg sync.WaitGroup
	for i := range calls {
		copies[i] = *v
		wg.Go(func() {
			deadline := time.Now().Add(time.Minute)
			for {
				errs[i] = step(&copies[i])
				if status.Code(errs[i]) != codes.Aborted || time.Now().After(deadline) {
					return
				}
				time.Sleep(2 * time.Millisecond)
			}
		})
	}
	wg.Wait()
	*v = copies[0]
	for _, c := range copies {
		if fmt.Sprint(c.publishContext) != fmt.Sprint(v.publishContext) {
			return fmt.Errorf("published as %v and as %v", v.publishContext, c.publishContext)
		}
	}
	return errors.Join(errs...)
}
