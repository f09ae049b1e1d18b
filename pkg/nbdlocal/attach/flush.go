package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"

	"golang.org/x/sys/unix"
)

// Making a device's caches durable waits for its server, in a system call that nothing
// interrupts. A process that is killed while it waits stays, with its locks and sockets,
// until a server answers; and what starts servers must not be that process, for its
// successor would wait for it forever. So another process waits, which holds nothing but
// the device.

// flushEnv tells a process which of its descriptors it is started to flush.
const flushEnv = "IMGDISK_FLUSH_DESCRIPTOR"

// flushFD is that descriptor: the first of those that exec.Cmd.ExtraFiles passes on.
const flushFD = 3

// The process is this program once more, whichever that is: one that didn't look here
// would do its own work a second time instead.
func init() {
	if os.Getenv(flushEnv) == strconv.Itoa(flushFD) {
		var errno unix.Errno
		if errors.As(unix.Fsync(flushFD), &errno) {
			os.Exit(int(errno))
		}
		os.Exit(0)
	}
}

// flushDevice makes durable what was written to a block device. It returns when ctx ends,
// or this process is killed; the flush may go on then, and has the device open as long.
func flushDevice(ctx context.Context, fd int, path string) error {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("flush %s: %w", path, err)
	}
	device := os.NewFile(uintptr(dup), path)
	defer device.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{"csi-imgdisk", "flush", path}
	cmd.Dir = "/"
	cmd.Env = []string{flushEnv + "=" + strconv.Itoa(flushFD)}
	cmd.ExtraFiles = []*os.File{device}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("flush %s: start a process for it: %w", path, err)
	}
	err = within(ctx, cmd.Wait)
	if failed := (*exec.ExitError)(nil); errors.As(err, &failed) && failed.Exited() {
		err = unix.Errno(failed.ExitCode())
	}
	if err != nil {
		return fmt.Errorf("flush %s: %w", path, err)
	}
	return nil
}
