package supervisor

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
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

func TestEnsure(t *testing.T) {
	h := newHarness(t)
	t.Cleanup(func() { _ = h.client.Stop(context.Background()) })
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
}
