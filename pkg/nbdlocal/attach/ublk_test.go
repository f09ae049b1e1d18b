package attach

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// What a virtual machine is not needed for. The rest is in test/vm/guest.

func TestUBLKBroken(t *testing.T) {
	for release, broken := range map[string]bool{
		"6.12.117+deb12-amd64": false,
		"6.17.0-34-generic":    false,
		"6.17.0-35-generic":    true,
		"6.17.0-40-generic":    true,
		"6.17.0-41-generic":    false,
		"6.17.0-350-generic":   false,
		"6.17.0-1015-azure":    true,
		"6.17.5":               false,
		"6.18.3":               false,
		"6.18.4":               true,
		"6.18.5-arch1-1":       true,
		"6.18.6":               false,
		"6.18.40":              true,
		"6.18.44":              false,
		"6.18.400":             false,
		"7.0.0-rc1":            true,
		"7.0.1":                false,
		"7.0.14-200.fc44":      true,
		"7.0.140":              false,
		"7.1.0":                false,
	} {
		if why := ublkBroken(release); (why != "") != broken {
			t.Errorf("%s: %q, want broken = %v", release, why, broken)
		}
	}
}

// The bytes that the kernel reads, against those that C programs pass.
func TestUBLKCommandNumbers(t *testing.T) {
	for name, c := range map[string]struct{ got, want uint32 }{
		"ADD_DEV":          {ublkAddDev, 0xc0207504},
		"START_DEV":        {ublkStartDev, 0xc0207506},
		"GET_DEV_INFO":     {ublkGetDevInfo, 0x80207502},
		"GET_FEATURES":     {ublkGetFeatures, 0x80207513},
		"DEL_DEV_ASYNC":    {ublkDelDevAsync, 0x80207514},
		"FETCH_REQ":        {ublkFetch, 0xc0107520},
		"COMMIT_AND_FETCH": {ublkCommitAndFetch, 0xc0107521},
	} {
		if c.got != c.want {
			t.Errorf("%s = %#x, want %#x", name, c.got, c.want)
		}
	}
}

func TestUBLKParams(t *testing.T) {
	spec := Spec{ID: "x", SizeBytes: 1 << 30, BlockBytes: 4096, ClusterBytes: 64 << 10, CanDiscard: true, CanZero: true}
	for name, c := range map[string]struct {
		change func(*Spec)
		check  func(ublkParams) bool
	}{
		"plain": {func(*Spec) {}, func(p ublkParams) bool {
			return p.Basic.LogicalShift == 12 && p.Basic.DevSectors == 1<<21 && p.Discard.Granularity == 64<<10 && p.Discard.MaxSectors == 1<<21 && p.Basic.Attrs == ublkVolatileCache|ublkFUA
		}},
		"512":           {func(s *Spec) { s.BlockBytes = 512 }, func(p ublkParams) bool { return p.Basic.LogicalShift == 9 && p.Basic.PhysicalShift == 12 }},
		"odd clusters":  {func(s *Spec) { s.ClusterBytes = 3 << 16 }, func(p ublkParams) bool { return p.Discard.Granularity == 4096 }},
		"no clusters":   {func(s *Spec) { s.ClusterBytes = 0 }, func(p ublkParams) bool { return p.Discard.Granularity == 4096 }},
		"no discard":    {func(s *Spec) { s.CanDiscard = false }, func(p ublkParams) bool { return p.Discard.MaxSectors == 0 && p.Discard.MaxZeroesSectors > 0 }},
		"neither":       {func(s *Spec) { s.CanDiscard, s.CanZero = false, false }, func(p ublkParams) bool { return p.Types == ublkTypeBasic }},
		"read-only":     {func(s *Spec) { s.ReadOnly = true }, func(p ublkParams) bool { return p.Types == ublkTypeBasic && p.Basic.Attrs&ublkReadOnly != 0 }},
		"length and so": {func(*Spec) {}, func(p ublkParams) bool { return int(p.Len) == binary.Size(p) }},
	} {
		s := spec
		c.change(&s)
		if p := ublkParamsOf(s); !c.check(p) {
			t.Errorf("%s: %+v", name, p)
		}
	}
}

