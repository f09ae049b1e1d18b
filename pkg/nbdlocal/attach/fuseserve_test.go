package attach

import (
	"bytes"
	"context"
	"errors"
	"math"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// memDevice is a block.Device in memory. entered, if not nil, is told of every write,
// which then waits for proceed.
type memDevice struct {
	block.Device // panics in what is not overridden

	mu       sync.Mutex
	data     []byte
	zeroes   []block.ZeroFlags
	flushes  int
	entered  chan struct{}
	proceed  chan struct{}
	writeErr error
}

func (d *memDevice) Info() block.Info {
	return block.Info{SizeBytes: int64(len(d.data)), LogicalBlockBytes: 512, ClusterBytes: 64 << 10}
}

func (d *memDevice) ReadAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange(off, int64(len(p)), int64(len(d.data))); err != nil {
		return 0, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(p, d.data[off:]), nil
}

func (d *memDevice) WriteAt(p []byte, off int64) (int, error) {
	if d.entered != nil {
		d.entered <- struct{}{}
		<-d.proceed
	}
	if err := block.CheckRange(off, int64(len(p)), int64(len(d.data))); err != nil {
		return 0, err
	}
	if d.writeErr != nil {
		return 0, d.writeErr
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(d.data[off:], p), nil
}

func (d *memDevice) WriteZeroes(off, n int64, flags block.ZeroFlags) error {
	if err := block.CheckRange(off, n, int64(len(d.data))); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.data[off : off+n])
	d.zeroes = append(d.zeroes, flags)
	return nil
}

func (d *memDevice) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.flushes++
	return nil
}

// fuseClient plays the kernel, over a socket that keeps messages apart.
type fuseClient struct {
	t      testing.TB
	fd     int
	server *os.File
	dev    *memDevice
	stop   context.CancelFunc
	ended  chan error
	unique uint64
	reply  []byte
}

func newFUSEClient(t testing.TB, dev *memDevice) *fuseClient {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		setSendBuffer(fd, nbdServerBufferBytes)
	}
	timeout := unix.Timeval{Sec: 20}
	if err := unix.SetsockoptTimeval(fds[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		t.Fatal(err)
	}
	c := &fuseClient{t: t, fd: fds[0], dev: dev, server: os.NewFile(uintptr(fds[1]), "server's end"), reply: make([]byte, 2<<20)}
	c.serve()
	t.Cleanup(func() {
		c.stop()
		unix.Close(c.fd)
		c.server.Close()
	})
	return c
}

// serve starts a server.
func (c *fuseClient) serve() { c.serveWith(2) }

func (c *fuseClient) serveWith(threads int) {
	ctx, cancel := context.WithCancel(c.t.Context())
	c.stop, c.ended = cancel, make(chan error, 1)
	go func() { c.ended <- ServeFUSE(ctx, c.server, c.dev, FUSEOptions{Threads: threads}) }()
}

// send sends a request with these arguments.
func (c *fuseClient) send(opcode uint32, node uint64, args []byte) {
	c.t.Helper()
	c.unique++
	req := make([]byte, fuseInHeaderBytes+len(args))
	order.PutUint32(req[inLen:], uint32(len(req)))
	order.PutUint32(req[inOpcode:], opcode)
	order.PutUint64(req[inUnique:], c.unique)
	order.PutUint64(req[inNode:], node)
	copy(req[fuseInHeaderBytes:], args)
	c.sendRaw(req)
}

func (c *fuseClient) sendRaw(req []byte) {
	c.t.Helper()
	for {
		switch _, err := unix.Write(c.fd, req); err {
		case nil:
			return
		case unix.EINTR:
		default:
			c.t.Fatalf("send: %v", err)
		}
	}
}

// read reads the next message. The socket's time limit makes the kernel report signals,
// of which the Go runtime sends itself many, instead of restarting the call.
func (c *fuseClient) read() (int, error) {
	for {
		if n, err := unix.Read(c.fd, c.reply); err != unix.EINTR {
			return n, err
		}
	}
}

// receive returns the next reply.
func (c *fuseClient) receive() (unix.Errno, []byte) {
	c.t.Helper()
	n, err := c.read()
	if err != nil || n < fuseOutHeaderBytes || int(order.Uint32(c.reply[outLen:])) != n {
		c.t.Fatalf("reply of %d bytes, %v", n, err)
	}
	if got := order.Uint64(c.reply[outUnique:]); got != c.unique {
		c.t.Fatalf("reply to request %d, sent %d", got, c.unique)
	}
	return unix.Errno(-int32(order.Uint32(c.reply[outError:]))), c.reply[fuseOutHeaderBytes:n]
}

