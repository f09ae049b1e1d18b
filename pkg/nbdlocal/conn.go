package nbdlocal

import (
	"fmt"
	"io"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// session is what was agreed with the peer.
type session struct {
	structured bool       // replies are structured, or extended if extended is set
	extended   bool       // headers are extended
	contexts   contextSet // what block status tells
	readOnly   bool
	kernel     bool // the peer is the kernel's nbd driver
}

// requestBytes is the size of a request's header.
func (s *session) requestBytes() int {
	if s.extended {
		return extendedRequestBytes
	}
	return requestBytes
}

// conn is a connection in the transmission phase.
type conn struct {
	server  *Server
	session session
	socket  socket
	slots   []request

	// draining: take no message that has not begun to arrive.
	draining atomic.Bool
	// abandoned: the kernel has given the connection up and sends again on another
	// what was not answered; what has not begun must not be carried out any more.
	abandoned atomic.Bool

	receiver receiver // belongs to the worker that has set receiving
	sender   sender   // belongs to the worker that has set sending

	mu        sync.Mutex
	arena     *arena
	free      []int       // slots, the last used one last: its buffer is still in the cache
	ready     requestList // to be carried out
	done      requestList // to be answered
	doneBytes int
	receiving bool
	sending   bool
	stalled   bool // receiving needs a slot or memory that only an answered request gives back
	starved   bool // a request in ready needs memory
	ended     bool // nothing more will be received
	dead      bool // nothing more can be sent
	err       error
	depth     int    // > 0: lately several requests were in flight at once
	progress  uint64 // grows with each request received or carried out
	nudged    uint64 // progress at the last nudge
	stats     counters
	idle      []*sleeper // workers that sleep, the last to have fallen asleep last
	workers   int
	carrying  int // requests that workers are carrying out, without flushes
	exited    sync.WaitGroup
}

// memoryOfDepth is after how many requests that came alone the next one is expected to
// come alone too.
const memoryOfDepth = 16

// yieldInterval is shorter than the 10 ms after which the Go scheduler takes a worker's
// processor away from it because it never yields. Each time it does that, its monitor
// looks after everything every 20 microseconds for a while, which took up to a third of
// the process's time.
const yieldInterval = 5 * time.Millisecond

// newConn makes a connection of sock, which it owns from then on also when it fails.
func newConn(s *Server, sock socket, agreed session) (*conn, error) {
	a, err := newArena(s.opts.BufferBytes)
	if err != nil {
		sock.close()
		return nil, err
	}
	c := &conn{server: s, session: agreed, socket: sock, arena: a}
	c.slots = make([]request, slotCount)
	c.free = make([]int, slotCount)
	c.idle = make([]*sleeper, 0, s.opts.Workers)
	for i := range c.slots {
		c.slots[i].conn, c.slots[i].slot, c.slots[i].small = c, i, a.small(i)
		c.free[i] = slotCount - 1 - i
	}
	c.receiver.in = a.receiveBuffer()
	c.receiver.drained = never
	return c, nil
}

// run serves the connection until it ends and everything taken is answered.
func (c *conn) run() error {
	c.mu.Lock()
	c.addWorker()
	c.mu.Unlock()
	c.exited.Wait()
	return c.err
}

// close releases what the connection holds, after run, and when nobody can call drain
// any more.
func (c *conn) close() {
	c.socket.close()
	c.arena.free()
}

// drain makes run return when everything taken is answered.
func (c *conn) drain() {
	c.draining.Store(true)
	c.socket.stopWaiting()
}

// abort ends the connection without answering. Requests that are being carried out
// still end.
func (c *conn) abort(err error) {
	c.mu.Lock()
	if !c.dead && !c.finished() {
		c.die(err)
	}
	c.mu.Unlock()
}

// addWorker starts a worker. The lock is held.
func (c *conn) addWorker() {
	c.workers++
	c.exited.Add(1)
	go c.work(new(sleeper))
}

// work is a worker: it does what is most urgent until the connection is finished.
func (c *conn) work(me *sleeper) {
	defer c.exited.Done()
	// The thread is the worker's own: it spends its life in system calls, and ends
	// with it.
	runtime.LockOSThread()
	yielded := clock()
	c.mu.Lock()
	for {
		switch {
		case c.carrying > 0 && c.server.pace.trying():
			c.rest(me) // who carries one out does the rest after it
		case c.ready.head == nil && clock()-yielded > yieldInterval:
			c.mu.Unlock()
			runtime.Gosched()
			yielded = clock()
			c.mu.Lock()
		case c.replyNow():
			c.sendReplies()
		case c.ready.head != nil && c.carryOutNext():
		case c.done.head != nil && !c.sending:
			c.sendReplies()
		case !c.receiving && !c.ended && !c.stalled:
			c.receiving = true
			c.mu.Unlock()
			c.receive()
			c.mu.Lock()
			c.receiving = false
		case c.ended && !c.receiving && c.receiver.current != nil:
			c.dropCurrent()
		case c.finished():
			c.wakeAll()
			c.mu.Unlock()
			return
		default:
			c.rest(me)
		}
	}
}

// rest sleeps until there is something to do. The lock is held; it is released meanwhile.
func (c *conn) rest(me *sleeper) {
	c.idle = append(c.idle, me)
	c.mu.Unlock()
	me.sleep()
	c.mu.Lock()
}

// finished reports whether there is nothing left to do, now or later. The lock is held.
func (c *conn) finished() bool { return c.ended && len(c.free) == len(c.slots) }

// inFlight is the number of requests taken and not yet answered. The lock is held.
func (c *conn) inFlight() int { return len(c.slots) - len(c.free) }

// helper returns a sleeping worker to wake once the lock is released, or starts one;
// nil if all are at work. The lock is held.
func (c *conn) helper() *sleeper {
	if n := len(c.idle); n > 0 {
		w := c.idle[n-1]
		c.idle = c.idle[:n-1]
		return w
	}
	if c.workers < c.server.opts.Workers {
		c.addWorker()
	}
	return nil
}

// wakeAll wakes every sleeping worker. The lock is held.
func (c *conn) wakeAll() {
	for _, w := range c.idle {
		w.wake()
	}
	c.idle = c.idle[:0]
}

// carryOutNext carries out a request, if there is memory for one. The lock is held; it
// is released meanwhile.
func (c *conn) carryOutNext() bool {
	r := c.nextReady()
	if r == nil {
		return false
	}
	if r.cmd != cmdFlush {
		c.carrying++
	}
	help := c.helpFor(r)
	c.mu.Unlock()
	if help != nil {
		help.wake()
	}
	if c.abandoned.Load() {
		r.err = errAbandoned
	}
	begun := c.server.pace.begin()
	r.carryOut(c.server.dev)
	c.server.pace.end(r.kind, begun)
	if r.ordered {
		c.server.leave(r)
	}
	c.mu.Lock()
	if r.cmd != cmdFlush {
		c.carrying--
	}
	c.done.push(r)
	c.doneBytes += r.headLen + len(r.tail)
	c.progress++
	c.stats.count(r)
	return true
}

var errAbandoned = fmt.Errorf("the kernel has given up the connection: %w", io.ErrClosedPipe)

// helpFor decides whether another worker should run while r is carried out, and
// returns it. The lock is held.
func (c *conn) helpFor(r *request) *sleeper {
	switch {
	case c.inFlight() > 1:
		c.depth = memoryOfDepth
	case c.depth > 0:
		c.depth--
	}
	if !c.server.pace.slow(r.kind) {
		return nil // it is done before another thread would run
	}
	if c.ready.head != nil || c.depth > 0 && !c.receiving && !c.ended && !c.stalled {
		return c.helper()
	}
	return nil
}

// nextReady takes the first request for which there is memory. The last worker that is not
// carrying out any takes flushes only: others may all wait for a limit, which a flush
// doesn't, and somebody must go on receiving. The lock is held.
func (c *conn) nextReady() *request {
	c.starved = false
	flushesOnly := c.carrying >= c.server.opts.Workers-1
	var before *request
	for r := c.ready.head; r != nil; before, r = r, r.next {
		if flushesOnly && r.cmd != cmdFlush {
			continue
		}
		if c.obtainBuffer(r) {
			c.ready.remove(before, r)
			return r
		}
		// The first that waits gets the next memory; were others served before
		// it, a large request might wait forever.
		c.starved = true
	}
	return nil
}

// obtainBuffer gives r the buffer it needs, if there is one. The lock is held.
func (c *conn) obtainBuffer(r *request) bool {
	n := r.bufferBytes()
	switch {
	case r.buf != nil || n == 0:
		return true
	case n <= smallBytes:
		r.buf = r.small[:n]
		return true
	case c.starved:
		return false
	}
	r.buf, r.granule = c.arena.take(n)
	return r.buf != nil
}

// release frees the slot of an answered or dropped request. The lock is held.
func (c *conn) release(r *request) {
	if r.granule >= 0 {
		c.arena.give(r.granule, len(r.buf))
		r.granule = -1
	}
	r.buf, r.tail = nil, nil
	c.free = append(c.free, r.slot)
	c.stalled = false
}

// end records that nothing more will be received, and why. The lock is held.
func (c *conn) end(err error) {
	c.ended = true
	if c.err == nil {
		c.err = err
	}
}

// die records that nothing more can be sent. The lock is held.
func (c *conn) die(err error) {
	c.dead = true
	c.end(err)
	if c.session.kernel {
		c.abandoned.Store(true)
	}
	c.socket.hangUp() // whoever receives returns
	c.socket.stopWaiting()
}

// admit makes a request ready that had to wait for another write, by a worker of c
// (own) or of another connection, which has to wake one of c.
func (c *conn) admit(r *request, own bool) {
	var help *sleeper
	c.mu.Lock()
	c.ready.push(r)
	if !own {
		help = c.helper()
	}
	c.mu.Unlock()
	if help != nil {
		help.wake()
	}
}

var epoch = time.Now()

// clock is a monotonic clock.
func clock() time.Duration { return time.Since(epoch) }
