package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   float64
	}{
		{[]float64{7}, 7},
		{[]float64{9, 1}, 5},
		{[]float64{100, 1, 3}, 3},
		{[]float64{4, 1, 3, 1000}, 3.5},
	} {
		before := slices.Clone(c.values)
		if got := median(c.values); got != c.want {
			t.Errorf("median of %v is %v, want %v", c.values, got, c.want)
		}
		if !slices.Equal(before, c.values) {
			t.Errorf("the values were moved: %v, were %v", c.values, before)
		}
	}
}

func TestRatios(t *testing.T) {
	got := ratios([]float64{10, 30, 5, 7}, []float64{5, 10, 0})
	if diff := cmp.Diff([]float64{2, 3}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A machine that slows down in the middle of a run does not change what is found out.
func TestCompare_PairsRounds(t *testing.T) {
	var r results
	work := works()[0].name
	for _, speed := range []float64{1, 1, 0.1, 0.1, 0.1} {
		r.add(figure{work: work, unit: opsPerSecond, value: 300 * speed}, vmdkName, ours)
		r.add(figure{work: work, unit: opsPerSecond, value: 100 * speed}, vmdkName, qemuNBD)
	}
	r.compare()
	if len(r.Comparisons) != 1 {
		t.Fatalf("comparisons: %+v", r.Comparisons)
	}
	c := r.Comparisons[0]
	want := comparison{Work: work, Format: vmdkName, Against: qemuNBD, Unit: opsPerSecond, Ours: 30, Theirs: 10, Ratio: 3, Low: 3, High: 3, Target: 2}
	if diff := cmp.Diff(want, c, cmpopts.EquateApprox(1e-9, 0)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestCompare_WithWhat(t *testing.T) {
	var r results
	add := func(work, format, server, unit string, value float64) {
		r.add(figure{work: work, unit: unit, value: value}, format, server)
	}
	const first = "4 KiB random first write, depth 32"
	add(first, rawName, ours, opsPerSecond, 50)
	add(first, rawName, nbdkit, opsPerSecond, 100)
	add(first, vmdkName, ownRaw, opsPerSecond, 50)
	add(first, "qcow2", ownRaw, opsPerSecond, 50)
	add(first, vmdkName, ours, opsPerSecond, 45)
	add(first, vmdkName, qemuNBD, opsPerSecond, 5)
	add(first, "qcow2", ours, opsPerSecond, 30)
	add(first, "qcow2", qemuNBD, opsPerSecond, 40)
	add(chainName(32), "qcow2", oneLayer, opsPerSecond, 100)
	add("block device: 1 MiB sequential read", rawName, ours, mibPerSecond, 30)
	add("block device: 1 MiB sequential read", rawName, plainLoop, mibPerSecond, 40)
	add(idleDevice, rawName, ours, mebibytes, 10)
	add(chainName(32), "qcow2", ours, opsPerSecond, 80)
	add(openTime, "qcow2", ours, milliseconds, 25)
	add(openTime, "qcow2", qemuNBD, milliseconds, 100)
	add(conversions()[0].name, "qcow2", ours, mibPerSecond, 300)
	add(conversions()[0].name, "qcow2", qemuImg, mibPerSecond, 100)
	r.compare()
	type found struct {
		format, against string
		ratio, target   float64
		met             bool
	}
	var got []found
	for _, c := range r.Comparisons {
		got = append(got, found{c.Format, c.Against, c.Ratio, c.Target, c.met()})
	}
	want := []found{
		{rawName, nbdkit, 0.5, 0, true},
		{vmdkName, qemuNBD, 9, 10, false},
		{vmdkName, ownRaw, 0.9, 0.8, true},
		{"qcow2", qemuNBD, 0.75, 0, true},
		{"qcow2", ownRaw, 0.6, 0.8, false},
		{"qcow2", oneLayer, 0.8, 0.9, false},
		{rawName, plainLoop, 0.75, 0, true},
		{rawName, limit, 1.5, 1, true},
		{"qcow2", qemuImg, 3, 2, true},
		{"qcow2", limit, 2, 1, true},
		{"qcow2", qemuNBD, 4, 0, true},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(found{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestTakeTurns(t *testing.T) {
	b := &bench{config: config{rounds: 3, binary: "/bin/sh"}, dir: t.TempDir(), results: new(results)}
	var order []string
	measure := func(name string) ([]figure, error) {
		order = append(order, name)
		return []figure{{work: "work", unit: opsPerSecond, value: float64(len(order))}}, nil
	}
	if err := b.takeTurns(t.Context(), "work", rawName, []string{ours, "sh", "no-such-program"}, measure); err != nil {
		t.Fatal(err)
	}
	if want := []string{ours, "sh", "sh", ours, ours, "sh"}; !slices.Equal(order, want) {
		t.Errorf("turns: %v, want %v", order, want)
	}
	if got := b.results.find("work", rawName, ours).Values; !slices.Equal(got, []float64{1, 4, 5}) {
		t.Errorf("our figures: %v", got)
	}
	if len(b.results.Skipped) != 1 || b.results.Skipped[0].What != "no-such-program" || b.results.Skipped[0].Failed {
		t.Errorf("skipped: %+v", b.results.Skipped)
	}
	broken := errors.New("broken")
	if err := b.takeTurns(t.Context(), "work", rawName, []string{ours}, func(string) ([]figure, error) { return nil, broken }); !errors.Is(err, broken) {
		t.Errorf("a measurement that fails: %v", err)
	}
}

func TestParseFio(t *testing.T) {
	const good = "fio: connected to NBD server\n" +
		`{"jobs":[{"error":0,"read":{"io_bytes":0,"iops":0},"write":{"io_bytes":8192,"bw_bytes":2097152,"iops":512.5}}]}`
	r, err := parseFio(good)
	if err != nil || r.in(opsPerSecond) != 512.5 || r.in(mibPerSecond) != 2 {
		t.Errorf("%+v, %v", r, err)
	}
	for text, says := range map[string]string{
		"fio: engine nbd not loadable":                         "not loadable",
		`{"jobs":[]}`:                                          "0 jobs",
		`{"jobs":[{"error":5}]}`:                               "error 5",
		`{"jobs":[{"read":{"io_bytes":0}}]}`:                   "nothing",
		`{"jobs":[{"read":{"io_bytes":"many"}}]}`:              "figures",
		`{"jobs":[{"read":{"io_bytes":1}},{}]}` + " and so on": "figures",
	} {
		if _, err := parseFio(text); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q in it", text, err, says)
		}
	}
}

func TestLoadArgs(t *testing.T) {
	timed := load{mode: "randread", blockBytes: 4096, depth: 32, sizeBytes: 1 << 20, duration: 1500 * time.Millisecond}
	counted := timed
	counted.totalBytes = 4 << 20
	whole := load{mode: "write", blockBytes: 1 << 20, depth: 4, sizeBytes: 1 << 20}
	for _, c := range []struct {
		load       load
		with, lack string
	}{
		{timed, "--time_based", "--io_size"},
		{timed, "--runtime=1500ms", "--io_size"},
		{counted, "--io_size=4194304", "--time_based"},
		{counted, "--runtime=1500ms", "--time_based"},
		{whole, "--bs=1048576", "--runtime"},
	} {
		args := strings.Join(c.load.args(), " ")
		if !strings.Contains(args, c.with) || strings.Contains(args, c.lack) {
			t.Errorf("%+v: %s: want %s and no %s", c.load, args, c.with, c.lack)
		}
	}
}

func TestParseResident(t *testing.T) {
	if got, err := parseResident("Name:\tx\nVmHWM:\t  9 kB\nVmRSS:\t   18244 kB\n", residentNow); got != 18244<<10 || err != nil {
		t.Errorf("%d, %v", got, err)
	}
	for _, text := range []string{"", "VmRSS:\tmuch\n"} {
		if _, err := parseResident(text, residentNow); err == nil {
			t.Errorf("%q is no error", text)
		}
	}
}

func TestParseProcessorTime(t *testing.T) {
	const fields = " S 1 2 3 4 5 6 7 8 9 10 150 25 0 0 20 0"
	for _, name := range []string{"x", "a (b) c", ") 1 2"} {
		if got, err := parseProcessorTime("12 (" + name + ")" + fields); err != nil || got != 1750*time.Millisecond {
			t.Errorf("program %q: %v, %v", name, got, err)
		}
	}
	for _, stat := range []string{"", "12 (x) S 1 2", "12 (x)" + strings.Replace(fields, "25", "?", 1)} {
		if _, err := parseProcessorTime(stat); err == nil {
			t.Errorf("%q is no error", stat)
		}
	}
}

// What a process does during a load, and only that, is counted.
func TestWatchLoad(t *testing.T) {
	work := func(d time.Duration) {
		for start, sum := time.Now(), 0; time.Since(start) < d; sum++ {
			_ = fmt.Sprint(sum)
		}
	}
	work(50 * time.Millisecond)
	_, idle, err := watchLoad([]int{os.Getpid()}, func() (rate, error) { return rate{operations: 10}, nil })
	if err != nil || idle.idleBytes < 1<<20 || idle.busyBytes < 1<<20 || idle.operations != 10 {
		t.Errorf("idle: %+v, %v", idle, err)
	}
	_, busy, err := watchLoad([]int{os.Getpid()}, func() (rate, error) {
		work(300 * time.Millisecond)
		return rate{operations: 10}, nil
	})
	if err != nil || busy.processor <= idle.processor {
		t.Errorf("busy: %+v, %v; idle %+v", busy, err, idle)
	}
	if _, u, err := watchLoad(nil, func() (rate, error) { return rate{operations: 1}, nil }); err != nil || u.perOperation() != nil {
		t.Errorf("without processes: %+v, %v", u, err)
	}
}

func TestWants(t *testing.T) {
	b := new(bench)
	for _, choice := range []string{sectionOpen, "depth 32$"} {
		b.only = append(b.only, regexp.MustCompile(choice))
	}
	for _, c := range []struct {
		section, name string
		want          bool
	}{
		{sectionOpen, "anything", true}, {sectionNBD, "read, depth 32", true}, {sectionNBD, "depth 32 or so", false}, {sectionDevice, "read", false},
	} {
		if got := b.wants(c.section, c.name); got != c.want {
			t.Errorf("%s: %s: %v", c.section, c.name, got)
		}
	}
}

func TestCPUModel(t *testing.T) {
	if got := cpuModel("processor\t: 0\nmodel name\t: Fast (R) CPU: 3\n"); got != "Fast (R) CPU: 3" {
		t.Error(got)
	}
	if got := cpuModel("processor : 0\n"); got != "" {
		t.Error(got)
	}
}

func TestScale(t *testing.T) {
	s := newScale([]comparison{{Ratio: 0.3, Target: 0.8}, {Ratio: 11, Target: 10}, {Ratio: math.Inf(1)}})
	if s.low != -2 || s.high != 4 {
		t.Fatalf("scale: %+v", s)
	}
	last := 0
	for _, ratio := range []float64{0, 0.1, 0.25, 1, 2, 16, 99} {
		x := s.x(ratio)
		if x < last || x < barsLeft || x > barsLeft+barsWidth {
			t.Errorf("%v is at %d, after %d", ratio, x, last)
		}
		last = x
	}
	if got := s.x(1) - s.x(0.5); got != s.x(8)-s.x(4) {
		t.Errorf("doubling takes %d pixels, or %d", got, s.x(8)-s.x(4))
	}
}

// sampleResults have a comparison that met its target, one that missed it and one without.
func sampleResults() *results {
	r := &results{Rounds: 3, Seconds: 0.5, Date: "2026-01-02T03:04:05Z", Machine: machine{Model: `<Fast & "cheap">`, CPUs: 2, FileSystem: "ext4"}}
	work := works()[0].name
	for format, value := range map[string]float64{rawName: 900, vmdkName: 150} {
		r.add(figure{work: work, unit: opsPerSecond, value: value}, format, ours)
		r.add(figure{work: work, unit: opsPerSecond, value: 100}, format, qemuNBD)
	}
	r.add(figure{work: chainName(8), unit: opsPerSecond, value: 5}, vmdkName, ours)
	r.add(figure{work: chainName(8), unit: opsPerSecond, value: 10}, vmdkName, qemuNBD)
	r.find(work, rawName, ours).Costs = []costs{{Micros: 7, IdleMiB: 12, BusyMiB: 20}, {Micros: 8.1, IdleMiB: 12, BusyMiB: 20}, {Micros: 9, IdleMiB: 11, BusyMiB: 31}}
	r.Skipped = []skipped{{What: "vhdx", Reason: "none\nyet"}}
	r.compare()
	return r
}

func TestPlot(t *testing.T) {
	picture, err := sampleResults().plot()
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]int{}
	decoder := xml.NewDecoder(bytes.NewReader(picture))
	for {
		token, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, picture)
		}
		if start, ok := token.(xml.StartElement); ok {
			for _, a := range start.Attr {
				if a.Name.Local == "class" {
					counts[start.Name.Local+" "+a.Value]++
				}
			}
		}
	}
	// One of each more in the legend.
	for what, want := range map[string]int{"rect met": 2, "rect missed": 2, "rect plain": 2, "line target": 3, "text work": 2, "line one": 1} {
		if counts[what] != want {
			t.Errorf("%d × %s, want %d\n%s", counts[what], what, want, picture)
		}
	}
	for _, want := range []string{"9.00× (900 : 100 ops/s)", "0.50× (5 : 10 ops/s)", "&lt;Fast &amp;", "prefers-color-scheme: dark"} {
		if !bytes.Contains(picture, []byte(want)) {
			t.Errorf("the plot has no %q:\n%s", want, picture)
		}
	}
}

// Nothing measured is a plot, too.
func TestPlot_Empty(t *testing.T) {
	if _, err := new(results).plot(); err != nil {
		t.Error(err)
	}
}

func TestPrint(t *testing.T) {
	var out bytes.Buffer
	sampleResults().print(&out)
	for _, want := range []string{`(?m)^ +raw +900 +8\.1 +12–20 +qemu-nbd +100 +- +- +9\.00 .*≥ 2\.00 +met$`, `(?m)^ +vmdk +150 .*missed$`, `(?m)^ +vmdk +5 +- +- .* - *$`, `vhdx: none; yet`} {
		if !regexp.MustCompile(want).MatchString(out.String()) {
			t.Errorf("no line matches %s:\n%s", want, &out)
		}
	}
}

func TestWrite(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	if err := sampleResults().write(dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"results.json", "results.svg"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Size() == 0 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 2: "2", 1.234: "1.23", 12.34: "12.3", 123.4: "123", 0.5: "0.50"} {
		if got := number(v); got != want {
			t.Errorf("%v is shown as %s, want %s", v, got, want)
		}
	}
}

func TestConfigCheck(t *testing.T) {
	good := config{seconds: 1, rounds: 1, sizeMiB: 64, formats: []string{"raw", "vmdk"}}
	if err := good.check(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*config){
		"-formats": func(c *config) { c.formats = []string{"floppy"} },
		"-seconds": func(c *config) { c.seconds = 0 },
		"-repeat":  func(c *config) { c.rounds = 0 },
		"-size":    func(c *config) { c.sizeMiB = 1 },
	} {
		c := good
		change(&c)
		if err := c.check(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Every format is measured at something, and names of works are not ambiguous.
func TestWorks(t *testing.T) {
	names := map[string]bool{}
	for _, w := range works() {
		if names[w.name] {
			t.Errorf("two works are called %s", w.name)
		}
		names[w.name] = true
		if w.kind == chainImage && w.layers < 1 {
			t.Errorf("%s: %d layers", w.name, w.layers)
		}
	}
	for _, layers := range []int{1, 8, deepest} {
		if !names[chainName(layers)] {
			t.Errorf("nothing is read through %d layers", layers)
		}
	}
}
