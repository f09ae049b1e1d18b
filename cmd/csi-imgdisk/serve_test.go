package main

import (
	"bufio"
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

// served is a running `csi-imgdisk serve`.
type served struct {
	t      *testing.T
	cmd    *exec.Cmd
	uri    string
	stderr bytes.Buffer
	ended  bool
}

// startServe serves an image and returns once clients can connect.
func startServe(t *testing.T, image, dir string, args ...string) *served {
	t.Helper()
	socket := filepath.Join(dir, "nbd.sock")
	s := &served{t: t, uri: "nbd+unix:///?socket=" + socket}
	s.cmd = exec.Command(binary, append([]string{"serve", image, "--socket", socket, "--run-dir", filepath.Join(dir, "run")}, args...)...)
	s.cmd.Stderr = &s.stderr
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.end(syscall.SIGKILL) })
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "serving ") {
		s.end(syscall.SIGKILL)
		t.Fatalf("serve %s: %q, %v\n%s", image, line, err, &s.stderr)
	}
	return s
}

// end ends the server by a signal and returns its exit code.
func (s *served) end(signal os.Signal) int {
	if !s.ended {
		s.ended = true
		_ = s.cmd.Process.Signal(signal) // it may have ended
		_ = s.cmd.Wait()                 // how is told by the exit code
	}
	return s.cmd.ProcessState.ExitCode()
}

// The writes of a kill test: slots of slotBytes, each in a place of its own, so that
// grains are allocated, filled and shared.
const (
	slotBytes  = 4096
	slotStride = 24 << 10
	slots      = 2048
	imageBytes = 64 << 20
)

// write is one write of a client: a slot filled with a byte; or a flush.
type write struct {
	slot    int
	pattern byte
	flush   bool
}

func (w write) command() string {
	if w.flush {
		return "flush\n"
	}
	return fmt.Sprintf("write -P %d %d %d\n", w.pattern, w.slot*slotStride, slotBytes)
}

// randomWrites returns n writes with a flush here and there.
func randomWrites(r *rand.Rand, n int) []write {
	var list []write
	for len(list) < n {
		if r.IntN(400) == 0 {
			list = append(list, write{flush: true})
		}
		list = append(list, write{slot: r.IntN(slots), pattern: byte(1 + r.IntN(255))})
	}
	return list
}

var (
	wroteLine = regexp.MustCompile(`^(qemu-io> )*wrote `)
	errorLine = regexp.MustCompile(`failed|error|Broken`)
)

// replay has qemu-io do writes, one after the other, and calls progress with how many
// have completed. It returns that number when qemu-io ends, or reports a failure.
func replay(t *testing.T, uri string, writes []write, progress func(completed int)) int {
	t.Helper()
	cmd := exec.Command(testenv.Oracle(t, "qemu-io"), "-f", "raw", uri)
	var script strings.Builder
	var completes []int // by line of output: how many writes have completed with it
	for i, w := range writes {
		script.WriteString(w.command())
		if !w.flush {
			completes = append(completes, i+1)
		}
	}
	cmd.Stdin = strings.NewReader(script.String())
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	completed, line := 0, 0
	for scanner := bufio.NewScanner(stdout); scanner.Scan(); {
		switch text := scanner.Text(); {
		case wroteLine.MatchString(text):
			completed = completes[line]
			line++
			progress(completed)
		case errorLine.MatchString(text):
			_ = cmd.Process.Kill()
		}
	}
	_ = cmd.Wait() // it fails when its server is killed
	return completed
}

// contents is what the slots of an image hold; an inconsistent slot fails the test.
func contents(t *testing.T, source ...string) []byte {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "contents.raw")
	tool(t, testenv.Oracle(t, "qemu-img"), append(append([]string{"convert", "-O", "raw"}, source...), raw)...)
	b, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(raw)
	got := make([]byte, slots)
	for i := range got {
		slot := b[i*slotStride:][:slotBytes]
		got[i] = slot[0]
		if strings.Trim(string(slot), string(slot[:1])) != "" {
			t.Errorf("slot %d holds parts of several writes", i)
		}
	}
	return got
}

// verify checks that slots hold what writes[:settled] left there, or what one of
// writes[settled:attempted] may have.
func verify(t *testing.T, what string, got []byte, writes []write, settled, attempted int) {
	t.Helper()
	accepted := make([]map[byte]bool, slots)
	for i := range accepted {
		accepted[i] = map[byte]bool{0: true}
	}
	for i, w := range writes[:min(attempted, len(writes))] {
		switch {
		case w.flush:
		case i < settled:
			accepted[w.slot] = map[byte]bool{w.pattern: true}
		default:
			accepted[w.slot][w.pattern] = true
		}
	}
	wrong := 0
	for slot, value := range got {
		if !accepted[slot][value] {
			wrong++
		}
	}
	if wrong > 0 {
		t.Errorf("%s: %d of %d slots do not hold what was written", what, wrong, slots)
	}
}

