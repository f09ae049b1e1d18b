package supervisor

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// A busy device is reported with who holds it, and is as it was.
func TestDevice_DetachSaysWhoHoldsIt(t *testing.T) { onDevices(t, testDevice_DetachSaysWhoHoldsIt) }

func testDevice_DetachSaysWhoHoldsIt(t *testing.T, h *harness) {
	h.startProcess() // a process does not count as a user of its own devices
	image := h.newDisk("disk")
	at := h.attach(image)
	refused := func(holder string) {
		t.Helper()
		err := h.client.Detach(h.ctx, image, false)
		if !errors.Is(err, block.ErrBusy) || !strings.Contains(err.Error(), holder) {
			t.Errorf("detach: %v, want %v with %q", err, block.ErrBusy, holder)
		}
		if now := h.waitPhase(image, Serving); now.PID != at.PID || now.Device != at.Device {
			t.Errorf("after a refused detach: %+v, was %+v", now, at)
		}
	}

	device, err := os.OpenFile(at.Device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	refused(fmt.Sprintf("opened by process %d (", os.Getpid()))
	device.Close()

	if out, err := exec.Command(testenv.Oracle(t, "mkfs.ext4"), "-q", at.Device).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	dir := filepath.Join(h.dir, "mount point")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(at.Device, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	refused("mounted on " + dir)
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}

	out, err := exec.Command(testenv.Oracle(t, "losetup"), "--find", "--show", at.Device).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	loop := strings.TrimSpace(string(out))
	refused("under " + loop)
	if out, err := exec.Command("losetup", "--detach", loop).CombinedOutput(); err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	h.persistDetach(image) // the kernel lets go of it in its own time
	h.checkNoDevices(image)
}

// persistDetach detaches what has been let go of a moment ago.
func (h *harness) persistDetach(image string) {
	h.t.Helper()
	h.eventually("a detach", func() error {
		err := h.client.Detach(h.ctx, image, false)
		if err != nil && !errors.Is(err, block.ErrBusy) {
			h.t.Fatal(err)
		}
		return err
	})
}

// A detach by force takes the device from its users, whose requests fail then, and nothing
// is left of it once they have closed it.
func TestDevice_DetachByForceLeavesNoZombie(t *testing.T) {
	onDevices(t, testDevice_DetachByForceLeavesNoZombie)
}

func testDevice_DetachByForceLeavesNoZombie(t *testing.T, h *harness) {
	h.startProcess()
	image := h.newDisk("disk")
	at := h.attach(image)
	device, err := os.OpenFile(at.Device, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	read, reading := make(chan error, 1), make(chan struct{})
	go func() {
		for i := 0; ; i++ {
			if err := readSector(device); err != nil {
				read <- err
				return
			}
			if i == 100 {
				close(reading)
			}
		}
	}()
	<-reading
	if err := h.client.Detach(h.ctx, image, true); err != nil {
		t.Errorf("detach by force: %v", err)
	}
	select {
	case <-read: // failed, in whichever way
	case <-time.After(patience):
		t.Error("the device can be read still")
	}
	if _, err := h.client.Get(h.ctx, image); !errors.Is(err, block.ErrNotFound) {
		t.Errorf("after a detach by force: %v, want %v", err, block.ErrNotFound)
	}
	device.Close()
	h.eventually("the kernel's end of it", func() error {
		if left := h.devices(); left != nil {
			return fmt.Errorf("left: %v", left)
		}
		return nil
	})
	h.checkNoDevices(image)
	again := h.attach(image) // and the image is usable at once
	if again.Device == "" {
		t.Errorf("attached again: %+v", again)
	}
	h.detach(image)
}

// A device that somebody opened at the last moment is detached: its image is closed.
func TestDetach_Lingers(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	h.attach(image)
	h.write(h.kernel.path(image, ".lingers"), "")
	if err := h.client.Detach(h.ctx, image, false); err != nil {
		t.Errorf("detach: %v", err)
	}
	if all, err := h.client.List(h.ctx); err != nil || len(all) > 0 {
		t.Errorf("still attached: %+v, %v", all, err)
	}
}
