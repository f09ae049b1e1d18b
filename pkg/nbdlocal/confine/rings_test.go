package confine_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach/uring"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/confine"
)

// ringsVariable makes a process of this test one that is confined with a ring.
const ringsVariable = "IMGDISK_CONFINED_RINGS"

// A process that is confined with a ring can use it for what it was made for, and nothing
// else; and can make no other.
func TestProcess_Rings(t *testing.T) {
	if withCgo {
		t.Skip("a program built with cgo cannot confine itself")
	}
	if r, err := uring.New(uring.Config{Entries: 4}); err != nil {
		t.Skip(err)
	} else {
		r.Close()
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^$")
	cmd.Env = append(os.Environ(), ringsVariable+"=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// confinedWithRing is that process.
func confinedWithRing() error {
	runtime.LockOSThread()
	r, err := uring.New(uring.Config{Entries: 4, OneThread: true, Only: []uring.Op{uring.OpCommand, uring.OpRead}})
	if err != nil {
		return err
	}
	applied, err := confine.Process(confine.Rules{Rings: true})
	if err != nil {
		return err
	}
	if !applied.Seccomp {
		return nil // there is nothing to show
	}
	const opOpen, opSocket = 18, 45
	for op, want := range map[uring.Op]unix.Errno{opOpen: unix.EACCES, opSocket: unix.EACCES, uring.OpNop: unix.EACCES, uring.OpRead: unix.EBADF} {
		e := r.Next()
		e.Op, e.FD, e.UserData = op, -1, uint64(op)
		if err := r.Enter(1, 0); err != nil {
			return err
		}
		if c, ok := r.Take(); !ok || c.Res != -int32(want) {
			return fmt.Errorf("operation %d of the ring: %+v, want %w", op, c, want)
		}
	}
	for name, call := range map[string]uintptr{"set up": unix.SYS_IO_URING_SETUP, "register with": unix.SYS_IO_URING_REGISTER} {
		if _, _, errno := syscall.Syscall6(call, 4, 0, 0, 0, 0, 0); !errors.Is(errno, unix.EPERM) {
			return fmt.Errorf("%s a ring: %w, want it to be denied", name, errno)
		}
	}
	return nil
}
