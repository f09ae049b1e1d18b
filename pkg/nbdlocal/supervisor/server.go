package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/filter"
)

// Opened is what a server serves.
type Opened struct {
	// Device is the server's from then on: it closes it.
	Device block.Device
	// Lost, if not nil, delivers the reason why the device must not be served any
	// longer, by this process or a successor, such as block.ErrFenced.
	Lost <-chan error
	// Stats, if not nil, returns counters that can be encoded as JSON. Like Image, it
	// may be called while the device is being closed and after that, and may hang.
	Stats func() any
	// Image, if not nil, returns what the device tells of itself.
	Image func() ImageStats
	// Limits, if not nil, returns the limits that the volume itself asks for, without
	// waiting for anything. They may change.
	Limits func() filter.Limits
}

// OpenFunc opens a server's device. It is called at most once, when somebody first asks
// for the device: a server that is to replace another is started before its turn has
// come. It stops trying when ctx ends.
type OpenFunc func(ctx context.Context) (Opened, error)

// ServeFunc serves a device on one descriptor until the kernel (or client) at the
// other end is gone, or until ctx ends: then it takes no further requests, finishes
// those it took, and returns. The file stays its caller's. It is called concurrently,
// once for every descriptor.
type ServeFunc func(ctx context.Context, file *os.File) error

// Protocol makes the ServeFunc of one device. It is called at most once in a
// process, so what all connections must share can live in what it returns.
type Protocol func(block.Device) ServeFunc

const (
	// drainPatience is how long a stop waits for requests that were taken. One that
	// takes longer is stuck in a store; the process then ends without Close, which
	// must not run beside it.
	drainPatience = 60 * time.Second
	// answerPatience is how long an ending server waits for its last answers to be
	// taken.
	answerPatience = 2 * time.Second
	// settleTime is after how long a server has what it needs in order to serve, and
	// gives back once more what only coming to that needed.
	settleTime = 5 * time.Second
	// maxControlConns bounds the clients of a control socket; the supervisor has two.
	maxControlConns = 32
)

// ServerConfig is what a server's process is made of.
type ServerConfig struct {
	// Control is the path of the control socket, as the supervisor gave it.
	Control string
	// Version of the program, for people.
	Version string
	Open    OpenFunc
	// Protocols by name, as transports call them.
	Protocols map[string]Protocol
}

// RunServer is the body of a volume's server process. It listens on the control
// socket, opens the device when it is first asked for it, and serves descriptors by the
// protocols it was given until the supervisor stops it, until the device is lost, or
// until ctx ends, which is a stop whatever is being served. It handles SIGTERM and SIGINT itself and obeys
// them only when nothing is being served: a node that drains signals everybody at
// once, and a volume in use is stopped by its supervisor, after its users.
//
// The descriptors a supervisor started the process with must stay open (one of them
// is the lock that says that the process lives), and nothing but this function may
// write to the control socket's directory.
//
// It returns nil after a stop with everything durable and the device closed. The
// outcome is also left in a file beside the control socket, for a supervisor that
// was away.
func RunServer(ctx context.Context, cfg ServerConfig) error {
	prepareServer()
	listener, err := listenUnix("unixpacket", cfg.Control)
	if err != nil {
		return err
	}
	defer listener.Close()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)

	s := newServer(cfg)
	go s.accept(listener)
	outcome := s.run(ctx, cfg.Open, signals)
	if err := writeExit(cfg.Control, outcome); err != nil {
		slog.Error("the server's outcome cannot be recorded", "error", err)
	}
	s.announce(outcome.Error.err())
	return outcome.Error.err()
}

// exitRecord is a server's outcome.
type exitRecord struct {
	Closed bool       `json:"closed"` // everything is durable and the device closed
	Lost   bool       `json:"lost,omitempty"`
	Error  *wireError `json:"failure,omitempty"`
}

func exitPath(control string) string { return control + ".exit" }

func writeExit(control string, outcome exitRecord) error {
	return writeFileAtomically(exitPath(control), marshal(outcome))
}

