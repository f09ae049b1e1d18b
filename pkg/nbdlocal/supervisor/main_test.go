package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/filter"
)

// The test binary is also the supervisor's and the servers' binary.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "test-server":
			os.Exit(exitStatus(serverMain(os.Args[2:])))
		case "test-keeper":
			os.Exit(exitStatus(RunKeeper(os.Args[3], func() error { return nil })))
		case "test-supervisor":
			os.Exit(exitStatus(supervisorMain(os.Args[2:])))
		}
	}
	os.Exit(m.Run())
}

func exitStatus(err error) int {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// parseArgs reads arguments of the form "name=value", and "--control" with its path.
func parseArgs(args []string) map[string]string {
	values := map[string]string{}
	for i := 0; i < len(args); i++ {
		if args[i] == "--control" && i+1 < len(args) {
			values["control"] = args[i+1]
			i++
			continue
		}
		name, value, _ := strings.Cut(args[i], "=")
		values[name] = value
	}
	return values
}

// serverMain serves the raw image file named by image=. Beside it, tests put files
// that make things go wrong: see testDevice and openTestDevice.
func serverMain(args []string) error {
	values := parseArgs(args)
	open := func(ctx context.Context) (Opened, error) { return openTestDevice(ctx, values["image"]) }
	cfg := ServerConfig{Control: values["control"], Version: testVersion(), Open: open, Protocols: testProtocols()}
	return RunServer(context.Background(), cfg)
}

// testProtocols adds to the real protocols "fake", which serves nothing until a byte
// arrives, which ends it.
func testProtocols() map[string]Protocol {
	protocols := KernelProtocols()
	protocols["fake"] = func(block.Device) ServeFunc {
		return func(ctx context.Context, f *os.File) error {
			defer context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })()
			_, err := f.Read(make([]byte, 1))
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
	}
	return protocols
}

// testVersion is the name of the file that this process was started from.
func testVersion() string {
	path, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err.Error()
	}
	return filepath.Base(strings.TrimSuffix(path, " (deleted)"))
}

// testDevice is a raw image file. A file IMAGE.fail-close makes Close fail.
type testDevice struct {
	f     *os.File
	image string
}

