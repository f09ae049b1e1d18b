package nbdlocal

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// client is an NBD client for tests: requests go out and replies come in one by one,
// in whatever order the test asks for.
type client struct {
	tb         testing.TB
	conn       net.Conn
	structured bool
	sent       map[uint64]command
	cookie     uint64
	size       int64
	flags      uint16
}

type command struct {
	cmd, flags uint16
	off        int64
	n          int
}

// answer is a reply, put together from its chunks.
type answer struct {
	cookie uint64
	errno  syscall.Errno
	text   string
	data   []byte      // of a read
	chunks []string    // what a structured reply consisted of
	status [][2]uint32 // of a block status
}

// socketPair returns two connected stream sockets: the server's as a file in blocking
// mode, as the kernel transport makes them, and the client's.
func socketPair(tb testing.TB) (*os.File, net.Conn) {
	tb.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	server, peer := os.NewFile(uintptr(fds[0]), "server end"), os.NewFile(uintptr(fds[1]), "client end")
	tb.Cleanup(func() { _ = server.Close() })
	conn, err := net.FileConn(peer)
	if err != nil {
		tb.Fatal(err)
	}
	_ = peer.Close()
	tb.Cleanup(func() { _ = conn.Close() })
	return server, conn
}

// pipeClient starts ServeConn on one end of a socket pair and returns a client on the
// other. result receives what ServeConn returned.
func pipeClient(tb testing.TB, s *Server) (c *client, result chan error) {
	tb.Helper()
	server, conn := socketPair(tb)
	result = make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		result <- s.ServeConn(ctx, server)
	}()
	tb.Cleanup(func() {
		cancel()
		_ = conn.Close()
		select {
		case <-returned:
		case <-time.After(10 * time.Second): // a gate that opens later, after a failure
			tb.Error("ServeConn doesn't return")
		}
	})
	return newClient(tb, conn), result
}

func newClient(tb testing.TB, conn net.Conn) *client {
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	return &client{tb: tb, conn: conn, sent: map[uint64]command{}}
}

// send sends a request and returns its cookie.
func (c *client) send(cmd, flags uint16, off int64, n int, payload []byte) uint64 {
	c.tb.Helper()
	c.cookie++
	c.sent[c.cookie] = command{cmd, flags, off, n}
	if _, err := c.conn.Write(append(requestHeader(cmd, flags, c.cookie, off, n), payload...)); err != nil {
		c.tb.Fatalf("send command %d: %v", cmd, err)
	}
	return c.cookie
}

// sendAll sends requests at once, so that they arrive together.
func (c *client) sendAll(commands ...command) {
	c.tb.Helper()
	var messages []byte
	for _, r := range commands {
		c.cookie++
		c.sent[c.cookie] = r
		messages = append(messages, requestHeader(r.cmd, r.flags, c.cookie, r.off, r.n)...)
		if r.cmd == cmdWrite {
			messages = append(messages, bytes.Repeat([]byte{1}, r.n)...)
		}
	}
	if _, err := c.conn.Write(messages); err != nil {
		c.tb.Fatal(err)
	}
}

