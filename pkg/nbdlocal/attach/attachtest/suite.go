package attachtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
)

// Config is what the suite needs to know.
type Config struct {
	Transport   string   // "nbd", "ublk" or "fuse"
	Connections int      // of nbd; 0 is the default
	Confined    bool     // servers confine themselves, as those of volumes do
	Kills       int      // of a server under load, per test that does it
	Only        []string // names of tests; none are all
}

// Run runs the suite as subtests.
func Run(t *testing.T, cfg Config) {
	for _, c := range []struct {
		name string
		test func(*testing.T, Config)
	}{
		{"Data", testData},
		{"Zeroes", testZeroes},
		{"Limits", testLimits},
		{"ReadOnly", testReadOnly},
		{"SmallBlocksRefused", testBadSpec},
		{"Errors", testErrors},
		{"Resize", testResize},
		{"DetachMounted", testDetachMounted},
		{"DetachOpened", testDetachOpened},
		{"DetachUnderLoop", testDetachUnderLoop},
		{"DetachOpenedUnseen", testDetachOpenedUnseen},
		{"AttachTwice", testAttachTwice},
		{"AttachServeFails", testAttachServeFails},
		{"AttachServerSilent", testAttachServerSilent},
		{"KillServer", testKillServer},
		{"KillServerFio", testKillServerFio},
		{"KillSupervisor", testKillSupervisor},
		{"KillBoth", testKillBoth},
		{"AdoptForeign", testAdoptForeign},
		{"RecoverServed", testRecoverServed},
		{"SlowServer", testSlowServer},
		{"Abort", testAbort},
		{"AbortOpened", testAbortOpened},
		{"LargeBlocks", testLargeBlocks},
		{"ZeroesInPlace", testZeroesInPlace},
		{"KillServerFullQueue", testKillServerFullQueue},
		{"HandOver", testHandOver},
		{"KillSuccessor", testKillSuccessor},
		{"KillSuccessorAtAnyTime", testKillSuccessorAtAnyTime},
		{"Forgotten", testForgotten},
		{"Stalled", testStalled},
		{"Signals", testSignals},
	} {
		if len(cfg.Only) == 0 || slices.Contains(cfg.Only, c.name) {
			t.Run(c.name, func(t *testing.T) { c.test(t, cfg) })
		}
	}
}

// testData writes odd sizes at odd places, through the device, and looks at the file.
func testData(t *testing.T, cfg Config) {
	r := attachedRig(t, cfg)
	dev := r.open(os.O_RDWR)
	buf := r.buffer(8 << 20)
	want := make([]byte, sizeBytes)
	for _, sectors := range []int{1, 7, 8, 129, 2047, 2048, 2049, 8<<20/512 - 1} {
		p := buf[:sectors*512]
		for i := range p {
			p[i] = byte(r.rng.Uint32())
		}
		off := r.rng.Int64N((sizeBytes-int64(len(p)))/512) * 512
		copy(want[off:], p)
		if _, err := dev.WriteAt(p, off); err != nil {
			t.Fatalf("write %d bytes at %d: %v", len(p), off, err)
		}
		got := r.buffer(len(p))
		if _, err := dev.ReadAt(got, off); err != nil || !bytes.Equal(got, p) {
			t.Fatalf("read %d bytes at %d: other bytes, or %v", len(p), off, err)
		}
	}
	if err := dev.Sync(); err != nil {
		t.Fatal(err)
	}
	dev.Close()
	if err := writeBuffered(r.state.Device, 12345, []byte("unaligned")); err != nil {
		t.Fatal(err)
	}
	copy(want[12345:], "unaligned")
	r.detach() // flushes what is buffered
	got, err := os.ReadFile(r.backing)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("the file holds other bytes than were written")
	}
}

func writeBuffered(path string, off int64, p []byte) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt(p, off)
	return err
}

