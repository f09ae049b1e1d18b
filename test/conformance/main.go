// Command conformance runs what proves the image formats, and prints a table of what was
// proven by how much, for every registered format and subformat:
//
//	go run ./test/conformance          all of it; the table goes into docs/formats.md, too
//	go run ./test/conformance -short   a small part, in some minutes; it goes nowhere
//
// The parts are the conformance suite of each format (package formattest), the tests of
// this package (qemu-img, 7-Zip and libyal's tools beside ours), random operations through
// csi-imgdisk serve, and the formats' fuzz targets. The counts are those that the parts
// write themselves. It fails if any part does.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/all"
)

func main() {
	short := flag.Bool("short", false, "do a small part")
	page := flag.String("page", "docs/formats.md", "file with two markers that the table is put between, if nothing has failed; a short run's only if this is given")
	flag.Parse()
	if *short && !given("page") {
		*page = ""
	}
	if err := conform(*short, *page); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
}

// given reports whether a flag was given.
func given(name string) bool {
	found := false
	flag.Visit(func(f *flag.Flag) { found = found || f.Name == name })
	return found
}

// part is one of the programs that are run.
type part struct {
	name string
	env  []string
	args []string
}

func parts(short bool) []part {
	goTest := []string{"go", "test", "-count=1", "-timeout=60m"}
	operations, fuzzTime := "100000", "20s"
	if short {
		goTest = append(goTest, "-short")
		operations, fuzzTime = "2000", "3s"
	}
	test := func(args ...string) []string { return append(goTest[:len(goTest):len(goTest)], args...) }
	return []part{
		{"oracles", nil, test("./test/conformance")},
		{"suite", nil, test("-run", "Conformance|KillProcess", "./pkg/formats/...")},
		{"serve", []string{"IMGDISK_OPERATIONS=" + operations}, test("-run", "^TestServe_RandomOperations$", "./cmd/csi-imgdisk")},
		{"fuzz", []string{"FUZZTIME=" + fuzzTime, "PACKAGES=./pkg/formats/..."}, []string{"hack/fuzz.sh"}},
	}
}

func conform(short bool, page string) error {
	work, err := os.MkdirTemp("", "conformance")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	all.Register()
	var wrong error
	var fuzzed map[string]int64
	began := time.Now()
	for _, p := range parts(short) {
		fmt.Fprintf(os.Stderr, "== %s: %v\n", p.name, p.args)
		out, err := p.run(work)
		if err != nil {
			wrong = errors.Join(wrong, fmt.Errorf("%s: %w", p.name, err))
		}
		if p.name == "fuzz" {
			fuzzed = fuzzCounts(out)
		}
	}
	reports, err := readReports(work)
	if err != nil {
		return errors.Join(wrong, err)
	}
	table := newTable(reports, fuzzed).markdown(time.Since(began), short)
	fmt.Print(table)
	if page != "" && wrong == nil {
		wrong = replaceTable(page, table)
	}
	return wrong
}

// run runs the part and returns what it printed, which is shown, too.
func (p part) run(work string) ([]byte, error) {
	log, err := os.Create(filepath.Join(work, p.name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(p.args[0], p.args[1:]...)
	cmd.Env = append(append(os.Environ(), "IMGDISK_FIGURES="+work), p.env...)
	cmd.Stdout, cmd.Stderr = log, log
	err = cmd.Run()
	out, readErr := os.ReadFile(log.Name())
	fmt.Fprint(os.Stderr, string(out))
	return out, errors.Join(err, readErr)
}

// report is what package formattest writes about one kind of image.
type report struct {
	Format, Subformat string
	Counts            map[string]int64
	Failed            []string
}

func readReports(dir string) ([]report, error) {
	files, err := filepath.Glob(filepath.Join(dir, "figures-*.json"))
	if err != nil {
		return nil, err
	}
	var all []report
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		var some []report
		if err := json.Unmarshal(b, &some); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		all = append(all, some...)
	}
	if len(all) == 0 {
		return nil, errors.New("no figures were written")
	}
	return all, nil
}

// version returns what a program says about itself, the first line of it.
func version(name string, args ...string) string {
	out, err := exec.Command(name, args...).Output()
	if err != nil {
		return name + " (not installed)"
	}
	return cmp.Or(firstLine(out), name)
}
