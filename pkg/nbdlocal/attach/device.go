package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// What the transports have in common: block devices as sysfs shows them, and waiting.

// checkAdmin says whether this process may administer block devices.
func checkAdmin() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("read this process's capabilities: %w", err)
	}
	if data[0].Effective&(1<<unix.CAP_SYS_ADMIN) == 0 {
		return fmt.Errorf("attaching block devices is not permitted: run this as root with CAP_SYS_ADMIN: %w", block.ErrUnsupported)
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// openExclusive opens a block device for detaching it: it fails with ErrBusy when the
// device is mounted, or part of another device. Something that merely probes it, as
// udev does, is given a moment.
func openExclusive(ctx context.Context, name string) (int, error) {
	// Read-only: closing a descriptor that could write makes udev probe the device.
	fd := -1
	err := poll(ctx, probeGrace, func() (bool, error) {
		var err error
		fd, err = unix.Open("/dev/"+name, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err != nil && err != unix.EBUSY {
			return false, fmt.Errorf("open /dev/%s: %w", name, err)
		}
		return err == nil, nil
	})
	if errors.Is(err, errPollTimeout) {
		return -1, busyError(name)
	}
	return fd, err
}

// checkDeviceSize returns an error unless the block device has this size.
func checkDeviceSize(name string, want int64) error {
	got, err := deviceBytes(name)
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("/dev/%s has %d bytes, %d were to be expected: %w", name, got, want, block.ErrInvalid)
	}
	return nil
}

// deviceBytes returns the size of a block device.
func deviceBytes(name string) (int64, error) {
	b, err := os.ReadFile("/sys/block/" + name + "/size")
	if err != nil {
		return 0, err
	}
	sectors, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("/sys/block/%s/size: %w", name, err)
	}
	return sectors * 512, nil
}

// setQueue sets an attribute of a device's request queue.
func setQueue(name, attribute string, value any) error {
	path := "/sys/block/" + name + "/queue/" + attribute
	if err := os.WriteFile(path, fmt.Append(nil, value), 0); err != nil {
		return fmt.Errorf("set %v: %w", value, err) // the error names the path
	}
	return nil
}

const (
	pollInterval = 10 * time.Millisecond
	// probeGrace is how long something that opens devices as they come and go may
	// take with one.
	probeGrace = time.Second
)

// within runs f, which may have to wait for a server in a system call that nothing
// interrupts. It returns when ctx ends; f goes on, to no effect that matters.
func within(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

var errPollTimeout = errors.New("timed out")

// poll calls try until it returns true or an error, for at most the limit.
func poll(ctx context.Context, limit time.Duration, try func() (bool, error)) error {
	deadline := time.Now().Add(limit)
	for {
		ok, err := try()
		if ok || err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return errPollTimeout
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pollInterval):
		}
	}
}

// maxIDBytes keeps an ID within what the kernel shows in a file of sysfs.
const maxIDBytes = 1024

// checkSpec returns an ErrInvalid that names what in the spec no transport could do.
func checkSpec(spec Spec) error {
	switch {
	case spec.ID == "", len(spec.ID) > maxIDBytes, strings.ContainsRune(spec.ID, 0):
		return fmt.Errorf("attach: ID %q: %w: 1 to %d bytes without NUL are accepted", spec.ID, block.ErrInvalid, maxIDBytes)
	case spec.BlockBytes != 512 && spec.BlockBytes != 4096:
		return fmt.Errorf("attach %s: block size %d: %w: 512 and 4096 are accepted", spec.ID, spec.BlockBytes, block.ErrInvalid)
	}
	return checkSize(spec, spec.SizeBytes)
}

// checkGrowth returns an ErrInvalid unless the device could have the new size.
func checkGrowth(st State, sizeBytes int64) error {
	if err := checkSize(st.Spec, sizeBytes); err != nil {
		return err
	}
	if sizeBytes < st.SizeBytes {
		return fmt.Errorf("resize %s: %d bytes: %w: a device can only grow, it has %d", st.ID, sizeBytes, block.ErrInvalid, st.SizeBytes)
	}
	return nil
}

func checkSize(spec Spec, sizeBytes int64) error {
	if sizeBytes <= 0 || sizeBytes%int64(spec.BlockBytes) != 0 {
		return fmt.Errorf("attach %s: size %d: %w: a positive multiple of %d is accepted", spec.ID, sizeBytes, block.ErrInvalid, spec.BlockBytes)
	}
	return nil
}
