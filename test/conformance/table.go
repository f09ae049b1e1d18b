package main

import (
	"bytes"
	"fmt"
	"os"
	"path"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
)

// column is one of the table's: the sum of some figures of a kind.
type column struct {
	title   string
	figures []string
}

var columns = []column{
	{"read theirs", []string{"ReadTheirs"}},
	{"read by theirs", []string{"ReadByOthers", "OracleCompares"}},
	{"create", []string{"Created"}},
	{"check agrees", []string{"OracleChecks"}},
	{"crash sweep", []string{"Crashes"}},
	{"… seen by qemu-img", []string{"OracleCrashes"}},
	{"kills", []string{"Kills", "ProcessKills"}},
	{"error sweep", []string{"InjectedErrors"}},
	{"damaged", []string{"HostileImages"}},
	{"fuzz", []string{"fuzz"}},
	{"resize", []string{"Resizes"}},
	{"discard", []string{"Discards"}},
	{"repair", []string{"Repairs"}},
	{"served", []string{"Served"}},
}

// table is what was counted, by format and subformat.
type table struct {
	counts map[string]map[string]int64 // by row and figure
	failed map[string][]string         // tests, by row
}

func rowName(format, subformat string) string {
	if subformat == "" {
		return format
	}
	return format + " " + subformat
}

func newTable(reports []report, fuzzed map[string]int64) *table {
	t := &table{counts: map[string]map[string]int64{}, failed: map[string][]string{}}
	for _, r := range reports {
		row := rowName(r.Format, r.Subformat)
		if t.counts[row] == nil {
			t.counts[row] = map[string]int64{}
		}
		for figure, n := range r.Counts {
			t.counts[row][figure] += n
		}
		t.failed[row] = append(t.failed[row], r.Failed...)
	}
	for _, f := range formats.All() {
		for _, row := range rows(f) {
			if t.counts[row] == nil {
				t.counts[row] = map[string]int64{}
			}
			// A format's targets are not told apart by subformat.
			t.counts[row]["fuzz"] = fuzzed[path.Base(reflect.TypeOf(f).PkgPath())]
		}
	}
	return t
}

// rows returns the rows of a format: every subformat that Create makes.
func rows(f formats.Format) []string {
	o := f.Options()
	var names []string
	for _, subformat := range slices.Concat(o.Subformats, o.OverlaySubformats) {
		if row := rowName(f.Name(), subformat); !slices.Contains(names, row) {
			names = append(names, row)
		}
	}
	if len(names) == 0 {
		names = []string{f.Name()}
	}
	return names
}

// markdown returns the table and how it came about.
func (t *table) markdown(took time.Duration, short bool) string {
	command := "make conformance"
	if short {
		command += " SHORT=1"
	}
	var b strings.Builder
	b.WriteString("| format |")
	for _, c := range columns {
		fmt.Fprintf(&b, " %s |", c.title)
	}
	fmt.Fprintf(&b, "\n|%s\n", strings.Repeat("---|", len(columns)+1))
	for _, f := range formats.All() {
		for _, row := range rows(f) {
			fmt.Fprintf(&b, "| %s |", row)
			for _, c := range columns {
				fmt.Fprintf(&b, " %s |", t.cell(row, c))
			}
			b.WriteString("\n")
		}
	}
	fmt.Fprintf(&b, "\nMade by `%s` on %s in %s, with %s; %s.\n",
		command, time.Now().UTC().Format(time.DateOnly), took.Round(time.Second), version("qemu-img", "--version"), version("7z"))
	for _, f := range formats.All() {
		for _, row := range rows(f) {
			for _, test := range t.failed[row] {
				fmt.Fprintf(&b, "\n**Failed:** %s, %s\n", row, test)
			}
		}
	}
	return b.String()
}

func (t *table) cell(row string, c column) string {
	var sum int64
	for _, figure := range c.figures {
		sum += t.counts[row][figure]
	}
	if sum == 0 {
		return "–"
	}
	return strconv.FormatInt(sum, 10)
}

var fuzzLine = regexp.MustCompile(`(?m)^ok +pkg/formats/(\w+) \w+: execs: (\d+)`)

// fuzzCounts returns how many inputs each format's package was given, by what hack/fuzz.sh
// has printed.
func fuzzCounts(out []byte) map[string]int64 {
	counts := map[string]int64{}
	for _, m := range fuzzLine.FindAllSubmatch(out, -1) {
		n, err := strconv.ParseInt(string(m[2]), 10, 64)
		if err == nil {
			counts[string(m[1])] += n
		}
	}
	return counts
}

// The markers that the table stands between.
const (
	tableBegin = "<!-- conformance: begin -->\n"
	tableEnd   = "<!-- conformance: end -->\n"
)

// replaceTable puts a table between the markers of a page.
func replaceTable(file, table string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	begin, end := bytes.Index(b, []byte(tableBegin)), bytes.Index(b, []byte(tableEnd))
	if begin < 0 || end < begin {
		return fmt.Errorf("%s: want the lines %q and %q", file, tableBegin, tableEnd)
	}
	page := slices.Concat(b[:begin+len(tableBegin)], []byte("\n"+table+"\n"), b[end:])
	return os.WriteFile(file, page, 0o644)
}

func firstLine(b []byte) string {
	line, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
	return strings.TrimSpace(line)
}
