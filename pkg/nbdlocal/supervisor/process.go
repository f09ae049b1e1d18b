package supervisor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Files of an attachment's directory.
const (
	recordFile = "record.json"
	logFile    = "server.log"
	oldLogFile = "server.log.old"
)

// seat is one of the two places for a server that an attachment's directory has, so that
// a successor can be there while the server that it is to replace still serves.
type seat int

func (s seat) other() seat { return 1 - s }

// lockPath and controlPath are the server's lock and control socket.
func (s seat) lockPath(dir string) string    { return s.path(dir, ".lock") }
func (s seat) controlPath(dir string) string { return s.path(dir, ".sock") }

func (s seat) path(dir, kind string) string {
	if s == 0 {
		return filepath.Join(dir, "server"+kind)
	}
	return filepath.Join(dir, fmt.Sprintf("server-%d%s", s, kind))
}

const (
	// socketPoll is how often a new server is tried until its socket is there.
	socketPoll = 2 * time.Millisecond
	// killPatience is how long a killed server may take to be gone: longer only if
	// a thread of it is stuck in the kernel.
	killPatience = 10 * time.Second
	// maxLogBytes is the size at which a log gives way to a new one when its
	// server is started again.
	maxLogBytes = 1 << 20
)

// lockServer takes the lock that says that a server has a seat of the attachment whose
// directory is dir; block.ErrLocked if one does.
//
// The lock is an open file description's: the supervisor takes it before it starts a
// server, which inherits it and holds it until its last thread is gone. So there is
// no moment at which a server exists, or may come to exist, that a later supervisor
// would not see, and no process id to mistake.
func lockServer(dir string, seat seat) (*os.File, error) {
	path := seat.lockPath(dir)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open server lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: a server holds it: %w", path, block.ErrLocked)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

// process is a volume's server process, started by this supervisor or an earlier one.
type process struct {
	pid     int
	start   uint64 // from /proc: tells a process from a later one with its id
	control string
	kill    func() error
	gone    chan struct{} // closed when its last thread is gone
	end     string        // how it ended, where that is known; valid once gone
	faded   chan struct{} // gets a value when a descriptor it served has ended
}

// spawn starts binary with args as a session of its own; dir is the attachment's
// directory, and lock the lock of the seat in it.
func spawn(binary string, args, env []string, dir string, seat seat, lock *os.File) (*process, error) {
	log, err := openLog(dir)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	control := seat.controlPath(dir)
	cmd := exec.Command(binary, append(append([]string(nil), args...), "--control", control)...)
	cmd.Args[0] = "csi-imgdisk"
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{lock}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start server %s: %w", binary, err)
	}
	p := newProcess(cmd.Process.Pid, control)
	p.start, _ = startTime(p.pid) // our child: its id is not given to another
	p.kill = cmd.Process.Kill
	go func() {
		_ = cmd.Wait()
		p.end = cmd.ProcessState.String()
		close(p.gone)
	}()
	return p, nil
}

func newProcess(pid int, control string) *process {
	return &process{pid: pid, control: control, gone: make(chan struct{}), faded: make(chan struct{}, 1)}
}

func openLog(dir string) (*os.File, error) {
	path := filepath.Join(dir, logFile)
	if fi, err := os.Stat(path); err == nil && fi.Size() > maxLogBytes {
		if err := os.Rename(path, filepath.Join(dir, oldLogFile)); err != nil {
			return nil, fmt.Errorf("rotate server log: %w", err)
		}
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open server log: %w", err)
	}
	return f, nil
}

// findProcess returns the server that an earlier supervisor started in a seat of the
// attachment in dir, nil if there is none. pid and start are what was recorded of it.
func findProcess(dir string, seat seat, pid int, start uint64) (*process, error) {
	lock, err := lockServer(dir, seat)
	if err == nil {
		lock.Close()
		return nil, nil
	}
	if !errors.Is(err, block.ErrLocked) {
		return nil, err
	}
	control := seat.controlPath(dir)
	p, dialErr := processBehind(control)
	if dialErr == nil {
		return p, nil
	}
	// It has not come as far as listening, or is past it. It can be waited for, and
	// killed, if it is known.
	if p, err := knownProcess(control, pid, start); err == nil {
		return p, nil
	}
	return nil, fmt.Errorf("the server of an earlier supervisor runs and does not answer: %w", dialErr)
}