// testZeroes zeroes and discards; both must give space back and not touch neighbours.
func testZeroes(t *testing.T, cfg Config) {
	for name, ioctl := range map[string]uintptr{"BLKDISCARD": unix.BLKDISCARD, "BLKZEROOUT": unix.BLKZEROOUT} {
		t.Run(name, func(t *testing.T) {
			r := attachedRig(t, cfg)
			dev := r.open(os.O_RDWR)
			p := r.buffer(4 << 20)
			for i := range p {
				p[i] = 0xa5
			}
			if _, err := dev.WriteAt(p, 0); err != nil {
				t.Fatal(err)
			}
			span := [2]uint64{1 << 20, 2 << 20}
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, dev.Fd(), ioctl, uintptr(unsafe.Pointer(&span))); errno != 0 {
				t.Fatalf("%s: %v", name, errno)
			}
			clear(p[1<<20 : 3<<20])
			got := r.buffer(len(p))
			if _, err := dev.ReadAt(got, 0); err != nil || !bytes.Equal(got, p) {
				t.Fatalf("other bytes than expected, or %v", err)
			}
			dev.Close()
			r.detach()
		})
	}
}

func testLimits(t *testing.T, cfg Config) {
	for _, blockBytes := range []int{512, 4096} {
		t.Run(strconv.Itoa(blockBytes), func(t *testing.T) {
			r := newRig(t, cfg)
			r.spec.BlockBytes = blockBytes
			r.attach()
			dev := r.open(os.O_RDONLY)
			for ioctl, want := range map[uint]int{unix.BLKSSZGET: blockBytes, unix.BLKROGET: 0} {
				if got, err := unix.IoctlGetInt(int(dev.Fd()), ioctl); err != nil || got != want {
					t.Errorf("ioctl %#x = %d, %v, want %d", ioctl, got, err, want)
				}
			}
			if end, err := dev.Seek(0, io.SeekEnd); err != nil || end != sizeBytes {
				t.Errorf("size %d, %v, want %d", end, err, int64(sizeBytes))
			}
			if got := r.queue("discard_max_bytes"); got <= 0 {
				t.Errorf("discard_max_bytes = %d, want some", got)
			}
			if got := r.queue("rotational"); got != 0 {
				t.Errorf("rotational = %d", got)
			}
			dev.Close()
			r.detach()
		})
	}
}

