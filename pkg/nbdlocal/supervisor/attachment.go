package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/filter"
)

const (
	// firstBackoff and defaultMaxBackoff bound the pause before a server that keeps
	// dying, or another step that keeps failing, is tried again.
	firstBackoff      = 100 * time.Millisecond
	defaultMaxBackoff = 5 * time.Second
	// steadyAfter is how long a server must have served for its death not to count
	// as a failed start.
	steadyAfter = 2 * time.Second
	// cleanupPatience bounds undoing a failed attach, and closing an image whose
	// device was aborted.
	cleanupPatience = 15 * time.Second
	// strayPatience is how long a server that an earlier supervisor started may take
	// to be found, or to be gone.
	strayPatience = 10 * time.Second
	// endPatience is how long a server that hangs up may take to be gone, and then
	// its lock to be free.
	endPatience = 2 * time.Second
)

// attachment is the life of one: a goroutine, run, owns its state and does one thing
// at a time. Whatever it does, it first records what may come to exist by it, so that
// a successor can finish or undo it: see package documentation, "Repair".
type attachment struct {
	s   *Supervisor
	id  string
	dir string
	log *slog.Logger

	wake  chan struct{} // the queue is not empty
	queue []*command    // guarded by s.mu

	forced    chan struct{} // closed when a detach by force is wanted: all else is given up
	forceOnce sync.Once

	view    atomic.Pointer[Attachment]
	current atomic.Pointer[process] // == proc, for reading

	// What follows is run's.

	rec       record
	transport attach.Transport
	adopted   bool     // what an earlier supervisor left has been taken over
	proc      *process // the server; nil if there is none or none is known
	version   string   // what proc says of itself
	ended     int      // descriptors of proc known to have ended
	unwatch   context.CancelFunc

	problem    error
	restarts   int
	recoveries int
	steady     time.Time // since when it has been serving; zero if it isn't
	backoff    time.Duration
	retry      <-chan time.Time

	parked []*command    // attaches that wait until it is serving
	proven *os.File      // the program of the last server that served; nil if there was none
	fails  int           // of servers started to recover, one after the other
	pause  time.Duration // of the last upgrade

	attachErr error // why the attach failed that made it
	finished  bool  // nothing of it is left
}

// command asks an attachment for something.
type command struct {
	client  context.Context // ends when nobody waits for the answer any more
	kind    commandKind
	request AttachRequest  // cmdAttach
	force   bool           // cmdDetach
	upgrade *upgrade       // cmdUpgrade
	limits  *filter.Limits // cmdLimits
	done    chan result    // of capacity 1
}

type commandKind int

const (
	cmdAttach commandKind = iota
	cmdDetach
	cmdResize
	cmdUpgrade
	cmdLimits
)

type result struct {
	attachment Attachment
	err        error
}

func (c *command) reply(at Attachment, err error) { c.done <- result{at, err} }

var errStopping = fmt.Errorf("the supervisor is stopping: %w", ErrNotRunning)

// errRetry tells an attach that what was in its way is gone.
var errRetry = errors.New("attach again")

func newAttachment(s *Supervisor, id string) *attachment {
	a := &attachment{
		s:       s,
		id:      id,
		dir:     filepath.Join(s.attachmentsDir(), dirName(id)),
		log:     s.cfg.Log.With("attachment", id),
		wake:    make(chan struct{}, 1),
		forced:  make(chan struct{}),
		unwatch: func() {},
	}
	a.publish()
	return a
}

// run is the attachment's goroutine. It returns when nothing of the attachment is
// left, or when ctx ends: then everything is left as it is, for the next supervisor.
func (a *attachment) run(ctx context.Context) {
	defer a.retire()
	if a.rec.Phase != "" {
		a.attempt(ctx) // what a predecessor left
	}
	for !a.finished {
		a.publish()
		select {
		case <-ctx.Done():
			return
		case <-a.wake:
			for _, c := range a.s.takeQueue(a) {
				a.answer(ctx, c)
			}
		case <-a.serverGone():
			a.noteDeath()
		case <-a.serverFaded():
			a.noteFaded()
		case <-a.retry:
			a.retry = nil
			a.attempt(ctx)
		}
	}
}

