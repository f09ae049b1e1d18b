package supervisor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Server and supervisor are needed for dirty memory to be written: neither may wait for
// that when it needs some, nor be killed for it. What a server runs and what it copies
// requests with stays in memory.
func TestDevice_FitForMemoryPressure(t *testing.T) { onDevices(t, testDevice_FitForMemoryPressure) }

func testDevice_FitForMemoryPressure(t *testing.T, h *harness) {
	if buildSetting("CGO_ENABLED") {
		t.Skip("a program built with cgo cannot prepare all of its threads")
	}
	h.startProcess()
	image := h.newDisk("disk")
	at := h.attach(image)
	before, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	caps, err := strconv.ParseUint(procStatus(t, os.Getpid())["CapEff"], 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	for name, pid := range map[string]int{"server": at.PID, "supervisor": h.cmd.Process.Pid} {
		if caps&(1<<unix.CAP_SYS_RESOURCE) == 0 {
			t.Logf("CAP_SYS_RESOURCE is missing here (oom_score_adj %s): %s not checked", strings.TrimSpace(string(before)), name)
			continue
		}
		score, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
		if err != nil || strings.TrimSpace(string(score)) != "-999" {
			t.Errorf("%s: oom_score_adj %q, %v, want -999", name, score, err)
		}
		checkFlusher(t, name, pid)
	}
	h.checkLocked(at.PID)
	h.detach(image)
}

// checkFlusher checks that every thread of a process was made an I/O flusher.
func checkFlusher(t *testing.T, name string, pid int) {
	t.Helper()
	const memallocNoIO = 0x00080000 // PF_MEMALLOC_NOIO of linux/sched.h
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(threads) == 0 {
		t.Fatalf("%s: threads %v, %v", name, threads, err)
	}
	for _, path := range threads {
		stat, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		flags, err := strconv.ParseUint(fields[9-3], 10, 32)
		if err != nil || flags&memallocNoIO == 0 {
			t.Errorf("%s: %s: flags %#x, %v: its memory may be got by writing to its own devices", name, path, flags, err)
		}
	}
}

// checkLocked checks that a server has locked its program, and its buffers if it serves
// with such that are there before a request is.
func (h *harness) checkLocked(pid int) {
	t, transport := h.t, h.real
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_MEMLOCK, nil, &limit); err != nil {
		t.Fatal(err)
	}
	const wantKiB = 1 << 10 // a buffer; a program is larger
	if limit.Cur < wantKiB<<10 || transport != "fuse" && limit.Cur < plentyLocked {
		t.Skipf("no more than %d bytes may be locked here", limit.Cur)
	}
	h.eventually("locked memory", func() error {
		locked, err := strconv.Atoi(strings.TrimSuffix(procStatus(t, pid)["VmLck"], " kB"))
		if err != nil || locked < wantKiB {
			return fmt.Errorf("%s: %d KiB are locked, %v, want at least %d", transport, locked, err, wantKiB)
		}
		return nil
	})
}
