package nbdlocal

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sleeper is where one thread sleeps until another wakes it. It is a bare futex: the
// Go scheduler would take microseconds longer to get a goroutine running on another
// processor.
type sleeper struct {
	woken atomic.Uint32
}

const (
	futexWaitPrivate = 0 | 128
	futexWakePrivate = 1 | 128
)

// sleep returns after a wake that no earlier sleep has consumed.
func (s *sleeper) sleep() {
	for !s.woken.CompareAndSwap(1, 0) {
		// EINTR and EAGAIN (woken in between) both mean: look again.
		_, _, _ = unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&s.woken)), futexWaitPrivate, 0, 0, 0, 0)
	}
}

// wake ends one sleep, the current or the next.
func (s *sleeper) wake() {
	s.woken.Store(1)
	// RawSyscall: it never blocks, so the scheduler need not know.
	_, _, _ = unix.RawSyscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&s.woken)), futexWakePrivate, 1, 0, 0, 0)
}
