package main

import (
	"context"
	"errors"
	"slices"
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
		if !b.wants(sectionOpen, openTime) && !b.wants(sectionOpen, openMemory) || !slices.Contains(b.formats, format) {
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
			{work: openTime, unit: milliseconds, value: float64(took.Microseconds()) / 1000},
			{work: openMemory, unit: mebibytes, value: float64(residentBytes) / float64(mib1)},
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
	residentBytes, err = resident(s.pids(), residentNow)
	return took, residentBytes, err
}
