package demo

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"
)

// console tells what happens: one line per step with its time.
type console struct {
	out      io.Writer
	terminal bool
	steps    []Step
}

// stepColumns is where times are.
const stepColumns = 66

const (
	bold  = "\x1b[1m"
	faint = "\x1b[2m"
	green = "\x1b[32m"
	red   = "\x1b[31m"
	plain = "\x1b[0m"
)

func newConsole(out io.Writer, terminal bool) *console {
	return &console{out: out, terminal: terminal}
}

// style wraps text in an escape sequence on a terminal.
func (c *console) style(style, text string) string {
	if !c.terminal {
		return text
	}
	return style + text + plain
}

func (c *console) title(format string, args ...any) {
	fmt.Fprintf(c.out, "\n%s\n", c.style(bold, fmt.Sprintf(format, args...)))
}

// note says something that is no step.
func (c *console) note(format string, args ...any) {
	for line := range strings.Lines(fmt.Sprintf(format, args...)) {
		fmt.Fprintf(c.out, "    %s\n", c.style(faint, strings.TrimRight(line, "\n")))
	}
}

// step runs one step and tells how long it took. What it returns beside an error is told
// below it.
func (c *console) step(name string, do func() (result string, err error)) error {
	if c.terminal {
		fmt.Fprintf(c.out, "  %s %s", c.style(faint, "…"), name)
	}
	start := time.Now()
	result, err := do()
	took := time.Since(start)
	if c.terminal {
		fmt.Fprint(c.out, "\r\x1b[K")
	}
	mark := c.style(green, "✓")
	if err != nil {
		mark = c.style(red, "✗")
	} else {
		c.steps = append(c.steps, Step{Name: name, Seconds: took.Seconds()})
	}
	pad := strings.Repeat(" ", max(1, stepColumns-utf8.RuneCountInString(name)))
	fmt.Fprintf(c.out, "  %s %s%s%s\n", mark, name, pad, c.style(faint, duration(took)))
	if result != "" {
		c.note("%s", result)
	}
	return err
}

// duration writes a time in at most eight columns, aligned.
func duration(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%5d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%5.1f s", d.Seconds())
}

// size writes a number of bytes for people.
func size(bytes int64) string {
	value, units := float64(bytes), []string{"B", "KiB", "MiB", "GiB", "TiB"}
	for value >= 1024 && len(units) > 1 {
		value, units = value/1024, units[1:]
	}
	if value >= 1000 { // where %.3g would write an exponent
		return fmt.Sprintf("%.0f %s", value, units[0])
	}
	return fmt.Sprintf("%.3g %s", value, units[0])
}
