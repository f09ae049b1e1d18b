package formattest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const (
	// hostileTime is how long everything that is done with one damaged image may take:
	// a generous limit for a busy machine.
	hostileTime = 30 * time.Second
	// hostileBytes is how much may be allocated meanwhile, caches included, and what is
	// written to files, which are in memory: a VHD makes room for a table by copying blocks.
	hostileBytes = 384 << 20
	// hostileReads bounds what is read of an image that says it is huge.
	hostileReads = 8 << 20
)

// testHostile damages an image in many ways: whatever is in it, using it gives data or
// errors, in bounded time and memory.
func testHostile(t *testing.T, f Factory) {
	f.counted(t, "damaged images", func(f *Figures) *atomic.Int64 { return &f.HostileImages })
	r := testenv.Rand(t)
	mem := vfs.NewMem()
	image := madeForDamage(t, f, mem, r)
	intact, err := readFiles(mem)
	if err != nil {
		t.Fatal(err)
	}
	h := &hostile{f: f, r: r, intact: intact, names: image.names, top: image.top()}
	h.findMetadata()
	for i := range f.scaled(400) {
		files, what := h.damaged(i)
		if err := h.use(files); err != nil {
			t.Fatalf("image %d, %s: %v", i, what, err)
		}
		f.figures(1).HostileImages.Add(1)
	}
}

// madeForDamage returns an image, not open, with something in it.
func madeForDamage(t testing.TB, f Factory, mem *vfs.Mem, r *rand.Rand) *rig {
	t.Helper()
	if f.FilledOnly {
		if err := f.convert(mem, f.randomContents(r), true); err != nil {
			t.Fatal(err)
		}
		return f.converted(mem)
	}
	depths := f.depths()
	p := newPlayer(t, f, mem, r, depths[min(1, len(depths)-1)])
	p.play(t, f.script(r, mix{opWrite: 3, opDiscard: 1, opFlush: 1}, 20))
	p.mustClose(t)
	return p.rig
}

// readFiles returns the contents of all files in the root directory.
func readFiles(fsys vfs.FS) (map[string][]byte, error) {
	entries, err := fsys.ReadDir(".")
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{}
	for _, e := range entries {
		f, err := fsys.Open(e.Name(), vfs.ReadOnly)
		if err != nil {
			return nil, err
		}
		size, err := f.Size()
		if err == nil {
			files[e.Name()], err = io.ReadAll(io.NewSectionReader(f, 0, size))
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return nil, err
		}
	}
	return files, nil
}

type hostile struct {
	f      Factory
	r      *rand.Rand
	intact map[string][]byte
	names  []string // of the chain
	top    string
	// metadata are the places of bytes that the format wrote, not the guest.
	metadata []bytePlace
}

type bytePlace struct {
	file string
	off  int
}

// findMetadata looks for sectors that hold neither zeroes nor stamps.
func (h *hostile) findMetadata() {
	const sector = 512
	for _, name := range slices.Sorted(maps.Keys(h.intact)) {
		b := h.intact[name]
		for off := 0; off < len(b); off += sector {
			s := b[off:min(off+sector, len(b))]
			if bytes.Count(s, []byte("@000")) > len(s)/cellBytes/2 || len(bytes.Trim(s, "\x00")) == 0 {
				continue
			}
			for i, c := range s {
				if c != 0 {
					h.metadata = append(h.metadata, bytePlace{name, off + i})
				}
			}
		}
	}
}

// pickPlace returns a byte to spoil: most damage is done at the beginning of files, where
// headers are, and in what the format wrote.
func (h *hostile) pickPlace() bytePlace {
	name := h.names[h.r.IntN(len(h.names))]
	switch size := len(h.intact[name]); h.r.IntN(3) {
	case 0:
		return bytePlace{name, h.r.IntN(min(size, 512))}
	case 1:
		return bytePlace{name, h.r.IntN(min(size, 4096))}
	}
	return h.metadata[h.r.IntN(len(h.metadata))]
}

