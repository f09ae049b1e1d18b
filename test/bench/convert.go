package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
)

// conversion is a conversion that is measured beside qemu-img's.
type conversion struct {
	name                   string
	source, format         string // file in b's directory; format of the target
	subformat              string // "": the format's default
	sourceFormat           string
	sourceSubformat        string
	theirOptions, ourFlags []string
	target                 float64
}

const streamOptimized = "streamOptimized"

func conversions() []conversion {
	return []conversion{
		{
			name: "convert streamOptimized to qcow2", source: "source.vmdk", sourceFormat: vmdkName, sourceSubformat: streamOptimized,
			format: "qcow2", target: 2,
		},
		{
			name: "convert raw to streamOptimized", source: "source.raw", sourceFormat: rawName,
			format: vmdkName, subformat: streamOptimized,
			theirOptions: []string{"-o", "subformat=" + streamOptimized}, ourFlags: []string{"--subformat", streamOptimized},
		},
	}
}

// measureConversions measures `image convert` beside `qemu-img convert`. Both write to
// the disk what they have made before they end: qemu-img does so with -t writeback.
func (b *bench) measureConversions(ctx context.Context) error {
	names := []string{"source.raw", "source.vmdk", "target"}
	defer func() { (&imageSet{dir: b.dir, names: names}).remove() }()
	for _, c := range conversions() {
		if !b.wants(sectionConvert, c.name) {
			continue
		}
		if err := c.supported(); err != nil {
			b.skip(c.name, err)
			continue
		}
		err := b.makeSources(ctx)
		if err == nil {
			err = b.takeTurns(ctx, c.name, c.format, []string{ours, qemuImg}, func(name string) ([]figure, error) {
				seconds, err := b.convert(ctx, name, &c)
				return []figure{{work: c.name, unit: mibPerSecond, value: float64(b.sizeMiB) / seconds}}, err
			})
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			b.fail(c.name, err)
		}
	}
	return nil
}

// supported says why we cannot convert so, if we cannot.
func (c *conversion) supported() error {
	for _, name := range []string{c.sourceFormat, c.format} {
		if _, err := formats.Lookup(name); err != nil {
			return err
		}
	}
	f, err := formats.Lookup(c.format)
	if err == nil && c.subformat != "" && !slices.Contains(f.Options().Subformats, c.subformat) {
		err = fmt.Errorf("%s images cannot be made as %s: want one of %s", c.format, c.subformat, strings.Join(f.Options().Subformats, ", "))
	}
	return err
}

// convert converts once and returns how many seconds it took. What came of it must be
// what went in.
func (b *bench) convert(ctx context.Context, name string, c *conversion) (float64, error) {
	if err := os.RemoveAll(filepath.Join(b.dir, "target")); err != nil {
		return 0, err
	}
	program, args := b.binary, append([]string{"image", "convert", "--format", c.format}, c.ourFlags...)
	if name == qemuImg {
		program, args = qemuImg, append([]string{"convert", "-t", "writeback", "-O", c.format}, c.theirOptions...)
	}
	start := time.Now()
	if err := b.program(ctx, program, append(args, c.source, "target")...); err != nil {
		return 0, err
	}
	seconds := time.Since(start).Seconds()
	return seconds, b.program(ctx, qemuImg, "compare", "-f", c.sourceFormat, "-F", c.format, c.source, "target")
}

// makeSources makes what is converted, once: a raw disk, and the same streamOptimized.
func (b *bench) makeSources(ctx context.Context) error {
	raw := filepath.Join(b.dir, "source.raw")
	if _, err := os.Stat(raw); err == nil {
		return nil
	}
	b.progress("make a disk of %d MiB to convert", b.sizeMiB)
	f, err := os.Create(raw)
	if err != nil {
		return err
	}
	err = writeDisk(f, b.fullBytes())
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("make a disk: %w", err)
	}
	return b.program(ctx, qemuImg, "convert", "-O", vmdkName, "-o", "subformat="+streamOptimized, "source.raw", "source.vmdk")
}

// writeDisk writes a disk as disks are: a third of it holes, the most of the rest text
// that can be compressed, and some that cannot. It is the same each time.
func writeDisk(f *os.File, sizeBytes int64) error {
	r := rand.New(rand.NewChaCha8([32]byte{}))
	chunk := make([]byte, chunkBytes)
	for off := int64(0); off < sizeBytes; off += chunkBytes {
		switch n := r.IntN(100); {
		case n < 35:
			continue // a hole
		case n < 80:
			fillText(r, chunk)
		default:
			for i := range chunk {
				chunk[i] = byte(r.Uint32())
			}
		}
		if _, err := f.WriteAt(chunk[:min(chunkBytes, sizeBytes-off)], off); err != nil {
			return err
		}
	}
	return f.Truncate(sizeBytes)
}

// vocabularySize is how many different words text has: it compresses to about a third.
const vocabularySize = 4096

// fillText fills p with made-up words.
func fillText(r *rand.Rand, p []byte) {
	for n := 0; n < len(p); {
		word := r.Uint64N(vocabularySize)
		text := fmt.Sprintf("%x%s ", word*2654435761%1000003, strings.Repeat("e", int(word%4)))
		n += copy(p[n:], text)
	}
}
