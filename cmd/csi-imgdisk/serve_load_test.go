package main

import (
	"bytes"
	"context"
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

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/all"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/formattest"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// operationsVariable says how many operations TestServe_RandomOperations does on each kind
// of image.
const operationsVariable = "IMGDISK_OPERATIONS"

// unreadableByQEMU are kinds of images that qemu-img cannot read, and why.
var unreadableByQEMU = map[string]string{}

// Every kind of image that can be written is served to qemu-io, which reads, writes,
// zeroes, discards and flushes at random and verifies what it reads; afterwards qemu-img
// finds the image sound and reads the same from it as we do.
func TestServe_RandomOperations(t *testing.T) {
	testenv.Oracle(t, "qemu-io")
	testenv.Oracle(t, "qemu-img")
	all.Register()
	count := 2000
	if testing.Short() {
		count = 500
	}
	if s := os.Getenv(operationsVariable); s != "" {
		var err error
		if count, err = strconv.Atoi(s); err != nil {
			t.Fatalf("%s: %v", operationsVariable, err)
		}
	}
	t.Cleanup(func() { formattest.WriteFigures(t) })
	for _, format := range formats.All() {
		subformats := format.Options().Subformats
		if len(subformats) == 0 {
			subformats = []string{""}
		}
		for _, subformat := range subformats {
			t.Run(format.Name()+"/"+subformat, func(t *testing.T) { serveRandomly(t, format, subformat, count) })
		}
	}
}

func serveRandomly(t *testing.T, format formats.Format, subformat string, count int) {
	t.Parallel()
	dir := t.TempDir()
	image := filepath.Join(dir, "x."+format.Name())
	ok(t, "image", "create", "-f", format.Name(), "--subformat", subformat, image, strconv.Itoa(loadBytes))
	if reason := cannotBeServed(t, format, image); reason != "" {
		t.Skip(reason)
	}
	server := startServe(t, image, dir, "--format", format.Name())
	l := newLoad(testenv.Rand(t))
	l.play(t, server.uri, count)
	if code := server.end(syscall.SIGTERM); code != 0 {
		t.Fatalf("the server ended with %d: %s", code, &server.stderr)
	}
	t.Logf("%d operations verified", count)
	formattest.FiguresOf(formattest.Kind{Format: format.Name(), Subformat: subformat}).Served.Add(int64(count))

	raw := filepath.Join(dir, "ours.raw")
	ok(t, "image", "convert", "-f", format.Name(), "-O", "raw", image, raw)
	got, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	l.verify(t, got)
	const leaks, nothingToCheck = 3, 63
	if r := run(t, "image", "check", "-f", format.Name(), image); r.code != 0 && r.code != leaks && r.code != nothingToCheck {
		t.Errorf("our check: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	if why := unreadableByQEMU[format.Name()+"/"+subformat]; why != "" {
		t.Logf("qemu-img is not asked: %s", why)
		return
	}
	checkByQEMU(t, format.Name(), image)
	tool(t, "qemu-img", "compare", "-f", format.Name(), "-F", "raw", image, raw)
}

// cannotBeServed says why an image cannot be written at random, "" if it can.
func cannotBeServed(t *testing.T, format formats.Format, image string) string {
	t.Helper()
	fsys, err := vfs.OpenDir(filepath.Dir(image))
	if err != nil {
		t.Fatal(err)
	}
	defer fsys.Close()
	img, err := formats.Open(context.Background(), fsys, filepath.Base(image), formats.OpenOptions{Format: format.Name(), Mode: vfs.ReadWrite})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if img.Sequential() {
		return "it is written once, in order"
	}
	return ""
}

// checkByQEMU has qemu-img check an image, if it has a check for the format.
func checkByQEMU(t *testing.T, format, image string) {
	t.Helper()
	const leaks, unsupported = 3, 63
	cmd := exec.Command("qemu-img", "check", "-f", format, image)
	out, err := cmd.CombinedOutput()
	if code := cmd.ProcessState.ExitCode(); err != nil && code != leaks && code != unsupported {
		t.Errorf("qemu-img check: %v\n%s", err, out)
	}
}

// The disk under load is dealt out in units of three sectors, so that requests lie across
// clusters, blocks and sectors of 4 KiB in every way.
const (
	unitBytes = 3 * 512
	loadUnits = 6000
	loadBytes = loadUnits*unitBytes + 512
	// batch is how many requests are on their way at the same time.
	batch = 16
)

// load is a disk's contents, unit by unit, while qemu-io works on it.
type load struct {
	r *rand.Rand
	// pattern is what each unit is filled with; unknown after a discard.
	pattern []int
	script  strings.Builder
}

const unknown = -1

func newLoad(r *rand.Rand) *load { return &load{r: r, pattern: make([]int, loadUnits)} }

// complaint is what qemu-io says when anything is not as it should be.
var complaint = regexp.MustCompile(`(?i)failed|error|broken|invalid|mismatch`)

// play has qemu-io do count operations, most of them several at a time.
func (l *load) play(t *testing.T, uri string, count int) {
	t.Helper()
	for done := 0; done < count; {
		n := min(1+l.r.IntN(batch), count-done)
		l.together(n)
		done += n
	}
	cmd := exec.Command(testenv.Oracle(t, "qemu-io"), "-f", "raw", uri)
	cmd.Stdin = strings.NewReader(l.script.String())
	out, err := cmd.CombinedOutput()
	if bad := complaint.FindIndex(out); err != nil || bad != nil {
		from := 0
		if bad != nil {
			from = max(bad[0]-500, 0)
		}
		t.Fatalf("qemu-io: %v\n%s", err, out[from:min(from+1500, len(out))])
	}
}

// together adds n operations that may run at the same time: on ranges of their own. A
// discard or flush is waited for.
func (l *load) together(n int) {
	taken := map[int]bool{}
	for range n {
		first, units := l.r.IntN(loadUnits), 1+l.r.IntN(4)
		if l.r.IntN(12) == 0 {
			units = 1 + l.r.IntN(100)
		}
		last := first
		for last < min(first+units, loadUnits) && !taken[last] {
			last++
		}
		if last == first {
			l.command("flush")
			continue
		}
		for unit := first; unit < last; unit++ {
			taken[unit] = true
		}
		l.operate(first, last)
	}
	l.command("aio_flush")
}

// operate adds an operation on units [first, last).
func (l *load) operate(first, last int) {
	off, n := first*unitBytes, (last-first)*unitBytes
	switch kind := l.r.IntN(20); {
	case kind < 7:
		l.read(first, last)
	case kind < 14:
		pattern := 1 + l.r.IntN(255)
		l.fill(first, last, pattern)
		l.command("aio_write -q -P %d %d %d", pattern, off, n)
	case kind < 16:
		l.fill(first, last, 0)
		l.command("aio_write -q -z %d %d", off, n)
	case kind < 17:
		l.fill(first, last, 0)
		l.command("aio_write -q -z -u %d %d", off, n) // it may unmap
	case kind < 19:
		l.fill(first, last, unknown)
		l.command("discard -q %d %d", off, n)
	default:
		l.command("flush")
	}
}

func (l *load) command(format string, args ...any) {
	fmt.Fprintf(&l.script, format+"\n", args...)
}

func (l *load) fill(first, last, pattern int) {
	for unit := first; unit < last; unit++ {
		l.pattern[unit] = pattern
	}
}

// read adds reads of the stretches of [first, last) that are filled with one pattern.
func (l *load) read(first, last int) {
	for unit := first; unit < last; {
		end := unit + 1
		for end < last && l.pattern[end] == l.pattern[unit] {
			end++
		}
		if l.pattern[unit] != unknown {
			l.command("aio_read -q -P %d %d %d", l.pattern[unit], unit*unitBytes, (end-unit)*unitBytes)
		}
		unit = end
	}
}

// verify compares the disk's bytes with what was written.
func (l *load) verify(t *testing.T, got []byte) {
	t.Helper()
	if len(got) < loadBytes {
		t.Fatalf("the disk has %d bytes, want %d", len(got), loadBytes)
	}
	wrong := 0
	for unit, pattern := range l.pattern {
		if pattern != unknown && !bytes.Equal(got[unit*unitBytes:(unit+1)*unitBytes], bytes.Repeat([]byte{byte(pattern)}, unitBytes)) {
			wrong++
		}
	}
	if wrong > 0 {
		t.Errorf("%d of %d units do not hold what was written", wrong, loadUnits)
	}
}
