package supervisor

import (
	"log/slog"
	"os"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"
)

// idleGCPercent keeps the heap of a server small. The data path does not allocate,
// so collecting earlier costs next to nothing.
const idleGCPercent = 50

// prepareProcess makes the process fit to stand below a block device, as far as the
// kernel lets it; none of it is needed for being right.
func prepareProcess() {
	prctlAllThreads("no new privileges", unix.PR_SET_NO_NEW_PRIVS)
	// Memory that a request needs must not be got by writing back dirty pages of
	// the very device it is for. Needs CAP_SYS_RESOURCE.
	prctlAllThreads("no writeback for memory (IO_FLUSHER)", unix.PR_SET_IO_FLUSHER)
	// Killing a server frees little and stalls its volume's users.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0o600); err != nil {
		slog.Debug("the kernel does not allow a process setting", "setting", "oom_score_adj", "error", err)
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(idleGCPercent)
	}
}

// prctlAllThreads sets an attribute that each thread has for itself and passes on to
// threads it starts.
func prctlAllThreads(setting string, option uintptr) {
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_PRCTL, option, 1, 0); errno != 0 {
		slog.Debug("the kernel does not allow a process setting", "setting", setting, "error", errno)
	}
}
