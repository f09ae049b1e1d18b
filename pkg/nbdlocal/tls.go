package nbdlocal

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// pumpBytes is what one direction of a tunnel holds.
	pumpBytes = 128 << 10
	// lastWords is how long a client may take to read its last replies.
	lastWords = 5 * time.Second
)

// serveTLS serves the transmission phase on a TLS connection, through a tunnel: a
// connection's workers know bare sockets only, which is what makes them fast, so they
// get one end of a socket pair, and two goroutines translate between the other end and
// the client. That costs a copy in each direction, little beside the encryption, and
// nothing where there is none.
func serveTLS(ctx context.Context, client *tls.Conn, s *Server, agreed session) error {
	sock, pipe, err := socketPipe()
	if err != nil {
		return errors.Join(err, client.Close())
	}
	t := tunnel{client: client, pipe: pipe}
	stop := context.AfterFunc(ctx, func() { _ = client.NetConn().Close() })
	defer stop()
	var inbound, outbound sync.WaitGroup
	inbound.Go(t.receive)
	outbound.Go(t.send)
	err = s.transmit(ctx, sock, agreed) // which closes sock
	_ = client.SetWriteDeadline(time.Now().Add(lastWords))
	outbound.Wait()
	_ = client.Close()
	inbound.Wait()
	_ = pipe.Close()
	return errors.Join(err, t.err)
}

// socketPipe returns the two ends of a socket pair: one for a connection, and one for Go.
func socketPipe() (socket, *net.UnixConn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return socket{}, nil, fmt.Errorf("make socket pair: %w", err)
	}
	file := os.NewFile(uintptr(fds[1]), "tunnel")
	defer file.Close()
	pipe, err := net.FileConn(file)
	if err != nil {
		return socket{}, nil, errors.Join(err, unix.Close(fds[0]))
	}
	sock, err := newSocket(fds[0])
	if err != nil {
		return socket{}, nil, errors.Join(err, unix.Close(fds[0]), pipe.Close())
	}
	return sock, pipe.(*net.UnixConn), nil
}

// tunnel joins a TLS connection to a pipe.
type tunnel struct {
	client *tls.Conn
	pipe   *net.UnixConn
	err    error // why nothing more could be received, if it wasn't the client's wish
}

// receive takes what the client sends until it ends.
func (t *tunnel) receive() {
	if err := pump(t.pipe, t.client); !isEnd(err) {
		t.err = fmt.Errorf("receive by TLS: %w", err)
	}
	_ = t.pipe.CloseWrite() // the connection sees the end once it has taken everything
}

// send sends what the connection has to say until it ends, or nobody takes it.
func (t *tunnel) send() {
	if pump(t.client, t.pipe) == nil {
		_ = t.client.CloseWrite() // an end that nobody has forged
		return
	}
	_ = t.pipe.Close() // the connection sees that nobody reads
}

// isEnd reports whether a tunnel ended as it may. A client that leaves without saying so
// may: the protocol knows whether it was in the middle of a message.
func isEnd(err error) bool {
	return err == nil || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// pump copies until from ends (nil) or either fails. Not io.Copy: what the two types offer
// it allocates smaller buffers.
func pump(to io.Writer, from io.Reader) error {
	buf := make([]byte, pumpBytes)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}
