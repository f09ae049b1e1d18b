package nbdlocal

import (
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// socket is a connected stream socket in blocking mode, used with bare system calls:
// going through Go's poller costs a wake of another thread for each wait.
type socket struct {
	fd int
	// interrupt is an event descriptor: readable once waiting should end.
	interrupt int
}

// adoptSocket makes a socket of a duplicate of conn's descriptor. The original stays
// the caller's, but both are in blocking mode from now on.
func adoptSocket(conn syscall.Conn) (socket, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return socket{}, err
	}
	fd, dupErr := -1, error(nil)
	if err := raw.Control(func(original uintptr) {
		fd, dupErr = unix.FcntlInt(original, unix.F_DUPFD_CLOEXEC, 0)
	}); err != nil {
		return socket{}, err
	}
	if dupErr != nil {
		return socket{}, fmt.Errorf("duplicate descriptor: %w", dupErr)
	}
	s, err := newSocket(fd)
	if err != nil {
		_ = unix.Close(fd) // the error that matters is err
	}
	return s, err
}

func newSocket(fd int) (socket, error) {
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return socket{}, fmt.Errorf("not a socket: %w", err)
	}
	if kind != unix.SOCK_STREAM {
		return socket{}, fmt.Errorf("socket of type %d: want a stream socket", kind)
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		return socket{}, fmt.Errorf("set blocking mode: %w", err)
	}
	if err := setReceiveTimeout(fd, briefWaitMicros); err != nil {
		return socket{}, err
	}
	// A large reply should not have to wait for its reader halfway. Advice: where
	// the limit cannot be exceeded, it is as large as it may be.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBufferBytes) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBufferBytes)
	}
	interrupt, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return socket{}, fmt.Errorf("make event descriptor: %w", err)
	}
	return socket{fd: fd, interrupt: interrupt}, nil
}

const (
	sendBufferBytes = 1 << 20
	// briefWaitMicros is how long a plain blocking receive waits, the cheapest way
	// to wait. After that comes a poll, which can be interrupted.
	briefWaitMicros = 20_000
)

func setReceiveTimeout(fd int, micros int64) error {
	tv := unix.NsecToTimeval(micros * 1000)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return fmt.Errorf("set receive timeout: %w", err)
	}
	return nil
}

// close releases the descriptors and leaves the socket's options as they were.
func (s *socket) close() {
	_ = setReceiveTimeout(s.fd, 0) // a connection that is gone has no use for it
	_ = unix.Close(s.fd)
	_ = unix.Close(s.interrupt)
}

// hangUp ends the connection for both sides; blocked calls return.
func (s *socket) hangUp() {
	_ = unix.Shutdown(s.fd, unix.SHUT_RDWR) // fails only when it is hung up
}

// stopWaiting makes this and every later wait return.
func (s *socket) stopWaiting() {
	one := [8]byte{1}
	_, _ = unix.Write(s.interrupt, one[:]) // EAGAIN would mean it is readable already
}

// peerGone reports whether the peer has closed or shut down the connection, whatever
// there may be left to receive.
func (s *socket) peerGone() bool {
	fds := [1]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLRDHUP}}
	for {
		n, err := unix.Poll(fds[:], 0)
		if err == unix.EINTR {
			continue
		}
		return err != nil || n > 0
	}
}

// wait waits until there is something to receive, the peer is gone, waiting is
// interrupted (unless uninterruptible), or timeoutMillis have passed (-1: never).
func (s *socket) wait(timeoutMillis int, uninterruptible bool) (readable, interrupted bool) {
	fds := [2]unix.PollFd{
		{Fd: int32(s.fd), Events: unix.POLLIN},
		{Fd: int32(s.interrupt), Events: unix.POLLIN},
	}
	watched := fds[:]
	if uninterruptible {
		watched = fds[:1]
	}
	n, err := unix.Poll(watched, timeoutMillis)
	for err == unix.EINTR {
		n, err = unix.Poll(watched, timeoutMillis)
	}
	if err != nil {
		return true, false // out of memory: the caller's next receive tells
	}
	return n > 0 && fds[0].Revents != 0, n > 0 && fds[1].Revents != 0
}

// receive is recvmsg(2).
func (s *socket) receive(msg *unix.Msghdr, flags int) (int, error) {
	var n uintptr
	var errno unix.Errno
	if flags&unix.MSG_DONTWAIT != 0 { // never blocks: the Go scheduler need not know
		n, _, errno = unix.RawSyscall(unix.SYS_RECVMSG, uintptr(s.fd), uintptr(unsafe.Pointer(msg)), uintptr(flags))
	} else {
		n, _, errno = unix.Syscall(unix.SYS_RECVMSG, uintptr(s.fd), uintptr(unsafe.Pointer(msg)), uintptr(flags))
	}
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// sendAll sends what iov describes, which it overwrites. It waits as long as it takes.
func (s *socket) sendAll(msg *unix.Msghdr, iov []unix.Iovec) error {
	for len(iov) > 0 {
		msg.Iov = &iov[0]
		msg.SetIovlen(len(iov))
		n, _, errno := unix.Syscall(unix.SYS_SENDMSG, uintptr(s.fd), uintptr(unsafe.Pointer(msg)), unix.MSG_NOSIGNAL)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return errno
		}
		iov = advance(iov, n)
	}
	return nil
}

// advance drops the first n bytes of iov.
func advance(iov []unix.Iovec, n uintptr) []unix.Iovec {
	for len(iov) > 0 && n >= uintptr(iov[0].Len) {
		n -= uintptr(iov[0].Len)
		iov = iov[1:]
	}
	if n > 0 {
		iov[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(iov[0].Base), n))
		iov[0].SetLen(int(uintptr(iov[0].Len) - n))
	}
	return iov
}