func (r *rig) queue(attribute string) int64 {
	r.t.Helper()
	b, err := os.ReadFile("/sys/block/" + r.deviceName() + "/queue/" + attribute)
	if err != nil {
		r.t.Fatal(err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

func testReadOnly(t *testing.T, cfg Config) {
	r := newRig(t, cfg)
	r.spec.ReadOnly, r.server.ReadOnly = true, true
	if err := writeBuffered(r.backing, 0, []byte("read me")); err != nil {
		t.Fatal(err)
	}
	r.attach()
	dev := r.open(os.O_RDONLY)
	p := r.buffer(4096)
	if _, err := dev.ReadAt(p, 0); err != nil || string(p[:7]) != "read me" {
		t.Errorf("read %q, %v", p[:7], err)
	}
	if ro, err := unix.IoctlGetInt(int(dev.Fd()), unix.BLKROGET); err != nil || ro != 1 {
		t.Errorf("BLKROGET = %d, %v", ro, err)
	}
	if f, err := os.OpenFile(r.state.Device, os.O_RDWR|unix.O_DIRECT, 0); err == nil {
		if _, err := f.WriteAt(p, 0); err == nil {
			t.Error("a read-only device was written")
		}
		f.Close()
	}
	dev.Close()
	r.detach()
}

func testBadSpec(t *testing.T, cfg Config) {
	r := newRig(t, cfg)
	for _, spoil := range []func(*attach.Spec){
		func(s *attach.Spec) { s.ID = "" },
		func(s *attach.Spec) { s.BlockBytes = 1024 },
		func(s *attach.Spec) { s.SizeBytes = 0 },
		func(s *attach.Spec) { s.SizeBytes = 1000 },
	} {
		spec := r.spec
		spoil(&spec)
		if _, err := r.transport.Attach(r.ctx, spec, r.hooks()); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("Attach(%+v): %v, want ErrInvalid", spec, err)
		}
	}
	if len(r.persisted) != 0 {
		t.Errorf("persisted %+v", r.persisted)
	}
}

// testErrors: an error of the server's device reaches the application, and only the
// request that it is for.
func testErrors(t *testing.T, cfg Config) {
	r := newRig(t, cfg)
	r.server.FullAt = 1 << 20
	r.attach()
	dev := r.open(os.O_RDWR)
	p := r.buffer(4096)
	want := unix.ENOSPC
	if cfg.Transport == "nbd" {
		want = unix.EIO // the kernel's nbd driver knows no other
	}
	if _, err := dev.WriteAt(p, 2<<20); !errors.Is(err, want) {
		t.Errorf("write where no space is: %v, want %v", err, want)
	}
	if _, err := dev.WriteAt(p, 0); err != nil {
		t.Errorf("write where space is: %v", err)
	}
	dev.Close()
	r.detach()
}

func testResize(t *testing.T, cfg Config) {
	r := attachedRig(t, cfg)
	if !resizes(t, cfg) {
		r.checkNoResize()
		return
	}
	l := r.startLoad()
	for i := range 10 {
		r.awaitProgress(l, 20)
		size := r.state.SizeBytes + 4<<20 + int64(i)*512
		if err := os.Truncate(r.backing, size); err != nil {
			t.Fatal(err)
		}
		st, err := r.transport.Resize(r.ctx, r.state, size)
		if err != nil {
			t.Fatalf("Resize: %v", err)
		}
		r.state = st
		dev := r.open(os.O_RDWR)
		if end, err := dev.Seek(0, io.SeekEnd); err != nil || end != size || st.SizeBytes != size {
			t.Fatalf("device has %d bytes, state %d, want %d (%v)", end, st.SizeBytes, size, err)
		}
		if _, err := dev.WriteAt(r.buffer(512), size-512); err != nil {
			t.Fatalf("write the last sector: %v", err)
		}
		dev.Close()
	}
	r.finish(l)
	if _, err := r.transport.Resize(r.ctx, r.state, 1<<20); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("shrink: %v, want ErrInvalid", err)
	}
	r.detach()
}

// resizes says whether this kernel can resize a device of the transport that is in use.
func resizes(t *testing.T, cfg Config) bool {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	major, minor := 0, 0
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	return cfg.Transport != "ublk" || major > 6 || major == 6 && minor >= 16
}

// checkNoResize checks that what can't be done says what to do, and harms nothing; and
// that the device has its new size once it is attached again.
func (r *rig) checkNoResize() {
	r.t.Helper()
	l := r.startLoad()
	r.awaitProgress(l, 20)
	size := int64(2 * sizeBytes)
	if err := os.Truncate(r.backing, size); err != nil {
		r.t.Fatal(err)
	}
	st, err := r.transport.Resize(r.ctx, r.state, size)
	if !errors.Is(err, block.ErrUnsupported) || !strings.Contains(fmt.Sprint(err), "attach it again") || st != r.state {
		r.t.Errorf("Resize: %v, %+v, want ErrUnsupported that says what to do, and the state as it was", err, st)
	}
	r.awaitProgress(l, 20)
	r.finish(l)
	r.detach()
	r.spec.SizeBytes = size
	r.attach()
	dev := r.open(os.O_RDONLY)
	if end, err := dev.Seek(0, io.SeekEnd); err != nil || end != size {
		r.t.Errorf("attached again it has %d bytes, %v, want %d", end, err, size)
	}
	dev.Close()
	r.detach()
}

// checkBusy checks that a device in use is not detached, that the error says by whom,
// and that the device goes on working.
func (r *rig) checkBusy(holder string) {
	r.t.Helper()
	start := time.Now()
	err := r.transport.Detach(r.ctx, r.state)
	if !errors.Is(err, block.ErrBusy) || !strings.Contains(fmt.Sprint(err), holder) {
		r.t.Fatalf("Detach: %v, want ErrBusy that names %q", err, holder)
	}
	r.t.Logf("after %v: %v", time.Since(start).Round(time.Millisecond), err)
	dev := r.open(os.O_RDONLY)
	defer dev.Close()
	if _, err := dev.ReadAt(r.buffer(4096), 0); err != nil {
		r.t.Errorf("read after a refused detach: %v", err)
	}
}

func testDetachMounted(t *testing.T, cfg Config) {
	mkfs := testenv.Oracle(t, "mkfs.ext4")
	r := attachedRig(t, cfg)
	if out, err := exec.Command(mkfs, "-q", r.state.Device).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	dir := filepath.Join(t.TempDir(), "with space")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	mount := func() {
		if err := unix.Mount(r.state.Device, dir, "ext4", 0, ""); err != nil {
			t.Fatalf("mount: %v", err)
		}
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	}
	mount()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("contents"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.checkBusy("mounted on " + dir)
	// A journal and its file system across a crash of the server.
	r.killServer()
	r.recover()
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	mount()
	if b, err := os.ReadFile(file); err != nil || string(b) != "contents" {
		t.Errorf("file holds %q, %v", b, err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	r.detach()
}

func testDetachOpened(t *testing.T, cfg Config) {
	sleep := testenv.Oracle(t, "sleep")
	r := attachedRig(t, cfg)
	dev := r.open(os.O_RDONLY)
	cmd := exec.Command(sleep, "1000")
	cmd.Stdin = dev
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	dev.Close()
	r.checkBusy(fmt.Sprintf("process %d (sleep)", cmd.Process.Pid))
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	r.detach()
}

// testDetachOpenedUnseen: who holds the device can't be found, as one who opens it between
// the look for them and the disconnect. It is flushed and needs no server.
func testDetachOpenedUnseen(t *testing.T, cfg Config) {
	r := attachedRig(t, cfg)
	if err := writeBuffered(r.state.Device, 4096, []byte("flushed")); err != nil {
		t.Fatal(err)
	}
	dev := r.open(os.O_RDONLY)
	// A descriptor on its way through a socket is in no process's table.
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	letGo := sync.OnceFunc(func() { unix.Close(pair[0]); unix.Close(pair[1]) })
	defer letGo()
	if err := unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(int(dev.Fd())), nil, 0); err != nil {
		t.Fatal(err)
	}
	dev.Close()
	err = r.transport.Detach(r.ctx, r.state)
	t.Log(err)
	switch cfg.Transport {
	case "fuse": // the kernel tells
		if !errors.Is(err, block.ErrBusy) {
			t.Errorf("Detach: %v, want ErrBusy", err)
		}
		letGo()
		r.detach()
		return
	case "ublk": // the kernel takes the device away
		if err != nil {
			t.Errorf("Detach: %v", err)
		}
	case "nbd":
		if !errors.Is(err, attach.ErrLingers) || errors.Is(err, block.ErrBusy) {
			t.Errorf("Detach: %v, want ErrLingers", err)
		}
	}
	if err := r.process.Wait(); err != nil {
		t.Errorf("server, once detached: %v", err)
	}
	r.process = nil
	got, err := os.ReadFile(r.backing)
	if err != nil || string(got[4096:4096+7]) != "flushed" {
		t.Errorf("what was written is not there, or %v", err)
	}
	letGo()
	r.awaitGone()
	r.detach()
}

// testDetachUnderLoop: kubelet keeps a loop device on raw block volumes.
func testDetachUnderLoop(t *testing.T, cfg Config) {
	r := attachedRig(t, cfg)
	dev, err := os.OpenFile(r.state.Device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	upper := upperLoop(t, dev)
	dev.Close()
	r.checkBusy("under " + upper.Name())
	if err := unix.IoctlSetInt(int(upper.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
		t.Fatal(err)
	}
	upper.Close()
	r.detach()
}

// upperLoop returns a loop device that stands on dev.
func upperLoop(t *testing.T, dev *os.File) *os.File {
	t.Helper()
	for range 20 {
		control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		index, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		control.Close()
		if err != nil {
			t.Fatal(err)
		}
		upper, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", index), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		err = unix.IoctlLoopConfigure(int(upper.Fd()), &unix.LoopConfig{Fd: uint32(dev.Fd())})
		if err == nil {
			t.Cleanup(func() {
				_ = unix.IoctlSetInt(int(upper.Fd()), unix.LOOP_CLR_FD, 0)
				upper.Close()
			})
			return upper
		}
		upper.Close()
		if err != unix.EBUSY { // else somebody was faster
			t.Fatal(err)
		}
	}
	t.Fatal("no loop device to be had")
	return nil
}

func testAttachTwice(t *testing.T, cfg Config) {
	r := attachedRig(t, cfg)
	if _, err := r.transport.Attach(r.ctx, r.spec, r.hooks()); !errors.Is(err, block.ErrExists) {
		t.Errorf("second Attach of an ID: %v, want ErrExists", err)
	}
	other := newRig(t, cfg)
	other.spec.ID += " other"
	if other.attach(); other.state.Device == r.state.Device {
		t.Errorf("two devices are %s", r.state.Device)
	}
	other.detach()
	r.detach()
}

// devices lists the block devices that are there, and bound if they are loop devices.
func devices(t testing.TB) string {
	t.Helper()
	var names []string
	entries, err := os.ReadDir("/sys/block")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile("/sys/block/" + e.Name() + "/loop/backing_file")
		if strings.HasPrefix(e.Name(), "nbd") || strings.HasPrefix(e.Name(), "ublk") || err == nil && strings.Contains(string(b), "imgdisk-") && strings.Contains(string(b), strconv.Itoa(os.Getpid())) {
			names = append(names, e.Name())
		}
	}
	return strings.Join(names, " ")
}

func testAttachServeFails(t *testing.T, cfg Config) {
	r := newRig(t, cfg)
	before := devices(t)
	hooks, reason := r.hooks(), errors.New("no server today")
	hooks.Serve = func(context.Context, string, []*os.File) error { return reason }
	if _, err := r.transport.Attach(r.ctx, r.spec, hooks); !errors.Is(err, reason) {
		t.Errorf("Attach: %v, want %q", err, reason)
	}
	hooks = r.hooks()
	hooks.Persist = func(attach.State) error { return reason }
	if _, err := r.transport.Attach(r.ctx, r.spec, hooks); !errors.Is(err, reason) {
		t.Errorf("Attach: %v, want %q", err, reason)
	}
	r.killServer()
	if after := devices(t); after != before {
		t.Errorf("devices were %q, are %q", before, after)
	}
}

// testAttachServerSilent: a server that never answers can't hold up an attach for
// longer than the caller wants.
func testAttachServerSilent(t *testing.T, cfg Config) {
	if cfg.Transport == "nbd" {
		t.Skip("the kernel's nbd asks its server nothing before somebody reads")
	}
	r := newRig(t, cfg)
	before := devices(t)
	r.server.Mute = true
	ctx, cancel := context.WithTimeout(r.ctx, 300*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := r.transport.Attach(ctx, r.spec, r.hooks()); err == nil {
		t.Error("attached without a word from the server")
	}
	if d := time.Since(start); d > 10*time.Second {
		t.Errorf("gave up after %v", d)
	}
	r.killServer()
	if after := devices(t); after != before {
		t.Errorf("devices were %q, are %q", before, after)
	}
}

// testKillServer kills servers under verifying load: no request may fail, no byte may
// differ.
func testKillServer(t *testing.T, cfg Config) {
	r := attachedRig(t, cfg)
	l := r.startLoad()
	for range cfg.Kills {
		r.awaitProgress(l, 50+r.rng.Int64N(200))
		r.killServer()
		r.recover()
	}
	r.awaitProgress(l, 50)
	r.finish(l)
	r.detach()
}

// testKillServerFio does it with a load that is not ours.
func testKillServerFio(t *testing.T, cfg Config) {
	fio := testenv.Oracle(t, "fio")
	r := attachedRig(t, cfg)
	cmd := exec.CommandContext(r.ctx, fio, "--name=load", "--filename="+r.state.Device, "--size=32m", "--direct=1",
		"--ioengine=libaio", "--iodepth=16", "--rw=randwrite", "--bsrange=4k-128k", "--loops=100000",
		"--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64", "--fsync=200")
	cmd.Dir = t.TempDir() // where it keeps its state
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for range cfg.Kills {
		select {
		case err := <-ended:
			t.Fatalf("fio ended early: %v\n%s", err, out.String())
		case <-time.After(time.Duration(100+r.rng.IntN(400)) * time.Millisecond):
		}
		r.killServer()
		r.recover()
	}
	time.Sleep(200 * time.Millisecond)
	if r.hungUpOn() {
		r.killServer()
		r.recover()
	}
	if err := cmd.Process.Signal(unix.SIGINT); err != nil { // ends at once, and reports
		t.Fatal(err)
	}
	err := <-ended
	// Interrupted, fio exits with 128; any error of a request with another.
	if report := out.String(); strings.Contains(report, "err=") && !strings.Contains(report, "err= 0") || strings.Contains(report, "verify:") {
		t.Fatalf("fio: %v\n%s", err, report)
	}
	r.detach()
}

// serverFiles returns what a server that answers would hand to its next supervisor.
func serverFiles(t testing.TB, pid int) []*os.File {
	t.Helper()
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, 3, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "server's descriptor")
	t.Cleanup(func() { f.Close() })
	return []*os.File{f}
}

// adopt does it as a supervisor does, which doesn't keep what it was handed.
func (r *rig) adopt(server int) {
	r.t.Helper()
	files := serverFiles(r.t, server)
	if err := r.transport.Adopt(r.ctx, r.state, files); err != nil {
		r.t.Fatalf("Adopt: %v", err)
	}
	for _, f := range files {
		f.Close()
	}
}

// killPID kills a process that is not our child, and waits until it is gone.
func killPID(t testing.TB, pid int) {
	t.Helper()
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	if err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		t.Fatal(err)
	}
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 30000)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			t.Fatalf("process %d does not end: %v", pid, err)
		}
		return
	}
}

