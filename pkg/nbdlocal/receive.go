package nbdlocal

import (
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// receiver is the state of receiving. It outlives the worker that receives: the next
// one goes on where the last one left off, in the middle of a message if need be.
type receiver struct {
	in         []byte // received bytes are in[start:end]
	start, end int
	current    *request // its header has arrived; nil between messages
	skip       int      // bytes of current's payload that nobody wants
	touched    bool     // buffers were used since they were last given back
	// alone: nothing is in flight, and lately requests have come one by one.
	alone bool
	// narrow: the last message was a large write, so that the next one is likely to
	// be, too. Receive no more than its header, and the rest straight to where it goes.
	narrow bool

	// drained is when the socket was last seen empty with no message begun: what
	// arrives was sent after that.
	drained time.Duration

	spin spin

	msg unix.Msghdr
	iov [2]unix.Iovec
}

const (
	// staleAfter is shorter than any timeout after which the kernel sends a request
	// again (whole seconds).
	staleAfter = 500 * time.Millisecond
	// never is a time before the process started: what lies in a socket that a
	// predecessor left may be of any age.
	never = -1000 * time.Hour
	// idleMillis is after how long without a request the buffers' memory is given
	// back.
	idleMillis = 1000
)

// receive takes requests: all that have arrived, or else it waits for one. It returns
// without any when receiving has ended or must wait for a slot or memory.
func (c *conn) receive() {
	for {
		batch := c.parse()
		if batch.head != nil {
			c.admitAll(&batch)
			return
		}
		if c.mustStop() {
			return
		}
		if n, err := c.fill(); err != nil {
			c.endReceiving(err)
			return
		} else if n > 0 {
			c.receiver.touched = true
		}
	}
}

// mustStop reports whether receiving has ended, has to pause, or may end here because
// the connection drains.
func (c *conn) mustStop() bool {
	rx := &c.receiver
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended || c.stalled {
		return true
	}
	rx.alone = c.depth == 0 && c.inFlight() == 0
	if c.draining.Load() && rx.current == nil && rx.start == rx.end {
		c.end(nil)
		return true
	}
	return false
}

// endReceiving records why nothing more can be received. io.EOF between two messages
// is the peer's right.
func (c *conn) endReceiving(err error) {
	rx := &c.receiver
	midway := rx.current != nil || rx.start != rx.end
	switch {
	case errors.Is(err, io.EOF) && midway:
		err = fmt.Errorf("nbd connection: closed in the middle of a request: %w", io.ErrUnexpectedEOF)
	case errors.Is(err, io.EOF):
		err = nil
	}
	if c.session.kernel {
		c.abandoned.Store(true)
	}
	c.mu.Lock()
	c.end(err)
	c.mu.Unlock()
}

// dropCurrent forgets a message that will never be whole. The lock is held, and nobody
// receives.
func (c *conn) dropCurrent() {
	rx := &c.receiver
	c.release(rx.current)
	rx.current = nil
}

// admitAll gives each write its place in the order of writes, and all that needn't
// wait for others to the workers. Then, and not before, it makes sure that the kernel
// still waits for the answers: if it doesn't, it may already have sent the writes
// again elsewhere.
func (c *conn) admitAll(batch *requestList) {
	var ready requestList
	for batch.head != nil {
		r := batch.pop()
		if r.modifies() {
			r.ordered = true
			if !c.server.ranges.enter(r) {
				continue
			}
		}
		ready.push(r)
	}
	rx := &c.receiver
	if c.session.kernel && clock()-rx.drained > staleAfter && c.socket.peerGone() {
		c.abandoned.Store(true)
	}
	c.mu.Lock()
	c.ready.pushAll(&ready)
	c.progress++
	c.mu.Unlock()
	c.server.watch.stir()
}

// parse takes the requests out of the bytes received. It returns those that are whole;
// one that isn't stays in receiver.current.
func (c *conn) parse() requestList {
	rx := &c.receiver
	var batch requestList
	for {
		if rx.current == nil && !c.parseHeader() {
			return batch
		}
		if !c.parsePayload() {
			return batch
		}
		batch.push(rx.current)
		rx.current = nil
	}
}

// parseHeader makes the next request current. It reports false when its header is not
// whole, when there is no slot for it, or when there is no next request.
func (c *conn) parseHeader() bool {
	rx := &c.receiver
	if rx.end-rx.start < c.session.requestBytes() {
		return false
	}
	c.mu.Lock()
	if c.ended || len(c.free) == 0 {
		c.stalled = !c.ended
		c.mu.Unlock()
		return false
	}
	r := &c.slots[c.free[len(c.free)-1]]
	c.free = c.free[:len(c.free)-1]
	c.mu.Unlock()

	header := rx.in[rx.start : rx.start+c.session.requestBytes()]
	rx.start += len(header)
	rx.current = r
	if !r.decode(header) {
		c.endReceiving(fmt.Errorf("nbd connection: %w: request begins with %#x", block.ErrInvalid, header[:4]))
		return false
	}
	if r.payload > hostilePayloadBytes {
		c.endReceiving(fmt.Errorf("nbd connection: %w: %d bytes of data with command %d: want at most %d",
			block.ErrInvalid, r.payload, r.cmd, maxPayloadBytes))
		return false
	}
	if r.cmd == cmdDisc {
		c.mu.Lock()
		c.end(nil)
		c.mu.Unlock()
		return false
	}
	if r.err = r.check(); r.err != nil && r.hasPayload() {
		rx.skip = r.payload
	}
	rx.narrow = r.payload >= largeBytes && r.err == nil
	return true
}

// parsePayload takes the current request's payload, if it has one. It reports whether
// the request is whole.
func (c *conn) parsePayload() bool {
	rx := &c.receiver
	r := rx.current
	if !r.hasPayload() {
		return true
	}
	if r.err != nil {
		n := min(rx.skip, rx.end-rx.start)
		rx.skip -= n
		rx.start += n
		return rx.skip == 0
	}
	into := r.query[:]
	if r.cmd == cmdWrite {
		if r.buf == nil && !c.obtainPayloadBuffer(r) {
			return false
		}
		into = r.buf
	}
	n := copy(into[r.filled:r.payload], rx.in[rx.start:rx.end])
	rx.start += n
	r.filled += n
	return r.filled == r.payload
}

func (c *conn) obtainPayloadBuffer(r *request) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.obtainBuffer(r) {
		c.stalled = true
		return false
	}
	return true
}

