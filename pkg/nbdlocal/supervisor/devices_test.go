package supervisor

import (
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

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
)

// onDevices runs a test with the real devices of each transport that works here.
func onDevices(t *testing.T, test func(t *testing.T, h *harness)) {
	testenv.Root(t)
	works := 0
	for _, transport := range []attach.Transport{attach.NewNBD(attach.NBDOptions{}), attach.NewFUSE()} {
		t.Run(transport.Name(), func(t *testing.T) {
			if err := transport.Probe(t.Context()); err != nil {
				t.Skipf("the transport does not work here: %v", err)
			}
			works++
			h := newHarness(t)
			h.real = transport.Name()
			test(t, h)
		})
	}
	if works == 0 {
		t.Skip("no transport works here")
	}
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

// devices returns what the kernel has of this harness's attachments.
func (h *harness) devices() []string {
	h.t.Helper()
	var found []string
	for _, pattern := range []string{"/sys/block/loop*/loop/backing_file", "/sys/block/nbd*/backend"} {
		names, err := filepath.Glob(pattern)
		if err != nil {
			h.t.Fatal(err)
		}
		for _, name := range names {
			backing, err := os.ReadFile(name)
			if err == nil && strings.Contains(string(backing), filepath.Base(filepath.Dir(h.dir))) {
				found = append(found, name)
			}
		}
	}
	return found
}

// checkNoDevices checks that nothing is left of an attachment, in the kernel or elsewhere.
func (h *harness) checkNoDevices(image string) {
	h.t.Helper()
	if left := h.devices(); left != nil {
		h.t.Errorf("left: %v", left)
	}
	h.checkGone(image)
}

func TestDevice_ServerKilledUnderLoad(t *testing.T) { onDevices(t, testDevice_ServerKilledUnderLoad) }

func testDevice_ServerKilledUnderLoad(t *testing.T, h *harness) {
	h.startHere()
	image := h.newDisk("disk")
	at := h.attach(image)
	seconds, kills := 5, 0
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

func TestDevice_SupervisorKilledUnderLoad(t *testing.T) {
	onDevices(t, testDevice_SupervisorKilledUnderLoad)
}

func testDevice_SupervisorKilledUnderLoad(t *testing.T, h *harness) {
	h.startProcess()
	image := h.newDisk("disk")
	at := h.attach(image)
	seconds, kills := 5, 0
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

// When all processes are killed an nbd device waits for the next supervisor. A fuse
// device cannot: it must not make its users wait then, and nothing may be left of it.
func TestDevice_AllKilled(t *testing.T) {
	onDevices(t, func(t *testing.T, h *harness) {
		h.startProcess()
		image := h.newDisk("disk")
		at := h.attach(image)
		device, err := os.OpenFile(at.Device, os.O_RDWR|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer device.Close()
		h.kill()
		killServer(t, at.PID)
		read := make(chan error, 1)
		go func() { read <- readSector(device) }()
		if h.real == "fuse" {
			checkLost(t, h, image, device, read)
		} else {
			checkSurvived(t, h, image, device, read)
		}
		h.checkNoDevices(image)
	})
}

func checkLost(t *testing.T, h *harness, image string, device *os.File, read chan error) {
	if err := <-read; err == nil {
		t.Error("a device without a server can be read")
	}
	device.Close()
	h.startProcess()
	if lost := h.waitPhase(image, Lost); lost.Device != "" || lost.Problem == "" {
		t.Errorf("lost: %+v", lost)
	}
	at := h.attach(image)
	again, err := os.OpenFile(at.Device, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := readSector(again); err != nil {
		t.Errorf("attached again: %v", err)
	}
	again.Close()
	h.detach(image)
}

func checkSurvived(t *testing.T, h *harness, image string, device *os.File, read chan error) {
	select {
	case err := <-read:
		t.Errorf("a read did not wait: %v", err)
	case <-time.After(time.Second):
	}
	h.startProcess()
	if err := <-read; err != nil {
		t.Errorf("the read that waited: %v", err)
	}
	h.waitPhase(image, Serving)
	device.Close()
	h.detach(image)
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

func TestDevice_DetachBusyResize(t *testing.T) { onDevices(t, testDevice_DetachBusyResize) }

func testDevice_DetachBusyResize(t *testing.T, h *harness) {
	h.startProcess() // a process does not count as a user of its own devices
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
func TestDevice_DetachIsDurable(t *testing.T) { onDevices(t, testDevice_DetachIsDurable) }

func testDevice_DetachIsDurable(t *testing.T, h *harness) {
	h.startHere()
	image := h.newDisk("disk")
	at := h.attach(image)
	device, err := os.OpenFile(at.Device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if seen := h.devices(); len(seen) != 1 {
		t.Errorf("attached: %v", seen)
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
func TestDevice_IdleServer(t *testing.T) { onDevices(t, testDevice_IdleServer) }

func testDevice_IdleServer(t *testing.T, h *harness) {
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
