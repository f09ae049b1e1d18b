package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
)

// print prints the comparisons as a table for people, and what is missing from it.
func (r *results) print(w io.Writer) {
	fmt.Fprintf(w, "%s, %d CPUs, Linux %s, %s; median of %d rounds of %v s\n",
		r.Machine.Model, r.Machine.CPUs, r.Machine.Kernel, r.Machine.fileSystems(), r.Rounds, r.Seconds)
	work := ""
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, c := range r.Comparisons {
		if c.Work != work {
			work = c.Work
			fmt.Fprintf(table, "\n%s (%s)\n", c.Work, c.Unit)
			fmt.Fprintln(table, "  image\t"+ours+"\tµs/op\tMiB\tbeside\tits figure\tµs/op\tMiB\tratio\trange\ttarget\t")
		}
		fmt.Fprintf(table, "  %s\t%s\t%s\t%s\t%s\t%s\t%.2f\t%.2f–%.2f\t%s\t%s\n",
			c.Format, number(c.Ours), c.OurCosts, c.Against, number(c.Theirs), c.TheirCosts, c.Ratio, c.Low, c.High, c.targetText(), c.verdict())
	}
	_ = table.Flush() // as little can be done as about the terminal
	if len(r.Skipped) > 0 {
		fmt.Fprintln(w, "\nNot measured:")
	}
	for _, s := range r.Skipped {
		fmt.Fprintf(w, "  %s: %s\n", s.What, strings.ReplaceAll(s.Reason, "\n", "; "))
	}
}

// String shows costs in two columns: processor time per operation, and memory, idle and busy.
func (c *costs) String() string {
	if c == nil {
		return "-\t-"
	}
	return fmt.Sprintf("%.1f\t%.0f–%.0f", c.Micros, c.IdleMiB, c.BusyMiB)
}

func (c *comparison) targetText() string {
	if c.Target == 0 {
		return "-"
	}
	return fmt.Sprintf("≥ %.2f", c.Target)
}

func (c *comparison) verdict() string {
	switch {
	case c.Target == 0:
		return ""
	case c.met():
		return "met"
	}
	return "missed"
}

// number shows a figure in three or more digits.
func number(v float64) string {
	switch {
	case v >= 100 || v == float64(int64(v)):
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}
