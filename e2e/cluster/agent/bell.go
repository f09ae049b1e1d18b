package main

import (
	"fmt"
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
)

// bell rings whenever something happens at any port. An emulated processor would otherwise be
// busy with looking whether somebody is connected.
type bell struct {
	mu   sync.Mutex
	rung chan struct{}
}

// newBell returns one that the kernel's signals ring.
func newBell() *bell {
	b := &bell{rung: make(chan struct{})}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGIO)
	go func() {
		for range signals {
			b.ring()
		}
	}()
	return b
}

// next returns a channel that is closed when the bell rings the next time.
func (b *bell) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rung
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.rung)
	b.rung = make(chan struct{})
}

// signalWhenConnected has the kernel send a signal when somebody connects to a port.
func signalWhenConnected(port *os.File) error {
	conn, err := port.SyscallConn() // File.Fd would make reads block a thread
	if err != nil {
		return err
	}
	var fcntlErr error
	err = conn.Control(func(fd uintptr) {
		if _, fcntlErr = unix.FcntlInt(fd, unix.F_SETOWN, os.Getpid()); fcntlErr != nil {
			return
		}
		var flags int
		if flags, fcntlErr = unix.FcntlInt(fd, unix.F_GETFL, 0); fcntlErr == nil {
			_, fcntlErr = unix.FcntlInt(fd, unix.F_SETFL, flags|unix.O_ASYNC)
		}
	})
	if err == nil {
		err = fcntlErr
	}
	if err != nil {
		return fmt.Errorf("ask for signals of %s: %w", port.Name(), err)
	}
	return nil
}