// damaged returns files that are damaged in some way, and in which.
func (h *hostile) damaged(i int) (map[string][]byte, string) {
	files := maps.Clone(h.intact)
	if i%4 == 0 || len(h.metadata) == 0 {
		name := h.names[h.r.IntN(len(h.names))]
		length := h.r.IntN(len(files[name]) + 1)
		if h.r.IntN(2) == 0 {
			length = h.r.IntN(min(length, 8<<10) + 1)
		}
		files[name] = files[name][:length]
		return files, fmt.Sprintf("%s cut to %d of %d bytes", name, length, len(h.intact[name]))
	}
	what := ""
	reseal := h.f.Reseal != nil && h.r.IntN(2) == 0
	for range 1 + h.r.IntN(3) {
		place := h.pickPlace()
		b := bytes.Clone(files[place.file])
		what += fmt.Sprintf("%s at %#x: %s; ", place.file, place.off, h.spoil(b, place.off))
		if reseal {
			h.f.Reseal(place.file, b)
		}
		files[place.file] = b
	}
	return files, what
}

// spoil changes something at off, or near it.
func (h *hostile) spoil(b []byte, off int) string {
	extremes := []uint64{0, 1, 1 << 31, 1<<32 - 1, 1 << 40, 1<<63 - 1, 1 << 63, 1<<64 - 1, uint64(len(b)), uint64(len(b)) / 512}
	extreme := extremes[h.r.IntN(len(extremes))] + uint64(h.r.IntN(3)) - 1
	switch h.r.IntN(6) {
	case 0:
		b[off] ^= 1 << h.r.IntN(8)
		return fmt.Sprintf("a bit flipped, now %#x", b[off])
	case 1:
		b[off] = byte(h.r.IntN(256))
		return fmt.Sprintf("now %#x", b[off])
	case 2:
		if off &^= 3; off+4 <= len(b) {
			binary.LittleEndian.PutUint32(b[off:], uint32(extreme))
		}
		return fmt.Sprintf("32 bits now %#x", uint32(extreme))
	case 3:
		if off &^= 3; off+4 <= len(b) {
			binary.BigEndian.PutUint32(b[off:], uint32(extreme))
		}
		return fmt.Sprintf("32 bits now %#x, big-endian", uint32(extreme))
	case 4:
		if off &^= 7; off+8 <= len(b) {
			binary.BigEndian.PutUint64(b[off:], extreme)
		}
		return fmt.Sprintf("64 bits now %#x, big-endian", extreme)
	}
	if off &^= 7; off+8 <= len(b) {
		binary.LittleEndian.PutUint64(b[off:], extreme)
	}
	return fmt.Sprintf("64 bits now %#x", extreme)
}

// use does everything with a damaged image that can be done, and returns an error if
// that takes too long, takes too much memory, or leaves something open.
func (h *hostile) use(files map[string][]byte) error {
	fsys := track(vfs.NewMem())
	for name, b := range files {
		if err := writeFile(fsys, name, b); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), hostileTime)
	defer cancel()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	done := make(chan error, 1)
	go func() { done <- h.useAll(ctx, fsys) }()
	select {
	case err := <-done:
		if err != nil {
			return err
		}
	case <-ctx.Done():
		stacks := make([]byte, 64<<10)
		return fmt.Errorf("still busy after %v:\n%s", hostileTime, stacks[:runtime.Stack(stacks, true)])
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > hostileBytes {
		return fmt.Errorf("%d bytes were allocated, want at most %d", n, hostileBytes)
	}
	if leaks := fsys.leaks(); leaks != "" {
		return errors.New(leaks)
	}
	return nil
}

func writeFile(fsys vfs.FS, name string, b []byte) error {
	f, err := fsys.Create(name)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, 0)
	return errors.Join(err, f.Close())
}

// useAll checks, reads, writes and repairs. What fails on the way is as it should be.
func (h *hostile) useAll(ctx context.Context, fsys vfs.FS) error {
	sound := true // as far as a check can tell
	for _, name := range h.names {
		layer, err := h.f.formatOf(name).Open(formats.OpenRequest{FS: fsys, Name: name, Mode: vfs.ReadOnly, Secret: h.f.Secret})
		if err != nil {
			continue
		}
		result, err := layer.Codec.Check(ctx, nil, func(done, total int64) {})
		sound = sound && err == nil && result.Corruptions == 0
		if err := errors.Join(layer.Close(), tooLong(err), saysLittle(result)); err != nil {
			return fmt.Errorf("check %s: %w", name, err)
		}
	}
	for _, mode := range []vfs.Mode{vfs.ReadOnly, vfs.ReadWrite} {
		img, err := formats.Open(ctx, fsys, h.top, h.f.openOptions(h.top, mode, nil))
		if err != nil {
			continue
		}
		err = useDisk(ctx, img, h.r, mode)
		if err == nil && sound && mode == vfs.ReadWrite {
			err = writeAndRead(img, h.r)
		}
		img.Close() // what was damaged may make it fail
		if err != nil {
			return err
		}
	}
	for _, name := range h.names {
		if err := h.repair(ctx, fsys, name); err != nil {
			return fmt.Errorf("repair %s: %w", name, err)
		}
	}
	return nil
}