// supervised attaches in another process and kills that under load.
func (r *rig) supervised(cfg Config) (server int, l *load) {
	r.t.Helper()
	supervisor, report, err := startSupervisor(r.ctx, supervisorConfig{Config: cfg, Spec: r.spec, Server: r.server})
	if err != nil {
		r.t.Fatal(err)
	}
	r.state = report.State
	l = r.startLoad()
	r.awaitProgress(l, 50)
	_ = supervisor.Process.Kill()
	_ = supervisor.Wait()
	r.awaitProgress(l, 50)
	return report.Server, l
}

// testKillSupervisor: who attached is gone; another adopts, and then does everything.
func testKillSupervisor(t *testing.T, cfg Config) {
	r := newRig(t, cfg)
	server, l := r.supervised(cfg)
	r.adopt(server)
	r.awaitProgress(l, 50)
	killPID(t, server)
	r.recover()
	r.awaitProgress(l, 50)
	r.finish(l)
	if !resizes(t, cfg) {
		r.detach()
		return
	}
	size := int64(2 * sizeBytes)
	if err := os.Truncate(r.backing, size); err != nil {
		t.Fatal(err)
	}
	st, err := r.transport.Resize(r.ctx, r.state, size)
	if err != nil || st.SizeBytes != size {
		t.Errorf("Resize: %v, %d bytes", err, st.SizeBytes)
	}
	r.state = st
	r.detach()
}

