package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/all"
)

// bench is a run.
type bench struct {
	config
	dir     string // everything else; removed in the end
	memory  string // images that are read and overwritten; dir, if there is no room in memory
	runDir  string // our servers' state: on tmpfs, where it is in production, if there is one
	results *results
}

func newBench(c config) (*bench, error) {
	all.Register()
	for _, tool := range []string{"fio", "qemu-img", "qemu-io"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, err
		}
	}
	var err error
	if c.binary, err = filepath.Abs(c.binary); err != nil {
		return nil, err
	}
	b := &bench{config: c, results: new(results)}
	if b.dir, err = os.MkdirTemp(c.dir, "csi-imgdisk-bench-"); err != nil {
		return nil, err
	}
	if b.runDir, err = os.MkdirTemp("/dev/shm", "csi-imgdisk-bench-"); err != nil {
		b.runDir = filepath.Join(b.dir, "run")
		err = os.Mkdir(b.runDir, 0o700)
	}
	if err == nil {
		err = b.makeMemory()
	}
	if err != nil {
		b.close()
		return nil, err
	}
	b.results.describe(b)
	return b, nil
}

// makeMemory makes a directory for what is to be measured without a disk.
func (b *bench) makeMemory() (err error) {
	b.memory = b.dir
	const copies = 3 // a full image, the layers over it, and something to spare
	var room unix.Statfs_t
	switch {
	case b.config.memory == "":
		return nil
	case unix.Statfs(b.config.memory, &room) != nil || int64(room.Bavail)*room.Bsize < copies*b.fullBytes():
		b.progress("no room for %d images of %d MiB in %s: reading and overwriting is measured on the disk, too", copies, b.sizeMiB, b.config.memory)
		return nil
	}
	b.memory, err = os.MkdirTemp(b.config.memory, "csi-imgdisk-bench-")
	return err
}

// at returns b with its images where those of a kind belong.
func (b *bench) at(kind imageKind) *bench {
	there := *b
	if kind != emptyImage {
		there.dir = b.memory
	}
	return &there
}

func (b *bench) close() {
	for _, dir := range []string{b.dir, b.memory, b.runDir} {
		if err := os.RemoveAll(dir); err != nil {
			fmt.Fprintln(os.Stderr, "bench: clean up:", err)
		}
	}
}

// run measures everything. What we cannot do, and what fails, is noted with the reason and
// left out; only an interrupt ends the run early.
func (b *bench) run(ctx context.Context) error {
	for _, format := range b.formats {
		if _, err := formats.Lookup(format); err != nil {
			b.skip(format, err)
			continue
		}
		if err := b.measureFormat(ctx, format); err != nil {
			return err
		}
	}
	if err := b.measureDevices(ctx); err != nil {
		return err
	}
	if err := b.measureConversions(ctx); err != nil {
		return err
	}
	if err := b.measureOpening(ctx); err != nil {
		return err
	}
	b.results.compare()
	return nil
}

// measureFormat does all works in one format.
func (b *bench) measureFormat(ctx context.Context, format string) error {
	var images, empty imageSet
	defer func() { images.remove(); empty.remove() }()
	for _, w := range works() {
		if !w.isFor(format) || !b.wants(w.section, w.name) {
			continue
		}
		set := &images
		if w.kind == emptyImage {
			set = &empty
		}
		there := b.at(w.kind)
		image, err := set.get(ctx, there, format, &w)
		if err == nil {
			err = b.takeTurns(ctx, w.name, format, w.contenders(format), func(name string) ([]figure, error) {
				value, used, err := there.measureBeside(ctx, set, name, format, image, &w)
				return []figure{{w.name, w.unit(), value, used}}, err
			})
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			b.fail(format+": "+w.name, err)
		}
	}
	return nil
}

// wants says whether a work is chosen: by its section's name, or by a part of its own.
func (b *bench) wants(section, name string) bool {
	return slices.ContainsFunc(b.only, func(choice *regexp.Regexp) bool {
		return choice.String() == section || choice.MatchString(name)
	})
}

// figure is one measured value of a work, and what it took.
type figure struct {
	work, unit string
	value      float64
	usage      usage
}

// takeTurns lets contenders do a work round by round, each second round in reverse order.
// One that is not installed is left out.
func (b *bench) takeTurns(ctx context.Context, what, format string, contenders []string, measure func(name string) ([]figure, error)) error {
	order := slices.DeleteFunc(slices.Clone(contenders), func(name string) bool { return !b.hasContender(name) })
	for round := range b.rounds {
		for _, name := range order {
			if err := ctx.Err(); err != nil {
				return err
			}
			b.progress("%s, %s, round %d of %d: %s", format, what, round+1, b.rounds, name)
			figures, err := measure(name)
			if err != nil {
				return err
			}
			for _, f := range figures {
				b.results.add(f, format, name)
			}
			settle(b.dir)
		}
		slices.Reverse(order)
	}
	return nil
}

// settle writes out what measurements left in the page cache, which would slow the next.
func settle(dir string) {
	if f, err := os.Open(dir); err == nil {
		_ = unix.Syncfs(int(f.Fd())) // it only makes figures steadier
		f.Close()
	}
}

// hasContender says whether a contender's program is there, and notes it if not.
func (b *bench) hasContender(name string) bool {
	program := name
	switch name {
	case ours, ownRaw, oneLayer:
		program = b.binary
	case nbdkit:
		program = "nbdkit"
	case plainLoop:
		program = "losetup"
	}
	_, err := exec.LookPath(program)
	if err != nil {
		b.skip(name, err)
	}
	return err == nil
}

// measureBeside is measure, or measures us with what our figure is compared with.
func (b *bench) measureBeside(ctx context.Context, set *imageSet, name, format, image string, w *work) (float64, usage, error) {
	switch name {
	case ownRaw:
		return b.measure(ctx, ours, rawName, image, w) // it is made anew
	case oneLayer:
		base, err := set.getChain(ctx, b, format, 1)
		if err != nil {
			return 0, usage{}, err
		}
		return b.measure(ctx, ours, format, base, w)
	}
	return b.measure(ctx, name, format, image, w)
}

// measure lets a contender do a work once, on an image that is served for it alone. An
// empty image is made anew.
func (b *bench) measure(ctx context.Context, name, format, image string, w *work) (value float64, used usage, err error) {
	l := load{mode: w.mode, blockBytes: w.blockBytes, depth: w.depth, sizeBytes: b.usedBytes(), duration: b.duration()}
	if w.kind == emptyImage {
		if err := b.create(ctx, format, image, emptyBytes); err != nil {
			return 0, used, err
		}
		l.sizeBytes, l.totalBytes = emptyBytes, firstWrites(w.blockBytes)
	}
	s, err := b.serve(ctx, name, format, image)
	if err != nil {
		return 0, used, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	s.client.close() // the load's is the only one
	r, used, err := watchLoad(s.pids(), func() (rate, error) { return runFio(ctx, onServer(s.socket), l) })
	return r.in(w.unit()), used, err
}

func (b *bench) progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
}

// skip notes what is not measured, and why; once.
func (b *bench) skip(what string, reason error) {
	note := skipped{What: what, Reason: reason.Error()}
	if !slices.Contains(b.results.Skipped, note) {
		b.progress("skipped: %s: %v", what, reason)
		b.results.Skipped = append(b.results.Skipped, note)
	}
}

// fail notes what should have been measured.
func (b *bench) fail(what string, reason error) {
	b.progress("failed: %s: %v", what, reason)
	b.results.Skipped = append(b.results.Skipped, skipped{What: what, Reason: reason.Error(), Failed: true})
}