func (a *attachment) serverGone() <-chan struct{} {
	if a.proc == nil {
		return nil
	}
	return a.proc.gone
}

func (a *attachment) serverFaded() <-chan struct{} {
	if a.proc == nil || a.rec.Phase != Serving {
		return nil
	}
	return a.proc.faded
}

// noteDeath takes note that the server is gone.
func (a *attachment) noteDeath() {
	cause := a.proc.obituary()
	a.log.Warn("server ended", "pid", a.proc.pid, "phase", a.rec.Phase, "cause", cause)
	a.setProcess(nil)
	if a.rec.Kernel != nil {
		a.interrupted(cause)
	}
}

// noteFaded takes note that a living server has lost a descriptor without a detach:
// the kernel gave up a connection, or the device.
func (a *attachment) noteFaded() {
	a.interrupted(fmt.Errorf("the kernel ended a connection to server process %d", a.proc.pid))
}

// interrupted makes recovery due.
func (a *attachment) interrupted(cause error) {
	a.problem = cause
	a.rec.Phase = Recovering // recorded when recovery begins
	if !a.steady.IsZero() && time.Since(a.steady) > steadyAfter {
		a.backoff = 0
	}
	a.steady = time.Time{} // once: what fails again before it serves is tried at longer intervals
	a.tryLater()
}

// tryLater schedules the next attempt.
func (a *attachment) tryLater() {
	a.retry = time.After(a.backoff)
	a.backoff = min(max(2*a.backoff, firstBackoff), a.s.maxBackoff)
}

// attempt does what is due, and schedules another attempt if that fails.
func (a *attachment) attempt(ctx context.Context) {
	work := a.due()
	if work == nil {
		return
	}
	stepCtx, cancel := a.stepContext(ctx)
	defer cancel()
	err := work(stepCtx)
	if err == nil || a.finished || ctx.Err() != nil {
		return
	}
	a.problem = err
	if a.due() == nil {
		return
	}
	a.log.Warn("will be tried again", "phase", a.rec.Phase, "after", a.backoff, "problem", err)
	a.tryLater()
}

// due returns what has to be done for the attachment without anybody asking.
func (a *attachment) due() func(context.Context) error {
	switch {
	case a.rec.Phase == Attaching:
		return a.rollBack
	case a.rec.Phase == Lost && (a.proc != nil || a.rec.Kernel != nil || !a.adopted):
		return a.quiesce
	case a.rec.Phase == Detaching && a.rec.Kernel == nil && !a.adopted:
		a.adopted = true // tried once: a detach tries again, and hears why not
		return a.finish
	case a.rec.Kernel != nil && !a.adopted:
		return a.adopt
	case a.rec.Phase == Recovering:
		return a.recover
	}
	return nil
}

// stepContext bounds one step, and ends it when a detach by force is wanted.
func (a *attachment) stepContext(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, a.s.cfg.StepTimeout)
	ctx, cancelCause := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-a.forced:
			cancelCause(fmt.Errorf("given up for a detach by force: %w", block.ErrBusy))
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancelCause(nil); cancel() }
}

// isForced says whether a detach by force is wanted, or under way.
func (a *attachment) isForced() bool {
	select {
	case <-a.forced:
		return true
	default:
		return false
	}
}

// cleanupContext is for what must be done also when ctx has ended.
func cleanupContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), cleanupPatience)
}

// answer carries out one command and answers it, once the list shows what it did.
func (a *attachment) answer(ctx context.Context, c *command) {
	at, err := a.handle(ctx, c)
	if errors.Is(err, errPark) {
		a.parked = slices.DeleteFunc(a.parked, func(c *command) bool { return c.client.Err() != nil })
		a.parked = append(a.parked, c)
		return
	}
	if a.finished {
		a.s.unlist(a)
	}
	a.publish()
	c.reply(at, err)
}