// testKillBoth: nbd and ublk wait for a new server all the same. FUSE can't, and must say so
// and leave no dead device.
func testKillBoth(t *testing.T, cfg Config) {
	r := newRig(t, cfg)
	server, l := r.supervised(cfg)
	killPID(t, server)
	err := r.transport.Adopt(r.ctx, r.state, nil)
	if cfg.Transport != "fuse" {
		if err != nil {
			t.Fatalf("Adopt: %v", err)
		}
		r.recover()
		r.awaitProgress(l, 50)
		r.finish(l)
		r.detach()
		return
	}
	if !errors.Is(err, block.ErrNotFound) {
		t.Errorf("Adopt: %v, want ErrNotFound", err)
	}
	if _, err := l.finish(); err == nil {
		t.Error("load on a dead connection had no error")
	}
	for _, w := range l.workers {
		w.dev.Close()
	}
	r.awaitGone()
}

func (r *rig) awaitGone() {
	r.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !r.gone() && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	r.checkGone()
}

func testAdoptForeign(t *testing.T, cfg Config) {
	r := attachedRig(t, cfg)
	files := serverFiles(t, r.process.Process.Pid)
	other := r.state
	other.ID = "somebody else's"
	if err := r.transport.Adopt(r.ctx, other, files); !errors.Is(err, block.ErrNotFound) {
		t.Errorf("Adopt of another's device: %v, want ErrNotFound", err)
	}
	if err := r.transport.Recover(r.ctx, other, r.hooks()); !errors.Is(err, block.ErrNotFound) {
		t.Errorf("Recover of another's device: %v, want ErrNotFound", err)
	}
	if _, err := r.transport.Resize(r.ctx, other, 2*sizeBytes); !errors.Is(err, block.ErrNotFound) {
		t.Errorf("Resize of another's device: %v, want ErrNotFound", err)
	}
	for name, f := range map[string]func(context.Context, attach.State) error{"Detach": r.transport.Detach, "Abort": r.transport.Abort} {
		if err := f(r.ctx, other); err != nil {
			t.Errorf("%s of a device that is not there: %v", name, err)
		}
	}
	r.detach()
}