func requestHeader(cmd, flags uint16, cookie uint64, off int64, n int) []byte {
	b := binary.BigEndian.AppendUint32(nil, requestMagic)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

// receive returns the next reply, whichever request it answers.
func (c *client) receive() (answer, error) {
	a := answer{}
	for {
		done, err := c.receiveMessage(&a)
		if err != nil || done {
			delete(c.sent, a.cookie)
			return a, err
		}
	}
}

func (c *client) receiveMessage(a *answer) (done bool, err error) {
	var head [simpleReplyBytes]byte
	if _, err := io.ReadFull(c.conn, head[:]); err != nil {
		return false, err
	}
	a.cookie = binary.BigEndian.Uint64(head[8:])
	req, known := c.sent[a.cookie]
	if !known {
		return false, fmt.Errorf("reply to %d, which was not asked", a.cookie)
	}
	switch magic := binary.BigEndian.Uint32(head[:]); {
	case magic == structuredReplyMagic && c.structured:
		return c.receiveChunk(a, req, head)
	case magic != simpleReplyMagic:
		return false, fmt.Errorf("reply begins with %#x", magic)
	case c.structured && req.cmd == cmdRead:
		return false, errors.New("simple reply to a read although structured ones were negotiated")
	}
	a.errno = syscall.Errno(binary.BigEndian.Uint32(head[4:]))
	if req.cmd == cmdRead && a.errno == 0 {
		a.data = make([]byte, req.n)
		_, err = io.ReadFull(c.conn, a.data)
	}
	return true, err
}

func (c *client) receiveChunk(a *answer, req command, head [simpleReplyBytes]byte) (done bool, err error) {
	var length [4]byte
	if _, err := io.ReadFull(c.conn, length[:]); err != nil {
		return false, err
	}
	payload := make([]byte, binary.BigEndian.Uint32(length[:]))
	if _, err := io.ReadFull(c.conn, payload); err != nil {
		return false, err
	}
	if req.cmd == cmdRead && a.data == nil {
		a.data = make([]byte, req.n)
	}
	switch kind := binary.BigEndian.Uint16(head[6:]); kind {
	case replyNone:
		a.chunks = append(a.chunks, "none")
	case replyOffsetData:
		a.chunks = append(a.chunks, "data")
		copy(a.data[int64(binary.BigEndian.Uint64(payload))-req.off:], payload[8:])
	case replyOffsetHole:
		a.chunks = append(a.chunks, "hole")
		if n := binary.BigEndian.Uint32(payload[8:]); int(n) > req.n {
			return false, fmt.Errorf("hole of %d bytes in a read of %d", n, req.n)
		}
	case replyBlockStatus:
		a.chunks = append(a.chunks, "status")
		for p := payload[4:]; len(p) >= 8; p = p[8:] {
			a.status = append(a.status, [2]uint32{binary.BigEndian.Uint32(p), binary.BigEndian.Uint32(p[4:])})
		}
	case replyError:
		a.chunks = append(a.chunks, "error")
		a.errno = syscall.Errno(binary.BigEndian.Uint32(payload))
		a.text = string(payload[6:])
	default:
		return false, fmt.Errorf("chunk of type %d", kind)
	}
	return binary.BigEndian.Uint16(head[4:])&replyFlagDone != 0, nil
}

// do sends one request and waits for its reply, the only one outstanding.
func (c *client) do(cmd, flags uint16, off int64, n int, payload []byte) answer {
	c.tb.Helper()
	cookie := c.send(cmd, flags, off, n, payload)
	a, err := c.receive()
	if err != nil {
		c.tb.Fatalf("reply to command %d: %v", cmd, err)
	}
	if a.cookie != cookie {
		c.tb.Fatalf("reply to %d, want to %d", a.cookie, cookie)
	}
	return a
}

func (c *client) read(off int64, n int) []byte {
	c.tb.Helper()
	a := c.do(cmdRead, 0, off, n, nil)
	if a.errno != 0 {
		c.tb.Fatalf("read of %d bytes at %d: %v %s", n, off, a.errno, a.text)
	}
	return a.data
}

func (c *client) write(off int64, data []byte) {
	c.tb.Helper()
	if a := c.do(cmdWrite, 0, off, len(data), data); a.errno != 0 {
		c.tb.Fatalf("write of %d bytes at %d: %v %s", len(data), off, a.errno, a.text)
	}
}

// unixClient serves dev on a unix socket and connects to it, before the handshake.
func unixClient(tb testing.TB, s *Server) (c *client, socket string) {
	tb.Helper()
	socket = filepath.Join(tb.TempDir(), "nbd")
	l, err := net.Listen("unix", socket)
	if err != nil {
		tb.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), l) }()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		_ = conn.Close()
		stopServer(tb, s)
		if err := <-served; err != nil {
			tb.Errorf("serve: %v", err)
		}
	})
	return newClient(tb, conn), socket
}

