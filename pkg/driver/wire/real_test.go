package wire_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver/drivertest"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
)

const (
	nodeID    = "test-node"
	storeName = "main"
)

// binaryDir is where binary puts the program.
var binaryDir string

// binary builds the program once for all tests.
var binary = sync.OnceValues(func() (path string, err error) {
	_, file, _, _ := runtime.Caller(0)
	if binaryDir, err = os.MkdirTemp("", "imgdisk-bin"); err != nil {
		return "", err
	}
	path = filepath.Join(binaryDir, "csi-imgdisk")
	cmd := exec.Command("go", "build", "-o", path, "./cmd/csi-imgdisk")
	cmd.Dir = filepath.Join(filepath.Dir(file), "..", "..", "..")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if binaryDir != "" {
		os.RemoveAll(binaryDir)
	}
	os.Exit(code)
}

// world is a machine with a store and the standalone driver: real processes, devices
// and mounts.
type world struct {
	t          *testing.T
	dir        string // of everything
	binary     string
	proc       *exec.Cmd
	ended      chan error
	identity   csi.IdentityClient
	controller csi.ControllerClient
	node       csi.NodeClient
}

// newWorld starts a driver with a store in a directory of its own.
func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldOn(t, t.TempDir())
}

// newWorldOn starts a driver with a store in an empty directory.
func newWorldOn(t *testing.T, store string) *world {
	t.Helper()
	testenv.Root(t)
	for _, tool := range []string{"mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "blkid", "mount"} {
		testenv.Oracle(t, tool)
	}
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	// A short path: a socket's may have 107 bytes.
	dir, err := os.MkdirTemp("", "imgdisk-csi")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, dir: dir, binary: path}
	t.Cleanup(w.cleanUp)
	if err := os.Symlink(store, w.path("store")); err != nil {
		t.Fatal(err)
	}
	w.command("store", "init", w.path("store"))
	if err := w.start(); err != nil {
		t.Fatal(err)
	}
	w.connect()
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }
func (w *world) endpoint() string        { return "unix://" + w.path("csi.sock") }

// command runs the program and returns what it prints.
func (w *world) command(args ...string) string {
	w.t.Helper()
	out, err := exec.Command(w.binary, args...).CombinedOutput()
	if err != nil {
		w.t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// start starts the driver; its log is in a file.
func (w *world) start() error {
	log, err := os.OpenFile(w.path("driver.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	w.proc = exec.Command(w.binary, "standalone", "--endpoint", w.endpoint(), "--node-id", nodeID,
		"--store", storeName+"="+w.path("store"), "--run-dir", w.path("run"))
	w.proc.Stdout, w.proc.Stderr = log, log
	if err := w.proc.Start(); err != nil {
		return err
	}
	w.ended = make(chan error, 1)
	go func(proc *exec.Cmd, ended chan error) { ended <- proc.Wait() }(w.proc, w.ended)
	return nil
}

// kill ends the driver as a crash would.
func (w *world) kill() {
	_ = w.proc.Process.Kill() // it may have ended
	<-w.ended
}

func (w *world) connect() {
	w.t.Helper()
	backoff := grpc.ConnectParams{MinConnectTimeout: time.Second}
	backoff.Backoff.BaseDelay, backoff.Backoff.MaxDelay, backoff.Backoff.Multiplier = 5*time.Millisecond, 50*time.Millisecond, 1.5
	conn, err := grpc.NewClient(w.endpoint(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(backoff))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	w.identity, w.controller, w.node = csi.NewIdentityClient(conn), csi.NewControllerClient(conn), csi.NewNodeClient(conn)
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	if _, err := w.identity.Probe(ctx, &csi.ProbeRequest{}, grpc.WaitForReady(true)); err != nil {
		w.t.Fatalf("Probe: %v\n%s", err, w.log())
	}
}

// log returns the end of the driver's log.
func (w *world) log() string {
	text, err := os.ReadFile(w.path("driver.log"))
	if err != nil {
		return err.Error()
	}
	if len(text) > 8000 {
		text = text[len(text)-8000:]
	}
	return string(text)
}

// in makes a subtest the one that is failed; call what it returns at its end.
func (w *world) in(t *testing.T) (restore func()) {
	parent := w.t
	w.t = t
	return func() { w.t = parent }
}

// cleanUp checks that nothing is left, removes what is, and ends the driver.
func (w *world) cleanUp() {
	w.removeDevices()
	if w.ended != nil {
		if err := w.proc.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
			w.t.Errorf("stop the driver: %v", err)
		}
		select {
		case err := <-w.ended:
			// One that was only just started dies of the signal: it does not listen yet.
			status, ok := w.proc.ProcessState.Sys().(syscall.WaitStatus)
			if killed := ok && status.Signal() == syscall.SIGTERM; err != nil && !killed {
				w.t.Errorf("the driver ended: %v", err)
			}
		case <-time.After(time.Minute):
			w.t.Error("the driver does not stop")
			w.kill()
		}
	}
	if w.t.Failed() {
		w.t.Logf("the driver's log:\n%s", w.log())
	}
	w.removeProcesses()
	if err := os.RemoveAll(w.dir); err != nil {
		w.t.Errorf("clean up: %v", err)
	}
}

// removeDevices fails the test for mounts and devices that are left, and removes them.
func (w *world) removeDevices() {
	for _, path := range w.mounts() {
		w.t.Errorf("left mounted: %s", path)
		if err := syscall.Unmount(path, syscall.MNT_DETACH); err != nil {
			w.t.Errorf("unmount %s: %v", path, err)
		}
	}
	client := supervisor.NewClient(supervisor.SocketPath(w.path("run/supervisor")))
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	list, err := client.List(ctx)
	if err != nil && !errors.Is(err, supervisor.ErrNotRunning) {
		w.t.Errorf("what is attached: %v", err)
	}
	for _, at := range list {
		w.t.Errorf("left attached: %s at %s", at.ID, at.Device)
		if err := client.Detach(ctx, at.ID, true); err != nil {
			w.t.Errorf("detach: %v", err)
		}
	}
}

// removeProcesses fails the test for processes that are left, and ends them.
func (w *world) removeProcesses() {
	deadline := time.Now().Add(20 * time.Second)
	for len(w.processes()) > 0 && time.Now().Before(deadline) {
		time.Sleep(20 * time.Millisecond) // the supervisor ends a moment after it said so
	}
	for pid, args := range w.processes() {
		w.t.Errorf("left running: %d %s", pid, args)
		_ = syscall.Kill(pid, syscall.SIGKILL) // it may end by itself meanwhile
	}
}

// mounts returns the mount points under the world's directory, the last first.
func (w *world) mounts() []string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		w.t.Fatal(err)
	}
	var paths []string
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); strings.HasPrefix(fields[4], w.dir+"/") {
			paths = append([]string{fields[4]}, paths...)
		}
	}
	return paths
}

// processes returns the arguments of the processes that work for this world.
func (w *world) processes() map[int]string {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		w.t.Fatal(err)
	}
	found := map[int]string{}
	for _, entry := range entries {
		var pid int
		if _, err := fmt.Sscan(entry.Name(), &pid); err != nil || pid == os.Getpid() {
			continue
		}
		args, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "cmdline"))
		if errors.Is(err, fs.ErrNotExist) || err != nil {
			continue
		}
		if bytes.Contains(args, []byte(w.dir)) {
			found[pid] = strings.ReplaceAll(string(args), "\x00", " ")
		}
	}
	return found
}

// TestSanity runs csi-sanity against the real driver.
func TestSanity(t *testing.T) {
	w := newWorld(t)
	drivertest.Sanity(t, w.endpoint())
}
