package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/cluster/wire"
)

// whenAlone is how long to wait when nobody is connected to a port, which then reads as
// being at its end. The bell rings earlier.
const whenAlone = time.Second

// port is one that is served.
type port struct {
	file    *os.File
	bell    *bell
	writing sync.Mutex
	current *command // nil: none
}

// serve runs what a port asks for, until the port fails.
func serve(device string, b *bell) error {
	file, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := signalWhenConnected(file); err != nil {
		return err
	}
	return (&port{file: file, bell: b}).serve()
}

func (p *port) serve() error {
	defer p.stop()
	lines := bufio.NewReaderSize(p.file, 2*wire.ChunkBytes)
	var line []byte
	for {
		rung := p.bell.next()
		part, err := lines.ReadBytes('\n')
		line = append(line, part...)
		switch {
		case errors.Is(err, io.EOF):
			p.stop()
			line = nil
			select {
			case <-rung:
			case <-time.After(whenAlone):
			}
			continue
		case err != nil:
			return err
		}
		p.handle(line)
		line = nil
	}
}

// handle does what a line asks for.
func (p *port) handle(line []byte) {
	var m wire.Message
	if json.Unmarshal(line, &m) != nil || m.Command == "" {
		return
	}
	if m.Run != "" {
		p.stop()
		p.current = p.start(m)
		return
	}
	c := p.current
	if c == nil || c.identity != m.Command {
		return
	}
	if len(m.In) > 0 {
		_, _ = c.stdin.Write(m.In) // a command may end without having read its input
	}
	if m.CloseIn {
		c.stdin.Close()
	}
}

// stop kills the command that runs, if one does, and all that it has started in its session.
func (p *port) stop() {
	if p.current == nil {
		return
	}
	p.current.kill()
	p.current = nil
}

// send writes one message.
func (p *port) send(m wire.Message) {
	line, err := json.Marshal(m)
	if err != nil {
		return
	}
	p.writing.Lock()
	defer p.writing.Unlock()
	_, _ = p.file.Write(append(line, '\n')) // the reader's end fails, too
}

// command is one that runs.
type command struct {
	identity string
	stdin    io.WriteCloser
	process  *os.Process // nil: it did not begin
}

func (c *command) kill() {
	c.stdin.Close()
	if c.process != nil {
		_ = syscall.Kill(-c.process.Pid, syscall.SIGKILL) // it may have ended
	}
}

// start begins a command; what it says and how it ends is sent while it runs.
func (p *port) start(m wire.Message) *command {
	cmd := exec.Command("/bin/bash", "-c", m.Run)
	cmd.Dir = "/root"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Stdout = sender(func(b []byte) { p.send(wire.Message{Command: m.Command, Out: b}) })
	cmd.Stderr = sender(func(b []byte) { p.send(wire.Message{Command: m.Command, Err: b}) })
	// A daemon that a command leaves behind may keep its output open.
	cmd.WaitDelay = time.Second
	reader, writer, err := os.Pipe()
	if err != nil {
		p.fail(m.Command, err)
		return nil
	}
	cmd.Stdin = reader
	err = cmd.Start()
	reader.Close()
	if err != nil {
		writer.Close()
		p.fail(m.Command, err)
		return nil
	}
	go func() {
		_ = cmd.Wait() // its state says how it ended
		code := cmd.ProcessState.ExitCode()
		p.send(wire.Message{Command: m.Command, Exit: &code})
	}()
	return &command{m.Command, writer, cmd.Process}
}

// fail tells of a command that did not begin.
func (p *port) fail(identity string, err error) {
	code := -1
	p.send(wire.Message{Command: identity, Err: fmt.Appendf(nil, "agent: %v\n", err)})
	p.send(wire.Message{Command: identity, Exit: &code})
}

// sender sends what is written, in chunks.
type sender func([]byte)

// Write never fails.
func (s sender) Write(b []byte) (int, error) {
	for rest := b; len(rest) > 0; {
		n := min(len(rest), wire.ChunkBytes)
		s(bytes.Clone(rest[:n]))
		rest = rest[n:]
	}
	return len(b), nil
}
