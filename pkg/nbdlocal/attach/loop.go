package attach

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

func loopPath(index int) string { return fmt.Sprintf("/dev/loop%d", index) }
func loopName(index int) string { return fmt.Sprintf("loop%d", index) }

// loopBacking returns what the kernel shows as the loop device's backing file, "" if
// it has none.
func loopBacking(index int) string {
	b, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/loop/backing_file", index))
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}

// findLoop returns the loop device with this backing file.
func findLoop(backing string) (index int, ok bool) {
	paths, _ := filepath.Glob("/sys/block/loop*/loop")
	for _, p := range paths {
		index, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(filepath.Dir(p)), "loop"))
		if err == nil && loopBacking(index) == backing {
			return index, true
		}
	}
	return 0, false
}

// configureLoop binds file to a free loop device, in direct-I/O mode.
func configureLoop(file *os.File, spec Spec) (index int, err error) {
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("loop: open /dev/loop-control: %w", err)
	}
	defer unix.Close(control)
	config := unix.LoopConfig{Fd: uint32(file.Fd()), Size: uint32(spec.BlockBytes)}
	// Unbound by its last close, until bindLoop is done with it: the kernel binds it for a
	// process, too, that is killed meanwhile, and then nobody would know of it.
	config.Info.Flags = unix.LO_FLAGS_DIRECT_IO | unix.LO_FLAGS_AUTOCLEAR
	if spec.ReadOnly {
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	copy(config.Info.File_name[:unix.LO_NAME_SIZE-1], file.Name())
	for range 64 {
		index, err = unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return 0, fmt.Errorf("loop: get a free device: %w", err)
		}
		err = bindLoop(index, &config)
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENXIO) && !errors.Is(err, unix.ENOENT) {
			break // else another process was faster, with this one or its removal
		}
	}
	return index, err
}

func bindLoop(index int, config *unix.LoopConfig) error {
	flags := unix.O_RDWR
	if config.Info.Flags&unix.LO_FLAGS_READ_ONLY != 0 {
		flags = unix.O_RDONLY
	}
	fd, err := unix.Open(loopPath(index), flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("loop: open %s: %w", loopPath(index), err)
	}
	defer unix.Close(fd)
	if err := unix.IoctlLoopConfigure(fd, config); err != nil {
		return fmt.Errorf("loop: configure %s: %w", loopPath(index), err)
	}
	info, err := unix.IoctlLoopGetStatus64(fd)
	if err == nil {
		info.Flags &^= unix.LO_FLAGS_AUTOCLEAR
		err = unix.IoctlLoopSetStatus64(fd, info)
	}
	if err != nil {
		return fmt.Errorf("loop: keep %s bound: %w", loopPath(index), err)
	}
	return nil
}

// growLoop makes the loop device as large as its backing file has become.
func growLoop(index int) error {
	fd, err := unix.Open(loopPath(index), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("loop: open %s: %w", loopPath(index), err)
	}
	defer unix.Close(fd)
	if err := unix.IoctlSetInt(fd, unix.LOOP_SET_CAPACITY, 0); err != nil {
		return fmt.Errorf("loop: set capacity of %s: %w", loopPath(index), err)
	}
	return nil
}

// clearLoop unbinds a loop device, if nobody else has it open; else it stays as it
// was. fd is an open descriptor of the device, which is unbound at the latest when
// that is closed.
func clearLoop(fd, index int) (cleared bool, err error) {
	// The kernel unbinds a device at once only for its sole opener; for others it
	// notes that the last to close it shall. That note tells which it was, and can
	// be withdrawn.
	if err := unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0); err != nil {
		if err == unix.ENXIO {
			return true, nil
		}
		return false, fmt.Errorf("loop: clear %s: %w", loopPath(index), err)
	}
	info, err := unix.IoctlLoopGetStatus64(fd)
	if err != nil || info.Flags&unix.LO_FLAGS_AUTOCLEAR == 0 {
		return true, nil
	}
	info.Flags &^= unix.LO_FLAGS_AUTOCLEAR
	if err := unix.IoctlLoopSetStatus64(fd, info); err != nil {
		return false, fmt.Errorf("loop: keep %s bound: %w", loopPath(index), err)
	}
	return false, nil
}

// abandonLoop unbinds a loop device whoever has it open: at the last close.
func abandonLoop(index int) error {
	fd, err := unix.Open(loopPath(index), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("loop: open %s: %w", loopPath(index), err)
	}
	defer unix.Close(fd)
	if err := unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0); err != nil && err != unix.ENXIO {
		return fmt.Errorf("loop: clear %s: %w", loopPath(index), err)
	}
	return nil
}
