package nbdlocal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"golang.org/x/sys/unix"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

const mib = 1 << 20

func TestServeConn_EveryCommand(t *testing.T) {
	dev := newMemDevice(10*memPage + 123)
	c, result := pipeClient(t, NewServer(dev, Options{}))
	data := []byte("hello, block device")
	c.write(memPage-5, data)
	if got := c.read(memPage-5, len(data)); !bytes.Equal(got, data) {
		t.Errorf("read %q, want %q", got, data)
	}
	if a := c.do(cmdFlush, 0, 0, 0, nil); a.errno != 0 || dev.flushCount() != 1 {
		t.Errorf("flush: %v, %d flushes of the device, want 1", a.errno, dev.flushCount())
	}
	if a := c.do(cmdWrite, cmdFlagFUA, 0, 1, []byte{1}); a.errno != 0 || dev.flushCount() != 2 {
		t.Errorf("write with FUA: %v, %d flushes of the device, want 2", a.errno, dev.flushCount())
	}
	if a := c.do(cmdRead, cmdFlagFUA, 0, 1, nil); a.errno != 0 || dev.flushCount() != 2 {
		t.Errorf("read with FUA: %v, %d flushes of the device, want 2", a.errno, dev.flushCount())
	}
	if a := c.do(cmdTrim, cmdFlagFUA, 0, memPage, nil); a.errno != 0 || dev.flushCount() != 3 {
		t.Errorf("trim with FUA: %v, %d flushes of the device, want 3", a.errno, dev.flushCount())
	}
	if a := c.do(cmdWriteZeroes, cmdFlagFUA, memPage, memPage, nil); a.errno != 0 || dev.flushCount() != 4 {
		t.Errorf("write zeroes with FUA: %v, %d flushes of the device, want 4", a.errno, dev.flushCount())
	}
	if got := c.read(0, 2*memPage); !bytes.Equal(got, make([]byte, 2*memPage)) {
		t.Error("trimmed and zeroed bytes are not zero")
	}
	if a := c.do(cmdWriteZeroes, cmdFlagNoHole, 2*memPage, memPage, nil); a.errno != 0 || !dev.allocated(2*memPage) {
		t.Errorf("write zeroes without hole: %v, page present: %v", a.errno, dev.allocated(2*memPage))
	}
	for _, n := range []int{0, 1, 511, smallBytes, smallBytes + 1, granuleBytes, granuleBytes + 1} {
		want := bytes.Repeat([]byte{0xa5}, n)
		c.write(100, want)
		if got := c.read(100, n); !bytes.Equal(got, want) {
			t.Errorf("%d bytes read back differently", n)
		}
	}
	end := dev.size - 1
	c.write(end, []byte{42})
	if got := c.read(end, 1); got[0] != 42 {
		t.Errorf("last byte is %d, want 42", got[0])
	}
	c.send(cmdDisc, 0, 0, 0, nil)
	if err := <-result; err != nil {
		t.Errorf("ServeConn after DISC: %v", err)
	}
}