// testRecoverServed: a server that is still there keeps its connections.
func testRecoverServed(t *testing.T, cfg Config) {
	if cfg.Transport == "fuse" {
		t.Skip("a FUSE connection can have several servers")
	}
	r := attachedRig(t, cfg)
	server := r.process
	l := r.startLoad()
	ctx, cancel := context.WithTimeout(r.ctx, time.Second)
	defer cancel()
	if err := r.transport.Recover(ctx, r.state, r.hooks()); err == nil {
		t.Error("recovered a device whose server is alive")
	}
	if r.process != server {
		t.Error("started a second server")
	}
	r.awaitProgress(l, 50)
	r.finish(l)
	r.detach()
}

// testSlowServer: a request may take as long as it takes.
func testSlowServer(t *testing.T, cfg Config) {
	r := newRig(t, cfg)
	r.server.DelayMillis = 4000
	r.attach()
	dev := r.open(os.O_RDWR)
	p := r.buffer(4096)
	copy(p, "slow")
	if _, err := dev.WriteAt(p, 8192); err != nil {
		t.Fatal(err)
	}
	got := r.buffer(4096)
	if _, err := dev.ReadAt(got, 8192); err != nil || !bytes.Equal(got, p) {
		t.Errorf("read %q, %v", got[:4], err)
	}
	dev.Close()
	// Killed in the middle of a slow request, which the next server then answers.
	wrote := make(chan error, 1)
	go func() {
		f, err := os.OpenFile(r.state.Device, os.O_RDWR|unix.O_DIRECT, 0)
		if err == nil {
			_, err = f.WriteAt(p, 0)
			f.Close()
		}
		wrote <- err
	}()
	time.Sleep(500 * time.Millisecond)
	r.killServer()
	r.server.DelayMillis = 0
	start := time.Now()
	r.recover()
	if err := <-wrote; err != nil {
		t.Errorf("write whose server was killed: %v", err)
	}
	t.Logf("answered %v after recovery began", time.Since(start).Round(time.Millisecond))
	r.detach()
}

