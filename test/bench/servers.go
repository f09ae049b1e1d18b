package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

const (
	// startPatience is how long a server may take to listen, stopPatience to end.
	startPatience = 30 * time.Second
	stopPatience  = 2 * time.Minute
)

// server is a running NBD server of one image.
type server struct {
	name   string
	cmd    *exec.Cmd
	socket string
	ended  chan struct{}
	stderr bytes.Buffer
	client *client // the first: it has seen that the server is ready
}

// pids are the processes that serve.
func (s *server) pids() []int { return []int{s.cmd.Process.Pid} }

// serve starts a contender's server of an image in b's directory, and returns once it has
// answered.
func (b *bench) serve(ctx context.Context, name, format, image string) (*server, error) {
	s := &server{name: name, socket: filepath.Join(b.dir, "nbd.sock"), ended: make(chan struct{})}
	if err := os.Remove(s.socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	switch name {
	case ours:
		s.cmd = exec.Command(b.config.binary, "serve", image, "--format", format, "--socket", s.socket, "--run-dir", b.runDir)
	case qemuNBD:
		s.cmd = exec.Command("qemu-nbd", "--persistent", "--shared=2", "--socket="+s.socket, "--format="+format, image)
	case nbdkit:
		s.cmd = exec.Command("nbdkit", "--foreground", "--unix", s.socket, "file", image)
	default:
		return nil, fmt.Errorf("no server is called %q", name)
	}
	s.cmd.Dir = b.dir
	s.cmd.Stderr = &s.stderr
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = s.cmd.Wait() // how it ended is asked by stop
		close(s.ended)
	}()
	if err := s.awaitReady(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("%s of %s: %w", name, image, err), s.stop())
	}
	return s, nil
}

// awaitReady returns once the server has shaken hands.
func (s *server) awaitReady(ctx context.Context) error {
	deadline := time.Now().Add(startPatience)
	for {
		c, err := dial(s.socket)
		if err == nil {
			s.client = c
			return nil
		}
		select {
		case <-s.ended:
			return fmt.Errorf("it ended: %s", lastLines(s.stderr.String()))
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("it does not listen: %w", err)
		}
	}
}

// stop ends the server, which closes its image.
func (s *server) stop() error {
	if s.client != nil {
		s.client.close()
	}
	_ = s.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-s.ended:
	case <-time.After(stopPatience):
		_ = s.cmd.Process.Kill()
		<-s.ended
		return fmt.Errorf("%s does not end and was killed", s.name)
	}
	status, ok := s.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if killed := ok && status.Signal() == syscall.SIGTERM; !killed && !s.cmd.ProcessState.Success() {
		return fmt.Errorf("%s ended with %v: %s", s.name, s.cmd.ProcessState, lastLines(s.stderr.String()))
	}
	return nil
}