func TestServeConn_Errors(t *testing.T) {
	const size = 4 * memPage
	failing := errors.New("some device's error")
	cases := []struct {
		name       string
		readOnly   bool
		fail       error
		cmd, flags uint16
		off        int64
		n          int
		want       syscall.Errno
	}{
		{name: "read past the end", cmd: cmdRead, off: size - 1, n: 2, want: syscall.EINVAL},
		{name: "write past the end", cmd: cmdWrite, off: size - 1, n: 2, want: syscall.ENOSPC},
		{name: "zeroes past the end", cmd: cmdWriteZeroes, off: size, n: 1, want: syscall.ENOSPC},
		{name: "trim past the end", cmd: cmdTrim, off: size, n: 1, want: syscall.EINVAL},
		{name: "offset beyond 2^63", cmd: cmdRead, off: -1 << 63, n: 1, want: syscall.EINVAL},
		{name: "offset that wraps", cmd: cmdWrite, off: -1, n: 2, want: syscall.ENOSPC},
		{name: "read too large", cmd: cmdRead, n: maxPayloadBytes + 1, want: syscall.EINVAL},
		{name: "read of 4 GiB", cmd: cmdRead, n: 1<<32 - 1, want: syscall.EINVAL},
		{name: "write too large", cmd: cmdWrite, n: maxPayloadBytes + 1, want: syscall.EINVAL},
		{name: "unknown command", cmd: 77, n: 5, want: syscall.EINVAL},
		{name: "cache past the end", cmd: cmdCache, off: size, n: 1, want: syscall.EINVAL},
		{name: "flag of an extended header", cmd: cmdFlush, flags: cmdFlagPayloadLen, want: syscall.EINVAL},
		{name: "unknown flag", cmd: cmdRead, flags: 1 << 9, n: 5, want: syscall.EINVAL},
		{name: "flag of another command", cmd: cmdWrite, flags: cmdFlagNoHole, n: 5, want: syscall.EINVAL},
		{name: "DF without structured replies", cmd: cmdRead, flags: cmdFlagDF, n: 5, want: syscall.EINVAL},
		{name: "block status without context", cmd: cmdBlockStatus, n: 5, want: syscall.EINVAL},
		{name: "flush with a range", cmd: cmdFlush, n: 5, want: syscall.EINVAL},
		{name: "write to read-only", readOnly: true, cmd: cmdWrite, n: 5, want: syscall.EPERM},
		{name: "zeroes to read-only", readOnly: true, cmd: cmdWriteZeroes, n: 5, want: syscall.EPERM},
		{name: "trim of read-only", readOnly: true, cmd: cmdTrim, n: 5, want: syscall.EPERM},
		{name: "flush of read-only", readOnly: true, cmd: cmdFlush},
		{name: "slow fast zeroes", cmd: cmdWriteZeroes, flags: cmdFlagFastZero, off: 1, n: 5, want: syscall.ENOTSUP},
		{name: "store full", fail: block.ErrNoSpace, cmd: cmdWrite, n: 5, want: syscall.ENOSPC},
		{name: "poisoned", fail: errors.Join(block.ErrPoisoned, block.ErrNoSpace), cmd: cmdFlush, want: syscall.EIO},
		{name: "unknown error", fail: failing, cmd: cmdRead, n: 5, want: syscall.EIO},
		{name: "error the protocol doesn't know", fail: block.ErrLocked, cmd: cmdRead, n: 5, want: syscall.EIO},
		{name: "unsupported, not fast zeroes", fail: block.ErrUnsupported, cmd: cmdWriteZeroes, n: 5, want: syscall.EINVAL},
		{name: "FUA whose flush fails", fail: block.ErrPoisoned, cmd: cmdWrite, flags: cmdFlagFUA, n: 5, want: syscall.EIO},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			dev := newMemDevice(size)
			dev.readOnly = tc.readOnly
			var healed atomic.Bool
			dev.before = func(op string, _, _ int64) error {
				if healed.Load() {
					return nil
				}
				if tc.flags&cmdFlagFUA != 0 && op != "flush" {
					return nil
				}
				return tc.fail
			}
			c, _ := pipeClient(t, NewServer(dev, Options{}))
			var payload []byte
			if tc.cmd == cmdWrite {
				payload = make([]byte, tc.n)
			}
			if a := c.do(tc.cmd, tc.flags, tc.off, tc.n, payload); a.errno != tc.want {
				t.Errorf("answered %v, want %v", a.errno, tc.want)
			}
			healed.Store(true)
			if got := c.read(1, 9); !bytes.Equal(got, make([]byte, 9)) {
				t.Errorf("the next read yields %x, want zeroes", got)
			}
		})
	}
}

