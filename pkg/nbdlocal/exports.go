package nbdlocal

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// ExportsOptions adjust Exports. The zero value suits a unix socket that only its owner
// can reach.
type ExportsOptions struct {
	// MaxClients is how many foreign clients may be served at the same time, all
	// exports together; 0 means 64. More are refused.
	MaxClients int
	// HandshakeTimeout is how long a client may take to get to the transmission
	// phase; 0 means 10 seconds. When too many are at it, the oldest is hung up on.
	HandshakeTimeout time.Duration
	// TLS, if not nil, lets clients make their connections secure.
	TLS *tls.Config
	// TLSRequired serves nothing, and tells nothing, to clients that don't.
	TLSRequired bool
	// ClientError, if not nil, is told why a client was refused, or why its
	// connection ended when it was not by the client's wish. It is called
	// concurrently, and as often as hostile clients like: see [LimitErrors].
	ClientError func(error)
}

// maxGreeting is how many clients may be in the handshake at the same time. They are not
// counted as served: who connects and says nothing keeps nobody out.
const maxGreeting = 256

var errTooManyClients = fmt.Errorf("too many clients are connected: %w", block.ErrBusy)

// Exports are devices that foreign clients can choose from by name. All methods are safe
// for concurrent use. The zero value is not usable: see NewExports.
type Exports struct {
	opts ExportsOptions

	mu        sync.Mutex
	exports   []export
	greeting  list.List // of net.Conn: clients in the handshake, the oldest first
	listeners map[net.Listener]struct{}
	served    int // clients in the transmission phase
	draining  bool
}

// export is a device with a name.
type export struct {
	name   string
	server *Server
}

// NewExports returns exports with nothing in them.
func NewExports(opts ExportsOptions) *Exports {
	if opts.MaxClients == 0 {
		opts.MaxClients = 64
	}
	if opts.HandshakeTimeout == 0 {
		opts.HandshakeTimeout = 10 * time.Second
	}
	return &Exports{opts: opts, listeners: map[net.Listener]struct{}{}}
}

// Add lets clients ask for server by name, which may be empty and is at most 4096 bytes
// of UTF-8. Clients that ask for the empty name get the export that has it, or else the
// only one there is. The same server may have several names.
func (e *Exports) Add(name string, server *Server) error {
	if len(name) > maxNameBytes || !validString(name) {
		return fmt.Errorf("export name %.80q: %w: want at most %d bytes of UTF-8 without NUL", name, block.ErrInvalid, maxNameBytes)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, other := range e.exports {
		if other.name == name {
			return fmt.Errorf("export %q: %w", name, block.ErrExists)
		}
	}
	e.exports = append(e.exports, export{name, server})
	return nil
}

// find returns the export that clients may call name.
func (e *Exports) find(name string) (x export, found bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, x := range e.exports {
		if x.name == name {
			return x, true
		}
	}
	if name == "" && len(e.exports) == 1 {
		return e.exports[0], true
	}
	return export{}, false
}

// all returns the exports there are.
func (e *Exports) all() []export {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.exports[:len(e.exports):len(e.exports)]
}

// Serve accepts foreign clients on l and serves each until it disconnects. It returns
// nil after Drain and ctx's error when that ends first, in either case after all of its
// clients' connections have ended; or another error when accepting doesn't work any
// more. It closes l.
func (e *Exports) Serve(ctx context.Context, l net.Listener) error {
	if !e.addListener(l) {
		return errors.Join(block.ErrClosed, l.Close())
	}
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	var clients sync.WaitGroup
	defer clients.Wait()
	for {
		client, err := l.Accept()
		if err == nil {
			if place := e.welcome(client); place != nil {
				clients.Go(func() { e.serveClient(ctx, client, place) })
			}
			continue
		}
		if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ECONNABORTED) {
			e.clientError(fmt.Errorf("accept nbd client: %w", err))
			time.Sleep(100 * time.Millisecond) // until others have closed theirs
			continue
		}
		ours := e.removeListener(l)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case ours:
			return nil
		}
		return errors.Join(fmt.Errorf("accept nbd clients on %s: %w", l.Addr(), err), l.Close())
	}
}

