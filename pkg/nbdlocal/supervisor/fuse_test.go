package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
)

// newFUSEHarness is a harness whose devices are real.
func newFUSEHarness(t *testing.T) *harness {
	t.Helper()
	testenv.Root(t)
	if err := attach.NewFUSE().Probe(context.Background()); err != nil {
		t.Skipf("the fuse transport does not work here: %v", err)
	}
	h := newHarness(t)
	h.real = "fuse"
	return h
}

// newDisk makes an image for fio to write to.
func (h *harness) newDisk(name string) string {
	path := h.newImage(name)
	if err := os.Truncate(path, 64<<20); err != nil {
		h.t.Fatal(err)
	}
	return path
}

// startFIO writes to a device for some seconds, reads everything back in between and
// in the end, and fails on any error.
func startFIO(t *testing.T, device string, seconds int) (wait func()) {
	t.Helper()
	cmd := exec.Command(testenv.Oracle(t, "fio"), "--name=verify", "--filename="+device,
		"--rw=randwrite", "--bs=4k", "--size=32m", "--ioengine=libaio", "--direct=1", "--iodepth=16",
		"--verify=crc32c", "--verify_backlog=512", "--verify_fatal=1", "--do_verify=1",
		"--time_based", fmt.Sprintf("--runtime=%d", seconds), "--eta=never", "--output-format=terse", "--terse-version=3")
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Dir = t.TempDir() // where it leaves its verification state
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waited := false
	t.Cleanup(func() {
		if !waited {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	return func() {
		t.Helper()
		waited = true
		if err := cmd.Wait(); err != nil {
			t.Fatalf("fio: %v\n%s", err, out.String())
		}
		// Terse version 3 ends a job's line with its count of errors, where not 0.
		if strings.Contains(out.String(), "err=") || strings.Contains(out.String(), "verify:") {
			t.Fatalf("fio: %s", out.String())
		}
	}
}

// checkNoDevices checks that no loop device has an attachment behind it.
func (h *harness) checkNoDevices(image string) {
	h.t.Helper()
	names, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		h.t.Fatal(err)
	}
	for _, name := range names {
		if backing, err := os.ReadFile(name); err == nil && strings.Contains(string(backing), filepath.Base(h.dir)) {
			h.t.Errorf("%s is left, on %s", name, backing)
		}
	}
	h.checkGone(image)
}

func TestFUSE_ServerKilledUnderLoad(t *testing.T) {
	h := newFUSEHarness(t)
	h.startHere()
	image := h.newDisk("disk")
	at := h.attach(image)
	seconds, kills := 8, 0
	if testing.Short() {
		seconds = 3
	}
	wait := startFIO(t, at.Device, seconds)
	rng := testenv.Rand(t)
	for end := time.Now().Add(time.Duration(seconds-1) * time.Second); time.Now().Before(end); kills++ {
		time.Sleep(time.Duration(50+rng.IntN(400)) * time.Millisecond)
		killServer(t, at.PID)
		at = h.waitRestart(image, at.PID)
	}
	wait()
	t.Logf("%d servers killed under load", kills)
	h.detach(image)
	h.checkNoDevices(image)
}

func TestFUSE_SupervisorKilledUnderLoad(t *testing.T) {
	h := newFUSEHarness(t)
	h.startProcess()
	image := h.newDisk("disk")
	at := h.attach(image)
	seconds, kills := 8, 0
	if testing.Short() {
		seconds = 3
	}
	wait := startFIO(t, at.Device, seconds)
	rng := testenv.Rand(t)
	for end := time.Now().Add(time.Duration(seconds-1) * time.Second); time.Now().Before(end); kills++ {
		time.Sleep(time.Duration(50+rng.IntN(300)) * time.Millisecond)
		h.kill()
		time.Sleep(time.Duration(rng.IntN(100)) * time.Millisecond)
		h.startProcess()
		now := h.waitPhase(image, Serving)
		if now.PID != at.PID || now.Device != at.Device {
			t.Fatalf("adopted: %+v, want %+v", now, at)
		}
		if kills%2 == 0 { // the adopted server can be replaced too
			killServer(t, at.PID)
			at = h.waitRestart(image, at.PID)
		}
	}
	wait()
	t.Logf("%d supervisors killed under load", kills)
	h.detach(image)
	h.checkNoDevices(image)
}

// With fuse the device cannot outlive all processes that hold its descriptor. It must
// not hang its users then, and nothing may be left of it.
func TestFUSE_AllKilled(t *testing.T) {
	h := newFUSEHarness(t)
	h.startProcess()
	image := h.newDisk("disk")
	at := h.attach(image)
	device, err := os.OpenFile(at.Device, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	h.kill()
	killServer(t, at.PID)
	if err := readSector(device); err == nil {
		t.Error("a device without a server can be read")
	}
	device.Close()
	h.startProcess()
	lost := h.waitPhase(image, Lost)
	if lost.Device != "" || lost.Problem == "" {
		t.Errorf("lost: %+v", lost)
	}
	at = h.attach(image)
	device, err = os.OpenFile(at.Device, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := readSector(device); err != nil {
		t.Errorf("attached again: %v", err)
	}
	device.Close()
	h.detach(image)
	h.checkNoDevices(image)
}

// readSector reads from a device past every cache.
func readSector(device *os.File) error {
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(page)
	_, err = device.ReadAt(page, 0)
	return err
}

func TestFUSE_DetachBusyResize(t *testing.T) {
	h := newFUSEHarness(t)
	h.startHere()
	image := h.newDisk("disk")
	at := h.attach(image)
	device, err := os.OpenFile(at.Device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	if err := h.client.Detach(h.ctx, image, false); !errors.Is(err, block.ErrBusy) {
		t.Errorf("detach of an open device: %v, want %v", err, block.ErrBusy)
	}
	h.waitPhase(image, Serving)
	if err := os.Truncate(image, 96<<20); err != nil {
		t.Fatal(err)
	}
	if at, err = h.client.Resize(h.ctx, image); err != nil || at.SizeBytes != 96<<20 {
		t.Errorf("resize: %+v, %v", at, err)
	}
	if size, err := device.Seek(0, 2); err != nil || size != 96<<20 {
		t.Errorf("the device has %d bytes, %v", size, err)
	}
	device.Close()
	h.detach(image)
	h.checkNoDevices(image)
}

// What is written through the page cache and not synced is in the image after a
// detach.
func TestFUSE_DetachIsDurable(t *testing.T) {
	h := newFUSEHarness(t)
	h.startHere()
	image := h.newDisk("disk")
	at := h.attach(image)
	device, err := os.OpenFile(at.Device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	written := strings.Repeat("written through the cache ", 1000)
	if _, err := device.WriteAt([]byte(written), 12345); err != nil {
		t.Fatal(err)
	}
	device.Close()
	h.detach(image)
	content, err := os.ReadFile(image)
	if err != nil || string(content[12345:12345+len(written)]) != written {
		t.Errorf("the image does not hold what was written (%v)", err)
	}
	h.checkNoDevices(image)
}

// An idle server must be small: a node has one for every volume.
func TestFUSE_IdleServer(t *testing.T) {
	h := newFUSEHarness(t)
	h.startHere()
	image := h.newDisk("disk")
	at := h.attach(image)
	status := procStatus(t, at.PID)
	const maxKiB = 15 << 10
	if rss, err := strconv.Atoi(strings.TrimSuffix(status["VmRSS"], " kB")); err != nil || rss > maxKiB && !buildSetting("-race") {
		t.Errorf("an idle server has %s resident (%s anonymous), want at most %d kB", status["VmRSS"], status["RssAnon"], maxKiB)
	} else {
		t.Logf("%d KiB resident", rss)
	}
	if status["NoNewPrivs"] != "1" && !buildSetting("CGO_ENABLED") {
		t.Errorf("NoNewPrivs is %q", status["NoNewPrivs"])
	}
	caps, err := strconv.ParseUint(status["CapEff"], 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	score, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", at.PID))
	if mayLower := caps&(1<<unix.CAP_SYS_RESOURCE) != 0; err != nil || mayLower && strings.TrimSpace(string(score)) != "-999" {
		t.Errorf("oom_score_adj %q, %v", score, err)
	}
	if sid, err := unix.Getsid(at.PID); err != nil || sid != at.PID {
		t.Errorf("server %d is in session %d, %v", at.PID, sid, err)
	}
	h.detach(image)
}

// procStatus reads /proc/PID/status.
func procStatus(t *testing.T, pid int) map[string]string {
	t.Helper()
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	status := map[string]string{}
	for line := range strings.Lines(string(content)) {
		name, value, _ := strings.Cut(line, ":")
		status[name] = strings.TrimSpace(value)
	}
	return status
}

// buildSetting says whether this binary was built with a setting on.
func buildSetting(name string) bool {
	info, _ := debug.ReadBuildInfo()
	for _, s := range info.Settings {
		if s.Key == name {
			return s.Value == "true" || s.Value == "1"
		}
	}
	return false
}
