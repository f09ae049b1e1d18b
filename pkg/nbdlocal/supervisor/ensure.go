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
)

// EnsureConfig says which supervisor to find or start.
type EnsureConfig struct {
	// StateDir is the supervisor's; it is made, mode 0700, if its parent exists.
	StateDir string
	// Binary and Args start a supervisor for StateDir, in the foreground; Binary ""
	// is this process's own. Its working directory is "/".
	Binary string
	Args   []string
	// Env is added to its environment.
	Env []string
}

const (
	// ensurePoll is how often a starting supervisor is asked whether it answers.
	ensurePoll = 10 * time.Millisecond
	// ensureStarts is how often one that ends before it answers is started: one may
	// lose against another that was started, or stopped, at the same time.
	ensureStarts = 3
)

// Ensure returns a client of the supervisor that runs in a state directory. If none
// does it starts one, as a daemon with a session and a log (supervisor.log) of its
// own that outlives the caller, and waits until it answers. Concurrent callers get
// the same supervisor.
func Ensure(ctx context.Context, cfg EnsureConfig) (*Client, error) {
	client := NewClient(SocketPath(cfg.StateDir))
	err := answers(ctx, client)
	for range ensureStarts {
		if !errors.Is(err, ErrNotRunning) || ctx.Err() != nil {
			break
		}
		err = startDaemon(ctx, cfg, client)
	}
	if err != nil {
		return nil, fmt.Errorf("supervisor in %s: %w", cfg.StateDir, err)
	}
	return client, nil
}

func answers(ctx context.Context, client *Client) error {
	_, err := client.List(ctx)
	return err
}

// startDaemon starts a supervisor and waits until one answers. ErrNotRunning means
// that it has ended instead.
func startDaemon(ctx context.Context, cfg EnsureConfig, client *Client) error {
	if err := os.Mkdir(cfg.StateDir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make state directory: %w", err)
	}
	logPath := filepath.Join(cfg.StateDir, "supervisor.log")
	ended, err := spawnDaemon(cfg, logPath)
	if err != nil {
		return err
	}
	for {
		err := answers(ctx, client)
		if !errors.Is(err, ErrNotRunning) {
			return err
		}
		select {
		case <-ended:
			// If it lost against another one, that is starting, or ending.
			if !isLocked(cfg.StateDir) {
				return fmt.Errorf("it ended when it was started; the end of %s: %s: %w", logPath, lastLine(logPath), ErrNotRunning)
			}
		default:
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (see %s): %w", ErrNotRunning, logPath, ctx.Err())
		case <-time.After(ensurePoll):
		}
	}
}

// spawnDaemon starts the process; the channel is closed when it ends.
func spawnDaemon(cfg EnsureConfig, logPath string) (ended <-chan struct{}, err error) {
	log, err := os.OpenFile(logPath, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open supervisor's log: %w", err)
	}
	defer log.Close()
	binary := cfg.Binary
	if binary == "" {
		binary = "/proc/self/exe"
	}
	cmd := exec.Command(binary, cfg.Args...)
	cmd.Args[0] = "csi-imgdisk"
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), cfg.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start supervisor: %w", err)
	}
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(done)
	}()
	return done, nil
}