func TestUBLKHash(t *testing.T) {
	if ublkHash("a/b") == ublkHash("a/c") || ublkHash("") == 0 {
		t.Error("hashes of IDs are not as different as IDs, or one is 0")
	}
}

// callsDevice notes what is asked of it.
type callsDevice struct {
	calls string
	err   error
}

func (d *callsDevice) note(format string, args ...any) error {
	d.calls += fmt.Sprintf(format, args...) + ";"
	return d.err
}

func (d *callsDevice) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		p[i] = 'r'
	}
	return len(p), d.note("read %d+%d", off, len(p))
}

func (d *callsDevice) WriteAt(p []byte, off int64) (int, error) {
	return len(p), d.note("write %d+%d %c", off, len(p), p[0])
}

func (d *callsDevice) WriteZeroes(off, n int64, flags block.ZeroFlags) error {
	return d.note("zero %d+%d %d", off, n, flags)
}
func (d *callsDevice) Discard(off, n int64) error { return d.note("discard %d+%d", off, n) }
func (d *callsDevice) Flush() error               { return d.note("flush") }
func (d *callsDevice) Map(int64, int64) (block.Extent, error) {
	return block.Extent{}, d.note("map")
}
func (d *callsDevice) Info() block.Info {
	return block.Info{SizeBytes: 1 << 40, LogicalBlockBytes: 512}
}
func (d *callsDevice) Close() error { return d.note("close") }

// Every operation becomes the device's, with the result that the driver wants.
func TestUBLKRequest(t *testing.T) {
	for name, c := range map[string]struct {
		desc   ublkDesc
		err    error
		calls  string
		result int32
	}{
		"read":          {ublkDesc{opFlags: ublkOpRead, startSector: 8, sectors: 3}, nil, "read 4096+1536;", 1536},
		"write":         {ublkDesc{opFlags: ublkOpWrite, startSector: 1 << 31, sectors: 2048}, nil, "write 1099511627776+1048576 w;", 1 << 20},
		"write FUA":     {ublkDesc{opFlags: ublkOpWrite | ublkFlagFUA, sectors: 1}, nil, "write 0+512 w;flush;", 512},
		"flush":         {ublkDesc{opFlags: ublkOpFlush}, nil, "flush;", 0},
		"discard":       {ublkDesc{opFlags: ublkOpDiscard, startSector: 2, sectors: 1 << 21}, nil, "discard 1024+1073741824;", 0},
		"zeroes":        {ublkDesc{opFlags: ublkOpWriteZeroes, sectors: 4}, nil, "zero 0+2048 0;", 0},
		"zeroes kept":   {ublkDesc{opFlags: ublkOpWriteZeroes | ublkFlagNoUnmap, sectors: 4}, nil, "zero 0+2048 1;", 0},
		"full":          {ublkDesc{opFlags: ublkOpWrite | ublkFlagFUA, sectors: 1}, fmt.Errorf("x: %w", block.ErrNoSpace), "write 0+512 w;", -int32(unix.ENOSPC)},
		"broken":        {ublkDesc{opFlags: ublkOpRead, sectors: 1}, errors.New("odd"), "read 0+512;", -int32(unix.EIO)},
		"too long":      {ublkDesc{opFlags: ublkOpRead, sectors: 1 << 20}, nil, "", -int32(unix.EINVAL)},
		"unknown":       {ublkDesc{opFlags: 77, sectors: 1}, nil, "", -int32(unix.ENOTSUP)},
		"failed flush":  {ublkDesc{opFlags: ublkOpFlush}, block.ErrPoisoned, "flush;", -int32(unix.EIO)},
		"read with FUA": {ublkDesc{opFlags: ublkOpRead | ublkFlagFUA, sectors: 1}, nil, "read 0+512;", 512},
	} {
		t.Run(name, func(t *testing.T) {
			dev := &callsDevice{err: c.err}
			r := &ublkRequest{buf: bytes.Repeat([]byte("w"), ublkMaxRequestBytes)}
			r.load(&c.desc)
			r.carryOut(&ublkServer{dev: dev})
			if dev.calls != c.calls || r.result != c.result {
				t.Errorf("calls %q, result %d, want %q, %d", dev.calls, r.result, c.calls, c.result)
			}
		})
	}
}

