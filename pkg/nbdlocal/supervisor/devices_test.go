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
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/keeper"
)

// onDevices runs a test with the real devices of each transport that works here.
func onDevices(t *testing.T, test func(t *testing.T, h *harness)) {
	testenv.Root(t)
	works := 0
	for _, transport := range []attach.Transport{attach.NewNBD(attach.NBDOptions{}), attach.NewUBLK(), attach.NewFUSE()} {
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
	if h.real == "ublk" { // doesn't say whose they are: where it works, all are ours
		found, _ := filepath.Glob("/sys/block/ublkb*")
		return found
	}
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
	h.eventually("the keeper's end", func() error {
		if pids := h.keepers(); pids != nil {
			return fmt.Errorf("keepers %v run", pids)
		}
		return nil
	})
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

func TestDevice_UpgradedUnderLoad(t *testing.T) { onDevices(t, testDevice_UpgradedUnderLoad) }

func testDevice_UpgradedUnderLoad(t *testing.T, h *harness) {
	h.startHere()
	image := h.newDisk("disk")
	programs := []string{h.newProgram("odd"), h.newProgram("even"), h.newProgram("cannot-open")}
	at := h.attach(image)
	seconds, upgrades, failed := 5, 0, 0
	if testing.Short() {
		seconds = 3
	}
	wait := startFIO(t, at.Device, seconds)
	rng := testenv.Rand(t)
	var longest time.Duration
	for end := time.Now().Add(time.Duration(seconds-1) * time.Second); time.Now().Before(end); {
		time.Sleep(time.Duration(50+rng.IntN(200)) * time.Millisecond)
		program := programs[(upgrades+failed)%len(programs)]
		now, err := h.client.Upgrade(h.ctx, image, UpgradeRequest{Binary: program})
		if filepath.Base(program) == "cannot-open" {
			failed++
			if !errors.Is(err, block.ErrUnsupported) {
				t.Errorf("upgrade to a program that can't open: %v, want %v", err, block.ErrUnsupported)
			}
			now = h.waitPhase(image, Serving)
			program = programs[1]
		} else if upgrades++; err != nil {
			t.Fatal(err)
		}
		if now.Version != filepath.Base(program) || now.PID == at.PID || now.Device != at.Device {
			t.Fatalf("upgraded to %s: %+v, was %+v", program, now, at)
		}
		at, longest = now, max(longest, time.Duration(now.UpgradePauseMillis)*time.Millisecond)
	}
	wait()
	t.Logf("%d upgrades and %d failed ones under load, the longest pause of the former %v", upgrades, failed, longest)
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

// When all processes but the keeper are killed at once, requests wait for the next
// supervisor.
func TestDevice_AllKilled(t *testing.T) {
	onDevices(t, func(t *testing.T, h *harness) {
		h.startProcess()
		image := h.newDisk("disk")
		at := h.attach(image)
		device, read := h.killAll(at)
		select {
		case err := <-read:
			t.Errorf("a read did not wait: %v", err)
		case <-time.After(time.Second):
		}
		h.startProcess()
		h.waitRead(read, nil)
		if now := h.waitPhase(image, Serving); now.PID == at.PID || now.Device != at.Device {
			t.Errorf("recovered: %+v, was %+v", now, at)
		}
		device.Close()
		h.detach(image)
		h.checkNoDevices(image)
	})
}

// A fuse device whose keeper is killed, too, cannot wait: it must not make its users wait
// then, and nothing may be left of it.
func TestDevice_AllAndKeeperKilled(t *testing.T) {
	onDevices(t, func(t *testing.T, h *harness) {
		if h.real != "fuse" {
			t.Skip("nothing needs to be kept for this transport")
		}
		h.startProcess()
		image := h.newDisk("disk")
		device, read := h.killAll(h.attach(image))
		h.killKeeper()
		h.waitRead(read, unix.EIO)
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
		h.checkNoDevices(image)
	})
}

// killAll kills the supervisor, which is a process, and an attachment's server, and
// returns the open device and what a read of it comes to.
func (h *harness) killAll(at Attachment) (device *os.File, read chan error) {
	h.t.Helper()
	device, err := os.OpenFile(at.Device, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { device.Close() })
	h.kill()
	killServer(h.t, at.PID)
	read = make(chan error, 1)
	go func() { read <- readSector(device) }()
	return device, read
}

func (h *harness) waitRead(read chan error, want error) {
	h.t.Helper()
	select {
	case err := <-read:
		if !errors.Is(err, want) {
			h.t.Errorf("the read that waited: %v, want %v", err, want)
		}
	case <-time.After(patience):
		h.t.Fatalf("the read waits still after %v", patience)
	}
}

// killKeeper kills the keeper, if there is one.
func (h *harness) killKeeper() {
	h.t.Helper()
	for _, pid := range h.keepers() {
		_ = unix.Kill(pid, unix.SIGKILL) // it may be gone already
	}
}

// keepers returns the process ids of keepers of the supervisor's state directory.
func (h *harness) keepers() (pids []int) {
	h.t.Helper()
	return pidsWith(h.t, "\x00test-keeper\x00--dir\x00"+h.stateDir+"/")
}

// Server, supervisor and, at other times, the keeper are killed under load: nobody gets an
// error, and nothing is left in the end.
func TestDevice_EverybodyKilledUnderLoad(t *testing.T) {
	onDevices(t, testDevice_EverybodyKilledUnderLoad)
}

func testDevice_EverybodyKilledUnderLoad(t *testing.T, h *harness) {
	h.startProcess()
	image := h.newDisk("disk")
	at := h.attach(image)
	seconds := 6
	if testing.Short() {
		seconds = 4
	}
	wait := startFIO(t, at.Device, seconds)
	rng := testenv.Rand(t)
	together, keepers := 0, 0
	for end := time.Now().Add(time.Duration(seconds-1) * time.Second); time.Now().Before(end); {
		time.Sleep(time.Duration(50+rng.IntN(300)) * time.Millisecond)
		if rng.IntN(3) == 0 {
			h.killKeeper()
			keepers++
			if h.real == "fuse" {
				// Until it is back, the others are all that holds the device.
				h.eventually("another keeper that holds the device", func() error { return h.keptBy(image) })
			}
			continue
		}
		if rng.IntN(2) == 0 { // in either order
			h.kill()
			killServer(t, at.PID)
		} else {
			killServer(t, at.PID)
			h.kill()
		}
		together++
		h.startProcess()
		at = h.waitRestart(image, at.PID)
	}
	wait()
	t.Logf("server and supervisor killed %d times, the keeper %d times under load", together, keepers)
	h.detach(image)
	h.checkNoDevices(image)
}

// keptBy returns nil if a keeper holds the attachment's descriptor.
func (h *harness) keptBy(image string) error {
	client := keeper.NewClient(keeper.Config{Dir: filepath.Join(h.stateDir, "keeper")})
	defer client.Close()
	file, err := client.Get(h.ctx, dirName(image))
	if err == nil {
		file.Close()
	}
	return err
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
