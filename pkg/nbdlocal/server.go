package nbdlocal

import (
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Options adjust a Server. The zero value is what a volume's server wants.
type Options struct {
	// ReadOnly refuses writes even if the device takes them.
	ReadOnly bool
	// Description is shown to foreign clients that ask for one.
	Description string
	// Workers is how many threads a connection has at most, at least 2; 0 means 17.
	// So many requests of a connection, less one, can wait for the device at the same
	// time; the last thread goes on receiving, and carries out flushes.
	Workers int
	// BufferBytes is the most memory a connection's buffers may take, at least
	// MinBufferBytes; 0 means 64 MiB. It is given back when the connection is idle.
	BufferBytes int64
}

// MinBufferBytes is the least Options.BufferBytes: enough for one request of the
// largest size, 32 MiB.
const MinBufferBytes = fixedBytes + maxPayloadBytes

func (o *Options) setDefaults() {
	if o.Workers == 0 {
		o.Workers = 17
	}
	o.Workers = max(o.Workers, 2) // one receives while the other carries out
	if o.BufferBytes == 0 {
		o.BufferBytes = 64 << 20
	}
	o.BufferBytes = max(o.BufferBytes, MinBufferBytes)
}

// Server serves one device on any number of connections: to the kernel by ServeConn, to
// foreign clients as one of [Exports]. All methods are safe for concurrent use. The
// device stays the caller's; it must not be closed before every call of ServeConn, and
// of Serve of the exports that it is one of, has returned.
type Server struct {
	dev    block.Device
	opts   Options
	ranges rangeOrder
	pace   pace
	holes  holes
	watch  watch
	size   atomic.Int64 // the device's, as last seen

	mu        sync.Mutex
	conns     map[*conn]struct{}
	draining  bool
	changed   chan struct{} // closed and replaced when a connection has ended
	stopWatch chan struct{} // non-nil while there are connections
	past      counters      // of connections that have ended
}

// NewServer returns a server of dev. It uses no resources until it has connections.
func NewServer(dev block.Device, opts Options) *Server {
	opts.setDefaults()
	s := &Server{
		dev:     dev,
		opts:    opts,
		watch:   newWatch(),
		conns:   map[*conn]struct{}{},
		changed: make(chan struct{}),
	}
	s.size.Store(dev.Info().SizeBytes)
	return s
}

// ServeConn serves the transmission phase on a socket whose other end the kernel's
// nbd driver has. It returns when the kernel disconnects or the connection breaks, and
// once Drain was called and everything taken has been answered: all of that is nil.
// When ctx ends first, the connection is hung up and ctx's error returned. Whatever
// the reason, no request is running any more when it returns.
//
// sock is a stream socket made in blocking mode; it stays the caller's, and open. After
// Drain, another server can go on with it: it was left between two messages.
func (s *Server) ServeConn(ctx context.Context, sock *os.File) error {
	own, err := adoptSocket(sock)
	if err != nil {
		return fmt.Errorf("serve nbd on %s: %w", sock.Name(), err)
	}
	if err := s.transmit(ctx, own, session{readOnly: s.readOnly(), kernel: true}); err != nil {
		return fmt.Errorf("serve nbd on %s: %w", sock.Name(), err)
	}
	return nil
}

// Drain stops the server for good: it takes no message of which not a byte has been
// received, and answers every request it has taken. It returns when all connections
// have ended; later ones end at once. When ctx ends first, what is left is hung up on
// without waiting, and ctx's error returned.
//
// Nothing is flushed: closing the device does that.
func (s *Server) Drain(ctx context.Context) error {
	s.mu.Lock()
	s.draining = true
	for c := range s.conns {
		c.drain()
	}
	s.mu.Unlock()
	for {
		s.mu.Lock()
		left, changed := len(s.conns), s.changed
		s.mu.Unlock()
		if left == 0 {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			for _, c := range s.connections() {
				c.abort(ctx.Err())
			}
			return fmt.Errorf("drain %d nbd connections: %w", left, ctx.Err())
		}
	}
}

// transmit serves a socket, which it owns, in the transmission phase.
func (s *Server) transmit(ctx context.Context, sock socket, agreed session) error {
	c, err := newConn(s, sock, agreed)
	if err != nil {
		return err
	}
	s.mu.Lock()
	if s.draining {
		c.drain()
	}
	s.conns[c] = struct{}{}
	if s.stopWatch == nil {
		s.stopWatch = make(chan struct{})
		go s.watch.run(s, s.stopWatch)
	}
	s.mu.Unlock()

	stop := context.AfterFunc(ctx, func() { c.abort(ctx.Err()) })
	err = c.run()
	stop()
	s.removeConn(c)
	c.close()
	return err
}

func (s *Server) removeConn(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	s.past.add(&c.stats)
	if len(s.conns) == 0 {
		close(s.stopWatch)
		s.stopWatch = nil
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

// connections returns the connections there are.
func (s *Server) connections() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		list = append(list, c)
	}
	return list
}

// leave ends a write's place in the order of writes.
func (s *Server) leave(r *request) {
	runnable := s.ranges.leave(r)
	r.ordered = false
	for runnable.head != nil {
		next := runnable.pop()
		next.conn.admit(next, next.conn == r.conn)
	}
}

// checkRange is the one range check there is. The device may have grown since its size
// was last seen.
func (s *Server) checkRange(off, n int64) error {
	if block.CheckRange(off, n, s.size.Load()) == nil {
		return nil
	}
	size := s.dev.Info().SizeBytes
	s.size.Store(size)
	return block.CheckRange(off, n, size)
}

func (s *Server) readOnly() bool { return s.opts.ReadOnly || s.dev.Info().ReadOnly }
