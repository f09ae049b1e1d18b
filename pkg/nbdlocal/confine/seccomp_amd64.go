package confine

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_X86_64

// archCalls are older forms of allowed calls, and what the runtime needs here only.
var archCalls = []uint32{
	unix.SYS_NEWFSTATAT, unix.SYS_POLL, unix.SYS_EPOLL_WAIT, unix.SYS_ARCH_PRCTL, unix.SYS_TIME,
	unix.SYS_READLINK, unix.SYS_ACCESS, unix.SYS_STAT, unix.SYS_LSTAT,
}