func TestServeConn_ReadOnlyOption(t *testing.T) {
	c, _ := pipeClient(t, NewServer(newMemDevice(mib), Options{ReadOnly: true}))
	if a := c.do(cmdWrite, 0, 0, 1, []byte{1}); a.errno != syscall.EPERM {
		t.Errorf("write answered %v, want EPERM", a.errno)
	}
}

func TestServeConn_DeviceGrows(t *testing.T) {
	dev := newMemDevice(memPage)
	c, _ := pipeClient(t, NewServer(dev, Options{}))
	if a := c.do(cmdWrite, 0, memPage, 1, []byte{1}); a.errno != syscall.ENOSPC {
		t.Fatalf("write past the end answered %v, want ENOSPC", a.errno)
	}
	dev.grow(2 * memPage)
	c.write(memPage, []byte{1})
}

// TestServeConn_Model runs random requests on several connections, many at a time,
// and compares with a plain byte slice. A connection's requests overlap only its own:
// those that write are carried out in order.
func TestServeConn_Model(t *testing.T) {
	const area = 8 * mib
	conns, steps := 3, 2000
	if testing.Short() {
		steps = 300
	}
	dev := newMemDevice(int64(conns) * area)
	var slow atomic.Bool
	dev.before = func(string, int64, int64) error {
		if slow.Load() {
			time.Sleep(100 * time.Microsecond)
		}
		return nil
	}
	rnd := testenv.Rand(t)
	s := NewServer(dev, Options{BufferBytes: MinBufferBytes})
	for i := range conns {
		seed := rnd.Uint64()
		t.Run(fmt.Sprint("connection", i), func(t *testing.T) {
			t.Parallel()
			m := &model{base: int64(i) * area, want: make([]byte, area), rnd: rand.New(rand.NewPCG(seed, seed)), pending: map[uint64]pending{}}
			if i == 0 {
				m.client = unixClient(t, NewServer(dev, Options{}))
				m.client.enter(true)
			} else {
				m.client, _ = pipeClient(t, s)
			}
			for range steps {
				m.step()
				if m.rnd.IntN(200) == 0 {
					slow.Store(!slow.Load())
				}
			}
			for len(m.pending) > 0 {
				m.receive()
			}
			if got := dev.snapshot(m.base, area); !bytes.Equal(got, m.want) {
				t.Error("the device holds other bytes than the model")
			}
		})
	}
}

type model struct {
	client  *client
	base    int64
	want    []byte
	rnd     *rand.Rand
	pending map[uint64]pending
}

// pending is a request in flight.
type pending struct {
	off, n int
	want   []byte // of a read; nil for one that writes
}

func (m *model) step() {
	for len(m.pending) >= 40 || len(m.pending) > 0 && m.rnd.IntN(3) == 0 {
		m.receive()
	}
	n := m.rnd.IntN(9000)
	switch m.rnd.IntN(40) {
	case 0, 1:
		n = m.rnd.IntN(200_000)
	case 2:
		n = m.rnd.IntN(len(m.want) / 2)
	}
	for m.bytesInFlight()+n > MinBufferBytes/2 { // or both sides wait for the other to read
		m.receive()
	}
	off := m.rnd.IntN(len(m.want) - n)
	switch m.rnd.IntN(10) {
	case 0:
		m.waitFor(off, n, false)
		clear(m.want[off : off+n])
		m.send(cmdWriteZeroes, uint16(m.rnd.IntN(4)), off, n, nil, nil)
	case 1:
		m.pending[m.client.send(cmdFlush, 0, 0, 0, nil)] = pending{}
	case 2, 3, 4, 5:
		m.waitFor(off, n, false)
		data := m.want[off : off+n]
		fill := m.rnd.Uint64()
		for i := range data {
			data[i] = byte(fill >> (i % 57))
		}
		m.send(cmdWrite, 0, off, n, data, nil)
	default:
		m.waitFor(off, n, true)
		m.send(cmdRead, 0, off, n, nil, bytes.Clone(m.want[off:off+n]))
	}
}

