package supervisor

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// ensureConfig starts this test's binary as a supervisor.
func (h *harness) ensureConfig() EnsureConfig {
	return EnsureConfig{
		StateDir: h.stateDir,
		Binary:   os.Args[0],
		Args:     []string{"test-supervisor", "stateDir=" + h.stateDir, "kernel=" + h.kernel.dir},
		Env:      []string{testEnv},
	}
}

// stopAfterwards ends a supervisor that a failed test has left.
func (h *harness) stopAfterwards() {
	h.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := Stop(ctx, h.stateDir); err != nil {
			h.t.Errorf("clean up: %v", err)
		}
	})
}

func TestEnsure(t *testing.T) {
	h := newHarness(t)
	h.stopAfterwards()
	var all sync.WaitGroup
	pids := make([]int, 4)
	for i := range pids {
		all.Go(func() {
			client, err := Ensure(h.ctx, h.ensureConfig())
			if err != nil {
				t.Error(err)
				return
			}
			status, err := client.Status(h.ctx)
			if err != nil {
				t.Error(err)
			}
			pids[i] = status.PID
		})
	}
	all.Wait()
	for _, pid := range pids {
		if pid != pids[0] || pid == os.Getpid() || pid == 0 {
			t.Errorf("supervisors %v, want one that is not this process (%d)", pids, os.Getpid())
		}
	}
	image := h.newImage("disk")
	if _, err := h.client.Attach(h.ctx, request(image)); err != nil {
		t.Error(err)
	}
	if err := h.client.Detach(h.ctx, image, false); err != nil {
		t.Error(err)
	}
	if err := h.client.Stop(h.ctx); err != nil {
		t.Error(err)
	}
	// Another is started at once, also while the first is still ending.
	if _, err := Ensure(h.ctx, h.ensureConfig()); err != nil {
		t.Error(err)
	}
	if status, err := h.client.Status(h.ctx); err != nil || status.PID == pids[0] {
		t.Errorf("after a stop: %+v, %v, want another process than %d", status, err, pids[0])
	}
	if err := h.client.Stop(h.ctx); err != nil {
		t.Error(err)
	}
	h.eventually("the end", func() error {
		if err := answers(h.ctx, h.client); !errors.Is(err, ErrNotRunning) {
			return errors.New("it answers")
		}
		return nil
	})
}

func TestEnsure_CannotStart(t *testing.T) {
	h := newHarness(t)
	cfg := h.ensureConfig()
	cfg.Args = []string{"test-supervisor", "stateDir="}
	_, err := Ensure(h.ctx, cfg)
	if !errors.Is(err, ErrNotRunning) || !strings.Contains(err.Error(), `state directory ""`) {
		t.Errorf("a supervisor that ends: %v", err)
	}
	cfg.Binary = filepath.Join(h.dir, "none")
	if _, err := Ensure(h.ctx, cfg); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no program: %v", err)
	}
	cfg.StateDir = filepath.Join(h.dir, "no", "parent")
	if _, err := Ensure(h.ctx, cfg); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no parent directory: %v", err)
	}
	ctx, cancel := context.WithTimeout(h.ctx, 100*time.Millisecond)
	defer cancel()
	cfg = h.ensureConfig()
	cfg.Binary, cfg.Args = "/bin/sleep", []string{"1"}
	if _, err := Ensure(ctx, cfg); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a supervisor that never answers: %v", err)
	}
	ctx, cancel = context.WithTimeout(h.ctx, 100*time.Millisecond)
	defer cancel()
	if err := Stop(ctx, h.stateDir); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, ErrNotRunning) {
		t.Errorf("stopping one that never answers: %v", err)
	}
}

// A supervisor that nobody waited for can be stopped, however far it has come.
func TestStop_WhileStarting(t *testing.T) {
	h := newHarness(t)
	h.stopAfterwards()
	r := testenv.Rand(t)
	const rounds = 20
	for range rounds {
		ctx, cancel := context.WithTimeout(h.ctx, time.Duration(r.Int64N(int64(20*time.Millisecond))))
		_, err := Ensure(ctx, h.ensureConfig())
		cancel()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if err := Stop(h.ctx, h.stateDir); err != nil {
			t.Error(err)
		}
		h.eventually("the end of supervisors", func() error {
			if processes := processesWith(t, h.stateDir); len(processes) > 0 {
				return errors.New(strings.Join(processes, ", "))
			}
			return nil
		})
	}
}

// processesWith returns the arguments of other processes that have something among them.
func processesWith(t *testing.T, what string) (list []string) {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		args, err := os.ReadFile(path)
		if err == nil && bytes.Contains(args, []byte(what)) { // else it has ended
			list = append(list, string(bytes.ReplaceAll(args, []byte{0}, []byte{' '})))
		}
	}
	return list
}

func TestStop_DependsOnAttachments(t *testing.T) {
	h := newHarness(t)
	h.stopAfterwards()
	if err := Stop(h.ctx, h.stateDir); err != nil {
		t.Errorf("stop where no supervisor has ever been: %v", err)
	}
	if _, err := Ensure(h.ctx, h.ensureConfig()); err != nil {
		t.Fatal(err)
	}
	image := h.newImage("disk")
	if _, err := h.client.Attach(h.ctx, request(image)); err != nil {
		t.Fatal(err)
	}
	if err := Stop(h.ctx, h.stateDir); !errors.Is(err, block.ErrBusy) {
		t.Errorf("stop with a volume attached: %v, want %v", err, block.ErrBusy)
	}
	if err := h.client.Detach(h.ctx, image, false); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := Stop(h.ctx, h.stateDir); err != nil {
			t.Error(err)
		}
	}
	if err := answers(h.ctx, h.client); !errors.Is(err, ErrNotRunning) {
		t.Errorf("after a stop: %v, want %v", err, ErrNotRunning)
	}
}

// A supervisor believes that it has a lock only if that is its state directory's.
func TestEnsure_OtherLock(t *testing.T) {
	h := newHarness(t)
	cfg := h.ensureConfig()
	other := filepath.Join(h.dir, "other")
	if err := os.Mkdir(other, 0o700); err != nil {
		t.Fatal(err)
	}
	h.write(lockPath(other), "")
	cfg.Args[1] = "stateDir=" + other
	if _, err := Ensure(h.ctx, cfg); !errors.Is(err, ErrNotRunning) || !strings.Contains(err.Error(), "it is not "+lockPath(other)) {
		t.Errorf("a supervisor with another directory's lock: %v", err)
	}
}
