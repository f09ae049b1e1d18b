package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// minWatchInterval keeps watching cheap for who is watched.
const minWatchInterval = 100 * time.Millisecond

// watchDevices shows what happens until the command is interrupted, which is not an
// error.
func watchDevices(cmd *cobra.Command, s *sampler, interval time.Duration) error {
	if interval < minWatchInterval {
		return fmt.Errorf("--interval %v: %w: want at least %v", interval, block.ErrInvalid, minWatchInterval)
	}
	ctx := cmd.Context()
	show := showerFor(cmd)
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		devices, err := s.take(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if err := show(devices); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// showerFor returns what shows one interval after the other: as lines of JSON, as a
// table that is drawn over the one before, or as tables below one another.
func showerFor(cmd *cobra.Command) func([]deviceStatus) error {
	out := cmd.OutOrStdout()
	if wantsJSON(cmd) {
		encoder := json.NewEncoder(out)
		encoder.SetEscapeHTML(false)
		return func(devices []deviceStatus) error {
			return encoder.Encode(map[string]any{"time": time.Now(), "devices": devices})
		}
	}
	if f, ok := out.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		screen := &redrawn{out: out, width: func() int {
			width, _, err := term.GetSize(int(f.Fd()))
			if err != nil {
				return 0
			}
			return width
		}}
		return func(devices []deviceStatus) error { return screen.show(rateTable(devices)) }
	}
	first := true
	return func(devices []deviceStatus) error {
		table := rateTable(devices)
		if !first {
			table = "\n" + table
		}
		first = false
		_, err := io.WriteString(out, table)
		return err
	}
}

// redrawn is text on a terminal that each time replaces what was shown before.
type redrawn struct {
	out   io.Writer
	width func() int // of the terminal now; 0: not known
	lines int        // shown before
}

func (r *redrawn) show(text string) error {
	var b bytes.Buffer
	if r.lines > 0 {
		fmt.Fprintf(&b, "\x1b[%dA\x1b[J", r.lines) // up, and clear from there
	}
	r.lines = 0
	width := r.width()
	for line := range strings.Lines(text) {
		b.WriteString(cut(strings.TrimSuffix(line, "\n"), width))
		b.WriteByte('\n')
		r.lines++
	}
	_, err := r.out.Write(b.Bytes())
	return err
}

// cut shortens a line to a width, so that it takes one line on a terminal; 0 is any.
func cut(line string, width int) string {
	if width <= 0 || utf8.RuneCountInString(line) <= width {
		return line
	}
	return string([]rune(line)[:width])
}

// rateTable shows what happened in an interval.
func rateTable(devices []deviceStatus) string {
	var out bytes.Buffer
	p := &printer{out: &out}
	if len(devices) == 0 {
		p.line("no devices")
		return out.String()
	}
	var rows [][]string
	for _, d := range devices {
		row := []string{d.Device, d.Transport}
		if r := d.Rates; r != nil {
			row = append(row, humanRate(r.IOPS), humanSize(int64(r.ReadBytes))+"/s", humanSize(int64(r.WrittenBytes))+"/s",
				humanMicros(r.P50Micros), humanMicros(r.P99Micros))
		} else {
			row = append(row, notTold, notTold, notTold, notTold, notTold)
		}
		if t := d.Totals; t != nil {
			row = append(row, strconv.Itoa(t.InFlight), strconv.Itoa(t.Throttled), strconv.FormatUint(t.Errors, 10))
		} else {
			row = append(row, notTold, notTold, notTold)
		}
		rows = append(rows, append(row, strconv.Itoa(d.Restarts), d.Image+d.Volume, d.state()))
	}
	p.table([]string{"DEVICE", "TRANSPORT", "IOPS", "READ", "WRITE", "P50", "P99", "IN FLIGHT", "THROTTLED", "ERRORS", "RESTARTS", "IMAGE OR VOLUME", "STATE"}, rows)
	return out.String()
}

// humanRate writes a number of requests per second.
func humanRate(perSecond float64) string {
	switch {
	case perSecond >= 1e6:
		return fmt.Sprintf("%.3gM", perSecond/1e6)
	case perSecond >= 1e4:
		return fmt.Sprintf("%.3gk", perSecond/1e3)
	}
	return fmt.Sprintf("%.0f", perSecond)
}

// humanMicros writes a time with two digits or three; 0 is none.
func humanMicros(micros float64) string {
	switch {
	case micros <= 0:
		return notTold
	case micros >= 1e6:
		return fmt.Sprintf("%.3gs", micros/1e6)
	case micros >= 1e3:
		return fmt.Sprintf("%.3gms", micros/1e3)
	}
	return fmt.Sprintf("%.3gµs", micros)
}
