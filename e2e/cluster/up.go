package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// state is what others have to know of a cluster that is up. It is kept in its directory.
type state struct {
	Network     network
	Base        base
	ClusterDisk string
	Bin         string
	PauseImage  string
}

const stateFile = "cluster.json"

// path returns one below the cluster's directory.
func (c *Cluster) path(names ...string) string {
	return filepath.Join(append([]string{c.dir}, names...)...)
}

func newCluster(dir string) *Cluster {
	c := &Cluster{dir: dir, machines: map[string]*Machine{}}
	for _, s := range specs {
		c.machines[s.name] = &Machine{spec: s, c: c}
	}
	return c
}

func open(dir string) (*Cluster, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	c := newCluster(dir)
	text, err := os.ReadFile(c.path(stateFile))
	if err != nil {
		return nil, fmt.Errorf("no cluster is up in %s: %w", dir, err)
	}
	if err := json.Unmarshal(text, &c.state); err != nil {
		return nil, fmt.Errorf("%s: %w", c.path(stateFile), err)
	}
	return c, nil
}

func (c *Cluster) saveState() error {
	text, err := json.MarshalIndent(c.state, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(c.path(stateFile), append(text, '\n'), 0o600)
}

// up is Up.
func up(ctx context.Context, config Config) (_ *Cluster, err error) {
	log := newSteps(config.Log)
	dir, err := filepath.Abs(config.Dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		return nil, errors.Join(err, fmt.Errorf("directory %s is not empty: a cluster is up there, or was not taken down", dir))
	}
	c := newCluster(dir)
	defer func() {
		if err != nil {
			kept := c.keepLogs()
			err = errors.Join(fmt.Errorf("%w (logs: %s)", err, kept), c.Down(context.WithoutCancel(ctx)))
		}
	}()
	if err := c.prepare(ctx, config, log); err != nil {
		return nil, err
	}
	if err := c.start(ctx, config, log); err != nil {
		return nil, err
	}
	return c, nil
}

// prepare gets all that is cached, and makes the network.
func (c *Cluster) prepare(ctx context.Context, config Config, log *steps) error {
	var err error
	if c.state.Base, err = prepareBase(ctx, config.Cache, log); err != nil {
		return err
	}
	if c.state.ClusterDisk, err = prepareClusterDisk(ctx, config.Cache, c.state.Base, config.Parts, log); err != nil {
		return err
	}
	log.done("the machines' disks are there")
	c.state.Bin, c.state.PauseImage = config.Parts.Bin, config.Parts.PauseImage
	if c.state.Network, err = makeNetwork(ctx, specs); err != nil {
		return fmt.Errorf("make the cluster's network: %w", err)
	}
	return errors.Join(c.saveState(), os.Mkdir(c.path("logs"), 0o755))
}

// start starts the control plane and the machines, and waits for all.
func (c *Cluster) start(ctx context.Context, config Config, log *steps) error {
	control, err := newControlPlane(c)
	if err != nil {
		return err
	}
	if err := control.start(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var powering sync.WaitGroup
	nfs := make(chan struct{})
	for _, m := range c.machines {
		powering.Go(func() {
			if err := errors.Join(m.makeFiles(ctx), m.PowerOn(ctx)); err != nil {
				cancel(err)
				return
			}
			log.done("%s has started", m.name)
			if m.name == NFS {
				close(nfs)
			}
		})
	}
	var serving sync.WaitGroup
	err = control.serve(ctx, config.Parts.SnapshotCRDs, log)
	if err == nil {
		serving.Go(func() {
			select {
			case <-nfs:
				if config.Serving != nil {
					config.Serving(ctx, c)
				}
			case <-ctx.Done():
			}
		})
		err = control.waitNodes(ctx, log)
	}
	if err != nil {
		cancel(err) // machines that start need not go on
	}
	powering.Wait()
	serving.Wait()
	cause := context.Cause(ctx) // the first error of all
	cancel(nil)
	return cause
}

func nodeReady(n *corev1.Node) bool {
	for _, condition := range n.Status.Conditions {
		if condition.Type == corev1.NodeReady {
			return condition.Status == corev1.ConditionTrue
		}
	}
	return false
}

// Down takes the cluster down and removes everything that it made, but for the cache. What
// is gone already is no error.
func (c *Cluster) Down(ctx context.Context) error {
	if err := c.state.Network.remove(ctx); err != nil {
		return fmt.Errorf("take down the cluster in %s: %w", c.dir, err)
	}
	return os.RemoveAll(c.dir)
}

// keepLogs saves the logs of a cluster that did not come up, and returns where.
func (c *Cluster) keepLogs() string {
	dir, err := os.MkdirTemp("", "imgdisk-e2e-failed-")
	if err != nil {
		return err.Error()
	}
	_ = copyAll(filepath.Join(dir, "control-plane"), c.path("logs", "*.log")) // some may not have come to be
	for _, m := range c.machines {
		_ = copyAll(filepath.Join(dir, m.name), m.path("*.log"))
	}
	return dir
}

// steps tells what has been done, and when.
type steps struct {
	mu    sync.Mutex
	out   io.Writer
	start time.Time
}

func newSteps(out io.Writer) *steps {
	if out == nil {
		out = io.Discard
	}
	return &steps{out: out, start: time.Now()}
}

// done tells of a step that is done, with the time since the start.
func (s *steps) done(format string, args ...any) { s.line(format, args...) }

// say tells of one that begins and takes long.
func (s *steps) say(format string, args ...any) { s.line(format+" …", args...) }

func (s *steps) line(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintf(s.out, "%6.1f s  %s\n", time.Since(s.start).Seconds(), fmt.Sprintf(format, args...))
}
