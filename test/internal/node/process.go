package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// processes returns the command lines of this node's processes, by process id.
func (n *Node) processes() map[int]string {
	found := map[int]string{}
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		args := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
		for _, arg := range args {
			if arg == n.cfg.Dir || strings.HasPrefix(arg, n.cfg.Dir+"/") {
				pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
				found[pid] = strings.Join(args, " ")
				break
			}
		}
	}
	return found
}

// Role is what a process of the node's does.
type Role string

// The processes of a node.
const (
	Driver     Role = "standalone"
	Supervisor Role = "supervisor"
	Server     Role = "server"
)

// pids returns the processes of some roles; of servers, those of one volume unless that
// is "".
func (n *Node) pids(volume string, roles ...Role) (pids []int) {
	for pid, args := range n.processes() {
		for _, role := range roles {
			if !strings.Contains(args, " "+string(role)+" ") {
				continue
			}
			if role != Server || volume == "" || strings.Contains(args+" ", " --volume "+volume+" ") {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// Kill kills all of the node's processes with some roles at once.
func (n *Node) Kill(roles ...Role) (killed int) {
	return signal(n.pids("", roles...), syscall.SIGKILL)
}

// KillServer kills the volume's server.
func (v *Volume) KillServer() (killed int) {
	return signal(v.node.pids(v.name, Server), syscall.SIGKILL)
}

// HangServer stops the volume's server for a while, as if its storage didn't answer.
func (v *Volume) HangServer(ctx context.Context, d time.Duration) (stopped int) {
	pids := v.node.pids(v.name, Server)
	stopped = signal(pids, syscall.SIGSTOP)
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
	signal(pids, syscall.SIGCONT)
	return stopped
}

func signal(pids []int, sig syscall.Signal) (reached int) {
	for _, pid := range pids {
		if syscall.Kill(pid, sig) == nil { // it may have ended
			reached++
		}
	}
	return reached
}

// AwaitServing waits until a supervisor says that all volumes are being served.
func (n *Node) AwaitServing(ctx context.Context) error {
	deadline := time.Now().Add(Patience)
	for {
		list, err := n.supervisor.List(ctx)
		if err == nil {
			for _, at := range list {
				if at.Phase != "serving" || at.PID == 0 {
					err = fmt.Errorf("%s is %s: %s", at.ID, at.Phase, at.Problem)
				}
			}
		}
		if err == nil || ctx.Err() != nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(pollInterval)
	}
}
