package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// EnsureConfig says which supervisor to find or start.
type EnsureConfig struct {
	// StateDir is the supervisor's; it is made, mode 0700, if its parent exists.
	StateDir string
	// Binary and Args start a supervisor for StateDir, in the foreground; Binary ""
	// is this process's own. Its working directory is "/", and it inherits the
	// directory's lock, which Supervisor.Run finds by itself.
	Binary string
	Args   []string
	// Env is added to its environment.
	Env []string
}

const (
	// ensurePoll is how often a supervisor that is starting or ending is looked at.
	ensurePoll = 10 * time.Millisecond
	// ensureStarts is how often one that ends before it answers is started: it may
	// have been stopped at the same time.
	ensureStarts = 3
)

// Ensure returns a client of the supervisor that runs in a state directory. If none
// does it starts one, as a daemon with a session and a log (supervisor.log) of its
// own that outlives the caller, and waits until it answers. Concurrent callers get
// the same supervisor. One whose start ctx cut short may yet come to run: Stop ends it.
func Ensure(ctx context.Context, cfg EnsureConfig) (*Client, error) {
	client := NewClient(SocketPath(cfg.StateDir))
	if err := ensure(ctx, cfg, client); err != nil {
		return nil, fmt.Errorf("supervisor in %s: %w", cfg.StateDir, err)
	}
	return client, nil
}

func ensure(ctx context.Context, cfg EnsureConfig, client *Client) error {
	if err := os.Mkdir(cfg.StateDir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make state directory: %w", err)
	}
	logPath := filepath.Join(cfg.StateDir, "supervisor.log")
	for starts := 0; ; {
		err := answers(ctx, client)
		if !errors.Is(err, ErrNotRunning) {
			return err
		}
		lock, err := lockSupervisor(cfg.StateDir)
		switch {
		case errors.Is(err, block.ErrLocked): // one is starting, or ending
		case err != nil:
			return err
		case starts == ensureStarts:
			lock.Close()
			return fmt.Errorf("it ended when it was started; the end of %s: %s: %w", logPath, lastLine(logPath), ErrNotRunning)
		default:
			starts++
			err := spawnDaemon(cfg, logPath, lock)
			lock.Close() // the daemon has it now
			if err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (see %s): %w", ErrNotRunning, logPath, ctx.Err())
		case <-time.After(ensurePoll):
		}
	}
}

func answers(ctx context.Context, client *Client) error {
	_, err := client.List(ctx)
	return err
}

// spawnDaemon starts the process, which inherits the state directory's lock.
func spawnDaemon(cfg EnsureConfig, logPath string, lock *os.File) error {
	log, err := os.OpenFile(logPath, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open supervisor's log: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(cfg.program(), cfg.Args...)
	cmd.Args[0] = "csi-imgdisk"
	cmd.Dir = "/"
	cmd.Env = append(append(os.Environ(), cfg.Env...), fmt.Sprintf("%s=%d", inheritedLockEnv, inheritedLockFD))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{lock}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start supervisor: %w", err)
	}
	go func() { _ = cmd.Wait() }() // its log says how it ended
	return nil
}

// Replace is Ensure with a supervisor that is started now: if one runs, it is ended first,
// and what is attached lives on. Until the new one answers, nobody restarts servers.
func Replace(ctx context.Context, cfg EnsureConfig) (*Client, error) {
	for {
		if err := end(ctx, cfg.StateDir, (*Client).Leave); err != nil {
			return nil, err
		}
		client, err := Ensure(ctx, cfg)
		if err != nil {
			return nil, err
		}
		status, err := client.Status(ctx)
		if err == nil && !isOther(status.PID, cfg.program()) {
			return client, nil
		}
		// Somebody else, such as a driver of another version that keeps a supervisor
		// running, was faster.
		if err != nil && !errors.Is(err, ErrNotRunning) {
			return nil, err
		}
	}
}

// program is what a supervisor is started from.
func (cfg EnsureConfig) program() string {
	if cfg.Binary == "" {
		return "/proc/self/exe"
	}
	return cfg.Binary
}

// isOther says whether a process is known to be of another program.
func isOther(pid int, program string) bool {
	_, err := os.Stat(exePath(pid))
	return err == nil && !runs(pid, program)
}

// Stop ends the supervisor of a state directory, also one that is only starting, and
// returns once it has let go of the directory, or when ctx ends. nil also means that
// there is none; block.ErrBusy means that it has attachments and goes on.
func Stop(ctx context.Context, stateDir string) error {
	return end(ctx, stateDir, (*Client).Stop)
}

// end asks a supervisor to end, in the way given, and waits until it has.
func end(ctx context.Context, stateDir string, ask func(*Client, context.Context) error) error {
	client := NewClient(SocketPath(stateDir))
	var err error
	for isLocked(stateDir) {
		if err = ask(client, ctx); err != nil && !errors.Is(err, ErrNotRunning) {
			if ctx.Err() == nil {
				return err
			}
			err = ErrNotRunning // as far as can be told by now
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("stop supervisor in %s: %w", stateDir, errors.Join(err, ctx.Err()))
		case <-time.After(ensurePoll):
		}
	}
	return nil
}