// openTestDevice opens an image, exclusively, and writes down what becomes of it in
// IMAGE.events, with its process id. A file IMAGE.fail-open makes it fail, with the kind of error that is
// the file's content; IMAGE.lost appearing later makes the device lost.
func openTestDevice(ctx context.Context, image string) (Opened, error) {
	if kind, err := os.ReadFile(image + ".fail-open"); err == nil {
		return Opened{}, (&wireError{Message: "open " + image + ": told to fail: " + string(kind), Kind: string(kind)}).err()
	}
	if testVersion() == "cannot-open" {
		return Opened{}, fmt.Errorf("open %s: this program can't: %w", image, block.ErrUnsupported)
	}
	for {
		if _, err := os.Stat(image + ".slow-open"); err != nil || ctx.Err() != nil {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return Opened{}, fmt.Errorf("%w: %w", err, block.ErrNotFound)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		event(image, "conflict")
		return Opened{}, fmt.Errorf("%s: %w: %w", image, err, block.ErrLocked)
	}
	event(image, "open")
	lost := make(chan error, 1)
	go func() {
		for {
			if _, err := os.Stat(image + ".lost"); err == nil {
				lost <- fmt.Errorf("%s: %w", image, block.ErrFenced)
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	return Opened{
		Device: &testDevice{f, image}, Lost: lost, Stats: func() any { return map[string]int{"opens": 1} },
		Image:  func() ImageStats { return ImageStats{Layers: 1} },
		Limits: func() filter.Limits { return testLimits(image) },
	}, nil
}

// testLimits returns the limits that a test's device asks for: IMAGE.iops.
func testLimits(image string) (limits filter.Limits) {
	if text, err := os.ReadFile(image + ".iops"); err == nil {
		limits.IOPS, _ = strconv.ParseInt(string(text), 10, 64)
	}
	return limits
}

func event(image, what string) {
	f, err := os.OpenFile(image+".events", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err == nil {
		fmt.Fprintln(f, what, os.Getpid())
		f.Close()
	}
}

func (d *testDevice) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.f.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		err = block.ErrOutOfRange
	}
	return n, err
}
func (d *testDevice) WriteAt(p []byte, off int64) (int, error) { return d.f.WriteAt(p, off) }
func (d *testDevice) WriteZeroes(off, n int64, _ block.ZeroFlags) error {
	return unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}
func (d *testDevice) Discard(off, n int64) error {
	return unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}
func (d *testDevice) Flush() error { return d.f.Sync() }
func (d *testDevice) Map(off, n int64) (block.Extent, error) {
	return block.Extent{Off: off, Len: n, State: block.Data, FileOff: off}, nil
}
func (d *testDevice) Info() block.Info {
	fi, err := d.f.Stat()
	if err != nil {
		return block.Info{}
	}
	_, roErr := os.Stat(d.image + ".read-only")
	return block.Info{SizeBytes: fi.Size(), LogicalBlockBytes: 512, ClusterBytes: 4096, CanDiscard: true, CanZero: true, ReadOnly: roErr == nil}
}
func (d *testDevice) Close() error {
	defer d.f.Close()
	if _, err := os.Stat(d.image + ".fail-close"); err == nil {
		event(d.image, "close-failed")
		return fmt.Errorf("%s: %w", d.image, block.ErrNoSpace)
	}
	err := d.f.Sync()
	event(d.image, "close")
	return err
}

// supervisorMain runs a supervisor for stateDir= with the fake transport on kernel=,
// or with transport=NAME a real one. It writes the steps it comes by into steps=, and
// kills itself at the one whose number is crash=.
func supervisorMain(args []string) error {
	values := parseArgs(args)
	s, err := New(testConfig(values, os.Stderr))
	if err != nil {
		return err
	}
	s.at = stepHook(values)
	s.maxBackoff = firstBackoff
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	return s.Run(ctx)
}

// testEnv keeps the race detector from sleeping a second whenever a process ends.
const testEnv = "GORACE=atexit_sleep_ms=0"

func testConfig(values map[string]string, log io.Writer) Config {
	transports := []attach.Transport{&fakeTransport{dir: values["kernel"]}}
	switch values["transport"] {
	case "fuse":
		transports = []attach.Transport{attach.NewFUSE()}
	case "nbd":
		transports = []attach.Transport{attach.NewNBD(attach.NBDOptions{})}
	case "ublk":
		transports = []attach.Transport{attach.NewUBLK()}
	}
	return Config{
		StateDir:     values["stateDir"],
		Env:          []string{testEnv},
		Transports:   transports,
		KeeperArgs:   []string{"test-keeper"},
		Version:      "test",
		Log:          slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		StartTimeout: 20 * time.Second,
		StepTimeout:  30 * time.Second,
	}
}

func stepHook(values map[string]string) func(string) {
	crash, err := strconv.Atoi(values["crash"])
	if err != nil {
		crash = -1
	}
	steps, count := values["steps"], 0
	return func(step string) {
		if steps != "" {
			f, err := os.OpenFile(steps, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
			if err != nil {
				panic(err)
			}
			fmt.Fprintln(f, step)
			f.Close()
		}
		if count == crash {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		count++
	}
}

// fakeTransport makes devices in a directory that stands for the kernel: it outlives
// supervisors, and tests can look into it and break it.
type fakeTransport struct {
	dir string
}

// fakeDevice is the kernel's idea of a device: the file ID.dev.
type fakeDevice struct {
	ID        string `json:"id"`
	SizeBytes int64  `json:"sizeBytes"`
	ReadOnly  bool   `json:"readOnly"`
	Birth     int64  `json:"birth"` // tells a device from a later one
}

func (t *fakeTransport) path(id, kind string) string { return filepath.Join(t.dir, dirName(id)+kind) }

func (t *fakeTransport) Name() string { return "fake" }

func (t *fakeTransport) Probe(context.Context) error {
	if _, err := os.Stat(t.dir); err != nil {
		return fmt.Errorf("there is no kernel in %s; make that directory", t.dir)
	}
	return nil
}

func (t *fakeTransport) Attach(ctx context.Context, spec attach.Spec, hooks attach.Hooks) (st attach.State, err error) {
	st = attach.State{Spec: spec, Transport: "fake"}
	if err := hooks.Persist(st); err != nil {
		return st, err
	}
	defer func() {
		if err != nil {
			_ = t.Abort(context.WithoutCancel(ctx), st)
		}
	}()
	if _, err := os.Stat(t.path(spec.ID, ".dev")); err == nil {
		return st, fmt.Errorf("device of %s: %w", spec.ID, block.ErrExists)
	}
	if err := unix.Mkfifo(t.path(spec.ID, ".fifo"), 0o600); err != nil {
		return st, err
	}
	device := fakeDevice{ID: spec.ID, SizeBytes: spec.SizeBytes, ReadOnly: spec.ReadOnly, Birth: time.Now().UnixNano()}
	if err := writeFileAtomically(t.path(spec.ID, ".dev"), marshal(device)); err != nil {
		return st, err
	}
	if err := t.serve(ctx, spec.ID, hooks); err != nil {
		return st, err
	}
	st.Device = t.path(spec.ID, ".dev")
	return st, hooks.Persist(st)
}

func (t *fakeTransport) serve(ctx context.Context, id string, hooks attach.Hooks) error {
	f, err := os.OpenFile(t.path(id, ".fifo"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return hooks.Serve(ctx, "fake", []*os.File{f})
}

func (t *fakeTransport) check(id string) error {
	if _, err := os.Stat(t.path(id, ".dev")); err != nil {
		return fmt.Errorf("device of %s: %w", id, block.ErrNotFound)
	}
	return nil
}

func (t *fakeTransport) Adopt(_ context.Context, st attach.State, _ []*os.File) error {
	return t.check(st.ID)
}

func (t *fakeTransport) Recover(ctx context.Context, st attach.State, hooks attach.Hooks) error {
	if err := t.check(st.ID); err != nil {
		return err
	}
	if _, err := os.Stat(t.path(st.ID, ".fail-recover")); err == nil {
		return errors.New("told to fail")
	}
	return t.serve(ctx, st.ID, hooks)
}

func (t *fakeTransport) Resize(_ context.Context, st attach.State, sizeBytes int64) (attach.State, error) {
	if err := t.check(st.ID); err != nil {
		return st, err
	}
	st.SizeBytes = sizeBytes
	device := fakeDevice{ID: st.ID, SizeBytes: sizeBytes, Birth: t.device(st.ID).Birth}
	return st, writeFileAtomically(t.path(st.ID, ".dev"), marshal(device))
}

// Detach blocks while there is a file ID.slow-detach, as long as ctx lets it. With a file
// ID.lingers it says that the device does.
func (t *fakeTransport) Detach(ctx context.Context, st attach.State) error {
	for {
		if _, err := os.Stat(t.path(st.ID, ".slow-detach")); err != nil {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	if _, err := os.Stat(t.path(st.ID, ".busy")); err == nil {
		return fmt.Errorf("device of %s is open: %w", st.ID, block.ErrBusy)
	}
	if err := t.Abort(ctx, st); err != nil {
		return err
	}
	if _, err := os.Stat(t.path(st.ID, ".lingers")); err == nil {
		return fmt.Errorf("device of %s: %w", st.ID, attach.ErrLingers)
	}
	return nil
}

func (t *fakeTransport) Abort(_ context.Context, st attach.State) error {
	for _, kind := range []string{".dev", ".fifo"} {
		if err := os.Remove(t.path(st.ID, kind)); err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	return nil
}

// device reads the kernel's device; zero if there is none.
func (t *fakeTransport) device(id string) fakeDevice {
	var device fakeDevice
	content, err := os.ReadFile(t.path(id, ".dev"))
	if err == nil {
		_ = json.Unmarshal(content, &device)
	}
	return device
}
