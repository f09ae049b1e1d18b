package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/keeper"
)

// Config configures a supervisor.
type Config struct {
	// StateDir is the supervisor's own directory, best on tmpfs: what lies in it
	// means nothing after a reboot. It is made if its parent exists.
	StateDir string
	// Binary is run with AttachRequest.Server for each volume; "" is the
	// supervisor's own.
	Binary string
	// Env is added to a server's environment.
	Env []string
	// KeeperArgs are the arguments with which Binary is run to keep descriptors (see
	// package keeper), to which "--dir DIR" is appended; nil: no keeper runs, and a
	// fuse device is lost when its server and its supervisor die together.
	KeeperArgs []string
	// Transports in order of preference; one at least.
	Transports []attach.Transport
	// Version is what Status tells.
	Version string
	// Log gets what happens; nil is slog.Default.
	Log *slog.Logger
	// StartTimeout bounds the time in which a server must have opened its device;
	// 0 is three minutes: what a busy machine does slowly is not to be begun anew.
	StartTimeout time.Duration
	// StepTimeout bounds an attach, a detach, and one attempt to recover; 0 is six
	// minutes.
	StepTimeout time.Duration
}

// SocketPath is where the supervisor of a state directory listens.
func SocketPath(stateDir string) string { return filepath.Join(stateDir, "api.sock") }

// Supervisor keeps volumes attached. See the package documentation.
type Supervisor struct {
	cfg    Config
	bootID string
	stop   context.CancelFunc

	at         func(step string) // tests end the process at a step
	maxBackoff time.Duration     // tests are impatient

	turns turns // of servers that start

	probing sync.Mutex
	works   map[string]bool // transports that have proved to work; guarded by probing

	lives sync.WaitGroup // attachments' goroutines

	keeper *keeper.Client // nil without; set by Run
	extra  []extraHandler // beside the API; see Handle

	mu          sync.Mutex
	ctx         context.Context // ends when Run is to end
	stopping    bool
	attachments map[string]*attachment
}

// New makes a supervisor, which does nothing until Run.
func New(cfg Config) (*Supervisor, error) {
	if len(cfg.Transports) == 0 {
		return nil, fmt.Errorf("supervisor: no transports are given: %w", block.ErrInvalid)
	}
	dir, err := filepath.Abs(cfg.StateDir)
	if err != nil || cfg.StateDir == "" {
		return nil, fmt.Errorf("supervisor: state directory %q: want a path: %w", cfg.StateDir, block.ErrInvalid)
	}
	cfg.StateDir = dir
	if cfg.Binary == "" {
		cfg.Binary = "/proc/self/exe" // the very build, also when the file was replaced
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.StartTimeout == 0 {
		cfg.StartTimeout = 3 * time.Minute
	}
	if cfg.StepTimeout == 0 {
		cfg.StepTimeout = 6 * time.Minute
	}
	id, err := bootID()
	if err != nil {
		return nil, fmt.Errorf("supervisor: %w", err)
	}
	return &Supervisor{
		cfg:         cfg,
		bootID:      id,
		at:          func(string) {},
		maxBackoff:  defaultMaxBackoff,
		turns:       newTurns(2 * runtime.GOMAXPROCS(0)),
		works:       map[string]bool{},
		attachments: map[string]*attachment{},
	}, nil
}

func (s *Supervisor) attachmentsDir() string { return filepath.Join(s.cfg.StateDir, "attachments") }

// Run takes over what an earlier supervisor left in the state directory, and serves
// the API until ctx ends or a client stops it. Devices and their servers live on. It
// is called once. block.ErrLocked means that another supervisor runs there.
func (s *Supervisor) Run(ctx context.Context) error {
	ctx, s.stop = context.WithCancel(ctx)
	defer s.stop()
	s.ctx = ctx
	for _, dir := range []string{s.cfg.StateDir, s.attachmentsDir()} {
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("supervisor: %w", err)
		}
	}
	protectFromPressure()
	lock, err := s.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	left, err := s.load()
	if err != nil {
		return fmt.Errorf("supervisor: %w", err)
	}
	listener, err := s.listen()
	if err != nil {
		return fmt.Errorf("supervisor: %w", err)
	}
	if s.cfg.KeeperArgs != nil {
		s.keeper = keeper.NewClient(s.keeperConfig())
		defer s.keeper.Close()
	}
	for _, a := range left {
		s.start(a)
	}
	s.lives.Go(func() { s.tellTransports(ctx) })
	s.cfg.Log.Info("supervisor runs", "stateDir", s.cfg.StateDir, "attachments", len(left))
	err = s.serveAPI(ctx, listener)
	s.stop()
	s.mu.Lock()
	s.stopping = true // so that none is started after Wait begins
	s.mu.Unlock()
	s.lives.Wait()
	s.cfg.Log.Info("supervisor ends; servers and devices live on")
	return err
}

