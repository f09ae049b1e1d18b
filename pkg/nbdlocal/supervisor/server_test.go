package supervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// newServerProcess starts a server by itself, as process.
func newServerProcess(t *testing.T) (p *process, image string) {
	t.Helper()
	// Longer than a socket's address may be.
	dir := filepath.Join(t.TempDir(), strings.Repeat("deep", 30))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	image = filepath.Join(dir, "disk")
	if err := os.WriteFile(image, make([]byte, imageBytes), 0o600); err != nil {
		t.Fatal(err)
	}
	lock, err := lockServer(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	p, err = spawn(os.Args[0], []string{"test-server", "image=" + image}, []string{testEnv}, dir, 0, lock)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.destroy(); err != nil {
			t.Error(err)
		}
		if log, err := os.ReadFile(filepath.Join(dir, logFile)); err == nil && t.Failed() {
			t.Logf("server's log:\n%s", log)
		}
	})
	return p, image
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func TestServer_Protocol(t *testing.T) {
	p, image := newServerProcess(t)
	ctx := testContext(t)
	hello, err := p.hello(ctx)
	if err != nil || hello.PID != p.pid || hello.Info.SizeBytes != imageBytes {
		t.Fatalf("hello: %+v, %v", hello, err)
	}
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	if ended, err := p.serve(ctx, "fake", []*os.File{read}); err != nil || ended != 0 {
		t.Fatalf("serve: %d, %v", ended, err)
	}
	files, ended, err := p.files(ctx)
	if err != nil || len(files) != 1 || ended != 0 {
		t.Fatalf("files: %v, %d, %v", files, ended, err)
	}
	if !sameFile(t, files[0], read) {
		t.Error("files: another file came back")
	}
	closeFiles(files)
	go p.watch(ctx, 0)
	write.Close()
	select {
	case <-p.faded:
	case <-ctx.Done():
		t.Error("watch does not notice that a descriptor has ended")
	}
	if files, ended, err := p.files(ctx); err != nil || len(files) != 0 || ended != 1 {
		t.Errorf("files after the end of one: %v, %d, %v", files, ended, err)
	}
	if err := p.stop(ctx); err != nil {
		t.Errorf("stop: %v", err)
	}
	if outcome, ok := readExit(p.control); !ok || !outcome.Closed || outcome.Error != nil {
		t.Errorf("outcome: %+v, %v", outcome, ok)
	}
	if events, err := os.ReadFile(image + ".events"); err != nil || string(events) != fmt.Sprintf("open %[1]d\nclose %[1]d\n", p.pid) {
		t.Errorf("image: %q, %v", events, err)
	}
}

func sameFile(t *testing.T, a, b *os.File) bool {
	t.Helper()
	x, err := a.Stat()
	if err != nil {
		t.Fatal(err)
	}
	y, err := b.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return os.SameFile(x, y)
}

