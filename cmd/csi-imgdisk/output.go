package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
)

// outputFormat is the value of -o.
type outputFormat string

const (
	outputText outputFormat = "text"
	outputJSON outputFormat = "json"
)

// String implements pflag.Value.
func (o *outputFormat) String() string { return string(*o) }

// Type implements pflag.Value.
func (o *outputFormat) Type() string { return "text|json" }

// Set implements pflag.Value.
func (o *outputFormat) Set(s string) error {
	switch outputFormat(s) {
	case outputText, outputJSON:
		*o = outputFormat(s)
		return nil
	}
	return fmt.Errorf("want text or json")
}

func addOutputFlag(root *cobra.Command) {
	format := outputText
	root.PersistentFlags().VarP(&format, "output", "o", "how results are printed")
}

func wantsJSON(cmd *cobra.Command) bool {
	return cmd.Flag("output").Value.String() == string(outputJSON)
}

// emit prints a result: as JSON if that is asked for, else as text has it.
func emit(cmd *cobra.Command, result any, text func(p *printer)) error {
	out := cmd.OutOrStdout()
	if wantsJSON(cmd) {
		encoder := json.NewEncoder(out)
		encoder.SetIndent("", "    ")
		encoder.SetEscapeHTML(false)
		return encoder.Encode(result)
	}
	p := &printer{out: out}
	text(p)
	return p.err
}

// printer writes text and remembers the first error.
type printer struct {
	out io.Writer
	err error
}

func (p *printer) line(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.out, format+"\n", args...)
	}
}

// table writes rows in columns.
func (p *printer) table(header []string, rows [][]string) {
	if p.err != nil {
		return
	}
	w := tabwriter.NewWriter(p.out, 0, 8, 3, ' ', 0)
	fmt.Fprintln(w, strings.Join(header, "\t"))
	for _, row := range rows {
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	p.err = w.Flush()
}

// sizeUnits are for people's eyes.
var sizeUnits = []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}

// humanSize writes a number of bytes with three digits.
func humanSize(bytes int64) string {
	value, unit := float64(bytes), 0
	for value >= 1024 && unit < len(sizeUnits)-1 {
		value /= 1024
		unit++
	}
	if value >= 1000 { // where %.3g would write an exponent
		return fmt.Sprintf("%.0f %s", value, sizeUnits[unit])
	}
	return fmt.Sprintf("%.3g %s", value, sizeUnits[unit])
}