func TestUBLKRequest_NoAllocations(t *testing.T) {
	dev := &memDevice{data: make([]byte, 1<<20)}
	s := &ublkServer{dev: dev}
	r := &ublkRequest{buf: make([]byte, ublkMaxRequestBytes)}
	n := testing.AllocsPerRun(100, func() {
		for _, op := range []uint32{ublkOpRead, ublkOpWrite, ublkOpFlush} {
			r.load(&ublkDesc{opFlags: op, startSector: 8, sectors: 8})
			r.carryOut(s)
		}
		if r.result < 0 {
			t.Error(unix.Errno(-r.result))
		}
	})
	if n != 0 {
		t.Errorf("%v allocations for three requests", n)
	}
}

// A device that becomes slow is left to helpers soon, and taken back when it is fast again;
// one slow request in between changes nothing.
func TestUBLKPace(t *testing.T) {
	var p ublkPace
	for range 100 {
		p.took(ublkSmallRead, 5*time.Microsecond)
	}
	p.took(ublkSmallRead, time.Second)
	if p.slow(ublkSmallRead) {
		t.Error("slow after one slow request")
	}
	for range 3 {
		p.took(ublkSmallRead, 10*time.Millisecond)
	}
	if !p.slow(ublkSmallRead) || p.slow(ublkSmallWrite) {
		t.Error("four slow reads: want reads, and nothing else, to pass for slow")
	}
	for range 100 {
		p.took(ublkSmallRead, 5*time.Microsecond)
	}
	if p.slow(ublkSmallRead) {
		t.Error("still slow after a hundred fast requests")
	}
}

// A thread for a queue makes no ring for another thread's use, ends when it is told to,
// and is not the process's first.
func TestUBLKThreads(t *testing.T) {
	threads, err := PrepareUBLK()
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	seen := map[int]bool{}
	for range ublkMaxQueues {
		thread, err := threads.take()
		if err != nil {
			t.Fatal(err)
		}
		tid := make(chan int)
		admin := make(chan bool, 1)
		go func() {
			thread.use <- func() {
				header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
				var data [2]unix.CapUserData
				err := unix.Capget(&header, &data[0])
				admin <- err != nil || data[0].Effective&(1<<unix.CAP_SYS_ADMIN) != 0
				tid <- unix.Gettid()
			}
		}()
		n := <-tid
		<-thread.ended
		if <-admin {
			t.Error("a queue's thread may administer the system")
		}
		if seen[n] || n == unix.Getpid() {
			t.Errorf("thread %d serves two queues, or is the process's first", n)
		}
		seen[n] = true
	}
	if _, err := threads.take(); !errors.Is(err, block.ErrBusy) {
		t.Errorf("one thread more than were made: %v, want ErrBusy", err)
	}
	for n := range seen {
		awaitThreadGone(t, n)
	}
}

func awaitThreadGone(t *testing.T, tid int) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); exists(fmt.Sprintf("/proc/self/task/%d", tid)); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("thread %d does not end", tid)
		}
	}
}

// The names of structures' fields may change, their places not.
func TestUBLKLayout(t *testing.T) {
	var d ublkDesc
	var c ublkIOCommand
	for name, ok := range map[string]bool{
		"start sector": unsafe.Offsetof(d.startSector) == 8,
		"descriptor":   unsafe.Offsetof(d.addr) == 16,
		"result":       unsafe.Offsetof(c.result) == 4,
		"buffer":       unsafe.Offsetof(c.addr) == 8,
		"device info":  unsafe.Offsetof(ublkDevInfo{}.ServerFlags) == 32,
		"parameters":   unsafe.Offsetof(ublkParams{}.Discard) == 40,
	} {
		if !ok {
			t.Errorf("%s is not where the kernel has it", name)
		}
	}
}
