package main

import (
	"regexp"
	"slices"
	"strings"
)

// What a digest takes of each kind of line at most, and of each line. Together they are
// what fits where only the end of a log is shown.
const (
	digestKernel   = 5 // of what the kernel says of itself
	digestWarnings = 3 // of what our processes complain of
	digestPanic    = 6 // of the first panic
	digestMessages = 5 // of each test that failed
	digestLines    = 25
	digestBytes    = 180
)

var (
	testBegins  = regexp.MustCompile(`^=== (?:RUN|NAME|CONT)\s+(\S+)`)
	testEnds    = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): (\S+)`)
	testMessage = regexp.MustCompile(`^\s+(\w+\.go:\d+: .*)`)
	panics      = regexp.MustCompile(`panic: |fatal error: |^\[signal |unexpected fault`)
	kernelTells = regexp.MustCompile(`Out of memory|oom-kill|oom_reaper|BUG: |Oops|Kernel panic|general protection|WARNING: CPU|blocked for more than|detected stall|page allocation failure|Send .* failed|I/O error|EXT4-fs error|segfault`)
	warnings    = regexp.MustCompile(`level=(WARN|ERROR)`)
)

// digest is what is worth repeating of a machine's output when it has failed: its log is
// long, and one sees its end first.
type digest struct {
	kernel   []string
	warnings []string
	panic    []string
	messages map[string][]string // by test
	current  string              // the test that runs
	failed   []string
	last     []string // lines, of whatever kind
}

func newDigest() *digest { return &digest{messages: map[string][]string{}} }

// add takes note of a line.
func (d *digest) add(line string) {
	d.last = appendLast(d.last, line, digestMessages)
	switch {
	case len(d.panic) > 0 && len(d.panic) < digestPanic:
		d.panic = append(d.panic, line)
	case panics.MatchString(line) && len(d.panic) == 0:
		d.panic = append(d.panic, line)
	case kernelTells.MatchString(line):
		if len(d.kernel) < digestKernel { // the first ones: others follow from them
			d.kernel = append(d.kernel, line)
		}
	case warnings.MatchString(line):
		d.warnings = appendLast(d.warnings, line, digestWarnings)
	default:
		d.addTestLine(line)
	}
}

func (d *digest) addTestLine(line string) {
	if m := testBegins.FindStringSubmatch(line); m != nil {
		d.current = m[1]
		return
	}
	if m := testEnds.FindStringSubmatch(line); m != nil {
		if m[1] == "FAIL" {
			d.failed = append(d.failed, m[2])
		}
		return
	}
	// A file that a test shows begins with its name between dashes.
	if m := testMessage.FindStringSubmatch(line); m != nil && !strings.Contains(m[1], ": --- ") {
		d.messages[d.current] = appendLast(d.messages[d.current], m[1], digestMessages)
	}
}

// lines returns what is worth repeating, what tells most at the end.
func (d *digest) lines() []string {
	failed := d.failed
	if failed == nil { // it ended, or was ended, in the middle of a test
		failed = []string{d.current}
	}
	lines := slices.Concat(d.kernel, d.warnings)
	if d.failed == nil {
		lines = append(lines, d.last...)
	}
	for _, name := range failed {
		lines = append(lines, d.messages[name]...)
		if d.failed != nil {
			lines = append(lines, "--- FAIL: "+name)
		}
	}
	lines = append(lines, d.panic...)
	lines = lines[max(0, len(lines)-digestLines):]
	for i, line := range lines {
		lines[i] = line[:min(len(line), digestBytes)]
	}
	return lines
}

// appendLast appends to a list that keeps its last entries only.
func appendLast(list []string, entry string, limit int) []string {
	list = append(list, entry)
	return list[max(0, len(list)-limit):]
}
