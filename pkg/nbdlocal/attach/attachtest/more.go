package attachtest

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// testLargeBlocks: blocks of 4096 bytes, written, verified, and a server killed meanwhile.
func testLargeBlocks(t *testing.T, cfg Config) {
	r := newRig(t, cfg)
	r.spec.BlockBytes = 4096
	r.attach()
	dev := r.open(os.O_RDWR)
	if _, err := dev.WriteAt(r.buffer(4096), 512); err == nil {
		t.Error("a write between two blocks succeeded")
	}
	dev.Close()
	l := r.startLoad()
	r.awaitProgress(l, 50)
	r.killServer()
	r.recover()
	r.awaitProgress(l, 50)
	r.finish(l)
	r.detach()
}

// testZeroesInPlace: zeroes that shall keep their space keep it, and others give it back.
func testZeroesInPlace(t *testing.T, cfg Config) {
	if cfg.Transport != "ublk" {
		t.Skip("not every kernel's nbd can zero, and a loop device's FUSE file has no space to count")
	}
	r := attachedRig(t, cfg)
	dev := r.open(os.O_RDWR)
	p := r.buffer(4 << 20)
	for i := range p {
		p[i] = 0x5a
	}
	if _, err := dev.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	full := r.allocated()
	zero := func(mode uint32, off, n int64) {
		t.Helper()
		if err := unix.Fallocate(int(dev.Fd()), mode|unix.FALLOC_FL_KEEP_SIZE, off, n); err != nil {
			t.Fatalf("fallocate mode %#x: %v", mode, err)
		}
		clear(p[off : off+n])
	}
	zero(unix.FALLOC_FL_ZERO_RANGE, 1<<20, 1<<20)
	if got := r.allocated(); got != full {
		t.Errorf("zeroed in place, %d bytes of %d are left", got, full)
	}
	zero(unix.FALLOC_FL_PUNCH_HOLE, 2<<20, 1<<20)
	if got := r.allocated(); got != full-1<<20 {
		t.Errorf("with a hole of %d bytes, %d of %d are left", 1<<20, got, full)
	}
	got := r.buffer(len(p))
	if _, err := dev.ReadAt(got, 0); err != nil || !bytes.Equal(got, p) {
		t.Errorf("other bytes than expected, or %v", err)
	}
	dev.Close()
	r.detach()
}

// allocated is how much space the file behind the device takes.
func (r *rig) allocated() int64 {
	r.t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(r.backing, &st); err != nil {
		r.t.Fatal(err)
	}
	return st.Blocks * 512
}

// testKillServerFullQueue kills a server that has as many requests as the kernel gives
// out: none is lost, and none has to wait for long.
func testKillServerFullQueue(t *testing.T, cfg Config) {
	r := newRig(t, cfg)
	r.server.DelayMillis = 1500
	r.attach()
	dev := r.open(os.O_RDWR)
	const writers = 600
	failed := make(chan error, writers)
	var writing sync.WaitGroup
	for i := range int64(writers) {
		p := r.buffer(4096)
		fillBlock(p, i*8192, uint32(i))
		writing.Go(func() {
			if _, err := dev.WriteAt(p, i*8192); err != nil {
				failed <- err
			}
		})
	}
	time.Sleep(time.Second) // they are on their way
	r.killServer()
	r.server.DelayMillis = 0
	start := time.Now()
	r.recover()
	writing.Wait()
	t.Logf("all were answered %v after recovery began", time.Since(start).Round(time.Millisecond))
	close(failed)
	for err := range failed {
		t.Errorf("a write failed: %v", err)
	}
	got, want := r.buffer(4096), make([]byte, 4096)
	for i := range int64(writers) {
		fillBlock(want, i*8192, uint32(i))
		if _, err := dev.ReadAt(got, i*8192); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("write %d: other bytes, or %v", i, err)
		}
	}
	dev.Close()
	r.detach()
}

