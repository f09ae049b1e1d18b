package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
)

// A planned upgrade replaces a server that lives by one of another program:
//
//  1. The successor is started in the other seat. It does what it can without the
//     device, and waits.
//  2. The supervisor takes duplicates of the descriptors that the server serves.
//  3. The record says "recovering": whoever finds it from here on puts things right as
//     after a crash.
//  4. The server stops: it takes no further request, answers those it took, flushes,
//     closes the image, and is waited for. Only then the record gives its seat up, and
//     the successor is asked to open the image: there is one opener at a time.
//  5. The successor gets the descriptors, and finds in them what the kernel has sent
//     since.
//
// Requests wait from 4 to 5. If the successor turns out to be no good after the server
// has stopped, what follows is a recovery, with the program that served before.

var errReplacing = errors.New("its server is being replaced")

// upgrade is what is wanted of an upgrade, and what has come of it.
type upgrade struct {
	binary string // "" is the supervisor's own program
	lazy   bool   // a server that is of that program already may stay

	from     string // version before
	replaced bool
}

// upgrade replaces the server by one of another program.
func (a *attachment) upgrade(ctx context.Context, u *upgrade) error {
	ctx, cancel := a.stepContext(ctx)
	defer cancel()
	if a.rec.Phase != Serving || !a.adopted || a.proc == nil || !a.proc.alive() {
		return fmt.Errorf("upgrade %s: it is %s: %w", a.id, a.view.Load().Phase, block.ErrBusy)
	}
	u.from = a.version
	if u.lazy && runs(a.proc.pid, a.programOf(u.binary)) {
		return nil
	}
	old, before := a.proc, a.rec.Binary
	next, version, err := a.startSuccessor(ctx, u.binary)
	if err != nil {
		return fmt.Errorf("upgrade %s: the successor does not start, nothing has changed: %w", a.id, err)
	}
	files, _, err := old.files(ctx)
	if err != nil {
		return errors.Join(fmt.Errorf("upgrade %s: %w", a.id, err), next.destroy())
	}
	begun := time.Now()
	err = a.replace(ctx, old, next, files, u.binary)
	closeFiles(files) // a socket that is kept open hides from the kernel that a server is gone
	if err != nil {
		a.log.Error("upgrade", "from", u.from, "to", version, "error", err)
		return errors.Join(fmt.Errorf("upgrade %s: %w", a.id, err), a.fallBack(ctx, next, before, err))
	}
	a.pause, u.replaced = time.Since(begun), true
	a.log.Info("upgraded", "from", u.from, "to", a.version, "pause", a.pause, "pid", a.proc.pid)
	return nil
}

// startSuccessor starts a server of a program in the seat that is free, and returns once
// it waits for its turn.
func (a *attachment) startSuccessor(ctx context.Context, binary string) (next *process, version string, err error) {
	next, err = a.spawn(ctx, a.programOf(binary), a.rec.Seat.other())
	if err != nil {
		return nil, "", err
	}
	a.s.at("upgrade: successor started")
	startCtx, cancel := context.WithTimeout(ctx, a.s.cfg.StartTimeout)
	defer cancel()
	if version, err = next.ready(startCtx); err != nil {
		if !next.alive() {
			err = next.obituary()
		}
		return nil, "", errors.Join(err, next.destroy())
	}
	a.s.at("upgrade: successor ready")
	return next, version, nil
}

// replace stops the old server and has the next one serve in its place. On an error
// either of them may be there, or none.
func (a *attachment) replace(ctx context.Context, old, next *process, files []*os.File, binary string) error {
	a.problem = errReplacing
	if err := a.setPhase(Recovering); err != nil {
		return err
	}
	a.s.at("upgrade: recorded")
	if err := old.stop(ctx); err != nil {
		return fmt.Errorf("the server does not end in order: %w", err)
	}
	a.s.at("upgrade: server gone")
	a.rec.Seat = a.rec.Seat.other()
	a.rec.Binary, a.rec.PID, a.rec.PIDStart = binary, next.pid, next.start
	a.setProcess(next)
	if err := a.save(); err != nil {
		return err
	}
	a.s.at("upgrade: successor's turn")
	hello, err := a.firstHello(ctx, next, func() {})
	if err == nil {
		err = a.checkSuccessor(hello.Info)
	}
	if err != nil {
		return fmt.Errorf("the successor: %w", err)
	}
	a.version = hello.Version
	procCtx, cancel := next.while(ctx)
	defer cancel()
	if err := a.handOver(procCtx, files); err != nil {
		return fmt.Errorf("the successor: %w", a.transportError(procCtx, err))
	}
	a.s.at("upgrade: handed over")
	return a.nowServing()
}

