package nbdlocal

import (
	"fmt"

	"golang.org/x/sys/unix"
)

const (
	// A worker that has more to carry out sends replies when it has this many. More
	// saves system calls, fewer lets the client start sooner.
	replyBatch      = 8
	replyBatchBytes = 64 << 10
)

// sender is what sending needs.
type sender struct {
	msg unix.Msghdr
	iov [2 * slotCount]unix.Iovec
}

// sendReplies sends the replies there are, and those that come to be meanwhile. The
// lock is held; it is released meanwhile.
func (c *conn) sendReplies() {
	c.sending = true
	for c.done.head != nil {
		batch := c.takeReplies()
		dead := c.dead
		c.mu.Unlock()
		var err error
		if !dead {
			err = c.transmit(&batch)
		}
		c.mu.Lock()
		if err != nil && !c.dead {
			c.die(peerError(err))
		}
		for batch.head != nil {
			c.release(batch.pop())
		}
	}
	c.sending = false
}

// replyNow reports whether to send replies before anything else. The lock is held.
func (c *conn) replyNow() bool {
	if c.done.head == nil || c.sending {
		return false
	}
	return c.ready.head == nil || c.done.count >= replyBatch || c.doneBytes >= replyBatchBytes ||
		c.server.pace.slow(c.ready.head.kind)
}

// takeReplies takes replies to be sent at once: few enough that the buffers of large
// ones come back while they are still in the processor's cache. The lock is held.
func (c *conn) takeReplies() requestList {
	if c.doneBytes <= 4*replyBatchBytes {
		batch := c.done
		c.done, c.doneBytes = requestList{}, 0
		return batch
	}
	var batch requestList
	for bytes := 0; c.done.head != nil && bytes < 4*replyBatchBytes; {
		r := c.done.pop()
		bytes += r.headLen + len(r.tail)
		c.doneBytes -= r.headLen + len(r.tail)
		batch.push(r)
	}
	return batch
}

func (c *conn) transmit(batch *requestList) error {
	s := &c.sender
	n := 0
	for r := batch.head; r != nil; r = r.next {
		s.iov[n].Base = &r.head[0]
		s.iov[n].SetLen(r.headLen)
		n++
		if len(r.tail) > 0 {
			s.iov[n].Base = &r.tail[0]
			s.iov[n].SetLen(len(r.tail))
			n++
		}
	}
	return c.socket.sendAll(&s.msg, s.iov[:n])
}

// peerError turns a socket's error into a connection's: a peer that is gone is not one.
func peerError(err error) error {
	if err == unix.EPIPE || err == unix.ECONNRESET {
		return nil
	}
	return fmt.Errorf("nbd connection: %w", err)
}
