package hostmount

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// childEnv names the device that a child of the test formats until it is killed.
const childEnv = "HOSTMOUNT_TEST_DEVICE"

// TestMain is also the driver that is killed with its mkfs at work.
func TestMain(m *testing.M) {
	if device := os.Getenv(childEnv); device != "" {
		_ = New().FormatAndMount(device, os.TempDir(), "slow", nil) // never ends by itself
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// TestHost_OrphanedMkfs kills a process while its mkfs works, and mounts the device.
func TestHost_OrphanedMkfs(t *testing.T) {
	device := loopDevice(t, 16*mib)
	bin := t.TempDir()
	// It tells its process id and works for long.
	script := "#!/bin/sh\necho $$ > " + filepath.Join(bin, "pid") + "\nexec sleep 300\n"
	must(t, "make mkfs.slow", os.WriteFile(filepath.Join(bin, "mkfs.slow"), []byte(script), 0o700))
	self, err := os.Executable()
	must(t, "own program", err)
	child := exec.Command(self)
	child.Env = append(os.Environ(), childEnv+"="+device, "PATH="+bin+":"+os.Getenv("PATH"))
	must(t, "start", child.Start())
	pid := waitForPID(t, filepath.Join(bin, "pid"))
	must(t, "kill", child.Process.Kill())
	_ = child.Wait() // it was killed
	mkfs, err := os.FindProcess(pid)
	must(t, "find mkfs", err)
	killed := false
	defer func() {
		if !killed {
			mkfs.Kill()
		}
	}()

	h, path := New(), mountPoint(t, "m")
	if err := h.FormatAndMount(device, path, "ext4", nil); !errors.Is(err, block.ErrBusy) {
		t.Errorf("while mkfs works: %v, want ErrBusy", err)
	}
	must(t, "kill mkfs", mkfs.Kill())
	killed = true
	deadline := time.Now().Add(30 * time.Second)
	for {
		err = h.FormatAndMount(device, path, "ext4", nil)
		if err == nil || time.Now().After(deadline) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	must(t, "when it is gone", err)
	must(t, "Unmount", h.Unmount(path))
}

func waitForPID(t *testing.T, file string) (pid int) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for time.Now().Before(deadline) {
		if text, err := os.ReadFile(file); err == nil && strings.HasSuffix(string(text), "\n") {
			pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
			must(t, "process id", err)
			return pid
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("mkfs was not started")
	return 0
}

// TestHost_KilledMkfs kills the real programs at many moments and mounts the device all
// the same.
func TestHost_KilledMkfs(t *testing.T) {
	r := testenv.Rand(t)
	for _, fsType := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			program := testenv.Oracle(t, "mkfs."+fsType)
			device := loopDevice(t, 512*mib)
			h, path := New(), mountPoint(t, "m")
			for range 5 {
				must(t, "erase", erase(device))
				cmd := exec.Command(program, "-q", device)
				must(t, "start", cmd.Start())
				time.Sleep(time.Duration(r.IntN(25_000)) * time.Microsecond)
				_ = cmd.Process.Kill() // it may have ended
				_ = cmd.Wait()
				must(t, "FormatAndMount", h.FormatAndMount(device, path, fsType, nil))
				must(t, "Unmount", h.Unmount(path))
			}
		})
	}
}

// erase makes a device empty where superblocks lie.
func erase(device string) error {
	f, err := os.OpenFile(device, os.O_WRONLY|os.O_SYNC, 0)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, mib)
	_, err = w.Write(make([]byte, 66*mib))
	return errors.Join(err, w.Flush(), f.Close())
}
