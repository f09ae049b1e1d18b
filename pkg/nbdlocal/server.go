package nbdlocal

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Options adjust a Server. The zero value is what a volume's server wants.
type Options struct {
	// ReadOnly refuses writes even if the device takes them.
	ReadOnly bool
	// ExportName is a name by which foreign clients may ask for the device; the
	// empty name always works. At most 4096 bytes.
	ExportName string
	// Description is shown to foreign clients that ask for one.
	Description string
	// Workers is how many threads a connection has at most, at least 2; 0 means 16.
	// So many requests of a connection can wait for the device at the same time.
	Workers int
	// BufferBytes is the most memory a connection's buffers may take, at least
	// MinBufferBytes; 0 means 64 MiB. It is given back when the connection is idle.
	BufferBytes int64
	// MaxClients is how many foreign clients may be connected at the same time;
	// 0 means 64. More are hung up on.
	MaxClients int
	// HandshakeTimeout is how long a foreign client may take to get to the
	// transmission phase; 0 means 10 seconds.
	HandshakeTimeout time.Duration
	// ClientError, if not nil, is told why a foreign client's connection ended when
	// it was not by the client's wish. It is called concurrently.
	ClientError func(error)
}

// MinBufferBytes is the least Options.BufferBytes: enough for one request of the
// largest size, 32 MiB.
const MinBufferBytes = fixedBytes + maxPayloadBytes

func (o *Options) setDefaults() {
	if o.Workers == 0 {
		o.Workers = 16
	}
	o.Workers = max(o.Workers, 2) // one receives while the other carries out
	if o.BufferBytes == 0 {
		o.BufferBytes = 64 << 20
	}
	o.BufferBytes = max(o.BufferBytes, MinBufferBytes)
	if o.MaxClients == 0 {
		o.MaxClients = 64
	}
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = 10 * time.Second
	}
}

// Server serves one device on any number of connections. All methods are safe for
// concurrent use. The device stays the caller's; it must not be closed before every
// call of Serve and ServeConn has returned.
type Server struct {
	dev    block.Device
	opts   Options
	ranges rangeOrder
	pace   pace
	watch  watch
	size   atomic.Int64 // the device's, as last seen

	mu        sync.Mutex
	conns     map[*conn]struct{}
	greeting  map[net.Conn]struct{} // foreign clients in the handshake
	listeners map[net.Listener]struct{}
	clients   int // foreign ones, in whichever phase
	draining  bool
	changed   chan struct{} // closed and replaced when a connection has ended
	stopWatch chan struct{} // non-nil while there are connections
	past      counters      // of connections that have ended
}

// NewServer returns a server of dev. It uses no resources until it has connections.
func NewServer(dev block.Device, opts Options) *Server {
	opts.setDefaults()
	s := &Server{
		dev:       dev,
		opts:      opts,
		watch:     newWatch(),
		conns:     map[*conn]struct{}{},
		greeting:  map[net.Conn]struct{}{},
		listeners: map[net.Listener]struct{}{},
		changed:   make(chan struct{}),
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

// Serve accepts foreign clients on l and serves each until it disconnects. It returns
// nil after Drain and ctx's error when that ends first, in either case after all of its
// clients' connections have ended; or another error when accepting doesn't work any
// more. It closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	if !s.addListener(l) {
		return errors.Join(block.ErrClosed, l.Close())
	}
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	var clients sync.WaitGroup
	defer clients.Wait()
	for {
		client, err := l.Accept()
		if err == nil {
			clients.Go(func() { s.serveClient(ctx, client) })
			continue
		}
		if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ECONNABORTED) {
			s.clientError(fmt.Errorf("accept nbd client: %w", err))
			time.Sleep(100 * time.Millisecond) // until others have closed theirs
			continue
		}
		ours := s.removeListener(l)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case ours:
			return nil
		}
		return errors.Join(fmt.Errorf("accept nbd clients on %s: %w", l.Addr(), err), l.Close())
	}
}

// Drain stops the server for good: it accepts no clients, takes no message of which not
// a byte has been received, and answers every request it has taken. It returns when
// all connections have ended. When ctx ends first, what is left is hung up on without
// waiting, and ctx's error returned.
//
// Nothing is flushed: closing the device does that.
func (s *Server) Drain(ctx context.Context) error {
	s.mu.Lock()
	s.draining = true
	for l := range s.listeners {
		_ = l.Close() // Serve's Accept returns
	}
	for c := range s.greeting {
		_ = c.Close()
	}
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

func (s *Server) addListener(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return false
	}
	s.listeners[l] = struct{}{}
	return true
}

// removeListener reports whether it was Drain that closed l.
func (s *Server) removeListener(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, l)
	return s.draining
}

// serveClient serves one foreign client, from greeting to end.
func (s *Server) serveClient(ctx context.Context, client net.Conn) {
	if !s.addClient(client) {
		_ = client.Close()
		return
	}
	defer s.removeClient()
	agreed, err := s.shakeHands(ctx, client)
	var sock socket
	if err == nil {
		if plain, ok := client.(syscall.Conn); ok {
			sock, err = adoptSocket(plain)
		} else {
			err = fmt.Errorf("connection of type %T: %w: want a plain socket", client, block.ErrUnsupported)
		}
	}
	s.mu.Lock()
	delete(s.greeting, client)
	s.mu.Unlock()
	_ = client.Close() // sock is a descriptor of its own, one that Go's poller doesn't know
	if err == nil {
		err = s.transmit(ctx, sock, agreed)
	}
	if err != nil && !errors.Is(err, errGoodbye) {
		s.clientError(fmt.Errorf("nbd client: %w", err))
	}
}

func (s *Server) addClient(client net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining || s.clients >= s.opts.MaxClients {
		return false
	}
	s.clients++
	s.greeting[client] = struct{}{}
	return true
}

func (s *Server) removeClient() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clients--
}

func (s *Server) clientError(err error) {
	if s.opts.ClientError != nil {
		s.opts.ClientError(err)
	}
}