func (m *model) send(cmd, flags uint16, off, n int, payload, want []byte) {
	m.pending[m.client.send(cmd, flags, m.base+int64(off), n, payload)] = pending{off, n, want}
}

// waitFor waits until nothing is in flight in [off, off+n) that makes it unknown what a
// read (otherwise: a write) yields or changes: for a read the writes, for a write the
// reads. Writes need not wait for one another.
func (m *model) waitFor(off, n int, isRead bool) {
	for {
		conflict := false
		for _, p := range m.pending {
			conflict = conflict || p.off < off+n && off < p.off+p.n && (p.want == nil) == isRead
		}
		if !conflict {
			return
		}
		m.receive()
	}
}

func (m *model) bytesInFlight() int {
	sum := 0
	for _, p := range m.pending {
		sum += p.n
	}
	return sum
}

func (m *model) receive() {
	m.client.tb.Helper()
	a, err := m.client.receive()
	if err != nil || a.errno != 0 {
		m.client.tb.Fatalf("reply: %v %v %s", err, a.errno, a.text)
	}
	if p := m.pending[a.cookie]; p.want != nil && !bytes.Equal(a.data, p.want) {
		m.client.tb.Fatalf("read of %d bytes at %d: wrong bytes", p.n, p.off)
	}
	delete(m.pending, a.cookie)
}

func TestServeConn_EndOfConnection(t *testing.T) {
	header := requestHeader(cmdWrite, 0, 1, 0, 100)
	for _, tc := range []struct {
		name string
		send []byte
		want error
	}{
		{"nothing sent", nil, nil},
		{"half a header", header[:11], io.ErrUnexpectedEOF},
		{"no payload", header, io.ErrUnexpectedEOF},
		{"half the payload", append(header, make([]byte, 50)...), io.ErrUnexpectedEOF},
		{"half the payload of a refused write", append(requestHeader(cmdWrite, 0, 1, 1<<40, 100), make([]byte, 50)...), io.ErrUnexpectedEOF},
		{"disconnect", requestHeader(cmdDisc, 0, 0, 0, 0), nil},
		{"bytes after disconnect", append(requestHeader(cmdDisc, 0, 0, 0, 0), 1, 2, 3), nil},
		{"hostile length", requestHeader(cmdWrite, 0, 1, 0, hostilePayloadBytes+1), errAny},
		{"garbage", bytes.Repeat([]byte{0xee}, 28), errAny},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dev := newMemDevice(mib)
			c, result := pipeClient(t, NewServer(dev, Options{}))
			c.write(5, []byte("x"))
			if _, err := c.conn.Write(tc.send); err != nil {
				t.Fatal(err)
			}
			if tc.want != errAny {
				_ = c.conn.Close()
			}
			err := <-result
			if tc.want == errAny && err == nil || tc.want != errAny && !errors.Is(err, tc.want) {
				t.Errorf("ServeConn: %v, want %v", err, tc.want)
			}
			if got := dev.snapshot(0, 100); !bytes.Equal(got[6:], make([]byte, 94)) {
				t.Error("a write that never arrived was carried out")
			}
		})
	}
}

// errAny stands for any error.
var errAny = errors.New("any error")

// TestServeConn_DisconnectAnswersFirst: what was taken before DISC is answered.
func TestServeConn_DisconnectAnswersFirst(t *testing.T) {
	dev := newMemDevice(mib)
	g := newGate(t)
	dev.before = func(string, int64, int64) error { g.wait(); return nil }
	c, result := pipeClient(t, NewServer(dev, Options{}))
	for i := range 20 {
		c.send(cmdWrite, 0, int64(i), 1, []byte{1})
	}
	c.send(cmdDisc, 0, 0, 0, nil)
	<-g.entered
	g.open()
	for range 20 {
		if a, err := c.receive(); err != nil || a.errno != 0 {
			t.Fatalf("reply: %v %v", err, a.errno)
		}
	}
	if err := <-result; err != nil {
		t.Errorf("ServeConn: %v", err)
	}
}