// repair has an image repaired, and checked again: nothing may be worse than it said.
func (h *hostile) repair(ctx context.Context, fsys vfs.FS, name string) error {
	open := func(mode vfs.Mode) (*engine.Layer, error) {
		return h.f.formatOf(name).Open(formats.OpenRequest{FS: fsys, Name: name, Mode: mode, Secret: h.f.Secret})
	}
	layer, err := open(vfs.ReadWrite)
	if err != nil {
		return nil
	}
	repaired, err := engine.Check(ctx, layer, true, func(done, total int64) {})
	if closeErr := errors.Join(layer.Close(), tooLong(err), saysLittle(repaired)); closeErr != nil || err != nil {
		return closeErr
	}
	if layer, err = open(vfs.ReadOnly); err != nil {
		return fmt.Errorf("it cannot be opened any more: %w", err)
	}
	after, err := layer.Codec.Check(ctx, nil, func(done, total int64) {})
	if err := errors.Join(layer.Close(), tooLong(err)); err != nil {
		return err
	}
	if err == nil && after.Corruptions > repaired.Corruptions {
		return fmt.Errorf("%d corruptions, of which %d were repaired; now there are %d", repaired.Corruptions, repaired.FixedProblems, after.Corruptions)
	}
	return nil
}

// saysLittle returns an error if a check describes more problems than anybody reads: there
// may be one for every entry of a table.
func saysLittle(result engine.CheckResult) error {
	const most = 1000
	if n := len(result.Problems); n > most {
		return fmt.Errorf("%d problems are described, want at most %d", n, most)
	}
	return nil
}

// writeAndRead writes here and there, and reads what it has written.
func writeAndRead(d block.Device, r *rand.Rand) error {
	size := d.Info().SizeBytes
	for i := range 8 {
		if size == 0 {
			return nil
		}
		off := r.Int64N(size)
		if i%2 == 0 {
			off = r.Int64N(min(size, 1<<20))
		}
		n := min(1+r.Int64N(4096), size-off, 1<<30)
		p := noise(i, n)
		if _, err := d.WriteAt(p, off); err != nil {
			continue
		}
		got := make([]byte, n)
		if _, err := d.ReadAt(got, off); err == nil && !bytes.Equal(got, p) {
			return fmt.Errorf("%d bytes at %#x read other bytes than were written", n, off)
		}
	}
	return nil
}

// tooLong returns err if it says that time has run out.
func tooLong(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

func useDisk(ctx context.Context, d block.Device, r *rand.Rand, mode vfs.Mode) error {
	size := d.Info().SizeBytes
	if size < 0 {
		return fmt.Errorf("the disk has %d bytes", size)
	}
	b := make([]byte, min(size, hostileReads))
	for _, off := range []int64{0, size - int64(len(b)), r.Int64N(size - int64(len(b)) + 1)} {
		// One bad place must not keep the rest from being read.
		for at := int64(0); at < int64(len(b)); at += 64 << 10 {
			d.ReadAt(b[at:min(at+64<<10, int64(len(b)))], off+at)
		}
	}
	const extents = 2000
	for i, off := 0, int64(0); i < extents && off < size && ctx.Err() == nil; i++ {
		e, err := d.Map(off, size-off)
		if err != nil {
			break
		}
		if e.Off != off || e.Len <= 0 || e.Len > size-off {
			return fmt.Errorf("map of %d bytes at %d returned %+v", size-off, off, e)
		}
		off += e.Len
	}
	if mode == vfs.ReadWrite && size > 0 {
		for range 8 {
			off := r.Int64N(min(size, 1<<20))
			n := min(1+r.Int64N(128<<10), size-off)
			d.WriteAt(b[:min(n, int64(len(b)))], off)
			d.Discard(off, n)
			d.WriteZeroes(off, n, 0)
		}
		d.Flush()
	}
	return ctx.Err()
}
