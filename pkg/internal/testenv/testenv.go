// Package testenv is internal/testenv under the name that packages below pkg knew it by.
package testenv

import (
	"math/rand/v2"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

// Oracle is testenv.Oracle.
func Oracle(tb testing.TB, name string) string {
	tb.Helper()
	return testenv.Oracle(tb, name)
}

// Root is testenv.Root.
func Root(tb testing.TB) {
	tb.Helper()
	testenv.Root(tb)
}

// Rand is testenv.Rand.
func Rand(tb testing.TB) *rand.Rand {
	tb.Helper()
	return testenv.Rand(tb)
}

// Samples is testenv.Samples.
func Samples(tb testing.TB) string {
	tb.Helper()
	return testenv.Samples(tb)
}
