// Command bench measures our speed beside qemu-nbd's, nbdkit's and qemu-img's on the same
// images, on the same file system, in one run: `make bench`, or `go run ./test/bench`
// from the repository's root. How to read what it prints is in docs/benchmarks.
//
//   - main.go: flags; bench.go: the run
//   - works.go: what is measured, and the targets
//   - usage.go: what servers take of processors and memory
//   - images.go, large.go: images to measure on
//   - servers.go: starting and stopping NBD servers; client.go: is one ready?
//   - fio.go: the client that measures them; device.go: block devices, which it measures too
//   - convert.go, open.go: what is measured without it
//   - results.go, compare.go: figures, and what they mean; report.go, plot.go: showing them
//
// Contenders take turns, round by round, so that a machine that slows down slows all of
// them; what is compared are medians of the rounds' ratios.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// config is how to measure.
type config struct {
	seconds float64          // of each measurement
	rounds  int              // per contender
	sizeMiB int64            // of images whose clusters all have contents
	formats []string         // in qemu-img's words
	only    []*regexp.Regexp // sections' names, or expressions for works' names
	dir     string           // for images
	memory  string           // for images that are read and overwritten
	out     string           // for the report; "" for none
	binary  string           // csi-imgdisk
}

// allFormats are those that qemu-nbd serves, too.
const allFormats = "raw,vmdk,qcow2,vdi,vhdx,vpc,qcow"

func main() {
	var c config
	flag.Float64Var(&c.seconds, "seconds", 4, "how long each measurement takes")
	flag.IntVar(&c.rounds, "repeat", 3, "rounds of each measurement, of which the median counts")
	flag.Int64Var(&c.sizeMiB, "size", 1024, "MiB of the images that are full of data")
	formats := flag.String("formats", allFormats, "formats to measure, separated by commas")
	only := flag.String("only", ".", "only these, separated by commas: sections ("+strings.Join(sections(), ", ")+"), or works whose names match an expression")
	flag.StringVar(&c.dir, "dir", os.TempDir(), "directory for images: the file system that is measured on")
	flag.StringVar(&c.memory, "memory", "/dev/shm", "directory for images that are read and overwritten, so that servers are measured and no disk; \"\" for that of -dir")
	flag.StringVar(&c.out, "out", "docs/benchmarks", "directory for results.json and results.svg; \"\" for none")
	flag.StringVar(&c.binary, "binary", "bin/csi-imgdisk", "our program")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := start(ctx, c, *formats, *only)
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func start(ctx context.Context, c config, formats, only string) error {
	for choice := range strings.SplitSeq(only, ",") {
		expression, err := regexp.Compile(choice)
		if err != nil {
			return fmt.Errorf("-only: %w", err)
		}
		c.only = append(c.only, expression)
	}
	c.formats = strings.Split(formats, ",")
	if err := c.check(); err != nil {
		return err
	}
	b, err := newBench(c)
	if err != nil {
		return err
	}
	defer b.close()
	if err := b.run(ctx); err != nil {
		return err
	}
	b.results.print(os.Stdout)
	if c.out != "" {
		if err := b.results.write(c.out); err != nil {
			return err
		}
	}
	if n := b.results.failures(); n > 0 {
		return fmt.Errorf("%d measurements failed: see the end of the table", n)
	}
	return nil
}

func (c *config) check() error {
	known := strings.Split(allFormats, ",")
	for _, f := range c.formats {
		if !slices.Contains(known, f) {
			return fmt.Errorf("-formats: %q: want some of %s", f, allFormats)
		}
	}
	switch {
	case c.seconds <= 0 || c.seconds > 600:
		return fmt.Errorf("-seconds %v: want more than 0 and at most 600", c.seconds)
	case c.rounds < 1 || c.rounds > 99:
		return fmt.Errorf("-repeat %d: want 1 to 99", c.rounds)
	case c.sizeMiB < 64 || c.sizeMiB > 1<<20:
		return fmt.Errorf("-size %d: want 64 to 1048576", c.sizeMiB)
	}
	return nil
}

// duration is how long a measurement takes.
func (c *config) duration() time.Duration { return time.Duration(c.seconds * float64(time.Second)) }
