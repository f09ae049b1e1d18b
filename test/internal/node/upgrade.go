package node

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
)

// Upgrade has the supervisor and all servers replaced by those of another program, as
// `csi-imgdisk upgrade` does: by turns a copy of the node's program and that itself. It
// repeats that until it succeeds, because others may be killing what is being replaced,
// and returns how many servers were, and for how long requests waited at most.
func (n *Node) Upgrade(ctx context.Context) (servers int, pause time.Duration, err error) {
	program, err := n.otherProgram()
	if err != nil {
		return 0, 0, err
	}
	err = n.insist(ctx, "upgrade", func(ctx context.Context) error {
		cmd := exec.CommandContext(ctx, program, "upgrade", "--run-dir", n.runDir(), "-o", "json")
		var problems []byte
		out, err := cmd.Output()
		if exit, ok := err.(*exec.ExitError); ok {
			problems = exit.Stderr
		}
		if err != nil {
			return fmt.Errorf("%s: %w: %s%s", program, err, out, problems)
		}
		var results []supervisor.UpgradeResult
		if err := json.Unmarshal(out, &results); err != nil {
			return fmt.Errorf("%s says %q: %w", program, out, err)
		}
		for _, r := range results {
			if r.Replaced {
				servers++
				pause = max(pause, time.Duration(r.PauseMillis)*time.Millisecond)
			}
		}
		return nil
	})
	return servers, pause, err
}

// otherProgram returns the program that isn't the last upgrade's.
func (n *Node) otherProgram() (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.upgrades++
	if n.upgrades%2 == 0 {
		return n.cfg.Binary, nil
	}
	path := filepath.Join(n.cfg.Store+"-program", filepath.Base(n.cfg.Binary))
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		return "", err
	}
	program, err := os.ReadFile(n.cfg.Binary)
	if err != nil {
		return "", err
	}
	return path, os.WriteFile(path, program, 0o700)
}
