package confine

import (
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// allowedCalls are what the Go runtime, and reading, writing and waiting need, on every
// architecture.
var allowedCalls = []uint32{
	// files
	unix.SYS_READ, unix.SYS_WRITE, unix.SYS_READV, unix.SYS_WRITEV, unix.SYS_PREAD64, unix.SYS_PWRITE64,
	unix.SYS_PREADV, unix.SYS_PWRITEV, unix.SYS_PREADV2, unix.SYS_PWRITEV2, unix.SYS_LSEEK, unix.SYS_OPENAT, unix.SYS_OPENAT2,
	unix.SYS_CLOSE, unix.SYS_FSTAT, unix.SYS_STATX, unix.SYS_FSTATFS, unix.SYS_STATFS, unix.SYS_FTRUNCATE,
	unix.SYS_FALLOCATE, unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_SYNC_FILE_RANGE, unix.SYS_FADVISE64,
	unix.SYS_FCNTL, unix.SYS_FLOCK, unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_FACCESSAT, unix.SYS_FACCESSAT2,
	unix.SYS_GETDENTS64, unix.SYS_READLINKAT, unix.SYS_UNLINKAT, unix.SYS_MKDIRAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2,
	unix.SYS_COPY_FILE_RANGE, unix.SYS_SPLICE, unix.SYS_VMSPLICE, unix.SYS_TEE, unix.SYS_SENDFILE, unix.SYS_IOCTL,
	unix.SYS_DUP, unix.SYS_DUP3, unix.SYS_PIPE2, unix.SYS_GETCWD, unix.SYS_UMASK,
	// sockets that are open
	unix.SYS_ACCEPT4, unix.SYS_RECVMSG, unix.SYS_SENDMSG, unix.SYS_RECVFROM, unix.SYS_SENDTO, unix.SYS_SHUTDOWN,
	unix.SYS_GETSOCKOPT, unix.SYS_SETSOCKOPT, unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME,
	// waiting
	unix.SYS_PPOLL, unix.SYS_PSELECT6, unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL, unix.SYS_EPOLL_PWAIT, unix.SYS_EPOLL_PWAIT2,
	unix.SYS_EVENTFD2, unix.SYS_FUTEX, unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_RESTART_SYSCALL,
	// memory
	unix.SYS_MUNMAP, unix.SYS_MADVISE, unix.SYS_MREMAP, unix.SYS_BRK, unix.SYS_MLOCK, unix.SYS_MLOCK2, unix.SYS_MUNLOCK,
	unix.SYS_MINCORE, unix.SYS_MEMBARRIER,
	// threads, signals, time
	unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_SIGALTSTACK, unix.SYS_TGKILL,
	unix.SYS_EXIT, unix.SYS_EXIT_GROUP, unix.SYS_SCHED_YIELD, unix.SYS_SCHED_GETAFFINITY, unix.SYS_SET_ROBUST_LIST,
	unix.SYS_RSEQ, unix.SYS_GETPID, unix.SYS_GETPPID, unix.SYS_GETTID, unix.SYS_CLOCK_GETTIME, unix.SYS_CLOCK_GETRES, unix.SYS_GETTIMEOFDAY,
	unix.SYS_TIMER_CREATE, unix.SYS_TIMER_SETTIME, unix.SYS_TIMER_DELETE, unix.SYS_SETITIMER,
	// about itself
	unix.SYS_GETRANDOM, unix.SYS_GETUID, unix.SYS_GETEUID, unix.SYS_GETGID, unix.SYS_GETEGID, unix.SYS_UNAME,
	unix.SYS_PRLIMIT64, unix.SYS_GETRUSAGE, unix.SYS_SYSINFO, unix.SYS_CAPGET,
}

// conditionalCalls are allowed depending on the low half of an argument: if it has a bit of
// with, or none of without, or is one of values, whichever is given.
var conditionalCalls = []struct {
	call, arg     uint32
	with, without uint32
	values        []uint32
}{
	// Threads, not processes.
	{call: unix.SYS_CLONE, arg: 0, with: unix.CLONE_THREAD},
	// Memory, not code.
	{call: unix.SYS_MMAP, arg: 2, without: unix.PROT_EXEC},
	{call: unix.SYS_MPROTECT, arg: 2, without: unix.PROT_EXEC},
	// Names of threads and of memory, for who debugs.
	{call: unix.SYS_PRCTL, arg: 0, values: []uint32{unix.PR_SET_NAME, unix.PR_GET_NAME, unix.PR_SET_VMA}},
}

// Offsets in struct seccomp_data, little endian.
const (
	seccompNumber = 0
	seccompArch   = 4
	seccompArgs   = 16
)

const (
	filterAllow = unix.SECCOMP_RET_ALLOW
	filterDeny  = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	filterKill  = unix.SECCOMP_RET_KILL_PROCESS
)

// filterCalls installs the filter for all threads. It reports false where the kernel has
// none.
func filterCalls(rings bool) (bool, error) {
	program := filterProgram(rings)
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&fprog)))
	runtime.KeepAlive(program)
	switch errno {
	case 0:
		return true, nil
	case unix.ENOSYS, unix.EINVAL:
		return false, nil
	}
	return false, fmt.Errorf("confine: filter system calls (seccomp): %w", errno)
}

// filterProgram returns the filter: what is allowed is allowed, what this program was not
// made for ends the process, and everything else fails with EPERM.
func filterProgram(rings bool) []unix.SockFilter {
	program := []unix.SockFilter{
		load(seccompArch),
		jumpIfEqual(auditArch, 1, 0),
		result(filterKill),
		load(seccompNumber),
	}
	// Sorted, so that the program does not depend on how the lists are written.
	calls := slices.Concat(allowedCalls, archCalls)
	if rings {
		calls = append(calls, unix.SYS_IO_URING_ENTER)
	}
	slices.Sort(calls)
	for _, call := range slices.Compact(calls) {
		program = append(program, jumpIfEqual(call, 0, 1), result(filterAllow))
	}
	for _, c := range conditionalCalls {
		var test []unix.SockFilter
		if c.with != 0 {
			test = append(test, jumpIfBits(c.with, 0, 1), result(filterAllow))
		}
		if c.without != 0 {
			test = append(test, jumpIfBits(c.without, 1, 0), result(filterAllow))
		}
		for _, v := range c.values {
			test = append(test, jumpIfEqual(v, 0, 1), result(filterAllow))
		}
		program = append(program, jumpIfEqual(c.call, 0, uint8(len(test)+2)), load(seccompArgs+8*c.arg))
		program = append(program, test...)
		program = append(program, result(filterDeny))
	}
	return append(program, result(filterDeny))
}

func load(offset uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
}

func jumpIfEqual(value uint32, yes, no uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value, Jt: yes, Jf: no}
}

func jumpIfBits(bits uint32, yes, no uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: bits, Jt: yes, Jf: no}
}

func result(action uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
}