// TestServeConn_PeerStopsReading: a peer that hangs up without reading its replies ends
// the connection, not the server.
func TestServeConn_PeerStopsReading(t *testing.T) {
	s := NewServer(newMemDevice(64*mib), Options{})
	c, result := pipeClient(t, s)
	for range 8 {
		c.send(cmdRead, 0, 0, 8*mib, nil)
	}
	time.Sleep(20 * time.Millisecond)
	_ = c.conn.Close()
	if err := <-result; err != nil {
		t.Errorf("ServeConn: %v, want nil", err)
	}
	other, _ := pipeClient(t, s)
	other.read(0, 10)
}

func TestServeConn_ContextEnds(t *testing.T) {
	server, conn := socketPair(t)
	s := NewServer(newMemDevice(mib), Options{})
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- s.ServeConn(ctx, server) }()
	newClient(t, conn).read(0, 1)
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("ServeConn: %v, want context.Canceled", err)
	}
}

func TestServeConn_NotAStreamSocket(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fds[1]) }()
	datagram := os.NewFile(uintptr(fds[0]), "datagram socket")
	defer func() { _ = datagram.Close() }()
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	for _, f := range []*os.File{datagram, file} {
		if err := NewServer(newMemDevice(mib), Options{}).ServeConn(context.Background(), f); err == nil {
			t.Errorf("ServeConn on %s: no error", f.Name())
		}
	}
}

// TestServeConn_OverlappingWritesKeepTheirOrder: as when the kernel resends a slow write
// on another connection, also when the first one's connection is gone by then.
func TestServeConn_OverlappingWritesKeepTheirOrder(t *testing.T) {
	dev := newMemDevice(mib)
	g := newGate(t)
	var first atomic.Bool
	dev.before = func(op string, off, _ int64) error {
		if op == "write" && off == 1000 && first.CompareAndSwap(false, true) {
			g.wait()
		}
		return nil
	}
	s := NewServer(dev, Options{})
	a, gone := pipeClient(t, s)
	b, _ := pipeClient(t, s)
	a.send(cmdWrite, 0, 1000, 4, []byte("old!"))
	<-g.entered
	_ = a.conn.Close()

	b.send(cmdWrite, 0, 998, 4, []byte("new!"))
	if !eventually(func() bool { return s.Stats().InFlight == 2 }) {
		t.Fatal("the second write doesn't arrive")
	}
	c, _ := pipeClient(t, s)
	c.send(cmdWriteZeroes, 0, 1001, 2, nil)
	c.write(5000, []byte("elsewhere")) // which is answered first, or this fails
	if got := c.read(998, 6); !bytes.Equal(got, make([]byte, 6)) {
		t.Fatalf("before the first write ended: %q", got)
	}
	time.Sleep(20 * time.Millisecond)
	if got := c.read(998, 6); !bytes.Equal(got, make([]byte, 6)) {
		t.Fatalf("a write overtook an overlapping one: %q", got)
	}
	g.open()
	for _, w := range []*client{b, c} {
		if r, err := w.receive(); err != nil || r.errno != 0 {
			t.Fatalf("reply: %v %v", err, r.errno)
		}
	}
	if got := string(c.read(998, 6)); got != "new\x00\x00!" {
		t.Errorf("after all: %q, want %q", got, "new\x00\x00!")
	}
	if err := <-gone; err != nil {
		t.Errorf("ServeConn of the connection that was closed: %v", err)
	}
}

