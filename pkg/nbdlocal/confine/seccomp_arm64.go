package confine

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_AARCH64

// archCalls are what the runtime needs here only.
var archCalls = []uint32{unix.SYS_FSTATAT}