func TestServer_RefusedRequests(t *testing.T) {
	p, _ := newServerProcess(t)
	ctx := testContext(t)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	many := make([]*os.File, maxDescriptors)
	for i := range many {
		many[i] = null
	}
	for name, c := range map[string]struct {
		req   controlRequest
		files []*os.File
		want  error
	}{
		"unknown operation":   {controlRequest{Op: "dance"}, nil, block.ErrUnsupported},
		"unknown protocol":    {controlRequest{Op: opServe, Protocol: "pigeon"}, []*os.File{null}, block.ErrUnsupported},
		"no descriptor":       {controlRequest{Op: opServe, Protocol: "fake"}, nil, block.ErrInvalid},
		"many descriptors":    {controlRequest{Op: opServe, Protocol: "fake"}, append(many, null), block.ErrInvalid},
		"descriptors ignored": {controlRequest{Op: opHello}, many, nil},
	} {
		_, files, err := p.call(ctx, c.req, c.files)
		closeFiles(files)
		if !errors.Is(err, c.want) || c.want == nil && err != nil {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

// What is no request ends the connection, and only that.
func TestServer_Garbage(t *testing.T) {
	p, _ := newServerProcess(t)
	ctx := testContext(t)
	for _, message := range []string{"", "{", "[]", strings.Repeat(" ", maxMessageBytes+1), `{"op":5}`} {
		c, err := p.dial(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte(message)); err != nil {
			t.Fatalf("%.10q: %v", message, err)
		}
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if n, err := c.Read(make([]byte, 100)); err == nil {
			t.Errorf("%.10q is answered with %d bytes", message, n)
		} else if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%.10q: the connection stays open", message)
		}
		c.Close()
	}
	if _, err := p.hello(ctx); err != nil {
		t.Errorf("hello after garbage: %v", err)
	}
}

// More connections than a server takes wait; they do no harm.
func TestServer_ManyConnections(t *testing.T) {
	p, _ := newServerProcess(t)
	ctx := testContext(t)
	var idle []net.Conn
	for range maxControlConns {
		c, err := p.dial(ctx)
		if err != nil {
			t.Fatal(err)
		}
		idle = append(idle, c)
	}
	answered := make(chan error, 1)
	go func() { answered <- second(p.hello(ctx)) }()
	select {
	case err := <-answered:
		t.Errorf("answered beside %d connections: %v", len(idle), err)
	case <-time.After(100 * time.Millisecond):
	}
	for _, c := range idle {
		c.Close()
	}
	if err := <-answered; err != nil {
		t.Errorf("hello once the others are gone: %v", err)
	}
}

func TestServer_SignalsWhenIdle(t *testing.T) {
	p, image := newServerProcess(t)
	if _, err := p.hello(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(p.pid, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := p.waitGone(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if events, err := os.ReadFile(image + ".events"); err != nil || string(events) != fmt.Sprintf("open %[1]d\nclose %[1]d\n", p.pid) {
		t.Errorf("image: %q, %v", events, err)
	}
}

func TestRunServer_ContextEnds(t *testing.T) {
	control := seat(0).controlPath(t.TempDir())
	ctx, cancel := context.WithCancel(context.Background())
	open := func(ctx context.Context) (Opened, error) {
		cancel()
		<-ctx.Done()
		return Opened{}, fmt.Errorf("open: %w", ctx.Err())
	}
	cfg := ServerConfig{Control: control, Open: open}
	p := newProcess(os.Getpid(), control)
	hello := make(chan error, 1)
	go func() { hello <- second(p.hello(testContext(t))) }()
	if err := RunServer(ctx, cfg); err == nil || !strings.Contains(err.Error(), "open: context canceled") {
		t.Errorf("a server told to stop while it opens: %v", err)
	}
	if err := <-hello; err == nil || !strings.Contains(err.Error(), "open: context canceled") {
		t.Errorf("who asked for its device heard %v", err)
	}
	if err := RunServer(context.Background(), cfg); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("a second server on a control socket: %v", err)
	}
}

func TestProcess_Found(t *testing.T) {
	p, image := newServerProcess(t)
	ctx := testContext(t)
	if _, err := p.hello(ctx); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(image)
	found, err := findProcess(dir, 0, 0, 0)
	if err != nil || found.pid != p.pid || found.start != p.start {
		t.Fatalf("found %+v, %v; want %+v", found, err, p)
	}
	// One that does not listen any more is found by its id, if that is still its own.
	if err := os.Remove(p.control); err != nil {
		t.Fatal(err)
	}
	if _, err := findProcess(dir, 0, p.pid, p.start+1); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("another process with its id is taken for it: %v", err)
	}
	if found, err = findProcess(dir, 0, p.pid, p.start); err != nil || found.pid != p.pid {
		t.Fatalf("by its id: %+v, %v", found, err)
	}
	if err := found.destroy(); err != nil {
		t.Fatal(err)
	}
	if found.alive() {
		t.Error("alive after destroy")
	}
	if err := p.waitGone(ctx); err != nil {
		t.Fatal(err)
	}
	if found, err = findProcess(dir, 0, p.pid, p.start); err != nil || found != nil {
		t.Errorf("a dead server is found: %+v, %v", found, err)
	}
}