func (s *Supervisor) keeperConfig() keeper.Config {
	dir := filepath.Join(s.cfg.StateDir, "keeper")
	return keeper.Config{
		Dir: dir, Binary: s.cfg.Binary, Args: append(slices.Clone(s.cfg.KeeperArgs), "--dir", dir),
		Env: s.cfg.Env, Log: s.cfg.Log,
	}
}

// lock makes sure that there is one supervisor for a state directory.
func (s *Supervisor) lock() (*os.File, error) {
	f, err := inheritedLock(s.cfg.StateDir)
	if f == nil && err == nil {
		f, err = lockSupervisor(s.cfg.StateDir)
	}
	if err != nil {
		return nil, fmt.Errorf("supervisor: %w", err)
	}
	return f, nil
}

// listen makes the API's socket, replacing a dead supervisor's.
func (s *Supervisor) listen() (*net.UnixListener, error) {
	path := SocketPath(s.cfg.StateDir)
	tmp := filepath.Join(s.cfg.StateDir, ".api.sock.new")
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := listenUnix("unix", tmp)
	if err != nil {
		return nil, err
	}
	// Nobody can connect before it has its mode and then its name.
	if err := errors.Join(os.Chmod(tmp, 0o600), os.Rename(tmp, path)); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// load makes attachments of the records in the state directory. A record it cannot
// read is an error, since guessing could tear down a device in use.
func (s *Supervisor) load() ([]*attachment, error) {
	entries, err := os.ReadDir(s.attachmentsDir())
	if err != nil {
		return nil, err
	}
	var left []*attachment
	for _, entry := range entries {
		dir := filepath.Join(s.attachmentsDir(), entry.Name())
		rec, err := loadRecord(dir)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			err = s.removeStale(dir, "it has no record")
		case err == nil && rec.BootID != s.bootID:
			err = s.removeStale(dir, "it is from before a reboot")
		case err == nil:
			a := newAttachment(s, rec.Request.ID)
			a.rec = rec
			a.publish()
			left = append(left, a)
		}
		if err != nil {
			return nil, err
		}
	}
	return left, nil
}

// removeStale removes a directory that no server and no device belongs to.
func (s *Supervisor) removeStale(dir, why string) error {
	s.cfg.Log.Info("attachment's directory removed", "directory", dir, "because", why)
	for _, seat := range []seat{0, 1} {
		lock, err := lockServer(dir, seat)
		if err != nil {
			return err
		}
		defer lock.Close()
	}
	return removeDir(dir)
}

// start lets an attachment live.
func (s *Supervisor) start(a *attachment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.startLocked(a)
}

func (s *Supervisor) startLocked(a *attachment) {
	s.attachments[a.id] = a
	s.lives.Go(func() { a.run(s.ctx) })
}

// submit queues a command for an attachment and waits for the answer, or until ctx
// ends: the command is carried out all the same. An attach makes an attachment that
// is not there.
func (s *Supervisor) submit(ctx context.Context, id string, c *command) (Attachment, error) {
	c.client, c.done = ctx, make(chan result, 1)
	if err := s.enqueue(id, c); err != nil {
		return Attachment{}, err
	}
	select {
	case r := <-c.done:
		return r.attachment, r.err
	case <-ctx.Done():
		return Attachment{}, ctx.Err()
	}
}

func (s *Supervisor) enqueue(id string, c *command) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping || s.ctx.Err() != nil {
		return errStopping
	}
	a := s.attachments[id]
	if a == nil && c.kind != cmdAttach {
		return notAttached(id)
	}
	if a == nil {
		a = newAttachment(s, id)
		s.startLocked(a)
	}
	a.queue = append(a.queue, c)
	if c.force {
		a.forceOnce.Do(func() { close(a.forced) })
	}
	select {
	case a.wake <- struct{}{}:
	default:
	}
	return nil
}

func notAttached(id string) error {
	return fmt.Errorf("attachment %s: %w", id, block.ErrNotFound)
}

// takeQueue takes what is queued for a.
func (s *Supervisor) takeQueue(a *attachment) []*command {
	s.mu.Lock()
	defer s.mu.Unlock()
	queue := a.queue
	a.queue = nil
	return queue
}

// unlist takes a off the list: it gets no commands any more.
func (s *Supervisor) unlist(a *attachment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.attachments[a.id] == a {
		delete(s.attachments, a.id)
	}
}

func (s *Supervisor) attach(ctx context.Context, req AttachRequest) (Attachment, error) {
	if err := req.validate(); err != nil {
		return Attachment{}, err
	}
	for {
		at, err := s.submit(ctx, req.ID, &command{kind: cmdAttach, request: req})
		if !errors.Is(err, errRetry) {
			return at, err
		}
	}
}

