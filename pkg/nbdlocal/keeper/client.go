package keeper

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Config says where a keeper is and how to start it.
type Config struct {
	// Dir is the keeper's own directory; it is made if its parent exists.
	Dir string
	// Binary and Args start one, which has to call Run for Dir.
	Binary string
	Args   []string
	// Env is added to its environment.
	Env []string
	Log *slog.Logger
}

const (
	// startTries is how often one that ends before it answers is started.
	startTries = 3
	pollPause  = 2 * time.Millisecond
	// answerPatience is how long one request may take.
	answerPatience = 10 * time.Second
	// firstRest and mostRest bound the pause before a keeper that does not come to be
	// is tried again.
	firstRest = 50 * time.Millisecond
	mostRest  = 5 * time.Second
)

// Client keeps descriptors with a keeper. It holds duplicates itself, from which a keeper
// that has died is refilled. It starts one when there is something to keep, and hangs up,
// upon which it ends, when there is not. Safe for concurrent use.
type Client struct {
	cfg Config

	mu        sync.Mutex
	kept      map[string]int // our duplicates
	conn      int            // -1 without
	connected int            // how often

	closed chan struct{}
	wake   chan struct{} // the connection has ended, and there is something to keep
	loop   sync.WaitGroup
}

// NewClient returns a client, which does nothing until it is asked to. Close it.
func NewClient(cfg Config) *Client {
	c := &Client{cfg: cfg, kept: map[string]int{}, conn: -1, closed: make(chan struct{}), wake: make(chan struct{}, 1)}
	c.loop.Go(c.reviveLoop)
	return c
}

// Keep has the keeper hold a duplicate of file under a name of 1 to 64 letters and digits,
// in place of what it held there. On an error it will go on trying until Drop.
func (c *Client) Keep(name string, file *os.File) error {
	if !validName([]byte(name)) {
		return fmt.Errorf("keeper: name %.80q: want 1 to %d letters and digits: %w", name, maxNameBytes, block.ErrInvalid)
	}
	fd, err := duplicate(file)
	if err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if old, ok := c.kept[name]; ok {
		unix.Close(old)
	}
	c.kept[name] = fd
	if err := c.connect(); err == nil {
		err = c.request(message{opKeep, name, fd})
		if err == nil {
			return nil
		}
	}
	c.hangUp()
	if err = c.refill(); err != nil {
		c.alarm()
	}
	return err
}

// Get returns a duplicate of what is kept under a name, by this client or by one before
// it; block.ErrNotFound if there is none, or no keeper.
func (c *Client) Get(ctx context.Context, name string) (*os.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if fd, ok := c.kept[name]; ok {
		return reopen(fd)
	}
	none := fmt.Errorf("keeper: nothing is kept as %.80q: %w", name, block.ErrNotFound)
	for {
		if c.conn < 0 {
			fd, err := dial(c.cfg.Dir)
			if err != nil {
				if lock, err := takeLock(c.cfg.Dir); err == nil {
					lock.Close() // and so there is no keeper
					return nil, none
				} else if errors.Is(err, fs.ErrNotExist) {
					return nil, none
				}
			} else {
				c.adopt(fd)
			}
		}
		if c.conn >= 0 {
			reply, err := c.exchange(message{opGet, name, -1})
			if len(c.kept) == 0 {
				defer c.hangUp()
			}
			switch {
			case err == nil && reply.fd >= 0:
				return os.NewFile(uintptr(reply.fd), "kept"), nil
			case err == nil:
				return nil, none
			}
			c.hangUp()
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("keeper in %s: %w", c.cfg.Dir, ctx.Err())
		case <-time.After(pollPause):
		}
	}
}

// Drop forgets what is kept under a name, by this client or by one before it.
func (c *Client) Drop(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if fd, ok := c.kept[name]; ok {
		unix.Close(fd)
		delete(c.kept, name)
	}
	if c.conn < 0 {
		fd, err := dial(c.cfg.Dir)
		if err != nil {
			return // there is none, or it is ending
		}
		c.adopt(fd)
	}
	if err := c.request(message{opDrop, name, -1}); err != nil {
		c.hangUp()
		c.alarm()
	}
	if len(c.kept) == 0 {
		c.hangUp()
		c.tidy()
	}
}

// tidy removes what a keeper that was killed has left, when there is nothing to keep. One
// that runs, or is ending, has the lock and tidies itself.
func (c *Client) tidy() {
	if len(c.kept) > 0 {
		return
	}
	lock, err := takeLock(c.cfg.Dir)
	if err != nil {
		return
	}
	_ = os.Remove(filepath.Join(c.cfg.Dir, socketFile)) // mostly there is none
	lock.Close()
}

// Close hangs up. What is kept stays so, for the next client.
func (c *Client) Close() {
	close(c.closed)
	c.loop.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hangUp()
	c.tidy()
	for name, fd := range c.kept {
		unix.Close(fd)
		delete(c.kept, name)
	}
}

// alarm has the loop refill a keeper.
func (c *Client) alarm() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// reviveLoop starts a keeper again that has died, and refills it.
func (c *Client) reviveLoop() {
	rest := firstRest
	for {
		select {
		case <-c.closed:
			return
		case <-c.wake:
		}
		for c.revive() != nil {
			select {
			case <-c.closed:
				return
			case <-time.After(rest):
			}
			rest = min(2*rest, mostRest)
		}
		rest = firstRest
	}
}

