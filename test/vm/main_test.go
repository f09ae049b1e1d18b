package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

func digestOf(output string) []string {
	d := newDigest()
	for line := range strings.Lines(output) {
		d.add(strings.TrimSuffix(line, "\n"))
	}
	return d.lines()
}

func TestDigest_FailedTest(t *testing.T) {
	got := digestOf(`=== RUN   TestGood
    good_test.go:3: nothing special
--- PASS: TestGood (0.1s)
=== RUN   TestBad
=== RUN   TestBad/nbd
    bad_test.go:10: seed 7
[  312.4] Out of memory: Killed process 99 (csi-imgdisk)
    bad_test.go:12: the servers are 7, were 99
=== NAME  TestBad
    bad_test.go:20: --- /dev/shm/node/driver.log
        time=1 level=INFO msg=begun
        time=2 level=WARN msg="server ended" cause=killed
--- FAIL: TestBad (3s)
    --- FAIL: TestBad/nbd (2s)
FAIL
`)
	want := []string{
		"[  312.4] Out of memory: Killed process 99 (csi-imgdisk)",
		`        time=2 level=WARN msg="server ended" cause=killed`,
		"--- FAIL: TestBad",
		"bad_test.go:10: seed 7", "bad_test.go:12: the servers are 7, were 99",
		"--- FAIL: TestBad/nbd",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestDigest_NoVerdict(t *testing.T) {
	got := strings.Join(digestOf("=== RUN   TestHangs\n    a_test.go:1: begun\nsomething else\npanic: nothing moves\n\ngoroutine 5 [running]:\n"), "\n")
	for _, want := range []string{"a_test.go:1: begun", "something else", "panic: nothing moves", "goroutine 5"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in\n%s", want, got)
		}
	}
}

// TestDigest_Bounded: the end of a log that shows little more has room for it.
func TestDigest_Bounded(t *testing.T) {
	var output strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&output, "=== RUN   Test%d\n    a_test.go:1: %s\nOops\npanic: x\nlevel=WARN\n--- FAIL: Test%d (0s)\n", i, strings.Repeat("x", 500), i)
	}
	lines := digestOf(output.String())
	if len(lines) > digestLines || slices.ContainsFunc(lines, func(line string) bool { return len(line) > digestBytes }) {
		t.Errorf("%d lines: %q", len(lines), lines)
	}
}
