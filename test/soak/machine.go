package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// machineStopPatience is how long a machine may take to end when it is told to.
const machineStopPatience = 30 * time.Second

// withMachine runs the soak here and, at the same time, in a virtual machine with
// Debian's kernel, which has nbd and ublk.
func withMachine(ctx context.Context, c config) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "run", "./test/vm", "-kernels", "6.12", "-soak", c.duration.String())
	cmd.Env = append(os.Environ(), fmt.Sprintf("IMGDISK_SEED=%d", c.seed))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // go run doesn't pass signals on
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = machineStopPatience
	if err := cmd.Start(); err != nil {
		return err
	}
	err := run(ctx, c)
	if err != nil {
		cancel() // one failure is enough
	}
	if machineErr := cmd.Wait(); machineErr != nil {
		err = errors.Join(err, fmt.Errorf("in the virtual machine: %w", machineErr))
	}
	return err
}