// fill receives bytes: straight into the current request's buffer, what follows into
// the receive buffer. It returns 0 and no error when it was interrupted.
func (c *conn) fill() (int, error) {
	rx := &c.receiver
	rx.compact()
	payload := 0
	rx.msg.Iov = &rx.iov[1]
	rx.msg.SetIovlen(1)
	room := len(rx.in) - rx.end
	if r := rx.current; r != nil && r.buf != nil {
		payload = len(r.buf) - r.filled
		rx.iov[0].Base = &r.buf[r.filled]
		rx.iov[0].SetLen(payload)
		rx.msg.Iov = &rx.iov[0]
		rx.msg.SetIovlen(2)
	}
	switch {
	case c.draining.Load(): // not a byte of the next message
		room = min(room, rx.missing(c.session.requestBytes()))
	case rx.narrow:
		room = min(room, c.session.requestBytes()-(rx.end-rx.start))
	}
	rx.iov[1].Base = &rx.in[rx.end%len(rx.in)]
	rx.iov[1].SetLen(room)
	if payload+room == 0 { // asked to drain since the caller looked
		return 0, nil
	}

	n, err := c.await()
	if n <= 0 {
		return 0, err
	}
	inPayload := min(n, payload)
	if inPayload > 0 {
		rx.current.filled += inPayload
	}
	rx.end += n - inPayload
	if n < payload+room && rx.current == nil && rx.start == rx.end {
		rx.drained = clock()
	}
	return n, nil
}

// compact moves what is left of the received bytes, less than a header if there is
// more to receive, to the buffer's start.
func (rx *receiver) compact() {
	if rx.start > 0 {
		rx.end = copy(rx.in, rx.in[rx.start:rx.end])
		rx.start = 0
	}
}

// missing is how many bytes the message that has begun lacks in the receive buffer; a
// payload that goes elsewhere doesn't count.
func (rx *receiver) missing(headerBytes int) int {
	switch r := rx.current; {
	case rx.skip > 0:
		return rx.skip
	case r != nil && r.buf != nil:
		return 0
	case r != nil:
		return r.payload - r.filled
	case rx.end == rx.start:
		return 0
	}
	return headerBytes - (rx.end - rx.start)
}

// await waits for bytes and receives them as receiver.msg says: first in the way that
// costs least, then in a way that can be interrupted and gives memory back.
func (c *conn) await() (int, error) {
	rx := &c.receiver
	n, err := 0, error(unix.EAGAIN)
	if !rx.alone {
		rx.spin.interrupt()
	} else if now := clock(); rx.spin.worthwhile(now) {
		n, err = rx.spin.receive(&c.socket, &rx.msg, now)
	}
	if wouldBlock(err) {
		n, err = c.socket.receive(&rx.msg, 0)
	}
	for wouldBlock(err) {
		timeout := -1
		if rx.touched {
			timeout = idleMillis
		}
		// A drain ends the wait, unless a message has begun: that one is taken whole.
		begun := rx.current != nil || rx.start != rx.end
		readable, interrupted := c.socket.wait(timeout, begun && c.draining.Load())
		switch {
		case readable:
			n, err = c.socket.receive(&rx.msg, unix.MSG_DONTWAIT)
		case interrupted:
			return 0, nil
		case rx.touched:
			c.trim()
		}
	}
	switch {
	case err != nil:
		if err = peerError(err); err == nil {
			err = io.EOF
		}
		return 0, err
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

func wouldBlock(err error) bool { return err == unix.EAGAIN || err == unix.EINTR }

// trim gives the buffers' memory back if nothing uses it.
func (c *conn) trim() {
	rx := &c.receiver
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.inFlight() == 0 && rx.start == rx.end {
		c.arena.trim()
		rx.touched = false
	}
}
