// Package testenv gives tests what lies around them: oracles (other people's tools),
// sample images, root, and replayable randomness.
package testenv

import (
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"
)

// Oracle returns the path of a program. A missing one skips the test, but fails it
// when CI is set: a skipped oracle proves nothing.
func Oracle(tb testing.TB, name string) string {
	tb.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		missing(tb, "oracle %s is not installed", name)
	}
	return path
}

// Root skips the test unless it runs as root; in CI it fails.
func Root(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() != 0 {
		missing(tb, "needs root")
	}
}

func missing(tb testing.TB, format string, args ...any) {
	tb.Helper()
	if os.Getenv("CI") != "" {
		tb.Fatalf(format, args...)
	}
	tb.Skipf(format, args...)
}

// Rand returns a source of randomness whose seed is logged; IMGDISK_SEED replays one.
func Rand(tb testing.TB) *rand.Rand {
	tb.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("IMGDISK_SEED"); s != "" {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			tb.Fatalf("IMGDISK_SEED=%q: %v", s, err)
		}
		seed = v
	}
	tb.Logf("replay with IMGDISK_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, seed))
}

// Samples returns the directory of real images by other people's tools, named by
// IMGDISK_SAMPLES or lying beside the repository; it skips the test when there is none.
// The images are not part of the repository.
func Samples(tb testing.TB) string {
	tb.Helper()
	dir := os.Getenv("IMGDISK_SAMPLES")
	if dir == "" {
		_, file, _, _ := runtime.Caller(0)
		dir = filepath.Join(filepath.Dir(file), "..", "..", "..", "shared", "samples")
	}
	if _, err := os.Stat(filepath.Join(dir, "SAMPLES.tsv")); err != nil {
		tb.Skipf("no sample images: %v", err)
	}
	return dir
}