func (c *Client) revive() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn >= 0 || len(c.kept) == 0 {
		return nil
	}
	err := c.refill()
	if err != nil {
		c.cfg.Log.Error("what keeps fuse devices alive does not run, and will be tried again", "error", err)
	} else {
		c.cfg.Log.Warn("the keeper had ended; another holds its descriptors now", "descriptors", len(c.kept))
	}
	return err
}

// refill gives a keeper everything there is to keep.
func (c *Client) refill() error {
	if err := c.connect(); err != nil {
		return err
	}
	for name, fd := range c.kept {
		if err := c.request(message{opKeep, name, fd}); err != nil {
			c.hangUp()
			return err
		}
	}
	return nil
}

// connect makes sure that there is a connection, and a keeper.
func (c *Client) connect() error {
	if c.conn >= 0 {
		return nil
	}
	if err := os.Mkdir(c.cfg.Dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("keeper: make its directory: %w", err)
	}
	deadline := time.Now().Add(answerPatience)
	for starts := 0; ; time.Sleep(pollPause) {
		fd, err := dial(c.cfg.Dir)
		if err == nil {
			c.adopt(fd)
			return nil
		}
		lock, lockErr := takeLock(c.cfg.Dir)
		switch {
		case lockErr == nil && starts == startTries:
			lock.Close()
			return fmt.Errorf("keeper: it ended when it was started, see %s", c.logPath())
		case lockErr == nil:
			starts++
			err := c.start(lock)
			lock.Close() // the process has it now
			if err != nil {
				return err
			}
		case !errors.Is(lockErr, block.ErrLocked):
			return lockErr
		case time.Now().After(deadline):
			return fmt.Errorf("keeper: it runs and does not answer: %w", err)
		}
	}
}

func (c *Client) logPath() string { return filepath.Join(c.cfg.Dir, "keeper.log") }

// start starts the process, which inherits the lock.
func (c *Client) start(lock *os.File) error {
	if err := os.Remove(filepath.Join(c.cfg.Dir, socketFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("keeper: remove a dead one's socket: %w", err)
	}
	log, err := os.OpenFile(c.logPath(), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("keeper: open its log: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(c.cfg.Binary, c.cfg.Args...)
	cmd.Args[0] = "csi-imgdisk"
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), c.cfg.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{lock}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("keeper: start %s: %w", c.cfg.Binary, err)
	}
	go func() { _ = cmd.Wait() }() // its log says how it ended
	return nil
}

// adopt makes a connection the client's, and watches it.
func (c *Client) adopt(fd int) {
	c.conn = fd
	c.connected++
	number := c.connected
	watch, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return // its end is noticed with the next request
	}
	go func() {
		waitHungUp(watch)
		unix.Close(watch)
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.conn < 0 || c.connected != number {
			return
		}
		c.hangUp()
		if len(c.kept) > 0 {
			c.alarm()
		}
	}()
}

// waitHungUp returns when either end of a socket is closed.
func waitHungUp(fd int) {
	for {
		state := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		if _, err := unix.Poll(state, -1); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// hangUp ends the connection, if there is one. Its watch ends with it.
func (c *Client) hangUp() {
	if c.conn >= 0 {
		_ = unix.Shutdown(c.conn, unix.SHUT_RDWR)
		unix.Close(c.conn)
		c.conn = -1
	}
}

// request carries out a request whose answer is nothing but that.
func (c *Client) request(m message) error {
	reply, err := c.exchange(m)
	reply.close()
	return err
}

// exchange sends a request and receives the answer, whose descriptor is the caller's.
func (c *Client) exchange(m message) (message, error) {
	err := sendMessage(c.conn, m, 0)
	reply := message{fd: -1}
	if err == nil {
		reply, err = receiveMessage(c.conn, 0)
	}
	if err != nil {
		return reply, fmt.Errorf("keeper: request %c: %w", m.op, err)
	}
	if reply.op != m.op && reply.op != opNone {
		reply.close()
		return message{fd: -1}, fmt.Errorf("keeper: request %c is answered with %q: %w", m.op, reply.op, block.ErrInvalid)
	}
	return reply, nil
}

// dial connects to the directory's keeper.
func dial(dir string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("keeper: make a socket: %w", err)
	}
	patience := unix.NsecToTimeval(answerPatience.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &patience))
	if err == nil {
		err = withSocketPath(dir, func(path string) error { return unix.Connect(fd, &unix.SockaddrUnix{Name: path}) })
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("keeper: connect in %s: %w", dir, err)
	}
	return fd, nil
}

// duplicate returns a descriptor of its own for file's open file. Not by way of File.Fd,
// which would make the open file, that others share, a blocking one.
func duplicate(file *os.File) (int, error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return -1, err
	}
	dup := -1
	controlErr := raw.Control(func(fd uintptr) { dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(controlErr, err); err != nil {
		return -1, fmt.Errorf("duplicate descriptor of %s: %w", file.Name(), err)
	}
	return dup, nil
}

func reopen(fd int) (*os.File, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("keeper: duplicate descriptor: %w", err)
	}
	return os.NewFile(uintptr(dup), "kept"), nil
}
