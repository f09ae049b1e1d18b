package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach/uring"
)

// What a node needs for ublk, and which kernels are not to be trusted with it.

const (
	// ublkNeeded is what no device can do without.
	ublkNeeded = ublkUserRecovery | ublkRecoveryReissue | ublkIoctlEncode
	// ublkWanted is what the kernels have that make the transport as good as nbd: there
	// a device can grow, and recovery has no known holes of the kind that are described
	// at ublkTransport.Recover.
	ublkWanted = ublkHasUpdateSize | ublkHasQuiesce
)

// Probe asks the driver what it can do. It makes no device: on some kernels that is what
// must not be tried.
func (*ublkTransport) Probe(ctx context.Context) error {
	_, err := probeUBLK(ctx)
	return err
}

// Reluctance says why the transport is not to be used unless it is asked for by name.
func (*ublkTransport) Reluctance(ctx context.Context) error {
	features, err := probeUBLK(ctx)
	if err == nil && features&ublkWanted != ublkWanted {
		err = fmt.Errorf("this kernel's ublk (%s) can't resize a device in use, and Linux 6.16 can: it is used only where transport ublk is asked for: %w", kernelRelease(), block.ErrUnsupported)
	}
	return err
}

func probeUBLK(ctx context.Context) (features uint64, err error) {
	if err := checkAdmin(); err != nil {
		return 0, err
	}
	if why := ublkBroken(kernelRelease()); why != "" {
		return 0, fmt.Errorf("ublk is not used on kernel %s: %s: %w", kernelRelease(), why, block.ErrUnsupported)
	}
	if !exists(ublkControlPath) {
		_ = exec.CommandContext(ctx, "modprobe", "ublk_drv").Run() // the next look tells
	}
	switch {
	case exists(ublkControlPath):
	case exists("/sys/module/ublk_drv"):
		return 0, fmt.Errorf("%s is missing, though the kernel has ublk: give this process the host's /dev: %w", ublkControlPath, block.ErrUnsupported)
	default:
		return 0, fmt.Errorf("kernel module ublk_drv is not available: a kernel with CONFIG_BLK_DEV_UBLK, Linux 6.5 or newer, has it (Ubuntu: install linux-modules-extra-%s, then modprobe ublk_drv): %w", kernelRelease(), block.ErrUnsupported)
	}
	if err := checkRings(); err != nil {
		return 0, err
	}
	features, err = ublkFeatures(ctx)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL), err == nil && features&ublkNeeded != ublkNeeded:
		return 0, fmt.Errorf("this kernel's ublk (%s, features %#x) can't hand a device to another server: Linux 6.5 or newer is needed: %w", kernelRelease(), features, block.ErrUnsupported)
	case err != nil:
		return 0, err
	}
	raiseUBLKLimit()
	return features, nil
}

// checkRings says whether this process may use io_uring, with all that a server needs.
func checkRings() error {
	ring, err := uring.New(uring.Config{Entries: 4, OneThread: true, Only: ublkRingOps})
	switch {
	case err == nil:
		return ring.Close()
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL):
		return fmt.Errorf("ublk needs io_uring of Linux 6.1 or newer, and this kernel (%s) has none (CONFIG_IO_URING), or a seccomp profile hides it: %w", kernelRelease(), errors.Join(block.ErrUnsupported, err))
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		if setting := sysctlInt("/proc/sys/kernel/io_uring_disabled"); setting > 0 {
			return fmt.Errorf("ublk needs io_uring, which kernel.io_uring_disabled=%d forbids: set it to 0, or with CAP_SYS_ADMIN to 1 (sysctl -w kernel.io_uring_disabled=0): %w", setting, block.ErrUnsupported)
		}
		return fmt.Errorf("ublk needs io_uring, which this container's seccomp profile forbids: run it with seccompProfile Unconfined, or one that allows io_uring_setup, io_uring_enter and io_uring_register: %w", block.ErrUnsupported)
	}
	return fmt.Errorf("ublk: %w", err)
}

func sysctlInt(path string) int64 {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return n
}

// raiseUBLKLimit lets the driver have more than the 64 devices that it has by default on
// some kernels. Where it can't, attaching says so.
func raiseUBLKLimit() {
	const limit, enough = "/sys/module/ublk_drv/parameters/ublks_max", 4096
	if n := sysctlInt(limit); n > 0 && n < enough {
		_ = os.WriteFile(limit, strconv.AppendInt(nil, enough, 10), 0)
	}
}

// brokenUBLK lists kernels on which using ublk harms the whole machine.
var brokenUBLK = []struct {
	release *regexp.Regexp
	why     string
}{
	{regexp.MustCompile(`^6\.17\.0-(3[5-9]|40)-`), "adding a device crashes Ubuntu's kernels 6.17.0-35 to 6.17.0-40; another kernel is needed"},
	{regexp.MustCompile(`^6\.17\.0-1[0-9]{3}-`), "adding a device crashes Ubuntu's cloud kernels 6.17.0; another kernel is needed"},
	{regexp.MustCompile(`^6\.18\.[45]([^0-9]|$)`), "adding a device crashes Linux 6.18.4 and 6.18.5; 6.18.6 or another kernel is needed"},
	{regexp.MustCompile(`^(6\.18\.40|7\.0\.0|7\.0\.14|7\.0)([^0-9.]|$)`), "its control commands can hang for good on Linux 6.18.40, 7.0.0 and 7.0.14; another kernel is needed"},
}

// ublkBroken says why ublk must not be used on a kernel, "" if nothing is known.
func ublkBroken(release string) string {
	for _, b := range brokenUBLK {
		if b.release.MatchString(release) {
			return b.why
		}
	}
	return ""
}
