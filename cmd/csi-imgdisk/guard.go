package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// respawnWait is how long a supervisor that has ended stays away: one that still
	// ends elsewhere may hold what the next one needs.
	respawnWait = time.Second
	// guardFlag is what tells a guard from the supervisor that it starts.
	guardFlag = "--guard"
)

// guard runs a supervisor as a child, again and again, until ctx ends. It is a container's
// first process: when that ends everything in the container is killed, volumes' servers
// as well. This one has nothing to do that could end it.
func guard(ctx context.Context, log *slog.Logger) error {
	// Servers whose supervisor has ended become this process's children.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("adopt orphans: %w", err)
	}
	args := append([]string{"csi-imgdisk"}, slices.DeleteFunc(slices.Clone(os.Args[1:]), func(arg string) bool {
		return arg == guardFlag || arg == guardFlag+"=true"
	})...)
	for {
		pid, err := spawnSupervisor(args)
		if err != nil {
			return err
		}
		stop := context.AfterFunc(ctx, func() { _ = syscall.Kill(pid, syscall.SIGTERM) })
		status := reapUntil(pid)
		stop()
		if ctx.Err() != nil {
			return nil
		}
		log.Warn("the supervisor has ended; it is started again", "exitCode", status.ExitStatus(), "signal", status.Signal())
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(respawnWait):
		}
	}
}

func spawnSupervisor(args []string) (pid int, err error) {
	p, err := os.StartProcess("/proc/self/exe", args, &os.ProcAttr{
		Dir: "/", Env: os.Environ(), Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
	})
	if err != nil {
		return 0, fmt.Errorf("start the supervisor: %w", err)
	}
	pid = p.Pid
	return pid, p.Release() // reapUntil waits for it
}

// reapUntil waits for children, whose parents they are not, until one of them has ended.
func reapUntil(pid int) (status syscall.WaitStatus) {
	for {
		got, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case got == pid:
			return status
		case err == syscall.EINTR, err == nil:
		default: // there is no child left
			return status
		}
	}
}