// server is the state of one RunServer.
type server struct {
	version   string
	protocols map[string]Protocol
	since     time.Time

	wanted   chan struct{} // closed once somebody asks for the device
	wantOnce sync.Once

	stop    context.Context // ends when a stop is due
	doStop  context.CancelFunc
	drain   context.Context // of the ServeFuncs
	doDrain context.CancelFunc

	opened  chan struct{} // closed once device and openErr are set
	device  Opened
	openErr error

	instruments instruments // of the device; see instruments.go

	ended chan struct{} // closed once outcome is set
	final error

	serves    sync.WaitGroup // ServeFuncs
	answering atomic.Int64   // requests

	mu       sync.Mutex
	refusing bool // no descriptors are taken any more
	funcs    map[string]ServeFunc
	served   []*served
	count    int // descriptors that have ended
	reason   string
	changed  chan struct{} // closed and replaced when count changes
}

// served is a descriptor being served.
type served struct {
	protocol string
	file     *os.File
}

func newServer(cfg ServerConfig) *server {
	s := &server{
		version:   cfg.Version,
		protocols: cfg.Protocols,
		wanted:    make(chan struct{}),
		opened:    make(chan struct{}),
		ended:     make(chan struct{}),
		funcs:     map[string]ServeFunc{},
		changed:   make(chan struct{}),
	}
	s.stop, s.doStop = context.WithCancel(context.Background())
	s.drain, s.doDrain = context.WithCancel(context.Background())
	return s
}

// run opens the device, serves it until there is a reason to stop, and closes it.
func (s *server) run(ctx context.Context, open OpenFunc, signals <-chan os.Signal) exitRecord {
	defer context.AfterFunc(ctx, s.doStop)()
	device, err := s.open(open, signals)
	if err != nil {
		return exitRecord{Error: toWire(err)}
	}
	lost := s.waitForEnd(device, signals)
	closeErr := s.close(device)
	if lost != nil {
		return exitRecord{Lost: true, Closed: closeErr == nil, Error: toWire(errors.Join(lost, closeErr))}
	}
	return exitRecord{Closed: closeErr == nil, Error: toWire(closeErr)}
}

// want has the device opened.
func (s *server) want() { s.wantOnce.Do(func() { close(s.wanted) }) }

// open calls f once the device is wanted, and obeys signals until it is open: nothing is
// being served yet.
func (s *server) open(f OpenFunc, signals <-chan os.Signal) (Opened, error) {
	select {
	case <-s.wanted:
	case <-signals:
		s.doStop()
	case <-s.stop.Done():
	}
	if s.stop.Err() != nil {
		s.openErr = fmt.Errorf("the server was told to end before it opened its device: %w", block.ErrClosed)
		close(s.opened)
		return Opened{}, s.openErr
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.device, s.openErr = f(s.stop)
		if s.openErr == nil {
			s.instrument()
		}
	}()
	for {
		select {
		case <-signals:
			s.doStop()
		case <-done:
			s.since = time.Now()
			close(s.opened)
			shedStartup()
			time.AfterFunc(settleTime, shedStartup)
			return s.device, s.openErr
		}
	}
}

// waitForEnd returns when serving must end: an error if the device is lost, else nil.
func (s *server) waitForEnd(device Opened, signals <-chan os.Signal) error {
	for {
		select {
		case reason := <-device.Lost:
			if reason == nil {
				reason = block.ErrFenced
			}
			return fmt.Errorf("the device is lost: %w", reason)
		case <-s.stop.Done():
			return nil
		case sig := <-signals:
			if n := s.serving(); n > 0 {
				slog.Info("signal ignored: a device is attached; its supervisor stops this server", "signal", sig, "descriptors", n)
				continue
			}
			return nil
		}
	}
}

