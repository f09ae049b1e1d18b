package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const (
	// emptyBytes is the size of images that are written for the first time: so large
	// that random writes hardly meet.
	emptyBytes = 64 << 30
	// chunkBytes is what layers of a chain hold at a time: the clusters of its formats.
	chunkBytes = 64 << 10
	// chunkStride is how many chunks lie between two of one layer.
	chunkStride = 64
	// edgeBytes is left alone at an image's end, because qemu rounds some sizes down.
	edgeBytes = 16 << 20
)

// firstWrites bounds what is written to an empty image, and so the space it takes.
func firstWrites(blockBytes int64) int64 {
	if blockBytes >= mib1 {
		return 2 << 30
	}
	return 65536 * blockBytes
}

func (b *bench) fullBytes() int64 { return b.sizeMiB << 20 }
func (b *bench) usedBytes() int64 { return b.fullBytes() - edgeBytes }

// run runs a program in b's directory.
func (b *bench) program(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = b.dir
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args[:min(len(args), 4)], " "), err, lastLines(out.String()))
	}
	return nil
}

// create makes an image with our program, in the place of an earlier one.
func (b *bench) create(ctx context.Context, format, name string, sizeBytes int64) error {
	if err := os.RemoveAll(filepath.Join(b.dir, name)); err != nil {
		return err
	}
	return b.program(ctx, b.binary, "image", "create", "--format", format, name, fmt.Sprint(sizeBytes))
}

// imageSet is the images of one format, made as they are needed.
type imageSet struct {
	dir   string
	full  string
	chain []string // base first
	names []string // all, to be removed
}

// get returns the image that a work is done on.
func (s *imageSet) get(ctx context.Context, b *bench, format string, w *work) (string, error) {
	s.dir = b.dir
	switch w.kind {
	case emptyImage:
		name := "empty." + format
		s.names = append(s.names, name)
		return name, nil // made for each measurement
	case chainImage:
		return s.getChain(ctx, b, format, w.layers)
	}
	return s.getFull(ctx, b, format)
}

// getFull returns an image whose clusters all have contents, which a server of ours has
// written from the first to the last.
func (s *imageSet) getFull(ctx context.Context, b *bench, format string) (string, error) {
	if s.full != "" {
		return s.full, nil
	}
	name := "full." + format
	s.names = append(s.names, name)
	b.progress("%s: fill an image of %d MiB", format, b.sizeMiB)
	if err := b.create(ctx, format, name, b.fullBytes()); err != nil {
		return "", err
	}
	srv, err := b.serve(ctx, ours, format, name)
	if err != nil {
		return "", err
	}
	srv.client.close()
	fill := load{mode: "write", blockBytes: mib1, depth: seqDepth, sizeBytes: b.fullBytes()}
	_, err = runFio(ctx, onServer(srv.socket), fill)
	if stopErr := srv.stop(); err == nil {
		err = stopErr
	}
	if err != nil {
		return "", fmt.Errorf("fill %s: %w", name, err)
	}
	settle(b.dir)
	s.full = name
	return name, nil
}

// getChain returns the top of a chain of so many layers. The base is full, the others
// have one chunk in chunkStride each; qemu's tools have made them.
func (s *imageSet) getChain(ctx context.Context, b *bench, format string, layers int) (string, error) {
	if s.chain == nil {
		base, err := s.getFull(ctx, b, format)
		if err != nil {
			return "", err
		}
		s.chain = []string{base}
	}
	for len(s.chain) < layers {
		if err := s.grow(ctx, b, format); err != nil {
			return "", err
		}
	}
	return s.chain[layers-1], nil
}

// grow puts one more layer on the chain.
func (s *imageSet) grow(ctx context.Context, b *bench, format string) error {
	depth := len(s.chain)
	name := fmt.Sprintf("layer-%d.%s", depth, format)
	s.names = append(s.names, name)
	err := b.program(ctx, "qemu-img", "create", "-q", "-f", format, "-b", s.chain[depth-1], "-F", format, name)
	if err != nil {
		return err
	}
	args := []string{"-t", "unsafe", "-f", format}
	for off := int64(2*depth%chunkStride) * chunkBytes; off+chunkBytes <= b.usedBytes(); off += chunkStride * chunkBytes {
		args = append(args, "-c", fmt.Sprintf("write -q -P %d %d %d", depth, off, chunkBytes))
	}
	if err := b.program(ctx, "qemu-io", append(args, name)...); err != nil {
		return err
	}
	s.chain = append(s.chain, name)
	return nil
}

// remove removes all images.
func (s *imageSet) remove() {
	for _, name := range s.names {
		if err := os.RemoveAll(filepath.Join(s.dir, name)); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
		}
	}
}