func (c *fuseClient) call(opcode uint32, args []byte) (unix.Errno, []byte) {
	c.t.Helper()
	c.send(opcode, fuseFileNode, args)
	return c.receive()
}

// end waits for ServeFUSE.
func (c *fuseClient) end() error {
	c.t.Helper()
	select {
	case err := <-c.ended:
		return err
	case <-time.After(20 * time.Second):
		c.t.Fatal("ServeFUSE does not end")
		return nil
	}
}

func ioArgs(off uint64, size uint32, data []byte) []byte {
	args := make([]byte, fuseWriteInBytes, fuseWriteInBytes+len(data))
	order.PutUint64(args[ioOff:], off)
	order.PutUint32(args[ioSize:], size)
	return append(args, data...)
}

func fallocateArgs(off, length uint64, mode uint32) []byte {
	args := make([]byte, fallocateBytes)
	order.PutUint64(args[fallocateOff:], off)
	order.PutUint64(args[fallocateLen:], length)
	order.PutUint32(args[fallocateMode:], mode)
	return args
}

func initArgs(minor uint32) []byte {
	args := make([]byte, initInBytes)
	order.PutUint32(args[initInMajor:], fuseMajor)
	order.PutUint32(args[initInMinor:], minor)
	order.PutUint32(args[initInFlags:], math.MaxUint32)
	return args
}

const punch = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE

