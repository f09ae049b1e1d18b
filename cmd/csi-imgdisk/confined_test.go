package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

// The process that parses a stranger's image and serves it has given up what it does not
// need, on every thread.
func TestAttach_ServerIsConfined(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	image, runDir := filepath.Join(dir, "x.vmdk"), filepath.Join(dir, "run")
	ok(t, "image", "create", image, "16M")
	device := attachedDevice(t, image, runDir)
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", device.PID))
	if err != nil || len(threads) < 2 {
		t.Fatalf("threads of the server: %v, %v", threads, err)
	}
	for _, thread := range threads {
		status, err := os.ReadFile(thread)
		if err != nil {
			continue // it has ended
		}
		for _, want := range []string{"NoNewPrivs:\t1\n", "Seccomp:\t2\n", "CapInh:\t0000000000000000\n"} {
			if !strings.Contains(string(status), want) {
				t.Errorf("%s lacks %q", thread, want)
			}
		}
		// CAP_DAC_OVERRIDE and CAP_FOWNER.
		if permitted := statusField(string(status), "CapPrm"); strings.TrimLeft(permitted, "0") != "a" {
			t.Errorf("%s: capabilities %s", thread, permitted)
		}
	}
	detachWhenIdle(t, image, runDir)
	if left, err := filepath.Glob(filepath.Join(runDir, "redo", "*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func statusField(status, name string) string {
	for line := range strings.Lines(status) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
