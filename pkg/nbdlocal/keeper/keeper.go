package keeper

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxKept  = 4096
	maxConns = 16
	// startPatience is how long a keeper waits for whoever started it.
	startPatience = 30 * time.Second
	// sweepInterval is how often a keeper that nobody is connected to looks whether
	// what it keeps is of any use yet.
	sweepInterval = 10 * time.Second
)

// Run is the body of a keeper's process. It listens in dir, calls ready once it needs
// nothing more than that, its descriptors and its socket's name (to be confined), and
// returns when it has nothing to keep and nobody is connected. The process must have been
// started by a Client, whose lock it has inherited.
func Run(dir string, ready func() error) error {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	debug.SetGCPercent(50)
	// Without the rights to that, it is as likely to be killed as others.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0o600)
	dirFD, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("keeper: open directory %s: %w", dir, err)
	}
	k := &keeper{kept: map[string]int{}, started: time.Now()}
	if k.listener, err = listen(dir); err != nil {
		return err
	}
	// Before the lock is free, so that it is not a successor's.
	defer func() { _ = unix.Unlinkat(dirFD, socketFile, 0) }()
	if err := ready(); err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	debug.FreeOSMemory()
	return k.run()
}

func listen(dir string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("keeper: make a socket: %w", err)
	}
	unix.Umask(0o177)
	err = withSocketPath(dir, func(path string) error { return unix.Bind(fd, &unix.SockaddrUnix{Name: path}) })
	if err == nil {
		err = unix.Listen(fd, maxConns)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("keeper: listen in %s: %w", dir, err)
	}
	return fd, nil
}

// keeper is the process's state. One thread does everything.
type keeper struct {
	listener int
	conns    []int
	kept     map[string]int
	started  time.Time
	known    bool // somebody has been connected
}

// run serves until there is nothing to keep and nobody connected.
func (k *keeper) run() error {
	for {
		fds := k.watched()
		_, err := unix.Poll(fds, k.timeoutMillis())
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("keeper: poll: %w", err)
		}
		if err == nil {
			k.handle(fds)
		}
		if len(k.conns) > 0 {
			continue
		}
		k.sweep()
		if len(k.kept) == 0 && (k.known || time.Since(k.started) > startPatience) && !k.accept() {
			return nil
		}
	}
}

// timeoutMillis is after how long something may be due that nobody tells.
func (k *keeper) timeoutMillis() int {
	switch {
	case len(k.conns) > 0:
		return -1
	case len(k.kept) > 0:
		return int(sweepInterval.Milliseconds())
	}
	return int(startPatience.Milliseconds())
}

// watched returns what to poll: the listener and the connections. Not what is kept: the
// kernel would wake this process for every request on it.
func (k *keeper) watched() []unix.PollFd {
	listening := int16(unix.POLLIN)
	if len(k.conns) == maxConns {
		listening = 0
	}
	fds := []unix.PollFd{{Fd: int32(k.listener), Events: listening}}
	for _, c := range k.conns {
		fds = append(fds, unix.PollFd{Fd: int32(c), Events: unix.POLLIN})
	}
	return fds
}

// handle deals with what poll found.
func (k *keeper) handle(fds []unix.PollFd) {
	for _, c := range fds[1:] {
		if c.Revents != 0 && !k.answer(int(c.Fd)) {
			k.hangUp(int(c.Fd))
		}
	}
	if fds[0].Revents != 0 {
		k.accept()
	}
}

// sweep drops what the kernel has ended: it keeps nothing alive.
func (k *keeper) sweep() {
	for name, fd := range k.kept {
		state := []unix.PollFd{{Fd: int32(fd)}} // errors are always told
		if _, err := unix.Poll(state, 0); err == nil && state[0].Revents&(unix.POLLERR|unix.POLLNVAL) != 0 {
			k.drop(name)
		}
	}
}

// accept takes a connection, if one waits.
func (k *keeper) accept() bool {
	c, _, err := unix.Accept4(k.listener, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
	if err != nil {
		return false
	}
	k.known = true
	cred, err := unix.GetsockoptUcred(c, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil || cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		unix.Close(c)
		return true
	}
	k.conns = append(k.conns, c)
	return true
}

func (k *keeper) hangUp(c int) {
	unix.Close(c)
	for i := range k.conns {
		if k.conns[i] == c {
			k.conns = append(k.conns[:i], k.conns[i+1:]...)
			return
		}
	}
}

// answer carries out a connection's request; false if there can be no more.
func (k *keeper) answer(c int) bool {
	m, err := receiveMessage(c, unix.MSG_DONTWAIT)
	if errors.Is(err, unix.EAGAIN) {
		return true
	}
	if err != nil {
		return false
	}
	defer m.close()
	if !validName([]byte(m.name)) || m.op == opKeep != (m.fd >= 0) {
		return false
	}
	reply := message{op: m.op, fd: -1}
	switch m.op {
	case opKeep:
		if _, again := k.kept[m.name]; !again && len(k.kept) == maxKept {
			return false
		}
		k.drop(m.name)
		k.kept[m.name] = m.fd
		m.fd = -1
	case opGet:
		if fd, ok := k.kept[m.name]; ok {
			reply.fd = fd
		} else {
			reply.op = opNone
		}
	case opDrop:
		k.drop(m.name)
	default:
		return false
	}
	return sendMessage(c, reply, unix.MSG_DONTWAIT) == nil
}

func (k *keeper) drop(name string) {
	if fd, ok := k.kept[name]; ok {
		unix.Close(fd)
		delete(k.kept, name)
	}
}
