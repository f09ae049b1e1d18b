package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/cluster/wire"
)

// client is the other end of a port.
type client struct {
	*testing.T
	file  *os.File
	lines *bufio.Reader
}

func newClient(t *testing.T) *client {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	served, ours := os.NewFile(uintptr(fds[0]), "port"), os.NewFile(uintptr(fds[1]), "client")
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = (&port{file: served, bell: newBell()}).serve() // ends when it is closed
	}()
	t.Cleanup(func() {
		ours.Close()
		served.Close()
		<-done
	})
	return &client{t, ours, bufio.NewReader(ours)}
}

func (c *client) write(text string) {
	c.Helper()
	if _, err := c.file.WriteString(text); err != nil {
		c.Fatal(err)
	}
}

func (c *client) send(m wire.Message) {
	c.Helper()
	line, err := json.Marshal(m)
	if err != nil {
		c.Fatal(err)
	}
	c.write(string(line) + "\n")
}

// result reads what a command says until it has ended.
func (c *client) result(identity string) (stdout, stderr string, code int) {
	c.Helper()
	for {
		line, err := c.lines.ReadBytes('\n')
		if err != nil {
			c.Fatal(err)
		}
		var m wire.Message
		if err := json.Unmarshal(line, &m); err != nil {
			c.Fatalf("%q: %v", line, err)
		}
		if m.Command != identity {
			continue
		}
		stdout, stderr = stdout+string(m.Out), stderr+string(m.Err)
		if m.Exit != nil {
			return stdout, stderr, *m.Exit
		}
	}
}

func needsRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("commands run in root's directory")
	}
}

func TestPort_InputOutputAndCode(t *testing.T) {
	needsRoot(t)
	c := newClient(t)
	c.send(wire.Message{Command: "a", Run: "cat; echo problem >&2; exit 3"})
	c.send(wire.Message{Command: "a", In: []byte("some")})
	c.send(wire.Message{Command: "a", In: []byte("thing")})
	c.send(wire.Message{Command: "a", CloseIn: true})
	if out, problem, code := c.result("a"); out != "something" || problem != "problem\n" || code != 3 {
		t.Errorf("%q, %q, %d", out, problem, code)
	}
}

func TestPort_MuchOutput(t *testing.T) {
	needsRoot(t)
	c := newClient(t)
	const size = 3*wire.ChunkBytes + 7
	c.send(wire.Message{Command: "a", Run: "head -c " + strconv.Itoa(size) + " /dev/zero"})
	if out, _, code := c.result("a"); out != strings.Repeat("\x00", size) || code != 0 {
		t.Errorf("%d bytes, code %d", len(out), code)
	}
}

// TestPort_AfterKilledClient: what a killed client left, half-written and running, is
// in nobody's way.
func TestPort_AfterKilledClient(t *testing.T) {
	needsRoot(t)
	c := newClient(t)
	pid := filepath.Join(t.TempDir(), "pid")
	c.send(wire.Message{Command: "old", Run: "echo $$ >" + pid + ".new; mv " + pid + ".new " + pid + "; while :; do echo more; sleep 0.01; done"})
	old := waitForNumber(t, pid)
	c.write(`{"command":"old","in":"AAA`)
	c.write("\n")
	c.send(wire.Message{Command: "new", Run: "echo done"})
	if out, _, code := c.result("new"); out != "done\n" || code != 0 {
		t.Errorf("%q, %d", out, code)
	}
	for end := time.Now().Add(time.Minute); syscall.Kill(old, 0) == nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("process %d of the former command still runs", old)
		}
	}
}

// TestBell: who has listened before it rang hears it.
func TestBell(t *testing.T) {
	b := newBell()
	first := b.next()
	select {
	case <-first:
		t.Error("it rings by itself")
	default:
	}
	if err := syscall.Kill(os.Getpid(), unix.SIGIO); err != nil {
		t.Fatal(err)
	}
	select {
	case <-first:
	case <-time.After(time.Minute):
		t.Error("a signal does not ring it")
	}
}

func waitForNumber(t *testing.T, path string) int {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		number, err := strconv.Atoi(string(bytes.TrimSpace(text)))
		if err != nil {
			t.Fatal(err)
		}
		return number
	}
	t.Fatalf("no file %s", path)
	return 0
}
