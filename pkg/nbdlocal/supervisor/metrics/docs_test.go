package metrics

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the table of metrics in docs/metrics.md")

const (
	docsFile      = "../../../../docs/metrics.md"
	dashboardFile = "../../../../charts/csi-imgdisk/dashboards/csi-imgdisk.json"
	tableBegin    = "<!-- metrics: begin -->\n"
	tableEnd      = "<!-- metrics: end -->\n"
)

// table is all metrics as Markdown.
func table() string {
	var b strings.Builder
	b.WriteString("| metric | type | labels | what it says |\n|---|---|---|---|\n")
	for _, d := range Descriptions() {
		labels := strings.Join(d.Labels, ", ")
		if labels == "" {
			labels = "–"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", d.Name, d.Type, labels, d.Help)
	}
	return b.String()
}

// docs/metrics.md lists the metrics that there are: go test -run Docs -update writes it.
func TestDocs(t *testing.T) {
	content, err := os.ReadFile(docsFile)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, begins := strings.Cut(string(content), tableBegin)
	listed, after, ends := strings.Cut(rest, tableEnd)
	if !begins || !ends {
		t.Fatalf("%s has no table between %q and %q", docsFile, tableBegin, tableEnd)
	}
	if listed == table() {
		return
	}
	if !*update {
		t.Fatalf("%s does not list the metrics that there are: run this test with -update", docsFile)
	}
	if err := os.WriteFile(docsFile, []byte(before+tableBegin+table()+tableEnd+after), 0o644); err != nil {
		t.Fatal(err)
	}
}

// expressions returns the values of all fields of a JSON document that hold queries.
func expressions(v any) (found []string) {
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			text, isText := value.(string)
			if isText && (key == "expr" || key == "query" || key == "definition") {
				found = append(found, text)
				continue
			}
			found = append(found, expressions(value)...)
		}
	case []any:
		for _, value := range v {
			found = append(found, expressions(value)...)
		}
	}
	return found
}

var (
	metricName = regexp.MustCompile(`\bcsi_imgdisk_[a-z0-9_]+`)
	matchers   = regexp.MustCompile(`\{([^}]*)\}`)
	matched    = regexp.MustCompile(`([a-z_]+)\s*(?:=~|!~|!=|=)\s*"`)
	grouped    = regexp.MustCompile(`\b(?:by|on|without)\s*\(([^)]*)\)`)
)

// The dashboard asks for nothing that a Collector does not have.
func TestDashboard(t *testing.T) {
	content, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	var dashboard map[string]any
	if err := json.Unmarshal(content, &dashboard); err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	// Prometheus adds what it scraped from, and histograms have a bound.
	labels := []string{"instance", "le"}
	for _, d := range Descriptions() {
		known[d.Name] = true
		if d.Type == "histogram" {
			known[d.Name+"_bucket"], known[d.Name+"_sum"], known[d.Name+"_count"] = true, true, true
		}
		labels = append(labels, d.Labels...)
	}
	used := map[string]bool{}
	for _, expr := range expressions(dashboard) {
		for _, name := range metricName.FindAllString(expr, -1) {
			used[name] = true
			if !known[name] {
				t.Errorf("no metric is called %s: %s", name, expr)
			}
		}
		for _, label := range labelsIn(expr) {
			if !slices.Contains(labels, label) {
				t.Errorf("no metric has a label %s: %s", label, expr)
			}
		}
	}
	for _, wanted := range []string{
		"csi_imgdisk_volume_operations_total", "csi_imgdisk_volume_bytes_total", "csi_imgdisk_volume_operation_duration_seconds_bucket",
		"csi_imgdisk_volume_errors_total", "csi_imgdisk_volume_stalls_total", "csi_imgdisk_volume_recoveries_total",
	} {
		if !used[wanted] {
			t.Errorf("the dashboard does not show %s", wanted)
		}
	}
}

// labelsIn returns the labels that an expression matches or groups by.
func labelsIn(expr string) (labels []string) {
	for _, m := range matchers.FindAllStringSubmatch(expr, -1) {
		for _, label := range matched.FindAllStringSubmatch(m[1], -1) {
			labels = append(labels, label[1])
		}
	}
	for _, m := range grouped.FindAllStringSubmatch(expr, -1) {
		for label := range strings.SplitSeq(m[1], ",") {
			labels = append(labels, strings.TrimSpace(label))
		}
	}
	return labels
}