func (s *Supervisor) detach(ctx context.Context, id string, force bool) error {
	_, err := s.submit(ctx, id, &command{kind: cmdDetach, force: force})
	return err
}

func (s *Supervisor) resize(ctx context.Context, id string) (Attachment, error) {
	return s.submit(ctx, id, &command{kind: cmdResize})
}

func (s *Supervisor) upgrade(ctx context.Context, id string, req UpgradeRequest) (Attachment, error) {
	if err := req.validate(); err != nil {
		return Attachment{}, err
	}
	return s.submit(ctx, id, &command{kind: cmdUpgrade, upgrade: &upgrade{binary: req.Binary}})
}

func (s *Supervisor) find(id string) (*attachment, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a := s.attachments[id]; a != nil {
		return a, nil
	}
	return nil, notAttached(id)
}

func (s *Supervisor) get(id string) (Attachment, error) {
	a, err := s.find(id)
	if err != nil {
		return Attachment{}, err
	}
	return *a.view.Load(), nil
}

func (s *Supervisor) stats(ctx context.Context, id string) (ServerStats, error) {
	a, err := s.find(id)
	if err != nil {
		return ServerStats{}, err
	}
	p := a.current.Load()
	if p == nil {
		return ServerStats{}, fmt.Errorf("stats of %s: no server runs: %w", id, block.ErrBusy)
	}
	return p.stats(ctx)
}

// list returns the attachments sorted by ID.
func (s *Supervisor) list() []Attachment {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]Attachment, 0, len(s.attachments))
	for _, a := range s.attachments {
		list = append(list, *a.view.Load())
	}
	slices.SortFunc(list, func(x, y Attachment) int { return strings.Compare(x.ID, y.ID) })
	return list
}

func (s *Supervisor) status(ctx context.Context) Status {
	status := Status{Version: s.cfg.Version, PID: os.Getpid()}
	for _, t := range s.cfg.Transports {
		ts := TransportStatus{Name: t.Name()}
		if err := s.probe(ctx, t); err != nil {
			ts.Problem = err.Error()
		}
		status.Transports = append(status.Transports, ts)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	status.Attachments = len(s.attachments)
	return status
}

// prepareStop lets nothing new begin; a supervisor that has attachments only goes if they
// are to live on without it.
func (s *Supervisor) prepareStop(keep bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.attachments); n > 0 && !keep {
		return fmt.Errorf("stop supervisor: %d volumes are attached; detach them first: %w", n, block.ErrBusy)
	}
	s.stopping = true
	return nil
}

// probe asks whether a transport works, until it has once.
func (s *Supervisor) probe(ctx context.Context, t attach.Transport) error {
	s.probing.Lock()
	defer s.probing.Unlock()
	if s.works[t.Name()] {
		return nil
	}
	if err := t.Probe(ctx); err != nil {
		return err
	}
	s.works[t.Name()] = true
	return nil
}

func (s *Supervisor) transport(name string) attach.Transport {
	for _, t := range s.cfg.Transports {
		if t.Name() == name {
			return t
		}
	}
	return nil
}

// tellTransports logs which transports work here, and what the others are missing.
func (s *Supervisor) tellTransports(ctx context.Context) {
	works := 0
	for _, t := range s.cfg.Transports {
		err := s.probe(ctx, t)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			s.cfg.Log.Info("a transport does not work on this node", "transport", t.Name(), "because", err)
			continue
		}
		works++
		s.cfg.Log.Info("a transport works on this node", "transport", t.Name())
	}
	if works == 0 {
		s.cfg.Log.Error("no transport works on this node: volumes cannot be attached until one does, see above")
	}
}

// pickTransport returns the transport with a name, or, if name is "", the first that
// works and is not reluctant.
func (s *Supervisor) pickTransport(ctx context.Context, name string) (attach.Transport, error) {
	var names, problems []string
	for _, t := range s.cfg.Transports {
		names = append(names, t.Name())
		if name != "" && name != t.Name() {
			continue
		}
		err := s.probe(ctx, t)
		if reluctant, ok := t.(attach.Reluctant); ok && err == nil && name == "" {
			err = reluctant.Reluctance(ctx)
		}
		if err == nil {
			return t, nil
		}
		problems = append(problems, t.Name()+": "+err.Error())
	}
	if problems == nil {
		return nil, fmt.Errorf("transport %.40q: this supervisor has %s: %w", name, strings.Join(names, ", "), block.ErrInvalid)
	}
	return nil, fmt.Errorf("no transport works on this node (%s): %w", strings.Join(problems, "; "), block.ErrUnsupported)
}
