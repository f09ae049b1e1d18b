// Package node runs csi-imgdisk on this machine as a node of a cluster would: its driver,
// supervisor and servers are processes of the real program, its client makes CSI calls
// and repeats those that fail, as Kubernetes does. Any of the processes can be killed.
//
//   - node.go: [Node]: starting and stopping the driver
//   - volume.go: [Volume]: CSI calls
//   - upgrade.go: another program for all of them
//   - process.go: finding, killing and stopping processes
//   - inventory.go: what lies around, and what is left of a node in the end
//   - storefs.go: a file system for a store, that can be frozen
package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Config says what a node is made of.
type Config struct {
	Binary string // csi-imgdisk, by its absolute path
	// Store is an existing directory, absolute; it is made a store unless it is one. Beside
	// it a copy of the program is kept while the node lives.
	Store string
	// Dir is an absolute path of an existing directory on tmpfs, where state and mount
	// points go. It is short, because a socket's path may have 107 bytes.
	Dir string
	// Name is the store's in handles, and thus part of what devices are called in the
	// kernel: it differs from other nodes' on this machine.
	Name string
}

// nodeID is what a driver calls its machine.
const nodeID = "this-machine"

const (
	// Patience is how long a call is repeated, and a process waited for: generous,
	// because machines may be slow and stores stall.
	Patience = 4 * time.Minute
	// callPatience is how long one try of a call may take.
	callPatience = time.Minute
	pollInterval = 20 * time.Millisecond
)

// Node is a running driver with all that belongs to it. Its methods may be used
// concurrently, a volume's one after the other.
type Node struct {
	cfg        Config
	conn       *grpc.ClientConn
	controller csi.ControllerClient
	node       csi.NodeClient
	supervisor *supervisor.Client
	repeats    atomic.Int64

	mu       sync.Mutex
	driver   *exec.Cmd // nil: is not running
	stopping bool
	upgrades int
	keeper   sync.WaitGroup
	startErr error
}

// Start starts a driver, and keeps it running until Close.
func Start(ctx context.Context, cfg Config) (*Node, error) {
	if err := initStore(cfg.Store); err != nil {
		return nil, err
	}
	n := &Node{cfg: cfg, supervisor: supervisor.NewClient(supervisor.SocketPath(filepath.Join(cfg.Dir, "run", "supervisor")))}
	quick := backoff.Config{BaseDelay: pollInterval, Multiplier: 1.2, MaxDelay: 10 * pollInterval}
	var err error
	n.conn, err = grpc.NewClient("unix://"+n.socket(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: quick, MinConnectTimeout: time.Second}))
	if err != nil {
		return nil, err
	}
	n.controller, n.node = csi.NewControllerClient(n.conn), csi.NewNodeClient(n.conn)
	n.keeper.Go(n.keepDriver)
	identity := csi.NewIdentityClient(n.conn)
	err = n.insist(ctx, "Probe", func(ctx context.Context) error {
		_, err := identity.Probe(ctx, &csi.ProbeRequest{})
		return err
	})
	if err != nil {
		return nil, errors.Join(err, n.Close(context.WithoutCancel(ctx)))
	}
	return n, nil
}

func initStore(path string) error {
	dir, err := vfs.OpenDir(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	if _, err := os.Stat(filepath.Join(path, "store.json")); err == nil {
		return nil
	}
	_, err = store.Init(dir)
	return err
}

func (n *Node) socket() string  { return filepath.Join(n.cfg.Dir, "csi.sock") }
func (n *Node) runDir() string  { return filepath.Join(n.cfg.Dir, "run") }
func (n *Node) logPath() string { return filepath.Join(n.cfg.Dir, "driver.log") }

// Repeats returns how many calls had to be repeated.
func (n *Node) Repeats() int64 { return n.repeats.Load() }

// Supervisor returns a client of the node's supervisor.
func (n *Node) Supervisor() *supervisor.Client { return n.supervisor }

// keepDriver runs the driver, again and again, until the node is being closed.
func (n *Node) keepDriver() {
	for {
		cmd, err := n.startDriver()
		if cmd == nil {
			n.mu.Lock()
			n.startErr = err
			n.mu.Unlock()
			return
		}
		_ = cmd.Wait() // how it ended is in its log
		time.Sleep(pollInterval)
	}
}

// startDriver returns nil when the node is being closed, or on an error.
func (n *Node) startDriver() (*exec.Cmd, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.stopping {
		return nil, nil
	}
	log, err := os.OpenFile(n.logPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(n.cfg.Binary, "standalone", "--endpoint", "unix://"+n.socket(), "--node-id", nodeID,
		"--store", n.cfg.Name+"="+n.cfg.Store, "--run-dir", n.runDir())
	cmd.Stdout, cmd.Stderr = log, log
	// Not in the terminal's foreground: an interrupt is this process's to handle.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	n.driver = cmd
	return cmd, nil
}

// Close stops the driver, and removes what it left by force if it must. An error names
// what a node that was told to stop should not have left.
func (n *Node) Close(ctx context.Context) error {
	left, err := n.end(ctx)
	return errors.Join(append(left, err)...)
}

// Abandon ends a node whatever is attached. An error names what could not be removed.
func (n *Node) Abandon(ctx context.Context) error {
	_, err := n.end(ctx)
	return err
}

// end stops everything. It returns what had to be removed by force, and what could not be.
func (n *Node) end(ctx context.Context) (left []error, err error) {
	n.mu.Lock()
	n.stopping = true
	if n.driver != nil {
		_ = n.driver.Process.Signal(syscall.SIGTERM) // it may have ended
	}
	n.mu.Unlock()
	n.keeper.Wait()
	n.conn.Close()
	left, err = n.removeLeftovers(ctx)
	return left, errors.Join(n.startErr, err, os.RemoveAll(n.cfg.Store+"-program"))
}

// removeLeftovers ends what is still attached, mounted or running, and says what it was.
func (n *Node) removeLeftovers(ctx context.Context) (left []error, err error) {
	ctx, cancel := context.WithTimeout(ctx, Patience)
	defer cancel()
	for {
		if err := unmountBelow(n.cfg.Dir); err != nil {
			left = append(left, err)
		}
		processes := n.processes()
		if len(processes) == 0 {
			break
		}
		list, err := n.supervisor.List(ctx)
		for _, at := range list {
			left = append(left, fmt.Errorf("%s is still attached as %s (%s) %s", at.ID, at.Device, at.Phase, at.Problem))
			_ = n.supervisor.Detach(ctx, at.ID, true) // the next round tells
		}
		if err == nil {
			_ = n.supervisor.Stop(ctx) // it may be ending already
		}
		if ctx.Err() != nil {
			return left, fmt.Errorf("processes do not end: %v", processes)
		}
		time.Sleep(pollInterval)
	}
	var errs []error
	for _, name := range n.devices() {
		errs = append(errs, fmt.Errorf("device %s is left", name))
	}
	return left, errors.Join(errs...)
}

// Log returns the ends of the driver's and the supervisor's logs.
func (n *Node) Log() string {
	text := ""
	for _, path := range []string{n.logPath(), filepath.Join(n.runDir(), "supervisor", "supervisor.log")} {
		b, err := os.ReadFile(path)
		if err != nil {
			b = []byte(err.Error())
		}
		text += fmt.Sprintf("--- %s\n%s\n", path, b[max(0, len(b)-8<<10):])
	}
	return text
}
