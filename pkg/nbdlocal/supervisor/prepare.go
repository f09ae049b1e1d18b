package supervisor

import (
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// idleGCPercent keeps the heap of a server small. The data path does not allocate,
// so collecting earlier costs next to nothing.
const idleGCPercent = 50

// plentyLocked is a limit on locked memory under which a program takes nothing from the
// buffers of its requests.
const plentyLocked = 256 << 20

// prepareServer makes a server's process fit to stand below a block device, as far as the
// kernel lets it; none of it is needed for being right.
func prepareServer() {
	prctlAllThreads("no new privileges", unix.PR_SET_NO_NEW_PRIVS)
	protectFromPressure()
	allowLocking()
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(idleGCPercent)
	}
}

// protectFromPressure is for processes without which dirty memory cannot be written back:
// servers, and the supervisor, which starts them again.
func protectFromPressure() {
	// Memory that a request needs must not be got by writing back dirty pages of
	// the very device it is for. Needs CAP_SYS_RESOURCE.
	prctlAllThreads("no writeback for memory (IO_FLUSHER)", unix.PR_SET_IO_FLUSHER)
	// Killing one frees little and stalls volumes' users.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0o600); err != nil {
		slog.Debug("the kernel does not allow a process setting", "setting", "oom_score_adj", "error", err)
	}
}

// allowLocking lifts the limit on locked memory as far as it goes. Later, when the process
// is confined, the limit is all it may lock.
func allowLocking() {
	err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY})
	if err == nil {
		return
	}
	var limit unix.Rlimit
	if err = unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err == nil {
		limit.Cur = limit.Max
		err = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit)
	}
	if err != nil {
		slog.Debug("the kernel does not allow a process setting", "setting", "locked memory", "error", err)
	}
}

// prctlAllThreads sets an attribute that each thread has for itself and passes on to
// threads it starts.
func prctlAllThreads(setting string, option uintptr) {
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_PRCTL, option, 1, 0); errno != 0 {
		slog.Debug("the kernel does not allow a process setting", "setting", setting, "error", errno)
	}
}

// shedStartup gives back the memory that only starting needed: the heap's, and the
// pages of the binary that were touched once. Those still wanted come back from the
// page cache, and then stay: a server that is short of memory must not have to read its
// own program, which might lie on what it serves.
func shedStartup() {
	debug.FreeOSMemory()
	binary, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		return
	}
	// The first claim on what may be locked have buffers of requests.
	var limit unix.Rlimit
	lock := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit) == nil && limit.Cur >= plentyLocked
	for _, m := range unmodifiedMappings(string(smaps), binary) {
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED)
		if lock { // from when they are next wanted
			_, _, _ = unix.Syscall(unix.SYS_MLOCK2, m.start, m.end-m.start, unix.MLOCK_ONFAULT)
		}
	}
}

// mapping is a range of addresses.
type mapping struct {
	start, end uintptr
}

// unmodifiedMappings returns the mappings of a file that are as the file is, and stay
// so: read-only ones without a page that was written to before they became it. smaps
// is /proc/PID/smaps: for each mapping a line "start-end perms offset dev inode path",
// followed by lines like "Anonymous: 4 kB", which counts modified pages.
func unmodifiedMappings(smaps, file string) []mapping {
	var found []mapping
	var current mapping
	wanted := false
	for line := range strings.Lines(smaps) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		var m mapping
		if n, _ := fmt.Sscanf(fields[0], "%x-%x", &m.start, &m.end); n == 2 {
			current = m
			wanted = strings.HasPrefix(fields[1], "r-") && fields[len(fields)-1] == file && current.start < current.end
		} else if wanted && fields[0] == "Anonymous:" && fields[1] == "0" {
			found = append(found, current)
		}
	}
	return found
}
