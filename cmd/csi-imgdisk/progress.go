package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
)

const (
	progressPeriod = 100 * time.Millisecond
	// progressDelay keeps short work quiet.
	progressDelay   = 500 * time.Millisecond
	progressColumns = 30
)

// startProgress returns what to tell progress to, and what to call when the work has
// ended. It draws a bar on standard error if that is a terminal, and nothing otherwise.
func startProgress(what string) (progress formats.Progress, end func()) {
	if !term.IsTerminal(int(os.Stderr.Fd())) {
		return func(int64, int64) {}, func() {}
	}
	start, last := time.Now(), time.Time{}
	drawn := false
	progress = func(done, total int64) {
		now := time.Now()
		if total <= 0 || now.Sub(start) < progressDelay || now.Sub(last) < progressPeriod && done < total {
			return
		}
		last, drawn = now, true
		fmt.Fprint(os.Stderr, "\r", progressBar(what, done, total, now.Sub(start)), "\x1b[K")
	}
	end = func() {
		if drawn {
			fmt.Fprint(os.Stderr, "\r\x1b[K")
		}
	}
	return progress, end
}

// progressBar is one line: how much is done, and how long the rest will take.
func progressBar(what string, done, total int64, elapsed time.Duration) string {
	share := float64(done) / float64(total)
	full := int(share * progressColumns)
	bar := strings.Repeat("━", full) + strings.Repeat("╌", progressColumns-full)
	left := ""
	if share > 0 && share < 1 {
		rest := time.Duration(float64(elapsed) * (1 - share) / share)
		left = ", " + rest.Round(time.Second).String() + " left"
	}
	return fmt.Sprintf("%s %s %3.0f %%%s", what, bar, share*100, left)
}