// TestServeConn_StaleWritesAreDropped: writes that lay in the socket when the kernel
// gave it up must not be carried out after what it has sent since.
func TestServeConn_StaleWritesAreDropped(t *testing.T) {
	dev := newMemDevice(mib)
	g := newGate(t)
	dev.before = func(op string, off, _ int64) error {
		if op == "write" && off < 1000 {
			g.wait()
		}
		return nil
	}
	s := NewServer(dev, Options{})
	old, result := pipeClient(t, s)
	const stale = 2000 // offset of a write that finds no slot
	writes := make([]command, slotCount+1)
	for i := range writes {
		writes[i] = command{cmd: cmdWrite, off: int64(i), n: 1}
	}
	writes[slotCount].off = stale
	old.sendAll(writes...) // before the device gets stuck
	if !eventually(func() bool { return s.Stats().InFlight == slotCount }) {
		t.Fatalf("%d in flight, want %d", s.Stats().InFlight, slotCount)
	}
	time.Sleep(staleAfter + 100*time.Millisecond)
	_ = old.conn.Close()

	again, _ := pipeClient(t, s)
	again.write(stale, []byte{2})
	g.open()
	if err := <-result; err != nil {
		t.Errorf("ServeConn: %v", err)
	}
	if got := again.read(stale, 1)[0]; got != 2 {
		t.Errorf("the byte written last is %d, want 2", got)
	}
	if !eventually(func() bool { return s.Stats().InFlight == 0 }) {
		t.Errorf("%d requests in flight afterwards", s.Stats().InFlight)
	}
}