// Drain stops serving for good: it accepts no clients, and drains the servers of all
// exports; see [Server.Drain].
func (e *Exports) Drain(ctx context.Context) error {
	e.mu.Lock()
	e.draining = true
	for l := range e.listeners {
		_ = l.Close() // Serve's Accept returns
	}
	for x := e.greeting.Front(); x != nil; x = x.Next() {
		_ = x.Value.(net.Conn).Close()
	}
	exports := e.exports
	e.mu.Unlock()
	errs := make([]error, len(exports))
	var drained sync.WaitGroup
	for i, x := range exports {
		drained.Go(func() { errs[i] = x.server.Drain(ctx) })
	}
	drained.Wait()
	return errors.Join(errs...)
}

func (e *Exports) addListener(l net.Listener) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.draining {
		return false
	}
	e.listeners[l] = struct{}{}
	return true
}

// removeListener reports whether it was Drain that closed l.
func (e *Exports) removeListener(l net.Listener) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.listeners, l)
	return e.draining
}

// welcome notes a client that begins the handshake. It returns the client's place among
// those, nil if it is not welcome and has been hung up on.
func (e *Exports) welcome(client net.Conn) *list.Element {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.draining {
		_ = client.Close()
		return nil
	}
	if e.greeting.Len() >= maxGreeting {
		// The newcomer's chances are better: this one has had its time.
		oldest := e.greeting.Front()
		_ = oldest.Value.(net.Conn).Close()
		e.greeting.Remove(oldest)
	}
	return e.greeting.PushBack(client)
}

// farewell ends what welcome began.
func (e *Exports) farewell(place *list.Element) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.greeting.Remove(place) // nothing if it has been removed
}

// claim makes room for another client in the transmission phase, until release.
func (e *Exports) claim() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.draining || e.served >= e.opts.MaxClients {
		return false
	}
	e.served++
	return true
}

func (e *Exports) release() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.served--
}

// serveClient serves one foreign client, from greeting to end.
func (e *Exports) serveClient(ctx context.Context, client net.Conn, place *list.Element) {
	h := handshake{client: client, exports: e}
	claimed := false
	h.claim = func() bool {
		claimed = e.claim()
		return claimed
	}
	var secure *tls.Conn
	if e.opts.TLS != nil {
		h.startTLS = func() (io.ReadWriter, error) {
			secure = tls.Server(client, e.opts.TLS)
			return secure, secure.HandshakeContext(ctx)
		}
	}
	err := e.shakeHands(ctx, client, &h)
	if claimed {
		defer e.release()
	}
	e.farewell(place)
	switch {
	case err != nil:
		_ = client.Close()
	case secure != nil:
		err = serveTLS(ctx, secure, h.server, h.agreed)
	default:
		err = servePlain(ctx, client, h.server, h.agreed)
	}
	if err != nil && !errors.Is(err, errGoodbye) {
		e.clientError(fmt.Errorf("nbd client%s: %w", whence(client), err))
	}
}

// shakeHands brings a client to the transmission phase, within the time allowed.
func (e *Exports) shakeHands(ctx context.Context, client net.Conn, h *handshake) error {
	stop := context.AfterFunc(ctx, func() { _ = client.Close() })
	defer stop()
	if err := client.SetDeadline(time.Now().Add(e.opts.HandshakeTimeout)); err != nil {
		return err
	}
	if err := h.run(); err != nil {
		return err
	}
	return client.SetDeadline(time.Time{})
}

// servePlain serves the transmission phase on client's own socket.
func servePlain(ctx context.Context, client net.Conn, s *Server, agreed session) error {
	plain, ok := client.(syscall.Conn)
	if !ok {
		_ = client.Close()
		return fmt.Errorf("connection of type %T: %w: want a plain socket", client, block.ErrUnsupported)
	}
	sock, err := adoptSocket(plain)
	_ = client.Close() // sock is a descriptor of its own, one that Go's poller doesn't know
	if err != nil {
		return err
	}
	return s.transmit(ctx, sock, agreed)
}

// whence says where a client comes from, if its kind of socket knows.
func whence(client net.Conn) string {
	if a, ok := client.RemoteAddr().(*net.TCPAddr); ok {
		return " at " + a.String()
	}
	return ""
}

func (e *Exports) clientError(err error) {
	if e.opts.ClientError != nil {
		e.opts.ClientError(err)
	}
}
