package cluster

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/cluster/wire"
)

// pollInterval is the pause between two looks at something that will come.
const pollInterval = 100 * time.Millisecond

// ExitError is how a command ended that did not end well.
type ExitError struct {
	Machine string
	Command string
	Code    int    // -1: it was killed, or did not begin
	Stderr  string // without the white space around it
}

// Error says all of it.
func (e *ExitError) Error() string {
	return fmt.Sprintf("%s: %q ended with code %d: %s", e.Machine, e.Command, e.Code, e.Stderr)
}

// Run runs a command with bash, as root, in directory /root. It needs nothing of the machine's
// network. It returns what the command wrote to its standard output, and an *ExitError if
// the command did not end well. When ctx is done the command is killed. At most
// wire.Ports commands run at the same time, others wait.
func (m *Machine) Run(ctx context.Context, command string) (string, error) {
	var stdout bytes.Buffer
	var stderr bytes.Buffer
	err := m.Stream(ctx, command, nil, &stdout, &stderr)
	if exit := (*ExitError)(nil); errors.As(err, &exit) {
		exit.Stderr = strings.TrimSpace(stderr.String())
	}
	return stdout.String(), err
}

// Stream is Run with a standard input, which may be nil, and with output as it comes. The reader
// is read in a goroutine, which may still wait for it when Stream returns.
func (m *Machine) Stream(ctx context.Context, command string, stdin io.Reader, stdout, stderr io.Writer) error {
	session, err := m.dial(ctx)
	if err != nil {
		return fmt.Errorf("%s: run %q: %w", m.name, command, err)
	}
	defer session.close()
	code, err := session.run(ctx, command, stdin, stdout, stderr)
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("%s: run %q: %w", m.name, command, ctx.Err())
	case err != nil:
		return fmt.Errorf("%s: run %q: %w", m.name, command, err)
	case code != 0:
		return &ExitError{Machine: m.name, Command: command, Code: code}
	}
	return nil
}

// session is a connection to a port of a machine's, which nobody else uses meanwhile.
type session struct {
	lock *os.File
	conn net.Conn
}

func (s *session) close() {
	s.conn.Close()
	s.lock.Close()
}

// errOff is what the caller finds of a machine that is off.
var errOff = errors.New("the machine is off")

// dial waits for a free port.
func (m *Machine) dial(ctx context.Context) (*session, error) {
	for {
		if !m.isOn() {
			return nil, errOff
		}
		for i := range wire.Ports {
			s, err := m.tryDial(i)
			if err == nil {
				return s, nil
			}
			if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, os.ErrNotExist) {
				return nil, err
			}
		}
		if err := sleep(ctx, pollInterval); err != nil {
			return nil, err
		}
	}
}

func (m *Machine) tryDial(i int) (*session, error) {
	lock, err := os.OpenFile(m.path(fmt.Sprintf("agent%d.lock", i)), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, err
	}
	conn, err := dialIn(m.path(), socketName(i))
	if err != nil {
		lock.Close()
		return nil, err
	}
	return &session{lock, conn}, nil
}

func socketName(i int) string { return fmt.Sprintf("agent%d", i) }

// dialIn connects to a socket in a directory whose path may be longer than a socket's address
// can be.
func dialIn(dir, name string) (net.Conn, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return net.Dial("unix", filepath.Join(fmt.Sprintf("/proc/self/fd/%d", d.Fd()), name))
}

// run runs one command and returns the code with which it ended.
func (s *session) run(ctx context.Context, command string, stdin io.Reader, stdout, stderr io.Writer) (int, error) {
	stop := context.AfterFunc(ctx, func() { s.conn.Close() })
	defer stop()
	identity := rand.Text()
	if _, err := io.WriteString(s.conn, "\n"); err != nil {
		return 0, err
	}
	if err := s.send(wire.Message{Command: identity, Run: command}); err != nil {
		return 0, err
	}
	go s.feed(identity, stdin)
	lines := bufio.NewReaderSize(s.conn, 2*wire.ChunkBytes)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return 0, fmt.Errorf("the machine went off: %w", err)
		}
		var m wire.Message
		if json.Unmarshal(line, &m) != nil || m.Command != identity {
			continue
		}
		if _, err := stdout.Write(m.Out); err != nil {
			return 0, err
		}
		if _, err := stderr.Write(m.Err); err != nil {
			return 0, err
		}
		if m.Exit != nil {
			return *m.Exit, nil
		}
	}
}

// feed sends a command's input. An error of the connection is found by who reads it.
func (s *session) feed(identity string, stdin io.Reader) {
	if stdin != nil {
		buf := make([]byte, wire.ChunkBytes)
		for {
			n, err := stdin.Read(buf)
			if n > 0 && s.send(wire.Message{Command: identity, In: buf[:n]}) != nil {
				return
			}
			if err != nil {
				break
			}
		}
	}
	_ = s.send(wire.Message{Command: identity, CloseIn: true})
}

func (s *session) send(m wire.Message) error {
	line, err := json.Marshal(m)
	if err != nil {
		return err
	}
	_, err = s.conn.Write(append(line, '\n'))
	return err
}

// sleep returns early, with an error, when ctx is done.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