func stopServer(tb testing.TB, s *Server) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := s.Drain(ctx); err != nil {
		tb.Errorf("drain: %v", err)
	}
}

// greet does the beginning of the handshake.
func (c *client) greet(flags uint32) {
	c.tb.Helper()
	var greeting [18]byte
	if _, err := io.ReadFull(c.conn, greeting[:]); err != nil {
		c.tb.Fatalf("greeting: %v", err)
	}
	want := binary.BigEndian.AppendUint64(nil, initMagic)
	want = binary.BigEndian.AppendUint64(want, optMagic)
	want = binary.BigEndian.AppendUint16(want, flagFixedNewstyle|flagNoZeroes)
	if !bytes.Equal(greeting[:], want) {
		c.tb.Fatalf("greeting %x, want %x", greeting, want)
	}
	if _, err := c.conn.Write(binary.BigEndian.AppendUint32(nil, flags)); err != nil {
		c.tb.Fatal(err)
	}
}

// optReply is one reply to an option.
type optReply struct {
	kind    uint32
	payload string
}

// option sends an option and returns the replies to it, up to the final one.
func (c *client) option(option uint32, data []byte) []optReply {
	c.tb.Helper()
	c.sendOption(option, data)
	var replies []optReply
	for {
		var head [20]byte
		if _, err := io.ReadFull(c.conn, head[:]); err != nil {
			c.tb.Fatalf("reply to option %d: %v", option, err)
		}
		if magic := binary.BigEndian.Uint64(head[:]); magic != optReplyMagic {
			c.tb.Fatalf("reply to option begins with %#x", magic)
		}
		if got := binary.BigEndian.Uint32(head[8:]); got != option {
			c.tb.Fatalf("reply to option %d, want %d", got, option)
		}
		payload := make([]byte, binary.BigEndian.Uint32(head[16:]))
		if _, err := io.ReadFull(c.conn, payload); err != nil {
			c.tb.Fatal(err)
		}
		r := optReply{binary.BigEndian.Uint32(head[12:]), string(payload)}
		replies = append(replies, r)
		if r.kind == repAck || r.kind&(1<<31) != 0 {
			return replies
		}
	}
}

func (c *client) sendOption(option uint32, data []byte) {
	c.tb.Helper()
	if _, err := c.conn.Write(optionBytes(option, data)); err != nil {
		c.tb.Fatal(err)
	}
}

func optionBytes(option uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, optMagic)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// infoData is the data of INFO and GO.
func infoData(name string, kinds ...uint16) []byte {
	b := appendString(nil, name)
	b = binary.BigEndian.AppendUint16(b, uint16(len(kinds)))
	for _, k := range kinds {
		b = binary.BigEndian.AppendUint16(b, k)
	}
	return b
}

// contextData is the data of LIST_META_CONTEXT and SET_META_CONTEXT.
func contextData(name string, queries ...string) []byte {
	b := appendString(nil, name)
	b = binary.BigEndian.AppendUint32(b, uint32(len(queries)))
	for _, q := range queries {
		b = appendString(b, q)
	}
	return b
}

// enter goes through the handshake to the transmission phase.
func (c *client) enter(structured bool) {
	c.tb.Helper()
	c.greet(flagFixedNewstyle | flagNoZeroes)
	if structured {
		c.option(optStructuredReply, nil)
		c.option(optSetMetaContext, contextData("", contextAllocation))
		c.structured = true
	}
	replies := c.option(optGo, infoData("", infoBlockSize))
	if last := replies[len(replies)-1]; last.kind != repAck {
		c.tb.Fatalf("GO: %#x %s", last.kind, last.payload)
	}
	info := []byte(replies[0].payload)
	c.size = int64(binary.BigEndian.Uint64(info[2:]))
	c.flags = binary.BigEndian.Uint16(info[10:])
}