// close ends serving and closes the device.
func (s *server) close(device Opened) error {
	s.mu.Lock()
	s.refusing = true
	s.mu.Unlock()
	s.instruments.limiter.Lift()
	s.doDrain()
	drained := make(chan struct{})
	go func() { s.serves.Wait(); close(drained) }()
	select {
	case <-drained:
	case <-time.After(drainPatience):
		return fmt.Errorf("close the device: requests still run after %v: %w", drainPatience, block.ErrBusy)
	}
	if err := device.Device.Close(); err != nil {
		return fmt.Errorf("close the device: %w", err)
	}
	return nil
}

// announce answers those who wait for the end, and gives them time to hear it.
func (s *server) announce(final error) {
	s.final = final
	close(s.ended)
	for start := time.Now(); s.answering.Load() > 0 && time.Since(start) < answerPatience; {
		time.Sleep(time.Millisecond)
	}
}

func (s *server) serving() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.served)
}

func (s *server) accept(listener *net.UnixListener) {
	slots := make(chan struct{}, maxControlConns)
	for {
		slots <- struct{}{}
		c, err := listener.AcceptUnix()
		if err != nil {
			return // closed
		}
		go func() {
			defer func() { c.Close(); <-slots }()
			if cred, err := peerCredentials(c); err != nil || cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
				return
			}
			s.converse(controlConn{c})
		}()
	}
}

// converse answers one connection's requests, one after the other.
func (s *server) converse(c controlConn) {
	for {
		var req controlRequest
		files, err := c.receive(&req)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				slog.Warn("control connection given up", "error", err)
			}
			return
		}
		s.answering.Add(1)
		resp, send, err := s.handle(req, files)
		if err != nil {
			resp = controlResponse{Error: toWire(err)}
		}
		err = c.send(resp, send)
		closeFiles(send)
		s.answering.Add(-1)
		if err != nil {
			return
		}
	}
}

// handle carries out one request. The files received are its to close, the ones it
// returns are the caller's to close.
func (s *server) handle(req controlRequest, files []*os.File) (controlResponse, []*os.File, error) {
	if req.Op != opServe {
		closeFiles(files)
	}
	switch req.Op {
	case opReady:
		return controlResponse{Version: s.version}, nil, nil
	case opHello:
		s.want()
		return s.hello()
	case opServe:
		s.want()
		return s.serve(req.Protocol, files)
	case opFiles:
		return s.files()
	case opWatch:
		return s.watch(req.Ended)
	case opStats:
		return s.stats()
	case opLimits:
		return controlResponse{}, nil, s.setLimits(req.Limits)
	case opDebug:
		return controlResponse{Debug: debugInfo(s.version)}, nil, nil
	case opStop:
		s.doStop()
		<-s.ended
		return controlResponse{}, nil, s.final
	}
	return controlResponse{}, nil, fmt.Errorf("operation %.40q of the server protocol: %w", req.Op, block.ErrUnsupported)
}

// waitOpen returns once the device is open.
func (s *server) waitOpen() error {
	<-s.opened
	return s.openErr
}

func (s *server) hello() (controlResponse, []*os.File, error) {
	if err := s.waitOpen(); err != nil {
		return controlResponse{}, nil, err
	}
	s.mu.Lock() // keeps the device open
	defer s.mu.Unlock()
	if s.refusing {
		return controlResponse{}, nil, fmt.Errorf("hello: the server is stopping: %w", block.ErrClosed)
	}
	return controlResponse{Hello: &Hello{Protocol: ServerProtocol, PID: os.Getpid(), Version: s.version, Info: s.device.Device.Info()}}, nil, nil
}

