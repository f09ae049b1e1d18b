package attachtest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
)

const (
	sizeBytes    = 48 << 20
	clusterBytes = 64 << 10
)

func newTransport(cfg Config) attach.Transport {
	switch cfg.Transport {
	case "nbd":
		return attach.NewNBD(attach.NBDOptions{Connections: cfg.Connections})
	case "ublk":
		return attach.NewUBLK()
	}
	return attach.NewFUSE()
}

// rig is one device: its file, its server, its transport.
type rig struct {
	t         testing.TB
	ctx       context.Context
	rng       *rand.Rand
	transport attach.Transport
	spec      attach.Spec
	server    serverConfig
	process   *exec.Cmd // the server's
	state     attach.State
	persisted []attach.State
	backing   string
}

// newRig makes everything but the device.
func newRig(t testing.TB, cfg Config) *rig {
	t.Helper()
	testenv.Root(t)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	r := &rig{
		t: t, ctx: ctx, rng: testenv.Rand(t), transport: newTransport(cfg),
		spec: attach.Spec{
			ID:        fmt.Sprintf("attachtest/%s %d", t.Name(), os.Getpid()),
			SizeBytes: sizeBytes, BlockBytes: 512, ClusterBytes: clusterBytes, CanDiscard: true, CanZero: true,
		},
	}
	if err := r.transport.Probe(ctx); err != nil {
		t.Fatalf("Probe: %v", err)
	}
	r.backing = filepath.Join(memoryDir(t), "disk")
	if err := os.WriteFile(r.backing, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(r.backing, sizeBytes); err != nil {
		t.Fatal(err)
	}
	r.server = serverConfig{Path: r.backing, Confined: cfg.Confined}
	// Whatever waits for a server that doesn't come is then freed.
	freed := context.AfterFunc(ctx, func() { _ = r.transport.Abort(context.Background(), r.state) })
	t.Cleanup(func() {
		freed()
		r.killServer()
		if err := r.transport.Abort(ctx, r.state); err != nil && r.state.Device != "" {
			t.Errorf("clean up: %v", err)
		}
		cancel()
	})
	return r
}

// memoryDir returns a directory in memory, so that no disk's pace matters.
func memoryDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "attachtest")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (r *rig) hooks() attach.Hooks {
	return attach.Hooks{
		Serve: func(ctx context.Context, protocol string, files []*os.File) error {
			cfg := r.server
			cfg.Protocol = protocol
			// Not ctx: a server outlives the call that started it.
			cmd, err := startServer(context.Background(), cfg, files)
			if err == nil {
				r.process = cmd
			}
			return err
		},
		Persist: func(st attach.State) error {
			r.persisted = append(r.persisted, st)
			return nil
		},
	}
}

// attachedRig makes a device.
func attachedRig(t testing.TB, cfg Config) *rig {
	t.Helper()
	r := newRig(t, cfg)
	r.attach()
	return r
}

func (r *rig) attach() {
	r.t.Helper()
	st, err := r.transport.Attach(r.ctx, r.spec, r.hooks())
	if err != nil {
		r.t.Fatalf("Attach: %v", err)
	}
	r.state = st
	if len(r.persisted) == 0 || r.persisted[len(r.persisted)-1] != st {
		r.t.Errorf("last persisted state is not the one returned, %+v", st)
	}
}

// killServer kills the server and waits until it is gone.
func (r *rig) killServer() {
	if r.process != nil {
		_ = r.process.Process.Kill()
		_ = r.process.Wait()
		r.process = nil
	}
}

func (r *rig) recover() {
	r.t.Helper()
	if err := r.transport.Recover(r.ctx, r.state, r.hooks()); err != nil {
		r.t.Fatalf("Recover: %v", err)
	}
}

// detach detaches, and checks that nothing is left and the server has ended well.
func (r *rig) detach() {
	r.t.Helper()
	if err := r.transport.Detach(r.ctx, r.state); err != nil {
		r.t.Fatalf("Detach: %v", err)
	}
	r.checkGone()
	if r.process != nil {
		if err := r.process.Wait(); err != nil {
			r.t.Errorf("server, once detached: %v", err)
		}
		r.process = nil
	}
	if err := r.transport.Detach(r.ctx, r.state); err != nil {
		r.t.Errorf("second Detach: %v", err)
	}
	r.state = attach.State{Spec: r.spec}
}

func (r *rig) deviceName() string { return filepath.Base(r.state.Device) }

// gone says whether the kernel has no trace of the device.
func (r *rig) gone() bool {
	path := "/sys/block/" + r.deviceName()
	if r.state.Transport == "fuse" {
		path += "/loop"
	}
	_, err := os.Stat(path)
	return err != nil
}

func (r *rig) checkGone() {
	r.t.Helper()
	if !r.gone() {
		r.t.Errorf("%s is still there", r.state.Device)
	}
}

// open opens the device for direct I/O.
func (r *rig) open(flags int) *os.File {
	r.t.Helper()
	f, err := os.OpenFile(r.state.Device, flags|unix.O_DIRECT, 0)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { f.Close() })
	return f
}

// buffer returns n bytes, aligned for direct I/O.
func (r *rig) buffer(n int) []byte {
	r.t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANONYMOUS|unix.MAP_PRIVATE)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = unix.Munmap(b) })
	return b
}

func (r *rig) startLoad() *load {
	r.t.Helper()
	l, err := startLoad(r.state.Device, r.spec.SizeBytes, r.rng)
	if err != nil {
		r.t.Fatal(err)
	}
	return l
}

// awaitProgress waits until a load has had n more answers. Like a supervisor, it replaces a
// server that has ended.
func (r *rig) awaitProgress(l *load, n int64) {
	r.t.Helper()
	for start, deadline := l.progress(), time.Now().Add(2*time.Minute); l.progress() < start+n; {
		if r.hungUpOn() {
			r.t.Log("the kernel hung up on the server")
			r.killServer()
			r.recover()
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("%d requests in two minutes, want %d", l.progress()-start, n)
		}
		time.Sleep(time.Millisecond)
	}
}

// hungUpOn says whether an nbd device's server has ended although nobody ended it. When a
// server dies while the kernel sends to it, both that sender and the receiver note that the
// connection is dead; the later one may find the next connection in its place.
func (r *rig) hungUpOn() bool {
	if r.state.Transport != "nbd" || r.process == nil {
		return false
	}
	var info unix.Siginfo
	err := unix.Waitid(unix.P_PID, r.process.Process.Pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	return err == nil && info.Signo != 0
}

func (r *rig) finish(l *load) {
	r.t.Helper()
	result, err := l.finish()
	if err != nil {
		r.t.Fatalf("load: %v", err)
	}
	r.t.Logf("%d requests verified, the longest took %v", result.Requests, result.Longest.Round(time.Millisecond))
}
