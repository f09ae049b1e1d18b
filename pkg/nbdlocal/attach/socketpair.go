package attach

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// A socketPair is one NBD connection: the kernel gets one end, a server the other.
type socketPair struct {
	kernel int
	server *os.File
}

// newSocketPairs makes n of them.
func newSocketPairs(n int) ([]socketPair, error) {
	var pairs []socketPair
	for range n {
		// Stream: the driver refuses datagrams.
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			closePairs(pairs)
			return nil, fmt.Errorf("make a socket pair: %w", err)
		}
		setSendBuffer(fds[0], nbdKernelBufferBytes)
		setSendBuffer(fds[1], nbdServerBufferBytes)
		pairs = append(pairs, socketPair{kernel: fds[0], server: os.NewFile(uintptr(fds[1]), "nbd socket")})
	}
	return pairs, nil
}

// setSendBuffer says how much may lie in a socket that was sent and not yet received.
// What is not granted only costs speed.
func setSendBuffer(fd, size int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, size) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, size)
	}
}

// connected says whether somebody, the kernel if not we, has the other end.
func (p *socketPair) connected() bool {
	raw, err := p.server.SyscallConn()
	if err != nil {
		return false
	}
	connected := false
	err = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		for {
			_, err := unix.Poll(fds, 0)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			connected = err == nil && fds[0].Revents == 0
			return
		}
	})
	return err == nil && connected
}

func (p *socketPair) closeKernel() {
	if p.kernel >= 0 {
		unix.Close(p.kernel)
		p.kernel = -1
	}
}

func (p *socketPair) close() {
	p.closeKernel()
	p.server.Close()
}

func closePairs(pairs []socketPair) {
	for i := range pairs {
		pairs[i].close()
	}
}

func serverEnds(pairs []socketPair) []*os.File {
	var files []*os.File
	for _, p := range pairs {
		files = append(files, p.server)
	}
	return files
}