// serve starts serving descriptors: all of them, or none and an error.
func (s *server) serve(protocol string, files []*os.File) (controlResponse, []*os.File, error) {
	started := false
	defer func() {
		if !started {
			closeFiles(files)
		}
	}()
	if err := s.waitOpen(); err != nil {
		return controlResponse{}, nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refusing {
		return controlResponse{}, nil, fmt.Errorf("serve %s: the server is stopping: %w", protocol, block.ErrClosed)
	}
	if len(files) == 0 || len(s.served)+len(files) > maxDescriptors {
		return controlResponse{}, nil, fmt.Errorf("serve %s: %d descriptors beside %d, want 1 or more and at most %d together: %w",
			protocol, len(files), len(s.served), maxDescriptors, block.ErrInvalid)
	}
	f, err := s.serveFunc(protocol)
	if err != nil {
		return controlResponse{}, nil, err
	}
	for _, file := range files {
		entry := &served{protocol, file}
		s.served = append(s.served, entry)
		s.serves.Go(func() { s.forget(entry, f(s.drain, file)) })
	}
	started = true
	return controlResponse{Ended: s.count}, nil, nil
}

// serveFunc returns the function for a protocol. s.mu is held.
func (s *server) serveFunc(protocol string) (ServeFunc, error) {
	if f := s.funcs[protocol]; f != nil {
		return f, nil
	}
	make := s.protocols[protocol]
	if make == nil {
		return nil, fmt.Errorf("serve protocol %.40q: this server does not speak it: %w", protocol, block.ErrUnsupported)
	}
	f := make(s.device.Device)
	s.funcs[protocol] = f
	return f, nil
}

// forget takes a descriptor off the list that a ServeFunc has returned from.
func (s *server) forget(entry *served, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.served {
		if s.served[i] == entry {
			s.served = append(s.served[:i], s.served[i+1:]...)
			break
		}
	}
	entry.file.Close()
	if s.refusing {
		return // ended by us: who watches will see the process end
	}
	s.count++
	s.reason = "closed by the other end"
	if err != nil {
		s.reason = err.Error()
	}
	slog.Info("a descriptor has ended", "protocol", entry.protocol, "reason", s.reason, "left", len(s.served))
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *server) files() (controlResponse, []*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	resp := controlResponse{Ended: s.count}
	var originals []*os.File
	for _, entry := range s.served {
		resp.Files = append(resp.Files, entry.protocol)
		originals = append(originals, entry.file)
	}
	files, err := duplicates(originals)
	return resp, files, err
}

// watch answers when the number of descriptors that have ended is not what the
// caller knows.
func (s *server) watch(known int) (controlResponse, []*os.File, error) {
	for {
		s.mu.Lock()
		count, reason, changed := s.count, s.reason, s.changed
		s.mu.Unlock()
		if count != known {
			return controlResponse{Ended: count, Reason: reason}, nil, nil
		}
		select {
		case <-changed:
		case <-s.ended:
			return controlResponse{}, nil, fmt.Errorf("watch: the server has ended: %w", block.ErrClosed)
		}
	}
}

func (s *server) stats() (controlResponse, []*os.File, error) {
	select {
	case <-s.opened:
	default: // who asks regularly must not pile up
		return controlResponse{}, nil, fmt.Errorf("stats: the device is not open yet: %w", block.ErrBusy)
	}
	if s.openErr != nil {
		return controlResponse{}, nil, s.openErr
	}
	stats := &ServerStats{Since: s.since, Serving: map[string]int{}}
	if err := s.instruments.readInto(stats); err != nil {
		return controlResponse{}, nil, fmt.Errorf("stats: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, entry := range s.served {
		stats.Serving[entry.protocol]++
	}
	return controlResponse{Stats: stats}, nil, nil
}

// duplicates makes files of their own for the open file descriptions of others.
func duplicates(files []*os.File) ([]*os.File, error) {
	var dups []*os.File
	for _, f := range files {
		fd, err := dupFD(f)
		if err != nil {
			closeFiles(dups)
			return nil, fmt.Errorf("duplicate descriptor of %s: %w", f.Name(), err)
		}
		dups = append(dups, os.NewFile(uintptr(fd), f.Name()))
	}
	return dups, nil
}

// writeFileAtomically replaces a file so that a reader sees the old or the new
// content whole, also when the writer is killed. It is not synced: what it is for
// must survive processes, not the machine.
func writeFileAtomically(path string, content []byte) error {
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
	if err := os.WriteFile(tmp, content, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