// retire answers who still waits when the attachment's goroutine ends.
func (a *attachment) retire() {
	a.unwatch()
	a.forgetProgram()
	a.s.unlist(a)
	for _, c := range append(a.parked, a.s.takeQueue(a)...) {
		if a.finished {
			c.reply(Attachment{}, a.afterEnd(c))
		} else {
			c.reply(Attachment{}, errStopping)
		}
	}
}

// errPark makes a command wait until the attachment is serving, or gone.
var errPark = errors.New("wait until it is serving")

func (a *attachment) handle(ctx context.Context, c *command) (Attachment, error) {
	var err error
	switch {
	case a.finished:
		err = a.afterEnd(c)
	case ctx.Err() != nil:
		err = errStopping
	case c.kind == cmdAttach:
		err = a.handleAttach(ctx, c.request)
	case c.kind == cmdDetach:
		err = a.handleDetach(ctx, c.force)
	case c.kind == cmdResize:
		err = a.resize(ctx)
	case c.kind == cmdUpgrade:
		err = a.upgrade(ctx, c.upgrade)
	case c.kind == cmdLimits:
		err = a.handleLimits(c)
	}
	if err != nil {
		return Attachment{}, err
	}
	a.publish()
	return *a.view.Load(), nil
}

// afterEnd answers a command that came when nothing was left.
func (a *attachment) afterEnd(c *command) error {
	switch {
	case c.kind == cmdDetach:
		return nil
	case c.kind == cmdAttach && a.attachErr != nil && sameRequest(a.rec.Request, c.request):
		return a.attachErr // it was asked for while the same was failing
	case c.kind == cmdAttach:
		return errRetry
	}
	return notAttached(a.id)
}

func (a *attachment) handleDetach(ctx context.Context, force bool) error {
	err := a.detach(ctx, force)
	if err != nil {
		a.log.Warn("detach", "force", force, "error", err)
	}
	if a.finished {
		a.log.Info("detached", "force", force)
		a.unpark(Attachment{}, fmt.Errorf("attach %s: detached meanwhile: %w", a.id, block.ErrClosed))
	}
	return err
}

func (a *attachment) handleAttach(ctx context.Context, req AttachRequest) error {
	switch {
	case a.rec.Phase == "":
		return a.attach(ctx, req)
	case a.rec.Phase == Attaching:
		return a.retryAfter(a.rollBack(ctx))
	case a.rec.Phase == Lost, a.rec.Phase == Detaching && a.rec.Kernel == nil:
		return a.retryAfter(a.discard(ctx))
	case a.rec.Phase == Detaching && a.adopted:
		return fmt.Errorf("attach %s: it is being detached: %w", a.id, block.ErrBusy)
	case !sameRequest(a.rec.Request, req):
		return fmt.Errorf("attach %s: it is attached with other arguments: %w", a.id, block.ErrExists)
	case a.rec.Phase == Serving && a.adopted:
		return nil
	}
	return errPark // a device whose requests wait would make its first user wait
}

// retryAfter turns success in clearing the way into errRetry.
func (a *attachment) retryAfter(err error) error {
	if err != nil {
		return fmt.Errorf("attach %s: what is left of an earlier attachment must go first: %w", a.id, err)
	}
	return errRetry
}

// unpark answers the attaches that wait.
func (a *attachment) unpark(at Attachment, err error) {
	for _, c := range a.parked {
		c.reply(at, err)
	}
	a.parked = nil
}

// sameRequest says whether a second attach asks for what the first got.
func sameRequest(have, want AttachRequest) bool {
	return slices.Equal(have.Server, want.Server) && have.ReadOnly == want.ReadOnly &&
		(want.Transport == "" || have.Transport == want.Transport)
}