// testAbort: the server hangs; its device goes all the same.
func testAbort(t *testing.T, cfg Config) {
	r := attachedRig(t, cfg)
	r.killServer()
	readEnded := make(chan error, 1)
	dev := r.open(os.O_RDONLY)
	p := r.buffer(4096)
	go func() {
		_, err := dev.ReadAt(p, 0)
		dev.Close()
		readEnded <- err
	}()
	time.Sleep(100 * time.Millisecond)
	if err := r.transport.Abort(r.ctx, r.state); err != nil {
		t.Fatalf("Abort: %v", err)
	}
	select {
	case err := <-readEnded:
		if err == nil {
			t.Error("a read without a server succeeded")
		}
	case <-time.After(30 * time.Second):
		t.Fatal("a read is still waiting 30 s after Abort")
	}
	r.awaitGone()
	if err := r.transport.Abort(r.ctx, r.state); err != nil {
		t.Errorf("second Abort: %v", err)
	}
}

func testAbortOpened(t *testing.T, cfg Config) {
	r := attachedRig(t, cfg)
	dev := r.open(os.O_RDONLY)
	if err := r.transport.Abort(r.ctx, r.state); err != nil {
		t.Fatalf("Abort: %v", err)
	}
	if _, err := dev.ReadAt(r.buffer(4096), 0); err == nil {
		t.Error("a read of an aborted device succeeded")
	}
	dev.Close()
	r.awaitGone()
}
