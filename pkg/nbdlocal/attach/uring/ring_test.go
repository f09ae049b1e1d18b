package uring_test

import (
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach/uring"
)

// newRing makes a ring on a thread of the test's own; where this machine allows none, the
// test is skipped: those in virtual machines are not.
func newRing(t *testing.T, cfg uring.Config) *uring.Ring {
	t.Helper()
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	r, err := uring.New(cfg)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// kinds are all kinds of rings that are used.
var kinds = map[string]uring.Config{
	"plain":      {Entries: 8},
	"wide":       {Entries: 8, Wide: true},
	"one thread": {Entries: 8, OneThread: true},
	"restricted": {Entries: 8, OneThread: true, Only: []uring.Op{uring.OpNop, uring.OpRead, uring.OpAsyncCancel, uring.OpCommand}},
}

// Entries come back with their user data, over many turns of both queues, in batches of
// all sizes.
func TestRing_ManyTurns(t *testing.T) {
	for name, cfg := range kinds {
		t.Run(name, func(t *testing.T) {
			r := newRing(t, cfg)
			var next, seen uint64
			for turn := range 1000 {
				batch := turn%int(cfg.Entries) + 1
				for range batch {
					next++
					r.Next().Nop(next)
				}
				if err := r.Enter(batch, 0); err != nil {
					t.Fatal(err)
				}
				for range batch {
					seen++
					if c, ok := r.Take(); !ok || c.UserData != seen || c.Res != 0 {
						t.Fatalf("turn %d: completion %+v, %v, want one of %d", turn, c, ok, seen)
					}
				}
				if c, ok := r.Take(); ok {
					t.Fatalf("turn %d: one completion more, %+v", turn, c)
				}
			}
		})
	}
}

func TestRing_NextWhenFull(t *testing.T) {
	r := newRing(t, uring.Config{Entries: 4})
	for i := range 4 {
		if r.Room() != 4-i {
			t.Errorf("room for %d, want %d", r.Room(), 4-i)
		}
		r.Next().Nop(uint64(i))
	}
	if e := r.Next(); e != nil {
		t.Errorf("a fifth entry of four: %+v", e)
	}
	if err := r.Enter(0, 0); err != nil {
		t.Fatal(err)
	}
	if r.Next() == nil || r.Ready() != 4 {
		t.Errorf("once submitted: no room, or %d completions, want 4", r.Ready())
	}
}

// A wait ends when its time is over, and leaves the rest as it was.
func TestRing_EnterLimit(t *testing.T) {
	r := newRing(t, uring.Config{Entries: 4, OneThread: true})
	event, buf := newEvent(t)
	r.Next().Read(event, buf, 7)
	start := time.Now()
	if err := r.Enter(1, 20*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(start); d < 15*time.Millisecond {
		t.Errorf("returned after %v", d)
	}
	if r.Ready() != 0 {
		t.Fatalf("%d completions of a read that has nothing to read", r.Ready())
	}
	if _, err := unix.Write(event, []byte{5, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	if err := r.Enter(1, time.Minute); err != nil {
		t.Fatal(err)
	}
	if c, ok := r.Take(); !ok || c.UserData != 7 || c.Res != 8 || binary.NativeEndian.Uint64(buf) != 5 {
		t.Errorf("completion %+v, %v, data %v", c, ok, buf)
	}
}

func newEvent(t *testing.T) (fd int, buf []byte) {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	buf, err = unix.Mmap(-1, 0, 8, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Close(fd)
		_ = unix.Munmap(buf)
	})
	return fd, buf
}

// Another thread's write wakes one that waits.
func TestRing_WokenByEvent(t *testing.T) {
	r := newRing(t, uring.Config{Entries: 4, OneThread: true})
	event, buf := newEvent(t)
	for i := range uint64(200) {
		r.Next().Read(event, buf, i)
		go func() {
			if i%2 == 0 {
				time.Sleep(time.Duration(i) * 10 * time.Microsecond)
			}
			_, _ = unix.Write(event, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		}()
		if err := r.Enter(1, time.Minute); err != nil {
			t.Fatal(err)
		}
		if c, ok := r.Take(); !ok || c.UserData != i || c.Res != 8 {
			t.Fatalf("completion %+v, %v, want one of %d", c, ok, i)
		}
	}
}

func TestRing_Cancel(t *testing.T) {
	r := newRing(t, uring.Config{Entries: 4})
	event, buf := newEvent(t)
	r.Next().Read(event, buf, 1)
	if err := r.Enter(0, 0); err != nil {
		t.Fatal(err)
	}
	r.Next().Cancel(1, 2)
	if err := r.Enter(2, time.Minute); err != nil {
		t.Fatal(err)
	}
	results := map[uint64]int32{}
	for c, ok := r.Take(); ok; c, ok = r.Take() {
		results[c.UserData] = c.Res
	}
	if results[1] != -int32(unix.ECANCELED) || results[2] != 0 || len(results) != 2 {
		t.Errorf("results %v, want the read to be cancelled", results)
	}
}

// A command reaches what is behind a descriptor: a file that knows no commands says so.
func TestRing_Command(t *testing.T) {
	for name, cfg := range kinds {
		t.Run(name, func(t *testing.T) {
			r := newRing(t, cfg)
			f, err := os.CreateTemp(t.TempDir(), "")
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			*(*[16]byte)(r.Next().Command(int(f.Fd()), 42, 9)) = [16]byte{1, 2, 3}
			if err := r.Enter(1, 0); err != nil {
				t.Fatal(err)
			}
			if c, ok := r.Take(); !ok || c.UserData != 9 || c.Res != -int32(unix.EOPNOTSUPP) {
				t.Errorf("completion %+v, %v, want one that says EOPNOTSUPP", c, ok)
			}
		})
	}
}

// A restricted ring does nothing else, also for who gets hold of the process.
func TestRing_Only(t *testing.T) {
	r := newRing(t, uring.Config{Entries: 4, OneThread: true, Only: []uring.Op{uring.OpCommand}})
	r.Next().Nop(1)
	if err := r.Enter(1, 0); err != nil {
		t.Fatal(err)
	}
	if c, ok := r.Take(); !ok || c.Res != -int32(unix.EACCES) {
		t.Errorf("completion %+v, %v, want one that says EACCES", c, ok)
	}
}

func TestNew_BadEntries(t *testing.T) {
	for _, n := range []uint32{0, 3, 8192} {
		if r, err := uring.New(uring.Config{Entries: n}); err == nil {
			t.Errorf("made a ring of %d entries", n)
			r.Close()
		}
	}
}

// Submitting and taking costs the garbage collector nothing.
func TestRing_NoAllocations(t *testing.T) {
	r := newRing(t, uring.Config{Entries: 8, OneThread: true})
	n := testing.AllocsPerRun(1000, func() {
		for i := range uint64(8) {
			r.Next().Nop(i)
		}
		if err := r.Enter(8, time.Minute); err != nil {
			t.Error(err)
		}
		for _, ok := r.Take(); ok; _, ok = r.Take() {
		}
	})
	if n != 0 {
		t.Errorf("%v allocations a turn", n)
	}
}