// save records the attachment.
func (a *attachment) save() error {
	if err := a.rec.save(a.dir); err != nil {
		return fmt.Errorf("record attachment %s: %w", a.id, err)
	}
	return nil
}

// setPhase records a phase.
func (a *attachment) setPhase(phase Phase) error {
	a.rec.Phase = phase
	a.publish()
	return a.save()
}

// setProcess notes which server there is.
func (a *attachment) setProcess(p *process) {
	a.unwatch()
	a.unwatch = func() {}
	a.proc = p
	a.version = ""
	a.current.Store(p)
}

// nowServing records that all is well, and watches the server.
func (a *attachment) nowServing() error {
	a.problem = nil
	if err := a.setPhase(Serving); err != nil {
		return err
	}
	a.steady = time.Now()
	a.fails = 0
	a.rememberProgram()
	ctx, cancel := context.WithCancel(context.Background())
	a.unwatch = cancel
	go a.proc.watch(ctx, a.ended)
	a.publish()
	a.unpark(*a.view.Load(), nil)
	return nil
}

// publish makes the attachment's state visible: a phase is shown once it is true, and
// recorded before it is.
func (a *attachment) publish() {
	at := &Attachment{
		AttachRequest: a.rec.Request,
		Phase:         a.rec.Phase,
		Since:         a.rec.Since,
		Restarts:      a.restarts,
		Recoveries:    a.recoveries,

		UpgradePauseMillis: a.pause.Milliseconds(),
	}
	at.ID = a.id
	if k := a.rec.Kernel; k != nil {
		at.Device, at.SizeBytes, at.Transport = k.Device, k.SizeBytes, k.Transport
	}
	if a.proc != nil && a.proc.alive() {
		at.PID, at.Version = a.proc.pid, a.version
	}
	if a.problem != nil {
		at.Problem = a.problem.Error()
	}
	switch {
	case a.rec.Phase == "":
		at.Phase = Attaching
	case a.rec.Phase == Serving && !a.adopted:
		at.Phase, at.Problem = Recovering, "it is being taken over from an earlier supervisor"
	case a.rec.Phase == Lost:
		at.Problem = a.rec.Lost
		if a.rec.Kernel != nil {
			at.Phase = Recovering // it is not gone yet
		}
	}
	a.view.Store(at)
}

// startServer starts a server and returns what it says of itself. The caller has
// made sure that an earlier one is gone; the lock proves it.
func (a *attachment) startServer(ctx context.Context) (Hello, error) {
	done, err := a.s.turns.take(ctx)
	if err != nil {
		return Hello{}, fmt.Errorf("wait until other servers have started: %w", err)
	}
	defer done()
	p, err := a.spawn(ctx, a.program(), a.rec.Seat)
	if err != nil {
		return Hello{}, err
	}
	a.s.at("start: spawned")
	a.setProcess(p)
	a.ended = 0
	a.rec.PID, a.rec.PIDStart = p.pid, p.start
	a.publish()
	if err := a.save(); err != nil {
		return Hello{}, errors.Join(err, a.destroyServer(err))
	}
	a.s.at("start: recorded")
	hello, err := a.firstHello(ctx, p, func() {
		a.s.at("start: ready")
		done()
	})
	if err != nil {
		return Hello{}, errors.Join(err, a.destroyServer(err))
	}
	a.version = hello.Version
	a.s.at("start: open")
	return hello, nil
}

// spawn starts a server of a program in a seat that nobody has.
func (a *attachment) spawn(ctx context.Context, program string, seat seat) (*process, error) {
	lock, err := a.lock(ctx, seat)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	a.s.at("start: locked")
	control := seat.controlPath(a.dir)
	for _, stale := range []string{control, exitPath(control)} {
		if err := os.Remove(stale); err != nil && !os.IsNotExist(err) {
			return nil, fmt.Errorf("remove what an earlier server left: %w", err)
		}
	}
	env := slices.Concat(transportEnviron(a.rec.Request.Transport), limitsEnviron(a.rec.Request.Limits), a.s.cfg.Env)
	return spawn(program, a.rec.Request.Server, env, a.dir, seat, lock)
}