// processBehind finds the process that listens on a control socket.
func processBehind(control string) (*process, error) {
	c, err := dialUnix("unixpacket", control)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	cred, err := peerCredentials(c)
	if err != nil {
		return nil, fmt.Errorf("credentials of the server behind %s: %w", control, err)
	}
	p, err := openProcess(control, int(cred.Pid))
	if err != nil {
		return nil, err
	}
	// The id could have been another process's by the time it was opened, if the
	// listener were gone by then; but then the connection would be closed.
	if hungUp(c) {
		return nil, fmt.Errorf("server behind %s: %w", control, block.ErrClosed)
	}
	return p, nil
}

// knownProcess opens a process by its recorded id.
func knownProcess(control string, pid int, start uint64) (*process, error) {
	if pid == 0 {
		return nil, fmt.Errorf("no process id is recorded: %w", block.ErrNotFound)
	}
	p, err := openProcess(control, pid)
	if err != nil {
		return nil, err
	}
	if p.start != start {
		return nil, fmt.Errorf("process %d is another one: %w", pid, block.ErrNotFound)
	}
	return p, nil
}

// openProcess makes a process of one that is not a child.
func openProcess(control string, pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	start, err := startTime(pid)
	if err == nil && pidfdReadable(uintptr(fd)) {
		err = fmt.Errorf("process %d has ended: %w", pid, block.ErrNotFound)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	p := newProcess(pid, control)
	p.start = start
	handle := os.NewFile(uintptr(fd), "pidfd")
	raw, err := handle.SyscallConn()
	if err != nil {
		handle.Close()
		return nil, fmt.Errorf("poll process %d: %w", pid, err)
	}
	p.kill = func() error { return signalPidfd(raw, unix.SIGKILL) }
	go func() {
		defer handle.Close()
		_ = raw.Read(pidfdReadable)
		close(p.gone)
	}()
	return p, nil
}

// pidfdReadable says whether the process has ended.
func pidfdReadable(fd uintptr) bool {
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(poll, 0)
	return err != nil && !errors.Is(err, unix.EINTR) || n > 0
}

func signalPidfd(raw syscall.RawConn, sig unix.Signal) error {
	var sendErr error
	if err := raw.Control(func(fd uintptr) { sendErr = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return nil // closed: it is gone
	}
	if errors.Is(sendErr, unix.ESRCH) {
		return nil
	}
	return sendErr
}

// startTime returns when a process was started, in clock ticks since boot.
func startTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("read start time of process %d: %w", pid, err)
	}
	// proc(5): field 22, and field 2 is a name in parentheses with anything in it.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const startField = 22 - 3
	if len(fields) <= startField {
		return 0, fmt.Errorf("start time of process %d: /proc gives %d fields", pid, len(fields))
	}
	return strconv.ParseUint(fields[startField], 10, 64)
}

// alive says whether the process has a thread left.
func (p *process) alive() bool {
	select {
	case <-p.gone:
		return false
	default:
		return true
	}
}

// waitGone returns once the process is gone, or when ctx ends.
func (p *process) waitGone(ctx context.Context) error {
	select {
	case <-p.gone:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the end of server process %d: %w", p.pid, ctx.Err())
	}
}

// destroy kills the process and waits until it is gone.
func (p *process) destroy() error {
	if err := p.kill(); err != nil && p.alive() {
		return fmt.Errorf("kill server process %d: %w", p.pid, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), killPatience)
	defer cancel()
	if err := p.waitGone(ctx); err != nil {
		return fmt.Errorf("server process %d was killed and is not gone after %v; its store may hang: %w", p.pid, killPatience, block.ErrBusy)
	}
	return nil
}

// while returns a context that also ends with the process.
func (p *process) while(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-p.gone:
			cancel(fmt.Errorf("server process %d has ended: %w", p.pid, block.ErrClosed))
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil) }
}

