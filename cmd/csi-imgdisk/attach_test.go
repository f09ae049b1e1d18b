package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

// attachedDevice attaches an image for the time of a test.
func attachedDevice(t *testing.T, image, runDir string) deviceInfo {
	t.Helper()
	info := decode[deviceInfo](t, ok(t, "attach", image, "--run-dir", runDir, "-o", "json"))
	t.Cleanup(func() {
		run(t, "detach", image, "--force", "--run-dir", runDir)
	})
	return info
}

func TestAttach_DeviceLivesThroughKills(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	image, runDir := filepath.Join(dir, "x.vmdk"), filepath.Join(dir, "run")
	ok(t, "image", "create", image, "64M")
	device := attachedDevice(t, image, runDir)
	if device.SizeBytes != 64<<20 || device.ReadOnly || device.Phase != "serving" || device.Image != image {
		t.Errorf("attached as %+v", device)
	}
	if again := attachedDevice(t, image, runDir); again.Device != device.Device {
		t.Errorf("attached again as %s, was %s", again.Device, device.Device)
	}

	want := bytes.Repeat([]byte("imgdisk "), 4<<20/8)
	f, err := os.OpenFile(device.Device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(want, 1<<20); err != nil {
		t.Fatal(err)
	}
	if r := run(t, "detach", device.Device, "--run-dir", runDir); r.code != 1 || !strings.Contains(r.stderr, "busy") {
		t.Errorf("detach of a device in use: code %d, %s", r.code, r.stderr)
	}
	if err := syscall.Kill(device.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil { // waits for the next server
		t.Errorf("sync across a kill of the server: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	list := decode[[]deviceInfo](t, ok(t, "devices", "--run-dir", runDir, "-o", "json"))
	if len(list) != 1 || list[0].Restarts != 1 || list[0].PID == device.PID {
		t.Errorf("after the kill: %+v, was %+v", list, device)
	}
	detachWhenIdle(t, device.Device, runDir)

	raw := filepath.Join(dir, "x.raw")
	ok(t, "image", "convert", image, raw)
	got, err := os.ReadFile(raw)
	if err != nil || !bytes.Equal(got[1<<20:][:len(want)], want) {
		t.Errorf("the image does not hold what was written to the device: %v", err)
	}
	if out := ok(t, "devices", "--run-dir", runDir); out != "no devices\n" {
		t.Errorf("after the detach: %s", out)
	}
}

// detachWhenIdle detaches a device; others, such as udev, may look at it for a moment.
func detachWhenIdle(t *testing.T, device, runDir string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		r := run(t, "detach", device, "--run-dir", runDir)
		if r.code == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("detach: %s", r.stderr)
		}
	}
}

func TestAttach_ReadOnly(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	image, runDir := filepath.Join(dir, "x.vmdk"), filepath.Join(dir, "run")
	ok(t, "image", "create", image, "16M")
	out := ok(t, "attach", "--read-only", image, "--run-dir", runDir)
	defer run(t, "detach", image, "--force", "--run-dir", runDir)
	device := strings.TrimSpace(out)
	if f, err := os.OpenFile(device, os.O_WRONLY, 0); err == nil {
		if _, err := f.Write(make([]byte, 4096)); err == nil {
			err = f.Sync()
			if err == nil {
				t.Error("a read-only device takes writes")
			}
		}
		f.Close()
	}
	if r := run(t, "attach", image, "--run-dir", runDir); r.code != 1 || !strings.Contains(r.stderr, "other options") {
		t.Errorf("attach in another way: code %d, %s", r.code, r.stderr)
	}
	detachWhenIdle(t, image, runDir)
}

// startStandalone runs a driver on a store, and returns once it listens.
func startStandalone(t *testing.T, storeDir, runDir, socket string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	var out bytes.Buffer
	cmd := exec.Command(binary, "standalone", "--endpoint", "unix://"+socket, "--store", "main="+storeDir, "--run-dir", runDir)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			return cmd, &out
		}
		if time.Now().After(deadline) {
			t.Fatalf("the driver does not listen: %s", &out)
		}
	}
}

func TestStandalone_LeavesTheSupervisorToWhatIsAttached(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	storeDir, runDir, socket := filepath.Join(dir, "store"), filepath.Join(dir, "run"), filepath.Join(dir, "csi.sock")
	if err := os.Mkdir(storeDir, 0o700); err != nil {
		t.Fatal(err)
	}
	ok(t, "store", "init", storeDir)
	image := filepath.Join(dir, "x.vmdk")
	ok(t, "image", "create", image, "16M")

	driver, out := startStandalone(t, storeDir, runDir, socket)
	device := attachedDevice(t, image, runDir) // by the driver's supervisor
	stopped(t, driver, out)
	if !strings.Contains(out.String(), image) {
		t.Errorf("the driver does not say what stays attached: %s", out)
	}
	if err := syscall.Kill(device.PID, 0); err != nil {
		t.Errorf("the volume's server ended with the driver: %v", err)
	}
	detachWhenIdle(t, image, runDir)
	waitGone(t, runDir)

	driver, out = startStandalone(t, storeDir, runDir, socket)
	stopped(t, driver, out)
	waitGone(t, runDir)
}

func stopped(t *testing.T, driver *exec.Cmd, out *bytes.Buffer) {
	t.Helper()
	if err := driver.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := driver.Wait(); err != nil {
		t.Fatalf("the driver ends with %v: %s", err, out)
	}
}

// waitGone waits until no process of ours uses a run directory.
func waitGone(t *testing.T, runDir string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		left := processesWith(t, runDir)
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("processes that do not end: %v", left)
		}
	}
}

// processesWith lists the program's processes that have something among their arguments.
func processesWith(t *testing.T, what string) (list []string) {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if exe, err := os.Readlink(link); err != nil || exe != binary {
			continue // another program, or it has ended
		}
		args, err := os.ReadFile(filepath.Join(filepath.Dir(link), "cmdline"))
		if err == nil && bytes.Contains(args, []byte(what)) {
			list = append(list, filepath.Base(filepath.Dir(link))+": "+string(bytes.ReplaceAll(args, []byte{0}, []byte{' '})))
		}
	}
	return list
}