// control is the path of the server's control socket.
func (a *attachment) control() string { return a.rec.Seat.controlPath(a.dir) }

// firstHello waits until a new server has opened its device. It calls ready when the server
// needs nothing more but its device.
func (a *attachment) firstHello(ctx context.Context, p *process, ready func()) (hello Hello, err error) {
	ctx, cancel := context.WithTimeout(ctx, a.s.cfg.StartTimeout)
	defer cancel()
	if _, err = p.ready(ctx); err == nil {
		ready()
		hello, err = p.hello(ctx)
	}
	if errors.Is(err, block.ErrClosed) { // it is ending, and will have said why
		endCtx, cancel := context.WithTimeout(ctx, endPatience)
		defer cancel()
		_ = p.waitGone(endCtx)
	}
	if err != nil && !p.alive() {
		return Hello{}, p.obituary()
	}
	return hello, err
}

// lock takes the lock of a seat. A server that is gone has released it, except for
// what the kernel may still be tidying up.
func (a *attachment) lock(ctx context.Context, seat seat) (*os.File, error) {
	for start := time.Now(); ; {
		lock, err := lockServer(a.dir, seat)
		if err == nil || !errors.Is(err, block.ErrLocked) || time.Since(start) > endPatience || ctx.Err() != nil {
			return lock, err
		}
		time.Sleep(socketPoll)
	}
}

// destroyServer kills the server, if there is one: for the log, because of cause.
func (a *attachment) destroyServer(cause error) error {
	if a.proc == nil {
		return nil
	}
	if a.proc.alive() {
		a.log.Warn("server killed", "pid", a.proc.pid, "forced", a.isForced(), "cause", cause)
	}
	if err := a.proc.destroy(); err != nil {
		return err // it may yet go: a.proc stays
	}
	a.setProcess(nil)
	return nil
}

// endServer stops the server, if there is one, and kills it if it has not closed its
// image within patience. The error says that something may not be durable.
func (a *attachment) endServer(ctx context.Context) error {
	if a.proc == nil {
		return nil
	}
	stopCtx, cancel := cleanupContext(ctx)
	defer cancel()
	err := a.proc.stop(stopCtx)
	return errors.Join(err, a.destroyServer(err))
}

// findServer looks for a server that an earlier supervisor started, and ends one that is
// waiting to replace it.
func (a *attachment) findServer(ctx context.Context) error {
	if a.proc != nil {
		return nil
	}
	stray, err := a.find(ctx, a.rec.Seat.other(), 0, 0)
	if err != nil {
		return err
	}
	if stray != nil {
		a.log.Warn("server killed", "pid", stray.pid, "forced", a.isForced(), "cause", "its turn never came")
		if err := stray.destroy(); err != nil {
			return err
		}
	}
	p, err := a.find(ctx, a.rec.Seat, a.rec.PID, a.rec.PIDStart)
	if err != nil {
		return err
	}
	a.setProcess(p)
	return nil
}

// find looks for a server in a seat. One that was only just started, or is about to be
// gone, is waited for.
func (a *attachment) find(ctx context.Context, seat seat, pid int, pidStart uint64) (*process, error) {
	for start := time.Now(); ; {
		p, err := findProcess(a.dir, seat, pid, pidStart)
		if err == nil || ctx.Err() != nil || time.Since(start) > strayPatience {
			return p, err
		}
		time.Sleep(socketPoll)
	}
}

// remove forgets the attachment, of which nothing but its directory is left.
func (a *attachment) remove(ctx context.Context) error {
	lock, err := a.lock(context.WithoutCancel(ctx), a.rec.Seat)
	if err != nil {
		return err
	}
	defer lock.Close()
	a.s.at("remove: locked")
	a.dropKept()
	if err := removeDir(a.dir); err != nil {
		return err
	}
	a.s.at("remove: removed")
	a.finished = true
	return nil
}