// lastFlush returns how many of the completed writes are covered by a completed flush.
func lastFlush(writes []write, completed int) int {
	for i := completed - 1; i >= 0; i-- {
		if writes[i].flush {
			return i
		}
	}
	return 0
}

func TestServe_KilledUnderLoad(t *testing.T) {
	testenv.Oracle(t, "qemu-img")
	r := testenv.Rand(t)
	rounds, count := 3, 10000
	if testing.Short() {
		rounds, count = 1, 3000
	}
	for round := range rounds {
		t.Run(strconv.Itoa(round), func(t *testing.T) { killUnderLoad(t, r, count) })
	}
}

// killUnderLoad kills a server at a random moment of many writes. Without the journal
// the image must be good and hold what was flushed; with it, what was completed.
func killUnderLoad(t *testing.T, r *rand.Rand, count int) {
	dir := t.TempDir()
	image := filepath.Join(dir, "x.vmdk")
	ok(t, "image", "create", image, strconv.Itoa(imageBytes))
	server := startServe(t, image, dir)
	writes := randomWrites(r, count)
	killAt, delay := r.IntN(count), time.Duration(r.IntN(2000))*time.Microsecond
	completed := replay(t, server.uri, writes, func(completed int) {
		if completed >= killAt && !server.ended {
			time.Sleep(delay)
			server.end(syscall.SIGKILL)
		}
	})
	// What qemu-io had sent, but not yet told, may have been done, too: it is one write.
	attempted := completed + 2
	flushed := lastFlush(writes, completed)
	t.Logf("killed after %d of %d writes, %d flushed", completed, count, flushed)
	tool(t, "qemu-img", "check", image)
	verify(t, "flushed, without the journal", contents(t, image), writes, flushed, attempted)

	server = startServe(t, image, dir)
	verify(t, "completed, with the journal", contents(t, "-f", "raw", server.uri), writes, completed, attempted)
	if code := server.end(syscall.SIGTERM); code != 0 {
		t.Errorf("the second server ended with %d: %s", code, &server.stderr)
	}
	tool(t, "qemu-img", "check", image)
	verify(t, "after a clean end", contents(t, image), writes, completed, attempted)
	if left, _ := filepath.Glob(filepath.Join(dir, "run", "redo", "*")); len(left) > 0 {
		t.Errorf("a clean end leaves journals: %v", left)
	}
}

func TestServe_DrainsOnSIGTERM(t *testing.T) {
	testenv.Oracle(t, "qemu-io")
	dir := t.TempDir()
	image := filepath.Join(dir, "x.vmdk")
	ok(t, "image", "create", image, strconv.Itoa(imageBytes))
	server := startServe(t, image, dir)
	writes := randomWrites(testenv.Rand(t), 200)
	if n := replay(t, server.uri, writes, func(int) {}); n != len(writes) {
		t.Fatalf("%d of %d writes completed", n, len(writes))
	}
	if code := server.end(syscall.SIGTERM); code != 0 {
		t.Errorf("exit code %d: %s", code, &server.stderr)
	}
	tool(t, "qemu-img", "check", image)
	verify(t, "after SIGTERM", contents(t, image), writes, len(writes), len(writes))
}

func TestServe_OneWriter(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	image := filepath.Join(dir, "x.vmdk")
	ok(t, "image", "create", image, "10M")
	server := startServe(t, image, dir)
	for _, c := range []struct{ socket, want string }{
		{filepath.Join(other, "s"), "in use by another process"},
		{filepath.Join(dir, "nbd.sock"), "in use by another process"}, // the socket is
		{image, "already exists"},
	} {
		r := run(t, "serve", image, "--socket", c.socket, "--run-dir", filepath.Join(other, "run"))
		if r.code != 1 || !strings.Contains(r.stderr, c.want) {
			t.Errorf("serve on %s: exit code %d, %s, want %q", c.socket, r.code, r.stderr, c.want)
		}
	}
	server.end(syscall.SIGKILL)
	startServe(t, image, dir) // replaces the socket that the killed one left
}

func TestServe_ReadOnly(t *testing.T) {
	qemuIO := testenv.Oracle(t, "qemu-io")
	dir := t.TempDir()
	image := filepath.Join(dir, "x.vmdk")
	ok(t, "image", "create", image, "10M")
	server := startServe(t, image, dir, "--read-only")
	if out, err := exec.Command(qemuIO, "-f", "raw", "-c", "write 0 4k", server.uri).CombinedOutput(); err == nil && bytes.Contains(out, []byte("wrote")) {
		t.Errorf("a write to a read-only server succeeds: %s", out)
	}
	tool(t, qemuIO, "-r", "-f", "raw", "-c", "read -P 0 0 4k", server.uri)
}