// handOver has the server, which is a new one, serve the descriptors that its predecessor
// left in order, if the transport can use them: else it makes others.
func (a *attachment) handOver(ctx context.Context, files []*os.File) error {
	if t, ok := a.transport.(attach.HandsOver); ok && len(files) > 0 && len(files) >= a.rec.Kernel.Conns {
		return t.HandOver(ctx, *a.rec.Kernel, files, a.hooks(a.proc))
	}
	closeFiles(files)
	return a.transport.Recover(ctx, *a.rec.Kernel, a.hooks(a.proc))
}

// fallBack recovers after an upgrade that failed, with the program that served before,
// which the record named so.
func (a *attachment) fallBack(ctx context.Context, next *process, before string, cause error) error {
	a.rec.Binary = before
	if err := next.destroy(); err != nil {
		a.interrupted(err)
		return err
	}
	if a.proc == next {
		a.setProcess(nil)
	}
	a.fails = 1 // which has recover try that program first
	a.problem = cause
	err := a.recover(ctx)
	if err != nil {
		a.interrupted(err)
		return fmt.Errorf("the earlier program does not serve either, and will be tried again: %w", err)
	}
	return nil
}

// programOf returns the path of a program that a client named; "" is the supervisor's own.
func (a *attachment) programOf(binary string) string {
	if binary == "" {
		return a.s.cfg.Binary
	}
	return binary
}

// program returns the program to start a server from. That is the one asked for; when
// servers of it fail to start, others take turns with it: the one that served last, and
// the supervisor's own.
func (a *attachment) program() string {
	programs := []string{a.programOf(a.rec.Binary)}
	if a.proven != nil {
		// By our descriptor: the file itself may have been replaced or removed.
		programs = append(programs, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), a.proven.Fd()))
	}
	if a.rec.Binary != "" {
		programs = append(programs, a.s.cfg.Binary)
	}
	return programs[a.fails%len(programs)]
}

// rememberProgram keeps the program that serves, for when another does not.
func (a *attachment) rememberProgram() {
	f, err := os.Open(exePath(a.proc.pid))
	if err != nil {
		return // it has ended
	}
	if a.proven != nil && sameFileAs(a.proven, f) {
		f.Close()
		return
	}
	a.forgetProgram()
	a.proven = f
}

func (a *attachment) forgetProgram() {
	if a.proven != nil {
		a.proven.Close()
		a.proven = nil
	}
}

func exePath(pid int) string { return fmt.Sprintf("/proc/%d/exe", pid) }

func sameFileAs(a, b *os.File) bool {
	x, errX := a.Stat()
	y, errY := b.Stat()
	return errX == nil && errY == nil && os.SameFile(x, y)
}

// runs says whether a process was started from a program.
func runs(pid int, program string) bool {
	x, errX := os.Stat(exePath(pid))
	y, errY := os.Stat(program)
	return errX == nil && errY == nil && os.SameFile(x, y)
}

func (r UpgradeRequest) validate() error {
	if r.Binary == "" {
		return nil
	}
	if !filepath.IsAbs(r.Binary) {
		return fmt.Errorf("upgrade: binary %.200q: want an absolute path, or none for the supervisor's own: %w", r.Binary, block.ErrInvalid)
	}
	if fi, err := os.Stat(r.Binary); err != nil {
		return fmt.Errorf("upgrade: binary: %w: %w", err, block.ErrNotFound)
	} else if !fi.Mode().IsRegular() || fi.Mode()&0o111 == 0 {
		return fmt.Errorf("upgrade: binary %.200q: want an executable file: %w", r.Binary, block.ErrInvalid)
	}
	return nil
}

// upgradeAll upgrades one attachment after the other, and stops at a successor that is no
// good: it would be none for the others.
func (s *Supervisor) upgradeAll(ctx context.Context, req UpgradeRequest) ([]UpgradeResult, error) {
	if err := req.validate(); err != nil {
		return nil, err
	}
	results := []UpgradeResult{}
	for _, at := range s.list() {
		if ctx.Err() != nil {
			break
		}
		u := &upgrade{binary: req.Binary, lazy: true}
		now, err := s.submit(ctx, at.ID, &command{kind: cmdUpgrade, upgrade: u})
		if err != nil && s.unlisted(at.ID) {
			continue // detached meanwhile
		}
		result := UpgradeResult{ID: at.ID, From: at.Version, To: at.Version}
		if err != nil {
			result.Problem = err.Error()
		} else {
			result.From, result.To, result.Replaced = u.from, now.Version, u.replaced
		}
		if result.Replaced {
			result.PauseMillis = now.UpgradePauseMillis
		}
		results = append(results, result)
		if err != nil && !errors.Is(err, block.ErrBusy) {
			break
		}
	}
	return results, nil
}

// unlisted says whether there is no such attachment.
func (s *Supervisor) unlisted(id string) bool {
	_, err := s.find(id)
	return err != nil
}