func TestServeFUSE_Data(t *testing.T) {
	dev := &memDevice{data: make([]byte, 4<<20)}
	c := newFUSEClient(t, dev)
	p := bytes.Repeat([]byte("csi-imgdisk "), fuseMaxRequestBytes/12+1)[:fuseMaxRequestBytes]
	if errno, body := c.call(fuseWrite, ioArgs(512, fuseMaxRequestBytes, p)); errno != 0 || order.Uint32(body[writeOutSize:]) != fuseMaxRequestBytes {
		t.Fatalf("write: %v, %x", errno, body)
	}
	if errno, body := c.call(fuseRead, ioArgs(512, fuseMaxRequestBytes, nil)); errno != 0 || !bytes.Equal(body, p) {
		t.Fatalf("read: %v, %d bytes", errno, len(body))
	}
	if errno, body := c.call(fuseRead, ioArgs(4<<20-100, 4096, nil)); errno != 0 || len(body) != 100 {
		t.Errorf("read across the end: %v, %d bytes", errno, len(body))
	}
	if errno, body := c.call(fuseRead, ioArgs(5<<20, 4096, nil)); errno != 0 || len(body) != 0 {
		t.Errorf("read beyond the end: %v, %d bytes", errno, len(body))
	}
	if errno, _ := c.call(fuseFallocate, fallocateArgs(512, 512, punch)); errno != 0 {
		t.Errorf("punch: %v", errno)
	}
	if errno, _ := c.call(fuseFallocate, fallocateArgs(1024, 512, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE)); errno != 0 {
		t.Errorf("zero: %v", errno)
	}
	if want := []block.ZeroFlags{0, block.ZeroKeepAllocated}; len(dev.zeroes) != 2 || dev.zeroes[0] != want[0] || dev.zeroes[1] != want[1] {
		t.Errorf("zeroed with %v, want %v", dev.zeroes, want)
	}
	if errno, _ := c.call(fuseFsync, make([]byte, 16)); errno != 0 || dev.flushes != 1 {
		t.Errorf("fsync: %v, %d flushes", errno, dev.flushes)
	}
	dev.writeErr = block.ErrNoSpace
	if errno, _ := c.call(fuseWrite, ioArgs(0, 1, []byte{1})); errno != unix.ENOSPC {
		t.Errorf("write without space: %v", errno)
	}
	if err := unix.Shutdown(c.fd, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	if err := c.end(); err != nil {
		t.Errorf("ServeFUSE: %v", err)
	}
}

func TestServeFUSE_Attributes(t *testing.T) {
	dev := &memDevice{data: make([]byte, 3<<20+511)} // not a whole number of blocks
	c := newFUSEClient(t, dev)
	errno, body := c.call(fuseInit, initArgs(45))
	if errno != 0 || len(body) != initOutBytes || order.Uint32(body[initOutMaxWrite:]) != fuseMaxRequestBytes || order.Uint32(body[initOutMinor:]) != fuseMinor {
		t.Errorf("INIT: %v, %x", errno, body)
	}
	if errno, body = c.call(fuseLookup, []byte("any name\x00")); errno != 0 || order.Uint64(body[entryOutNode:]) != fuseFileNode {
		t.Errorf("LOOKUP: %v, %x", errno, body)
	}
	if errno, body = c.call(fuseGetattr, make([]byte, 16)); errno != 0 || order.Uint64(body[attrOutAttr+attrSize:]) != 3<<20 || order.Uint32(body[attrOutAttr+attrMode:]) != unix.S_IFREG|0o600 {
		t.Errorf("GETATTR: %v, %x", errno, body)
	}
	c.send(fuseGetattr, fuseRootNode, make([]byte, 16))
	if errno, body = c.receive(); errno != 0 || order.Uint32(body[attrOutAttr+attrMode:])&unix.S_IFMT != unix.S_IFDIR {
		t.Errorf("GETATTR of the root: %v, %x", errno, body)
	}
	if errno, body = c.call(fuseStatfs, nil); errno != 0 || order.Uint32(body[statfsBsize:]) != 64<<10 {
		t.Errorf("STATFS: %v, %x", errno, body)
	}
	if errno, body = c.call(fuseOpen, make([]byte, 8)); errno != 0 || order.Uint32(body[openOutFlags:])&openNoFlush == 0 {
		t.Errorf("OPEN: %v, %x", errno, body)
	}
}

func TestServeFUSE_HostileRequests(t *testing.T) {
	c := newFUSEClient(t, &memDevice{data: make([]byte, 1<<20)})
	for _, h := range []struct {
		name   string
		opcode uint32
		args   []byte
		want   unix.Errno
	}{
		{"no such operation", 999, nil, unix.ENOSYS},
		{"interrupt", fuseInterrupt, make([]byte, 8), unix.ENOSYS},
		{"kernel too old", fuseInit, initArgs(31), unix.ENOTSUP},
		{"INIT cut short", fuseInit, initArgs(45)[:20], unix.ENOTSUP},
		{"read cut short", fuseRead, ioArgs(0, 512, nil)[:24], unix.EINVAL},
		{"read too large", fuseRead, ioArgs(0, fuseMaxRequestBytes+1, nil), unix.EINVAL},
		{"read of 4 GiB", fuseRead, ioArgs(0, math.MaxUint32, nil), unix.EINVAL},
		{"read at a negative offset", fuseRead, ioArgs(1<<63, 512, nil), unix.EINVAL},
		{"write without arguments", fuseWrite, nil, unix.EINVAL},
		{"write of less than it says", fuseWrite, ioArgs(0, 512, make([]byte, 511)), unix.EINVAL},
		{"write of more than it says", fuseWrite, ioArgs(0, 511, make([]byte, 512)), unix.EINVAL},
		{"write that says 4 GiB", fuseWrite, ioArgs(0, math.MaxUint32, make([]byte, 512)), unix.EINVAL},
		{"write across the end", fuseWrite, ioArgs(1<<20-1, 2, []byte{1, 2}), unix.EINVAL},
		{"write at the last offset", fuseWrite, ioArgs(math.MaxInt64, 1, []byte{1}), unix.EINVAL},
		{"fallocate cut short", fuseFallocate, fallocateArgs(0, 512, punch)[:20], unix.EINVAL},
		{"punch across the end", fuseFallocate, fallocateArgs(512, 1<<20, punch), unix.EINVAL},
		{"punch that overflows", fuseFallocate, fallocateArgs(math.MaxInt64, math.MaxInt64, punch), unix.EINVAL},
		{"punch at a negative offset", fuseFallocate, fallocateArgs(1<<63, 1, punch), unix.EINVAL},
		{"fallocate that allocates", fuseFallocate, fallocateArgs(0, 512, 0), unix.ENOTSUP},
		{"fallocate that collapses", fuseFallocate, fallocateArgs(0, 512, unix.FALLOC_FL_COLLAPSE_RANGE), unix.ENOTSUP},
	} {
		if errno, body := c.call(h.opcode, h.args); errno != h.want || len(body) != 0 {
			t.Errorf("%s: %v and %d bytes, want %v", h.name, errno, len(body), h.want)
		}
	}
	// Those that are never answered leave the next one's answer in place.
	c.send(fuseForget, fuseFileNode, make([]byte, 8))
	c.send(fuseBatchForget, fuseFileNode, make([]byte, 24))
	if errno, _ := c.call(fuseRelease, make([]byte, 24)); errno != 0 {
		t.Errorf("RELEASE: %v", errno)
	}
}

// TestServeFUSE_Nonsense: what is not even a request ends the server with an error.
func TestServeFUSE_Nonsense(t *testing.T) {
	for name, req := range map[string][]byte{"short": make([]byte, 39), "wrong length": make([]byte, 64)} {
		c := newFUSEClient(t, &memDevice{data: make([]byte, 512)})
		c.sendRaw(req)
		if err := c.end(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestServeFUSE_Threads(t *testing.T) {
	for _, n := range []int{-1, fuseMaxThreads + 1} {
		err := ServeFUSE(t.Context(), os.Stdin, &memDevice{}, FUSEOptions{Threads: n})
		if !errors.Is(err, block.ErrInvalid) {
			t.Errorf("%d threads: %v, want ErrInvalid", n, err)
		}
	}
}

// TestServeFUSE_Stop: requests taken are answered before ServeFUSE returns, others
// stay for the next server.
func TestServeFUSE_Stop(t *testing.T) {
	dev := &memDevice{data: make([]byte, 1<<20), entered: make(chan struct{}, 2), proceed: make(chan struct{})}
	c := newFUSEClient(t, dev)
	for range 3 { // one more than there are threads
		c.send(fuseWrite, fuseFileNode, ioArgs(0, 1, []byte{7}))
	}
	<-dev.entered
	<-dev.entered
	c.stop()
	select {
	case err := <-c.ended:
		t.Fatalf("returned with requests running: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(dev.proceed)
	if err := c.end(); err != nil {
		t.Errorf("ServeFUSE: %v", err)
	}
	for range 2 {
		c.awaitAnswer()
	}
	if n, _, err := unix.Recvfrom(c.fd, c.reply, unix.MSG_DONTWAIT); err != unix.EAGAIN {
		t.Errorf("a request that was not taken has an answer of %d bytes, %v", n, err)
	}
	c.serve()
	c.awaitAnswer()
}

// awaitAnswer waits for an answer to whatever it is.
func (c *fuseClient) awaitAnswer() {
	c.t.Helper()
	if n, err := c.read(); err != nil || n < fuseOutHeaderBytes || order.Uint32(c.reply[outError:]) != 0 {
		c.t.Fatalf("answer of %d bytes, %v", n, err)
	}
}

// TestServeFUSE_Helpers: when requests take long, more are worked on at a time.
func TestServeFUSE_Helpers(t *testing.T) {
	const threads = 12
	dev := &memDevice{data: make([]byte, 1<<20), entered: make(chan struct{}, 100), proceed: make(chan struct{})}
	c := newFUSEClient(t, dev)
	c.stop()
	if err := c.end(); err != nil {
		t.Fatal(err)
	}
	c.serveWith(threads)
	const requests = 100
	for range requests {
		c.send(fuseWrite, fuseFileNode, ioArgs(0, 1, []byte{7}))
	}
	entered, released := 0, 0
	for entered-released < threads {
		select {
		case <-dev.entered:
			entered++
		case <-time.After(3 * slowRequest): // those that have entered are slow ones now
			if released == requests-threads {
				t.Fatalf("%d requests are worked on at a time, want %d", entered-released, threads)
			}
			dev.proceed <- struct{}{} // and who is done with one calls a helper
			released++
		}
	}
	close(dev.proceed)
	for range requests {
		c.awaitAnswer()
	}
}

// TestServeFUSE_Stalled: however many requests storage holds up, as long as a thread is left
// another one is answered, and when storage goes on, all are.
func TestServeFUSE_Stalled(t *testing.T) {
	const threads = 10
	dev := &memDevice{data: make([]byte, 1<<20), entered: make(chan struct{}, threads), proceed: make(chan struct{})}
	c := newFUSEClient(t, dev)
	for range 2 { // the second time after having recovered
		c.stop()
		if err := c.end(); err != nil {
			t.Fatal(err)
		}
		c.serveWith(threads)
		for range threads - 1 {
			c.send(fuseWrite, fuseFileNode, ioArgs(0, 1, []byte{7}))
			<-dev.entered
			for range 3 {
				if errno, _ := c.call(fuseRead, ioArgs(4096, 4096, nil)); errno != 0 {
					t.Fatalf("read: %v", errno)
				}
			}
		}
		for range threads - 1 {
			dev.proceed <- struct{}{}
			c.awaitAnswer()
		}
	}
}

// TestServeFUSE_Allocations: none per request.
func TestServeFUSE_Allocations(t *testing.T) {
	c := newFUSEClient(t, &memDevice{data: make([]byte, 1<<20)})
	read := make([]byte, fuseInHeaderBytes+fuseWriteInBytes)
	order.PutUint32(read[inLen:], uint32(len(read)))
	order.PutUint32(read[inOpcode:], fuseRead)
	copy(read[fuseInHeaderBytes:], ioArgs(4096, 4096, nil))
	roundTrip := func() {
		c.sendRaw(read)
		if n, err := c.read(); err != nil || n != fuseOutHeaderBytes+4096 {
			t.Fatalf("%d bytes, %v", n, err)
		}
	}
	roundTrip()
	if n := testing.AllocsPerRun(2000, roundTrip); n > 0 {
		t.Errorf("%v allocations per request", n)
	}
}

// TestFUSEServer_StopAfterClose: a context that ends late writes into no descriptor that has
// got the number of one of the server's.
func TestFUSEServer_StopAfterClose(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	connection := os.NewFile(uintptr(fds[1]), "server's end")
	defer connection.Close()
	s, err := newFUSEServer(connection, &memDevice{data: make([]byte, 4096)}, 1)
	if err != nil {
		t.Fatal(err)
	}
	number := s.stopFD
	s.close()
	other := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(other, []byte("contents"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(other, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if int(f.Fd()) != number {
		if err := unix.Dup3(int(f.Fd()), number, unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(number)
	}
	s.stop()
	if got, err := os.ReadFile(other); err != nil || string(got) != "contents" {
		t.Errorf("the file holds %q, %v", got, err)
	}
}

// FuzzServeFUSE: whatever a request holds, there is one answer or none, and the server
// either goes on or ends.
func FuzzServeFUSE(f *testing.F) {
	for _, args := range [][]byte{nil, ioArgs(512, 512, nil), ioArgs(0, 4, []byte("data")), fallocateArgs(0, 512, punch), initArgs(45)} {
		for _, opcode := range []uint32{fuseInit, fuseLookup, fuseGetattr, fuseOpen, fuseRead, fuseWrite, fuseStatfs, fuseFsync, fuseFallocate, fuseInterrupt} {
			f.Add(opcode, uint64(fuseFileNode), args)
		}
	}
	f.Fuzz(func(t *testing.T, opcode uint32, node uint64, args []byte) {
		if len(args) > fuseMaxRequestBytes || opcode == fuseForget || opcode == fuseBatchForget {
			return
		}
		c := newFUSEClient(t, &memDevice{data: make([]byte, 1<<20)})
		c.send(opcode, node, args)
		if errno, body := c.receive(); errno != 0 && len(body) != 0 || errno > 511 {
			t.Errorf("error %d with %d bytes", errno, len(body))
		}
		if errno, _ := c.call(fuseFsync, make([]byte, 16)); errno != 0 {
			t.Errorf("the next request: %v", errno)
		}
	})
}

func TestCheckFUSEInit(t *testing.T) {
	request := func(minor uint32, flags2 uint32) []byte {
		req := make([]byte, fuseInHeaderBytes+initInBytes)
		order.PutUint32(req[inOpcode:], fuseInit)
		copy(req[fuseInHeaderBytes:], initArgs(minor))
		order.PutUint32(req[fuseInHeaderBytes+initInFlags2:], flags2)
		return req
	}
	for _, c := range []struct {
		name string
		req  []byte
		ok   bool
	}{
		{"6.9", request(40, initFlags2HasResend), true},
		{"6.18", request(45, math.MaxUint32), true},
		{"6.1", request(38, 0), false},
		{"without resending", request(40, 0), false},
		{"cut short", request(40, initFlags2HasResend)[:50], false},
		{"nothing", nil, false},
	} {
		if err := checkFUSEInit(c.req); (err == nil) != c.ok || err != nil && !errors.Is(err, block.ErrUnsupported) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