// call sends one request and returns the answer, whose files are the caller's. It
// waits for the socket of a process that is just starting.
func (p *process) call(ctx context.Context, req controlRequest, files []*os.File) (controlResponse, []*os.File, error) {
	ctx, cancel := p.while(ctx)
	defer cancel()
	c, err := p.dial(ctx)
	if err != nil {
		return controlResponse{}, nil, fmt.Errorf("server's %s: %w", req.Op, err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
	var resp controlResponse
	var received []*os.File
	if err = c.send(req, files); err == nil {
		received, err = c.receive(&resp)
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) {
		err = fmt.Errorf("the server closed the connection: %w", block.ErrClosed)
	}
	if err != nil {
		return controlResponse{}, nil, fmt.Errorf("server's %s: %w", req.Op, err)
	}
	if resp.Error != nil {
		closeFiles(received)
		return controlResponse{}, nil, resp.Error.err()
	}
	return resp, received, nil
}

func (p *process) dial(ctx context.Context) (controlConn, error) {
	for {
		c, err := dialUnix("unixpacket", p.control)
		if err == nil {
			return controlConn{c}, nil
		}
		select {
		case <-ctx.Done():
			return controlConn{}, context.Cause(ctx)
		case <-time.After(socketPoll):
		}
	}
}

// ready returns once the process has come as far as it can without its device, with the
// program's version.
func (p *process) ready(ctx context.Context) (version string, err error) {
	resp, files, err := p.call(ctx, controlRequest{Op: opReady}, nil)
	closeFiles(files)
	return resp.Version, err
}

// hello has the device opened, if it is not yet, and returns once it is.
func (p *process) hello(ctx context.Context) (Hello, error) {
	resp, files, err := p.call(ctx, controlRequest{Op: opHello}, nil)
	closeFiles(files)
	if err != nil {
		return Hello{}, err
	}
	if resp.Hello == nil || resp.Hello.Protocol != ServerProtocol {
		return Hello{}, fmt.Errorf("server process %d does not speak version %d of the server protocol: %w", p.pid, ServerProtocol, block.ErrUnsupported)
	}
	return *resp.Hello, nil
}

func (p *process) serve(ctx context.Context, protocol string, files []*os.File) (ended int, err error) {
	resp, extra, err := p.call(ctx, controlRequest{Op: opServe, Protocol: protocol}, files)
	closeFiles(extra)
	return resp.Ended, err
}

// files returns what the server is serving, for the caller to close, and how many
// descriptors have ended in its life.
func (p *process) files(ctx context.Context) (files []*os.File, ended int, err error) {
	resp, files, err := p.call(ctx, controlRequest{Op: opFiles}, nil)
	return files, resp.Ended, err
}

func (p *process) stats(ctx context.Context) (ServerStats, error) {
	resp, files, err := p.call(ctx, controlRequest{Op: opStats}, nil)
	closeFiles(files)
	if err != nil {
		return ServerStats{}, err
	}
	if resp.Stats == nil {
		return ServerStats{}, fmt.Errorf("server process %d has no counters: %w", p.pid, block.ErrUnsupported)
	}
	return *resp.Stats, nil
}

// stop makes the server end, and returns once it is gone: nil if everything is
// durable and the device closed.
func (p *process) stop(ctx context.Context) error {
	_, files, err := p.call(ctx, controlRequest{Op: opStop}, nil)
	closeFiles(files)
	if goneErr := p.waitGone(ctx); goneErr != nil {
		return errors.Join(err, goneErr)
	}
	if err == nil {
		return nil
	}
	if outcome, ok := readExit(p.control); ok {
		return outcome.Error.err() // it had ended by itself, or its answer was lost
	}
	return err
}

// watch puts a value into p.faded whenever more descriptors have ended than known,
// until the process is gone or ctx ends.
func (p *process) watch(ctx context.Context, known int) {
	for ctx.Err() == nil && p.alive() {
		resp, files, err := p.call(ctx, controlRequest{Op: opWatch, Ended: known}, nil)
		closeFiles(files)
		if err != nil {
			select {
			case <-ctx.Done():
			case <-p.gone:
			case <-time.After(time.Second):
			}
			continue
		}
		known = resp.Ended
		select {
		case p.faded <- struct{}{}:
		default: // one is waiting to be taken
		}
	}
}

// readExit returns the outcome that the last server on a control socket left.
func readExit(control string) (exitRecord, bool) {
	var outcome exitRecord
	content, err := os.ReadFile(exitPath(control))
	if err != nil || json.Unmarshal(content, &outcome) != nil {
		return exitRecord{}, false
	}
	return outcome, true
}

// obituary says why a server that is gone has ended, as well as that can be known.
func (p *process) obituary() error {
	if outcome, ok := readExit(p.control); ok && outcome.Error != nil {
		return outcome.Error.err()
	}
	how := p.end
	if how == "" {
		how = "ended" // not our child: its status is not for us to know
	}
	if line := lastLine(filepath.Join(filepath.Dir(p.control), logFile)); line != "" {
		how += "; its last words: " + line
	}
	return fmt.Errorf("server process %d: %s", p.pid, how)
}

// lastLine returns the last line of a log, cut to a length fit for an error.
func lastLine(path string) string {
	const maxBytes = 300
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	tail := make([]byte, maxBytes)
	size, _ := f.Seek(0, io.SeekEnd)
	n, _ := f.ReadAt(tail, max(0, size-maxBytes))
	text := strings.TrimSpace(strings.ToValidUTF8(string(tail[:n]), ""))
	return text[strings.LastIndexByte(text, '\n')+1:]
}
