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

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// client is an NBD client for tests: requests go out and replies come in one by one,
// in whatever order the test asks for.
type client struct {
	tb         testing.TB
	conn       net.Conn
	structured bool // replies are, or extended
	extended   bool
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
	status [][2]uint32 // of a block status, the first context's
	// statuses are those of all contexts, by their number.
	statuses map[uint32][][2]uint64
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
	header := requestHeader(cmd, flags, c.cookie, off, n)
	if c.extended {
		if cmd == cmdWrite {
			flags |= cmdFlagPayloadLen
		}
		header = extendedHeader(cmd, flags, c.cookie, off, uint64(n))
	}
	if _, err := c.conn.Write(append(header, payload...)); err != nil {
		c.tb.Fatalf("send command %d: %v", cmd, err)
	}
	return c.cookie
}

func extendedHeader(cmd, flags uint16, cookie uint64, off int64, n uint64) []byte {
	b := binary.BigEndian.AppendUint32(nil, extendedRequestMagic)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	return binary.BigEndian.AppendUint64(b, n)
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
	case c.extended && magic == extendedReplyMagic:
		return c.receiveExtendedChunk(a, req, head)
	case c.extended:
		return false, fmt.Errorf("reply begins with %#x although extended headers were negotiated", magic)
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
	return c.receiveChunkPayload(a, req, head, int(binary.BigEndian.Uint32(length[:])))
}

func (c *client) receiveExtendedChunk(a *answer, req command, head [simpleReplyBytes]byte) (done bool, err error) {
	var rest [extendedReplyBytes - simpleReplyBytes]byte
	if _, err := io.ReadFull(c.conn, rest[:]); err != nil {
		return false, err
	}
	if off := int64(binary.BigEndian.Uint64(rest[:])); off != req.off {
		return false, fmt.Errorf("reply to a request at %d says %d", req.off, off)
	}
	return c.receiveChunkPayload(a, req, head, int(binary.BigEndian.Uint64(rest[8:])))
}

func (c *client) receiveChunkPayload(a *answer, req command, head [simpleReplyBytes]byte, length int) (done bool, err error) {
	if length < 0 || length > maxPayloadBytes+12 {
		return false, fmt.Errorf("chunk of %d bytes", length)
	}
	payload := make([]byte, length)
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
	case replyBlockStatus, replyBlockStatusExt:
		if (kind == replyBlockStatusExt) != c.extended {
			return false, fmt.Errorf("chunk of type %d, extended headers: %v", kind, c.extended)
		}
		a.chunks = append(a.chunks, "status")
		a.addStatus(kind, payload)
	case replyError:
		a.chunks = append(a.chunks, "error")
		a.errno = syscall.Errno(binary.BigEndian.Uint32(payload))
		a.text = string(payload[6:])
	default:
		return false, fmt.Errorf("chunk of type %d", kind)
	}
	return binary.BigEndian.Uint16(head[4:])&replyFlagDone != 0, nil
}

// addStatus takes a chunk of a block status apart.
func (a *answer) addStatus(kind uint16, payload []byte) {
	id := binary.BigEndian.Uint32(payload)
	var list [][2]uint64
	if kind == replyBlockStatus {
		for p := payload[4:]; len(p) >= 8; p = p[8:] {
			list = append(list, [2]uint64{uint64(binary.BigEndian.Uint32(p)), uint64(binary.BigEndian.Uint32(p[4:]))})
		}
	} else {
		for p := payload[8:]; len(p) >= 16; p = p[16:] {
			list = append(list, [2]uint64{binary.BigEndian.Uint64(p), binary.BigEndian.Uint64(p[8:])})
		}
		if count := binary.BigEndian.Uint32(payload[4:]); int(count) != len(list) || len(payload) != 8+16*len(list) {
			panic(fmt.Sprintf("%d descriptors announced in %d bytes", count, len(payload)))
		}
	}
	if a.statuses == nil {
		a.statuses = map[uint32][][2]uint64{}
		for _, d := range list {
			a.status = append(a.status, [2]uint32{uint32(d[0]), uint32(d[1])})
		}
	}
	a.statuses[id] = append(a.statuses[id], list...)
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

// exportsOf returns exports with one in them.
func exportsOf(tb testing.TB, name string, s *Server, opts ExportsOptions) *Exports {
	tb.Helper()
	e := NewExports(opts)
	if err := e.Add(name, s); err != nil {
		tb.Fatal(err)
	}
	return e
}

// unixClient serves s on a unix socket and connects to it, before the handshake.
func unixClient(tb testing.TB, s *Server) *client {
	tb.Helper()
	c, _ := exportsClient(tb, exportsOf(tb, "", s, ExportsOptions{}))
	return c
}

// exportsClient serves exports on a unix socket and connects to it.
func exportsClient(tb testing.TB, e *Exports) (c *client, socket string) {
	tb.Helper()
	socket = filepath.Join(tb.TempDir(), "nbd")
	serveExports(tb, e, socket)
	return dialClient(tb, socket), socket
}

// dialClient connects to a unix socket.
func dialClient(tb testing.TB, socket string) *client {
	tb.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = conn.Close() })
	return newClient(tb, conn)
}

// serveExports serves on a unix socket until the test ends.
func serveExports(tb testing.TB, e *Exports, socket string) {
	tb.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		tb.Fatal(err)
	}
	serveListener(tb, e, l)
}

func serveListener(tb testing.TB, e *Exports, l net.Listener) {
	tb.Helper()
	served := make(chan error, 1)
	go func() { served <- e.Serve(context.Background(), l) }()
	tb.Cleanup(func() {
		stopExports(tb, e)
		if err := <-served; err != nil {
			tb.Errorf("serve: %v", err)
		}
	})
}

// serveUnix serves dev on a unix socket until the test ends.
func serveUnix(tb testing.TB, dev block.Device, socket string) *Server {
	tb.Helper()
	s := NewServer(dev, Options{})
	serveExports(tb, exportsOf(tb, "", s, ExportsOptions{}), socket)
	return s
}

func stopExports(tb testing.TB, e *Exports) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := e.Drain(ctx); err != nil {
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
		c.option(optSetMetaContext, contextData("", "base:allocation"))
		c.structured = true
	}
	c.goTo("")
}

// enterExtended goes there with extended headers and all metadata contexts.
func (c *client) enterExtended() {
	c.tb.Helper()
	c.greet(flagFixedNewstyle | flagNoZeroes)
	if got := c.option(optExtendedHeaders, nil); got[0].kind != repAck {
		c.tb.Fatalf("extended headers: %+v", got)
	}
	c.option(optSetMetaContext, contextData("", "base:allocation", "qemu:allocation-depth"))
	c.structured, c.extended = true, true
	c.goTo("")
}

// goTo ends the handshake with GO.
func (c *client) goTo(export string) {
	c.tb.Helper()
	replies := c.option(optGo, infoData(export, infoBlockSize))
	if last := replies[len(replies)-1]; last.kind != repAck {
		c.tb.Fatalf("GO: %#x %s", last.kind, last.payload)
	}
	info := []byte(replies[0].payload)
	c.size = int64(binary.BigEndian.Uint64(info[2:]))
	c.flags = binary.BigEndian.Uint16(info[10:])
}