// TestServeConn_SlowDevice: as many requests as there are workers, less one that
// receives, wait for the device at the same time.
func TestServeConn_SlowDevice(t *testing.T) {
	dev := newMemDevice(mib)
	var running, most atomic.Int64
	dev.before = func(string, int64, int64) error {
		now := running.Add(1)
		for m := most.Load(); now > m && !most.CompareAndSwap(m, now); m = most.Load() {
		}
		time.Sleep(5 * time.Millisecond)
		running.Add(-1)
		return nil
	}
	const workers = 8
	c, _ := pipeClient(t, NewServer(dev, Options{Workers: workers}))
	for i := range 200 {
		c.send(cmdRead, 0, int64(i), 1, nil)
		if i >= 64 {
			if _, err := c.receive(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for len(c.sent) > 0 {
		if _, err := c.receive(); err != nil {
			t.Fatal(err)
		}
	}
	if got := most.Load(); got < workers-1 || got > workers {
		t.Errorf("at most %d requests at the same time, want %d", got, workers)
	}
}

// TestServeConn_SlowDeviceIsKnown: once a device is known to be slow, workers wake one
// another; it doesn't take the watch.
func TestServeConn_SlowDeviceIsKnown(t *testing.T) {
	dev := newMemDevice(mib)
	g := newGate(t)
	dev.before = func(string, int64, int64) error { g.wait(); return nil }
	const workers = 8
	s := NewServer(dev, Options{Workers: workers})
	s.stopWatch = make(chan struct{}) // as if it ran
	for range 20 {
		s.pace.took(paceRead, time.Millisecond)
	}
	c, _ := pipeClient(t, s)
	requests := make([]command, workers-2)
	for i := range requests {
		requests[i] = command{cmd: cmdRead, n: 1}
	}
	c.sendAll(requests...)
	for range requests {
		<-g.entered
	}
	c.send(cmdRead, 0, 5, 1, nil)
	<-g.entered
	g.open()
}

// TestServeConn_FlushPassesOthers: a flush is carried out while more reads than there are
// workers wait for the device, before it and after it.
func TestServeConn_FlushPassesOthers(t *testing.T) {
	dev := newMemDevice(mib)
	g := newGate(t)
	dev.before = func(op string, _, _ int64) error {
		if op == "read" {
			g.wait()
		}
		return nil
	}
	const workers = 4
	c, _ := pipeClient(t, NewServer(dev, Options{Workers: workers}))
	reads := make([]command, 2*workers)
	for i := range reads {
		reads[i] = command{cmd: cmdRead, n: 1}
	}
	for range 2 {
		c.sendAll(reads...)
		for range 3 {
			c.send(cmdFlush, 0, 0, 0, nil)
			flush := c.cookie
			if a, err := c.receive(); err != nil || a.cookie != flush || a.errno != 0 {
				t.Fatalf("reply to %d (%v, error %d), want to the flush %d", a.cookie, err, a.errno, flush)
			}
		}
	}
	g.open()
	for range 2 * len(reads) {
		if a, err := c.receive(); err != nil || a.errno != 0 {
			t.Fatalf("reply: %v, error %d", err, a.errno)
		}
	}
}

// TestServeConn_OneStuckRequest: a device that suddenly doesn't answer one request goes
// on answering the others, those received with it included.
func TestServeConn_OneStuckRequest(t *testing.T) {
	dev := newMemDevice(mib)
	g := newGate(t)
	dev.before = func(_ string, off, _ int64) error {
		if off == 777 {
			g.wait()
		}
		return nil
	}
	c, _ := pipeClient(t, NewServer(dev, Options{}))
	for range 1000 {
		c.read(0, 1) // the device is known to be quick
	}
	c.sendAll(command{cmd: cmdRead, n: 1}, command{cmd: cmdRead, off: 777, n: 1}, command{cmd: cmdRead, off: 1, n: 1})
	first, stuck, last := c.cookie-2, c.cookie-1, c.cookie
	got := map[uint64]bool{}
	for range 2 {
		a, err := c.receive()
		if err != nil {
			t.Fatal(err)
		}
		got[a.cookie] = true
	}
	if !got[first] || !got[last] {
		t.Fatalf("answered %v, want %d and %d", got, first, last)
	}
	c.read(0, 1)
	g.open()
	if a, err := c.receive(); err != nil || a.cookie != stuck {
		t.Errorf("reply to %d (%v), want to %d", a.cookie, err, stuck)
	}
}

// TestServeConn_PeerPauses: while a client doesn't read its replies, the server does
// nothing at all; when it reads on, all replies come.
func TestServeConn_PeerPauses(t *testing.T) {
	s := NewServer(newMemDevice(32*mib), Options{})
	c, _ := pipeClient(t, s)
	const count = 200
	for i := range count {
		c.send(cmdRead, 0, int64(i)*1000, mib, nil)
	}
	if !eventually(s.watch.asleep.Load) {
		t.Fatal("the watch never falls asleep")
	}
	if n := s.Stats().InFlight; n < 30 {
		t.Errorf("%d requests in flight, want as many as there is memory for", n)
	}
	for len(c.sent) > 0 {
		if a, err := c.receive(); err != nil || a.errno != 0 {
			t.Fatalf("reply: %v %v", err, a.errno)
		}
	}
}

// TestServeConn_BoundedMemory: requests of the largest size and small ones beside them
// are all answered with the least memory there can be.
func TestServeConn_BoundedMemory(t *testing.T) {
	dev := newMemDevice(64 * mib)
	s := NewServer(dev, Options{BufferBytes: MinBufferBytes})
	c, _ := pipeClient(t, s)
	big := bytes.Repeat([]byte("0123456789abcdef"), maxPayloadBytes/16)
	c.write(mib, big)
	go func() { // while the replies are read
		for i := range 10 {
			for _, n := range []int{maxPayloadBytes, 1, granuleBytes + 1} {
				c.tb.Helper()
				_, _ = c.conn.Write(requestHeader(cmdRead, 0, uint64(100*(i+1)+n%97), mib, n))
			}
		}
	}()
	for i := range 10 {
		for _, n := range []int{maxPayloadBytes, 1, granuleBytes + 1} {
			c.sent[uint64(100*(i+1)+n%97)] = command{cmd: cmdRead, n: n}
		}
	}
	for len(c.sent) > 0 {
		a, err := c.receive()
		if err != nil || a.errno != 0 {
			t.Fatalf("reply: %v %v", err, a.errno)
		}
		if !bytes.Equal(a.data, big[:len(a.data)]) {
			t.Fatalf("read of %d bytes: wrong bytes", len(a.data))
		}
	}
	for _, conn := range s.connections() {
		conn.mu.Lock()
		if conn.arena.used != 0 || len(conn.arena.mem) > MinBufferBytes {
			t.Errorf("%d granules in use afterwards, %d bytes mapped", conn.arena.used, len(conn.arena.mem))
		}
		conn.mu.Unlock()
	}
}

// TestServeConn_WriteWaitsForMemory: a write that finds none goes on when there is some,
// whether anything else arrives or not.
func TestServeConn_WriteWaitsForMemory(t *testing.T) {
	dev := newMemDevice(64 * mib)
	g := newGate(t)
	dev.before = func(string, int64, int64) error { g.wait(); return nil }
	c, _ := pipeClient(t, NewServer(dev, Options{BufferBytes: MinBufferBytes}))
	data := make([]byte, maxPayloadBytes)
	c.send(cmdWrite, 0, 0, len(data), data)
	<-g.entered
	go func() {
		time.Sleep(50 * time.Millisecond)
		g.open()
	}()
	c.send(cmdWrite, 0, maxPayloadBytes, 2*smallBytes, data[:2*smallBytes])
	for range 2 {
		if a, err := c.receive(); err != nil || a.errno != 0 {
			t.Fatalf("reply: %v %v", err, a.errno)
		}
	}
}

// TestServeConn_NoAllocations: requests cost no memory of the Go heap.
func TestServeConn_NoAllocations(t *testing.T) {
	c, _ := pipeClient(t, NewServer(newMemDevice(mib), Options{}))
	c.write(0, make([]byte, mib))
	const count, block = 10_000, 4096
	request := requestHeader(cmdRead, 0, 1, 0, block)
	write := append(requestHeader(cmdWrite, 0, 2, 8192, block), make([]byte, block)...)
	reply := make([]byte, simpleReplyBytes+block+simpleReplyBytes)
	var before, after runtime.MemStats
	for round := range 2 { // the first warms up
		runtime.ReadMemStats(&before)
		for range count / 2 {
			if _, err := c.conn.Write(request); err != nil {
				t.Fatal(err)
			}
			if _, err := c.conn.Write(write); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c.conn, reply); err != nil {
				t.Fatal(err)
			}
		}
		runtime.ReadMemStats(&after)
		if n := after.Mallocs - before.Mallocs; round == 1 && n > count/100 {
			t.Errorf("%d allocations in %d requests", n, count)
		}
	}
}

// TestServeConn_IdleGivesMemoryBack: what a burst of large requests touched does not
// stay with an idle connection.
func TestServeConn_IdleGivesMemoryBack(t *testing.T) {
	s := NewServer(newMemDevice(32*mib), Options{})
	c, _ := pipeClient(t, s)
	c.read(0, 32*mib)
	conn := s.connections()[0]
	if before := residentBytes(t, conn); before < 32*mib {
		t.Fatalf("%d bytes resident after a read of 32 MiB", before)
	}
	if !eventually(func() bool { return residentBytes(t, conn) < mib }) {
		t.Errorf("%d bytes resident when idle", residentBytes(t, conn))
	}
	if got := c.read(5, 3); !bytes.Equal(got, make([]byte, 3)) {
		t.Errorf("read after that: %x", got)
	}
}

// residentBytes is how much of a connection's buffers is in memory.
func residentBytes(t *testing.T, c *conn) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	pages := make([]byte, len(c.arena.mem)/os.Getpagesize())
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&c.arena.mem[0])),
		uintptr(len(c.arena.mem)), uintptr(unsafe.Pointer(&pages[0]))); errno != 0 {
		t.Fatal(errno)
	}
	n := 0
	for _, p := range pages {
		n += int(p & 1)
	}
	return n * os.Getpagesize()
}