// testHandOver replaces servers in order, under verifying load: each answers what it has
// taken, and ends well.
func testHandOver(t *testing.T, cfg Config) {
	if cfg.Transport != "ublk" {
		t.Skip("this suite's servers of other transports do not end in order")
	}
	r := attachedRig(t, cfg)
	l := r.startLoad()
	for range cfg.Kills {
		r.awaitProgress(l, 50+r.rng.Int64N(200))
		if err := r.process.Process.Signal(unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := r.process.Wait(); err != nil {
			t.Errorf("server, told to end: %v", err)
		}
		r.process = nil
		r.recover()
	}
	r.awaitProgress(l, 50)
	r.finish(l)
	r.detach()
}

// testKillSuccessor kills a server that is just being given a device: it is recovered the
// next time.
func testKillSuccessor(t *testing.T, cfg Config) {
	if cfg.Transport != "ublk" {
		t.Skip("nbd and FUSE make their successors ready in one step")
	}
	r := attachedRig(t, cfg)
	l := r.startLoad()
	for range 3 {
		r.awaitProgress(l, 50)
		r.killServer()
		r.server.Mute = true // it never asks for a request
		ctx, cancel := context.WithCancel(r.ctx)
		hooks := r.hooks()
		serve := hooks.Serve
		hooks.Serve = func(ctx context.Context, protocol string, files []*os.File) error {
			err := serve(ctx, protocol, files)
			time.AfterFunc(time.Duration(r.rng.IntN(100))*time.Millisecond, cancel)
			return err
		}
		if err := r.transport.Recover(ctx, r.state, hooks); err == nil {
			t.Error("recovered with a server that does nothing")
		}
		cancel()
		r.killServer()
		r.server.Mute = false
		r.recover()
	}
	r.awaitProgress(l, 50)
	r.finish(l)
	r.detach()
}

// testKillSuccessorAtAnyTime kills servers while they prepare to serve a device, sooner and
// later: wherever that meets them, the next one can have the device.
func testKillSuccessorAtAnyTime(t *testing.T, cfg Config) {
	if cfg.Transport != "ublk" {
		t.Skip("nbd and FUSE make their successors ready in one step")
	}
	r := attachedRig(t, cfg)
	l := r.startLoad()
	const kills = 40
	for i := range kills {
		r.awaitProgress(l, 5)
		r.killServer()
		hooks := r.hooks()
		serve := hooks.Serve
		hooks.Serve = func(ctx context.Context, protocol string, files []*os.File) error {
			err := serve(ctx, protocol, files)
			// Later kills meet a server that serves, in an emulated machine too.
			time.Sleep(time.Duration(r.rng.IntN(1+i)) * time.Millisecond)
			_ = r.process.Process.Kill()
			return err
		}
		if err := r.transport.Recover(r.ctx, r.state, hooks); err != nil {
			t.Logf("the server was killed before it served: %v", err)
		}
		r.killServer()
		r.recover()
	}
	r.awaitProgress(l, 50)
	r.finish(l)
	r.detach()
}

// testForgotten: what is known of a device from before it was complete is enough to remove
// it.
func testForgotten(t *testing.T, cfg Config) {
	if cfg.Transport == "fuse" {
		t.Skip("nothing of an incomplete FUSE device outlives its process")
	}
	r := attachedRig(t, cfg)
	early := r.persisted[0]
	if early.Device != "" {
		t.Fatalf("the first state that was persisted has a device, %+v", early)
	}
	if err := r.transport.Adopt(r.ctx, early, nil); !errors.Is(err, block.ErrNotFound) {
		t.Errorf("Adopt of an incomplete device: %v, want ErrNotFound", err)
	}
	if err := r.transport.Abort(r.ctx, early); err != nil {
		t.Errorf("Abort of an incomplete device: %v", err)
	}
	r.awaitGone()
}

// testStalled: requests that wait for storage hold up no others, once it is known to be
// slow.
func testStalled(t *testing.T, cfg Config) {
	r := newRig(t, cfg)
	r.server.StallFile, r.server.StallAt = filepath.Join(filepath.Dir(r.backing), "stall"), sizeBytes/2
	stall := func() {
		t.Helper()
		if err := os.WriteFile(r.server.StallFile, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	goOn := func() { _ = os.Remove(r.server.StallFile) }
	t.Cleanup(goOn)
	r.attach()
	dev := r.open(os.O_RDWR)
	wrote := make(chan error)
	write := func(off int64) {
		p := r.buffer(4096)
		fillBlock(p, off, 1)
		go func() {
			_, err := dev.WriteAt(p, off)
			wrote <- err
		}()
	}
	for i := range int64(10) { // of which the server learns what writes take
		stall()
		write(r.server.StallAt + i*4096)
		time.Sleep(5 * time.Millisecond)
		goOn()
		if err := <-wrote; err != nil {
			t.Fatal(err)
		}
	}
	stall()
	const writers = 8
	for i := range int64(writers) {
		write(r.server.StallAt + i*1<<20)
	}
	time.Sleep(50 * time.Millisecond) // they are with the server, or soon will be
	readsDone := make(chan error, 1)
	p := r.buffer(4096)
	go func() {
		for i := range int64(200) {
			if _, err := dev.ReadAt(p, i*4096); err != nil {
				readsDone <- err
				return
			}
		}
		readsDone <- nil
	}()
	select {
	case err := <-readsDone:
		if err != nil {
			t.Errorf("a read beside writes that wait: %v", err)
		}
	case err := <-wrote:
		t.Errorf("a write that was to wait has ended: %v", err)
	case <-time.After(time.Minute):
		t.Error("reads are held up by writes that wait")
	}
	goOn()
	for range writers {
		if err := <-wrote; err != nil {
			t.Errorf("a write that waited: %v", err)
		}
	}
	dev.Close()
	r.detach()
}

// testSignals interrupts threads that write more than a slow server takes: the device
// goes on with the server that it has, and keeps what they write.
func testSignals(t *testing.T, cfg Config) {
	r := newRig(t, cfg)
	r.server.DelayMillis = 5
	r.attach()
	dev := r.open(os.O_RDWR)
	const (
		writers  = 16
		each     = 2 << 20
		versions = 8
	)
	threads := make(chan int, writers)
	failed := make(chan error, writers)
	var writing sync.WaitGroup
	for i := range int64(writers) {
		p := r.buffer(each)
		writing.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			threads <- unix.Gettid()
			for version := range uint32(versions) {
				for off := 0; off < each; off += loadBlockBytes {
					fillBlock(p[off:off+loadBlockBytes], i*each+int64(off), version)
				}
				if _, err := dev.WriteAt(p, i*each); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	written := make(chan struct{})
	go func() { writing.Wait(); close(written) }()
	var tids []int
	for range writers {
		tids = append(tids, <-threads)
	}
	for limit := time.After(2 * time.Minute); ; {
		select {
		case <-written:
		case <-limit:
			t.Fatal("not written in two minutes: does the device still have its server?")
		case <-time.After(time.Millisecond):
			for _, tid := range tids {
				_ = unix.Tgkill(os.Getpid(), tid, unix.SIGURG) // Go takes it for its own
			}
			continue
		}
		break
	}
	close(failed)
	for err := range failed {
		t.Errorf("a write failed: %v", err)
	}
	got, want := r.buffer(each), make([]byte, loadBlockBytes)
	for i := range int64(writers) {
		if _, err := dev.ReadAt(got, i*each); err != nil {
			t.Fatal(err)
		}
		for off := 0; off < each; off += loadBlockBytes {
			fillBlock(want, i*each+int64(off), versions-1)
			if !bytes.Equal(got[off:off+loadBlockBytes], want) {
				t.Fatalf("other bytes at %d", i*each+int64(off))
			}
		}
	}
	dev.Close()
	r.detach()
}
