package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
)

const (
	barPeriod  = 100 * time.Millisecond
	linePeriod = 5 * time.Second
	// progressDelay keeps short work quiet.
	progressDelay   = 500 * time.Millisecond
	progressColumns = 30
	// ratePeriod is over how long a rate is taken: the last seconds say more about what is
	// left than the holes at the beginning.
	ratePeriod = 8 * time.Second
)

func addProgressFlag(cmd *cobra.Command) {
	cmd.Flags().BoolP("progress", "p", false,
		"say how far it is every few seconds, with -o json as events, also where standard error is no terminal")
}

// startProgress returns what to tell progress to, and what to call when the work has
// ended. On a terminal it draws a bar; elsewhere it is quiet, unless --progress asks for
// lines or, with -o json, events. All go to standard error.
func startProgress(cmd *cobra.Command, what string, in progressUnit) (formats.Progress, func()) {
	wanted := false
	if flag := cmd.Flag("progress"); flag != nil {
		wanted = flag.Value.String() == "true"
	}
	m := &meter{what: what, unit: in, out: os.Stderr, start: time.Now(), period: linePeriod}
	switch {
	case wanted && wantsJSON(cmd):
		m.show = m.event
	case term.IsTerminal(int(os.Stderr.Fd())):
		m.period, m.show = barPeriod, m.bar
	case wanted:
		m.show = m.line
	default:
		return func(int64, int64) {}, func() {}
	}
	return m.progress, m.end
}

// progressUnit is what progress is counted in.
type progressUnit string

const (
	inBytes  progressUnit = "bytes"
	inTables progressUnit = "tables" // says nothing to people: no rate is shown
)

// meter shows how work goes on, and when it will end.
type meter struct {
	what   string
	unit   progressUnit
	out    io.Writer
	start  time.Time
	period time.Duration
	show   func(pace)

	shown   time.Time
	drawn   bool
	samples []sample // of the last ratePeriod, oldest first
}

// sample is how much was done at a time.
type sample struct {
	at   time.Time
	done int64
}

// pace is where work stands.
type pace struct {
	done, total int64
	unit        progressUnit
	perSecond   float64
	left        time.Duration // 0: not known
}

func (m *meter) progress(done, total int64) {
	now := time.Now()
	if total <= 0 || now.Sub(m.start) < progressDelay || now.Sub(m.shown) < m.period && done < total {
		return
	}
	m.shown = now
	m.show(m.pace(now, done, total))
}

// pace takes the rate since the oldest sample that is kept.
func (m *meter) pace(now time.Time, done, total int64) pace {
	for len(m.samples) > 1 && now.Sub(m.samples[0].at) > ratePeriod {
		m.samples = m.samples[1:]
	}
	since := sample{at: m.start}
	if len(m.samples) > 0 {
		since = m.samples[0]
	}
	m.samples = append(m.samples, sample{now, done})
	p := pace{done: done, total: total, unit: m.unit}
	if elapsed := now.Sub(since.at).Seconds(); elapsed > 0 {
		p.perSecond = float64(done-since.done) / elapsed
	}
	if p.perSecond > 0 {
		p.left = time.Duration(float64(total-done) / p.perSecond * float64(time.Second))
	}
	return p
}

func (m *meter) bar(p pace) {
	m.drawn = true
	fmt.Fprint(m.out, "\r", progressBar(m.what, p), "\x1b[K")
}

func (m *meter) line(p pace) {
	fmt.Fprintf(m.out, "%s: %s\n", m.what, p)
}

// event writes what a program can read.
func (m *meter) event(p pace) {
	_ = json.NewEncoder(m.out).Encode(map[string]any{ // nobody listens: the work goes on
		"event": "progress", "work": m.what, "unit": p.unit, "done": p.done, "total": p.total,
		"per-second": int64(p.perSecond), "seconds-left": int64(p.left.Seconds()),
	})
}

func (m *meter) end() {
	if m.drawn {
		fmt.Fprint(m.out, "\r\x1b[K")
	}
}

// String says how much is done, how fast it goes, and how long the rest will take.
func (p pace) String() string {
	text := fmt.Sprintf("%3.0f %%", 100*float64(p.done)/float64(p.total))
	if p.perSecond > 0 && p.unit == inBytes {
		text += ", " + humanSize(int64(p.perSecond)) + "/s"
	}
	if p.left > 0 && p.done < p.total {
		text += ", " + p.left.Round(time.Second).String() + " left"
	}
	return text
}

// progressBar is one line.
func progressBar(what string, p pace) string {
	full := int(float64(p.done) / float64(p.total) * progressColumns)
	return what + " " + strings.Repeat("━", full) + strings.Repeat("╌", progressColumns-full) + " " + p.String()
}
