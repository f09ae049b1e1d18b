package keeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

const patience = time.Minute

// The test binary is also the keeper's.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "test-keeper" {
		if err := Run(os.Args[2], func() error { return nil }); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// newDir returns a directory for a keeper, with a path longer than a socket's address.
func newDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), strings.Repeat("deep", 30))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { waitEnd(t, dir) })
	return dir
}

func newClient(t *testing.T, dir string) *Client {
	t.Helper()
	return NewClient(Config{
		Dir: dir, Binary: os.Args[0], Args: []string{"test-keeper", dir},
		Env: []string{"GORACE=atexit_sleep_ms=0"}, Log: slog.Default(),
	})
}

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	var err error
	for start := time.Now(); time.Since(start) < patience; time.Sleep(5 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Errorf("%s: still after %v: %v", what, patience, err)
}

// waitEnd waits until no keeper runs, and checks that it has left nothing.
func waitEnd(t *testing.T, dir string) {
	t.Helper()
	eventually(t, "the keeper's end", func() error {
		lock, err := takeLock(dir)
		if err == nil {
			lock.Close()
		}
		return err
	})
	if _, err := os.Lstat(filepath.Join(dir, socketFile)); err == nil && !t.Failed() {
		t.Error("its socket is left")
	}
}

// pidOf returns the keeper's process id.
func pidOf(t *testing.T, dir string) int {
	t.Helper()
	fd, err := dial(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		t.Fatal(err)
	}
	return int(cred.Pid)
}

// pipe returns both ends of a pipe.
func pipe(t *testing.T) (read, write *os.File) {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { read.Close(); write.Close() })
	return read, write
}

// checkKept checks that what is kept is the same pipe.
func checkKept(t *testing.T, c *Client, name string, want *os.File) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	got, err := c.Get(ctx, name)
	if err != nil {
		t.Errorf("get %s: %v", name, err)
		return
	}
	defer got.Close()
	x, errX := got.Stat()
	y, errY := want.Stat()
	if errX != nil || errY != nil || !os.SameFile(x, y) {
		t.Errorf("get %s: another file (%v, %v)", name, errX, errY)
	}
}

func checkNone(t *testing.T, c *Client, name string) {
	t.Helper()
	if _, err := c.Get(context.Background(), name); !errors.Is(err, block.ErrNotFound) {
		t.Errorf("get %s: %v, want %v", name, err, block.ErrNotFound)
	}
}

func TestKeeper_OutlivesItsClient(t *testing.T) {
	dir := newDir(t)
	first := newClient(t, dir)
	checkNone(t, first, "a")
	a, _ := pipe(t)
	b, _ := pipe(t)
	for name, file := range map[string]*os.File{"a": b, "b": b} {
		if err := first.Keep(name, file); err != nil {
			t.Fatal(err)
		}
	}
	if err := first.Keep("a", a); err != nil { // in place of the other
		t.Fatal(err)
	}
	pid := pidOf(t, dir)
	first.Close()

	second := newClient(t, dir)
	defer second.Close()
	checkKept(t, second, "a", a)
	checkKept(t, second, "b", b)
	checkNone(t, second, "c")
	if now := pidOf(t, dir); now != pid {
		t.Errorf("another keeper, %d, was %d", now, pid)
	}
	second.Drop("a")
	checkNone(t, second, "a")
	checkKept(t, second, "b", b)
	second.Drop("b")
	waitEnd(t, dir)
	checkNone(t, second, "b")
}

func TestKeeper_KilledIsRefilled(t *testing.T) {
	dir := newDir(t)
	c := newClient(t, dir)
	defer c.Close()
	a, _ := pipe(t)
	if err := c.Keep("a", a); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		pid := pidOf(t, dir)
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		other := newClient(t, dir)
		eventually(t, "another keeper", func() error {
			file, err := other.Get(context.Background(), "a")
			if err != nil {
				return err
			}
			file.Close()
			if pidOf(t, dir) == pid {
				return errors.New("the same keeper")
			}
			return nil
		})
		other.Close()
	}
	c.Drop("a")
}

