package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

// A driver that is told to stop, whenever that is, ends as told and leaves no process.
func TestStandalone_StoppedWhileStarting(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	storeDir := filepath.Join(dir, "store")
	if err := os.Mkdir(storeDir, 0o700); err != nil {
		t.Fatal(err)
	}
	ok(t, "store", "init", storeDir)
	r := testenv.Rand(t)
	for round := range 12 {
		// Every other one is stopped as soon as its supervisor is seen, which does not
		// answer yet; the others anywhere.
		stopRound(t, dir, storeDir, round%2 == 0, time.Duration(r.Int64N(int64(150*time.Millisecond))))
	}
}

func stopRound(t *testing.T, dir, storeDir string, onSight bool, after time.Duration) {
	t.Helper()
	runDir := filepath.Join(dir, "run")
	var out bytes.Buffer
	driver := exec.Command(binary, "standalone", "--endpoint", "unix://"+filepath.Join(dir, "csi.sock"), "--store", "main="+storeDir, "--run-dir", runDir)
	driver.Stdout, driver.Stderr = &out, &out
	began := time.Now()
	if err := driver.Start(); err != nil {
		t.Fatal(err)
	}
	for time.Since(began) < 20*time.Second && (onSight && !supervisorRuns(t, runDir) || !onSight && time.Since(began) < after) {
		time.Sleep(time.Millisecond)
	}
	took := time.Since(began)
	if err := driver.Process.Signal(syscall.SIGTERM); err != nil {
		t.Errorf("after %v: %v", took, err)
	}
	err := driver.Wait()
	status := driver.ProcessState.Sys().(syscall.WaitStatus)
	if err != nil && status.Signal() != syscall.SIGTERM { // which takes it before it can listen to it
		t.Errorf("stopped after %v, the driver ends with %v: %s", took, err, &out)
	}
	defer func() {
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(runDir, "supervisor", "supervisor.log"))
			t.Logf("stopped after %v, on sight: %t, the driver ends with %v and says %s, its supervisor %s", took, onSight, err, &out, log)
		}
	}()
	waitGone(t, runDir)
}

func supervisorRuns(t *testing.T, runDir string) bool {
	t.Helper()
	return slices.ContainsFunc(processesWith(t, runDir), func(args string) bool { return strings.Contains(args, " supervisor ") })
}
