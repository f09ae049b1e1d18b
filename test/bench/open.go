package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
)

// Opening the largest images.
const (
	openTime   = "open 2 TiB with 1 TiB mapped: time to first data"
	openMemory = "open 2 TiB with 1 TiB mapped: resident memory"

	mappedBytes = 1 << 40
	// probes is how many places of a large image are read before memory is measured.
	probes = 64
)

// openingLimit is what opening may take at most.
type openingLimit struct {
	work string
	most float64
}

func openingLimits() []openingLimit { return []openingLimit{{openTime, 50}, {openMemory, 64}} }

// measureOpening measures how long a server takes to give the first data of a large image,
// and its memory once it has read in many places.
func (b *bench) measureOpening(ctx context.Context) error {
	for _, format := range []string{"qcow2", vmdkName} {
		_, err := formats.Lookup(format)
		if !b.only.MatchString(openTime) && !b.only.MatchString(openMemory) || !slices.Contains(b.formats, format) {
			continue
		}
		if err != nil {
			b.skip("open a large "+format, err)
			continue
		}
		if err := b.measureOpeningOf(ctx, format); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			b.fail("open a large "+format, err)
		}
	}
	return nil
}

func (b *bench) measureOpeningOf(ctx context.Context, format string) error {
	image := "large." + format
	defer func() { (&imageSet{dir: b.dir, names: []string{image}}).remove() }()
	b.progress("%s: make an image of 2 TiB with 1 TiB mapped", format)
	if err := b.makeLarge(ctx, format, image); err != nil {
		return err
	}
	settle(b.dir)
	return b.takeTurns(ctx, "open 2 TiB", format, []string{ours, qemuNBD}, func(name string) ([]figure, error) {
		took, residentBytes, err := b.open(ctx, name, format, image)
		return []figure{
			{openTime, milliseconds, float64(took.Microseconds()) / 1000},
			{openMemory, mebibytes, float64(residentBytes) / float64(mib1)},
		}, err
	})
}

// open starts a server, reads, and stops it.
func (b *bench) open(ctx context.Context, name, format, image string) (took time.Duration, residentBytes int64, err error) {
	start := time.Now()
	s, err := b.serve(ctx, name, format, image)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	for i := range int64(probes) {
		if err := s.client.read(make([]byte, kib4), i*(mappedBytes/probes)); err != nil {
			return 0, 0, err
		}
		if i == 0 {
			took = time.Since(start)
		}
	}
	residentBytes, err = resident(s.cmd.Process.Pid)
	return took, residentBytes, err
}

// resident returns how much memory a process has.
func resident(pid int) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	return parseResident(string(text))
}

// parseResident reads VmRSS of proc(5)'s status.
func parseResident(status string) (int64, error) {
	for line := range strings.Lines(status) {
		if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.New("the process has no VmRSS")
}
