package hostmount

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
	utilexec "k8s.io/utils/exec"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// programs runs programs, and mkfs with a lock on the device: when the driver is killed,
// its mkfs may go on, and the next driver must neither start another nor mount what is
// half made. Not every mkfs keeps others away by itself: that of btrfs doesn't.
type programs struct {
	utilexec.Interface
}

func (p programs) Command(name string, args ...string) utilexec.Cmd {
	cmd := p.Interface.Command(name, args...)
	if !strings.HasPrefix(name, "mkfs.") || len(args) == 0 {
		return cmd
	}
	return mkfs{Cmd: cmd, name: name, args: args}
}

// mkfs is a program whose last argument is a device, which it holds locked.
type mkfs struct {
	utilexec.Cmd
	name string
	args []string
}

// CombinedOutput runs the program. The lock belongs to the open file, which the program
// inherits: it lasts for as long as either lives.
func (m mkfs) CombinedOutput() ([]byte, error) {
	f, err := lockDevice(m.args[len(m.args)-1])
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cmd := exec.Command(m.name, m.args...)
	cmd.ExtraFiles = []*os.File{f}
	return cmd.CombinedOutput()
}

// idle returns block.ErrBusy if somebody has a device for himself: it is mounted, or a
// killed driver's mkfs is still at work.
func idle(device string) error {
	exclusive, err := openExclusive(device, os.O_RDONLY)
	if err != nil {
		return err
	}
	locked, err := lockDevice(device)
	if err != nil {
		return errors.Join(err, exclusive.Close())
	}
	return errors.Join(locked.Close(), exclusive.Close())
}

// openExclusive opens a device that nobody has for himself, or returns block.ErrBusy.
func openExclusive(device string, flags int) (*os.File, error) {
	f, err := os.OpenFile(device, flags|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("%w: %w", block.ErrBusy, err)
	}
	return f, err
}

// lockDevice opens a device with the lock that mkfs has while it works, or returns
// block.ErrBusy.
func lockDevice(device string) (*os.File, error) {
	f, err := os.Open(device)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("an earlier mkfs is still at work: %w", block.ErrBusy)
		}
		return nil, errors.Join(fmt.Errorf("lock %s: %w", device, err), f.Close())
	}
	return f, nil
}
