package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

const (
	patience   = 60 * time.Second // for anything to happen on a busy machine
	imageBytes = 1 << 20
)

// harness is a supervisor with the fake transport, and what its clients see.
type harness struct {
	t        *testing.T
	ctx      context.Context
	dir      string
	stateDir string
	kernel   *fakeTransport
	real     string              // name of a real transport, used instead
	prepare  func(s *Supervisor) // changes one that is to run here
	client   *Client

	cmd    *exec.Cmd     // of a supervisor that is a process
	cancel func()        // of one that runs here
	ended  chan struct{} // closed when either has ended
}

func newHarness(t *testing.T) *harness {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	dir := t.TempDir()
	h := &harness{t: t, ctx: ctx, dir: dir, stateDir: filepath.Join(dir, "state"), kernel: &fakeTransport{dir: filepath.Join(dir, "kernel")}}
	if err := os.Mkdir(h.kernel.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	h.client = NewClient(SocketPath(h.stateDir))
	t.Cleanup(h.cleanUp)
	return h
}

func (h *harness) values() map[string]string {
	return map[string]string{"stateDir": h.stateDir, "kernel": h.kernel.dir, "transport": h.real}
}

// startHere runs a supervisor in this process, where the race detector sees it.
func (h *harness) startHere() {
	h.t.Helper()
	log := h.openLog()
	s, err := New(testConfig(h.values(), log))
	if err != nil {
		h.t.Fatal(err)
	}
	s.maxBackoff = firstBackoff
	if h.prepare != nil {
		h.prepare(s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	h.cancel, h.ended, h.cmd = cancel, ended, nil
	go func() {
		defer close(ended)
		defer log.Close()
		if err := s.Run(ctx); err != nil {
			h.t.Errorf("supervisor: %v", err)
		}
	}()
	h.waitAnswer()
}

// startProcess runs a supervisor as a process, which can be killed.
func (h *harness) startProcess(extra ...string) {
	h.t.Helper()
	args := []string{"test-supervisor"}
	for name, value := range h.values() {
		args = append(args, name+"="+value)
	}
	cmd := exec.Command(os.Args[0], append(args, extra...)...)
	log := h.openLog()
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), testEnv)
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	ended := make(chan struct{})
	h.cmd, h.ended, h.cancel = cmd, ended, nil
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	h.waitAnswer()
}

func (h *harness) openLog() *os.File {
	h.t.Helper()
	log, err := os.OpenFile(filepath.Join(h.dir, "supervisor.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		h.t.Fatal(err)
	}
	return log
}

// waitAnswer waits until the supervisor answers, or has ended.
func (h *harness) waitAnswer() {
	h.t.Helper()
	h.eventually("an answer of the supervisor", func() error {
		if h.hasEnded() {
			return nil
		}
		return answers(h.ctx, h.client)
	})
}

func (h *harness) hasEnded() bool {
	select {
	case <-h.ended:
		return true
	default:
		return false
	}
}

// end ends the supervisor: with SIGTERM, or its context.
func (h *harness) end() {
	if h.cmd != nil {
		_ = h.cmd.Process.Signal(syscall.SIGTERM)
	}
	h.waitEnd()
}

// kill kills the supervisor, which is a process.
func (h *harness) kill() {
	_ = h.cmd.Process.Kill()
	h.waitEnd()
}

func (h *harness) waitEnd() {
	if h.cancel != nil {
		h.cancel()
	}
	select {
	case <-h.ended:
	case <-time.After(patience):
		h.t.Fatal("the supervisor does not end")
	}
}

func (h *harness) eventually(what string, f func() error) {
	h.t.Helper()
	var err error
	for start := time.Now(); time.Since(start) < patience; time.Sleep(5 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	h.t.Fatalf("%s: still after %v: %v", what, patience, err)
}

// newImage makes an image file and returns its path.
func (h *harness) newImage(name string) string {
	path := filepath.Join(h.dir, name)
	h.write(path, strings.Repeat("x", imageBytes))
	return path
}

// newProgram makes a copy of this test's binary, which serves under its name as version.
func (h *harness) newProgram(name string) string {
	h.t.Helper()
	path := filepath.Join(h.dir, name)
	// Not by this process, whose children would hold it open for writing.
	if out, err := exec.Command("cp", "--reflink=auto", "/proc/"+strconv.Itoa(os.Getpid())+"/exe", path).CombinedOutput(); err != nil {
		h.t.Fatalf("copy of this binary: %v: %s", err, out)
	}
	return path
}

func (h *harness) write(path, content string) {
	h.t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		h.t.Fatal(err)
	}
}

func (h *harness) remove(path string) {
	h.t.Helper()
	if err := os.Remove(path); err != nil {
		h.t.Fatal(err)
	}
}

// request asks for an image to be attached under its path.
func request(image string) AttachRequest {
	return AttachRequest{ID: image, Server: []string{"test-server", "image=" + image}}
}

func (h *harness) attach(image string) Attachment {
	h.t.Helper()
	r := request(image)
	r.Transport = h.real // not all are chosen without being asked for
	at, err := h.client.Attach(h.ctx, r)
	if err != nil {
		h.t.Fatal(err)
	}
	if at.Phase != Serving || at.PID == 0 || at.Device == "" || at.Problem != "" {
		h.t.Fatalf("attached: %+v", at)
	}
	return at
}

func (h *harness) detach(image string) {
	h.t.Helper()
	if err := h.client.Detach(h.ctx, image, false); err != nil {
		h.t.Fatal(err)
	}
	h.checkGone(image)
}

// waitPhase waits until an attachment is in a phase, and returns it.
func (h *harness) waitPhase(id string, phase Phase) Attachment {
	h.t.Helper()
	var at Attachment
	h.eventually("phase "+string(phase), func() (err error) {
		if at, err = h.client.Get(h.ctx, id); err != nil {
			return err
		}
		if at.Phase != phase {
			return fmt.Errorf("%+v", at)
		}
		return nil
	})
	return at
}

// waitRestart waits until an attachment is served by another process than pid.
func (h *harness) waitRestart(id string, pid int) Attachment {
	h.t.Helper()
	var at Attachment
	h.eventually("another server", func() (err error) {
		if at, err = h.client.Get(h.ctx, id); err != nil {
			return err
		}
		if at.Phase != Serving || at.PID == pid || at.PID == 0 {
			return fmt.Errorf("%+v", at)
		}
		return nil
	})
	return at
}

func killServer(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatalf("kill server %d: %v", pid, err)
	}
}

// opening is what one server did with an image.
type opening struct {
	pid    string
	events []string // such as "open", "close"
}

// openings returns what became of an image's openings, in the order in which they began.
func (h *harness) openings(image string) []opening {
	content, err := os.ReadFile(image + ".events")
	if err != nil {
		return nil // it was never opened
	}
	var list []opening
	for line := range strings.Lines(string(content)) {
		what, pid, _ := strings.Cut(strings.TrimSpace(line), " ")
		if len(list) == 0 || list[len(list)-1].pid != pid {
			list = append(list, opening{pid: pid})
		}
		last := &list[len(list)-1]
		last.events = append(last.events, what)
	}
	return list
}

// events returns the events of all of an image's openings.
func (h *harness) events(image string) []string {
	var events []string
	for _, o := range h.openings(image) {
		events = append(events, o.events...)
	}
	return events
}

// checkGone checks that nothing is left of an attachment, and that its image was never
// open twice and was closed properly by the last that opened it.
func (h *harness) checkGone(image string) {
	h.t.Helper()
	if _, err := os.Stat(h.kernel.path(image, ".dev")); err == nil {
		h.t.Errorf("%s: the device is left", image)
	}
	dir := filepath.Join(h.stateDir, "attachments", dirName(image))
	if _, err := os.Stat(dir); err == nil {
		h.t.Errorf("%s: directory %s is left", image, dir)
	}
	openings := h.openings(image)
	if slices.Contains(h.events(image), "conflict") {
		h.t.Errorf("%s: opened while it was open: %v", image, openings)
	}
	if len(openings) > 0 {
		h.checkClosed(image, openings[len(openings)-1])
	}
}

// checkClosed checks that a server closed the image that it had opened, unless it was
// killed for a detach by force, which does not wait for that.
func (h *harness) checkClosed(image string, o opening) {
	h.t.Helper()
	if o.events[len(o.events)-1] != "close" && !h.killedByForce(o.pid) {
		h.t.Errorf("%s: not closed by server %s: %v", image, o.pid, h.openings(image))
	}
}

// killedByForce says whether the supervisor killed a server for a detach by force.
func (h *harness) killedByForce(pid string) bool {
	h.t.Helper()
	log, err := os.ReadFile(filepath.Join(h.dir, "supervisor.log"))
	if err != nil {
		h.t.Fatal(err)
	}
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, `msg="server killed"`) && strings.Contains(line, " pid="+pid+" forced=true ") {
			return true
		}
	}
	return false
}

// cleanUp leaves no process behind, whatever the test came to.
func (h *harness) cleanUp() {
	if h.ended == nil {
		return
	}
	if h.t.Failed() {
		if log, err := os.ReadFile(filepath.Join(h.dir, "supervisor.log")); err == nil {
			h.t.Logf("supervisor's log:\n%s", log)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	h.ctx = ctx // the test's may have ended
	if h.hasEnded() {
		h.startProcess()
	}
	list, err := h.client.List(ctx)
	if err != nil {
		h.t.Errorf("clean up: %v", err)
	}
	for _, at := range list {
		if err := h.client.Detach(ctx, at.ID, true); err != nil && !errors.Is(err, block.ErrNotFound) {
			h.t.Errorf("clean up: %v", err)
		}
	}
	h.end()
}