// A node that drains signals everybody.
func TestKeeper_IgnoresSignals(t *testing.T) {
	dir := newDir(t)
	c := newClient(t, dir)
	defer c.Close()
	a, _ := pipe(t)
	if err := c.Keep("a", a); err != nil {
		t.Fatal(err)
	}
	pid := pidOf(t, dir)
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP} {
		if err := unix.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
	}
	if fi, err := os.Stat(filepath.Join(dir, socketFile)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v, want mode 0600", fi, err)
	}
	other := newClient(t, dir)
	defer other.Close()
	checkKept(t, other, "a", a)
	if now := pidOf(t, dir); now != pid {
		t.Errorf("another keeper, %d, was %d", now, pid)
	}
	c.Drop("a")
}

// What makes no sense ends the connection it came by, and nothing else.
func TestKeeper_Garbage(t *testing.T) {
	dir := newDir(t)
	c := newClient(t, dir)
	defer c.Close()
	a, _ := pipe(t)
	if err := c.Keep("a", a); err != nil {
		t.Fatal(err)
	}
	null, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(null)
	for _, m := range []message{
		{'X', "a", -1}, {opKeep, "a", -1}, {opGet, "a", null}, {opDrop, "", -1}, {opDrop, "../a", -1},
		{opGet, strings.Repeat("a", maxNameBytes+1), -1}, {opGet, strings.Repeat("a", 10_000), -1}, {opKeep, "b c", null},
	} {
		fd, err := dial(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := sendMessage(fd, m, 0); err != nil {
			t.Errorf("%c %.20q: %v", m.op, m.name, err)
		}
		reply, err := receiveMessage(fd, 0)
		if err == nil {
			t.Errorf("%c %.20q is answered: %c", m.op, m.name, reply.op)
		} else if !errors.Is(err, errHungUp) && !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%c %.20q: %v, want the connection's end", m.op, m.name, err)
		}
		unix.Close(fd)
	}
	other := newClient(t, dir)
	defer other.Close()
	checkKept(t, other, "a", a)
	checkNone(t, other, "b")
	for _, name := range []string{"", "a/b", strings.Repeat("a", maxNameBytes+1)} {
		if err := c.Keep(name, a); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("keep %.20q: %v, want %v", name, err, block.ErrInvalid)
		}
	}
	c.Drop("a")
}

// More connections than a keeper takes wait for their turn.
func TestKeeper_ManyConnections(t *testing.T) {
	dir := newDir(t)
	c := newClient(t, dir)
	defer c.Close()
	a, _ := pipe(t)
	if err := c.Keep("a", a); err != nil {
		t.Fatal(err)
	}
	var idle []int
	for range maxConns {
		fd, err := dial(dir)
		if err != nil {
			t.Fatal(err)
		}
		idle = append(idle, fd)
	}
	for _, fd := range idle {
		unix.Close(fd)
	}
	other := newClient(t, dir)
	defer other.Close()
	checkKept(t, other, "a", a)
	c.Drop("a")
}

// What the kernel has ended is not kept.
func TestSweep(t *testing.T) {
	live, write := pipe(t)
	dead, gone := pipe(t)
	k := &keeper{kept: map[string]int{}}
	for name, file := range map[string]*os.File{"live": write, "dead": gone} {
		fd, err := duplicate(file)
		if err != nil {
			t.Fatal(err)
		}
		k.kept[name] = fd
	}
	defer k.drop("live")
	dead.Close() // a pipe that nobody reads any more is an error for who writes
	k.sweep()
	if _, ok := k.kept["live"]; !ok || len(k.kept) != 1 {
		t.Errorf("kept: %v, want only the live one", k.kept)
	}
	live.Close()
	k.sweep()
	if len(k.kept) != 0 {
		t.Errorf("kept: %v, want nothing", k.kept)
	}
}

func TestKeeper_CannotStart(t *testing.T) {
	dir := newDir(t)
	c := NewClient(Config{Dir: dir, Binary: "/bin/false", Log: slog.New(slog.DiscardHandler)})
	defer c.Close()
	a, _ := pipe(t)
	if err := c.Keep("a", a); err == nil || !strings.Contains(err.Error(), "ended when it was started") {
		t.Errorf("keep: %v", err)
	}
	checkKept(t, c, "a", a) // the client holds it all the same
	c.Drop("a")
}
