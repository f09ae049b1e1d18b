package attach

import (
	"fmt"
	"runtime"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach/uring"
)

// The threads of a ublk server. The driver takes the thread that asks for a queue's
// requests for the queue's server: it alone may answer them, and its end is the server's.

// ublkRingOps are what a queue's ring is for. It can't open, connect or send anything,
// whatever becomes of the process.
var ublkRingOps = []uring.Op{uring.OpCommand, uring.OpRead}

const (
	// ublkRingEntries: one for each tag, and for the wake-up call.
	ublkRingEntries = 2 * ublkDepth
	// ublkCommitBatch is how many answers are handed in together at the most while
	// there are requests to carry out.
	ublkCommitBatch = 16
	// ublkRest is after how long without requests a queue gives back the memory that
	// large ones took.
	ublkRest = 5 * time.Second
	// ublkWoken is the user data of the wake-up call; of commands it is the tag.
	ublkWoken = ublkDepth
)

// UBLKThreads are threads that can serve queues, with a ring each. They are made before
// the process is confined: making a ring is among the first things a confined one may not
// do. A thread serves once, and ends with the device.
type UBLKThreads struct {
	mu   sync.Mutex
	idle []*ublkThread
}

// PrepareUBLK makes the threads that one device needs at the most. Those that are not used
// go with the process.
func PrepareUBLK() (*UBLKThreads, error) {
	t := &UBLKThreads{}
	for range ublkMaxQueues {
		thread, err := newUBLKThread()
		if err != nil {
			for _, made := range t.idle {
				made.close()
			}
			return nil, fmt.Errorf("prepare a ublk server: %w", err)
		}
		t.idle = append(t.idle, thread)
	}
	return t, nil
}

// take returns a thread.
func (t *UBLKThreads) take() (*ublkThread, error) {
	if t == nil {
		return newUBLKThread()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(t.idle)
	if n == 0 {
		return nil, fmt.Errorf("all threads that were prepared have been used: %w", block.ErrBusy)
	}
	thread := t.idle[n-1]
	t.idle = t.idle[:n-1]
	return thread, nil
}

// ublkThread is an operating system thread with a ring that only it may use.
//
// The ring is closed by another thread, once this one is gone. What the kernel is about to
// hand over when a ring is closed, kernels before 6.16 still hand to its thread, if that is
// there; nobody would answer it, and the device would wait for that for good. From a thread
// that is gone they take it back.
type ublkThread struct {
	ring  *uring.Ring
	tid   int
	use   chan func()   // takes what to do, once; nil is nothing
	ended chan struct{} // closed when it is about to end
}

// ublkThreadEnd is how long a thread may take to be gone once its function has returned:
// much longer than it ever does.
const ublkThreadEnd = 10 * time.Second

func newUBLKThread() (*ublkThread, error) {
	t := &ublkThread{use: make(chan func()), ended: make(chan struct{})}
	ready := make(chan error)
	go t.live(ready)
	if err := <-ready; err != nil {
		return nil, err
	}
	return t, nil
}

func (t *ublkThread) live(ready chan<- error) {
	// Never unlocked: the thread ends with this function, so that the driver sees the
	// server gone, and nothing else runs with what the thread has given up.
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The first thread can't end before the process. It is held until another one
		// has been found.
		defer runtime.UnlockOSThread()
		found := make(chan error)
		go t.live(found)
		ready <- <-found
		return
	}
	t.tid = unix.Gettid()
	err := renounceAdmin()
	if err == nil {
		t.ring, err = uring.New(uring.Config{Entries: ublkRingEntries, OneThread: true, Only: ublkRingOps})
	}
	ready <- err
	if err != nil {
		return
	}
	defer close(t.ended)
	if f := <-t.use; f != nil {
		f()
	}
}

// close ends the thread, unless it has ended, waits until it is gone, and closes its ring.
func (t *ublkThread) close() {
	select {
	case t.use <- nil: // it was never used
	case <-t.ended:
	}
	<-t.ended
	for start := time.Now(); time.Since(start) < ublkThreadEnd && unix.Tgkill(unix.Getpid(), t.tid, 0) == nil; {
		time.Sleep(50 * time.Microsecond)
	}
	_ = t.ring.Close() // nothing that could be done about it
}

// renounceAdmin makes this thread, and no other, one without CAP_SYS_ADMIN. The driver
// then doesn't look for partitions in the device: they are the guest's, and START_DEV
// would read while it holds a lock that stands in the way of recovery on kernels before
// 6.16.
func renounceAdmin() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("read a thread's capabilities: %w", err)
	}
	const admin = 1 << unix.CAP_SYS_ADMIN
	data[0].Effective &^= admin
	data[0].Permitted &^= admin
	data[0].Inheritable &^= admin
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("give up a thread's CAP_SYS_ADMIN: %w", err)
	}
	return nil
}

// ublkQueue is one queue of a device. But for finish and wake, its thread alone uses it.
type ublkQueue struct {
	s        *ublkServer
	id       uint16
	thread   *ublkThread
	desc     []byte        // mapping that the driver writes descriptors to
	mapped   chan struct{} // closed when desc is there and requests may be carried out
	mem      []byte        // mapping of the requests' buffers, and of a page for woken
	requests [ublkDepth]ublkRequest

	wakeFD    int
	listening bool // for the wake-up call
	taken     int  // requests that helpers have
	gone      int  // tags that the driver has given up: the device is stopped
	prepared  int  // answers not yet handed in
	large     bool // a large request has touched mem since it was given back

	mu   sync.Mutex
	done []*ublkRequest // that helpers have carried out
	free []*ublkRequest // the list that takes turns with done
}

const ublkBuffersBytes = ublkDepth * ublkMaxRequestBytes

// newUBLKQueue makes a queue, which owns desc from then on, whatever it returns.
func newUBLKQueue(s *ublkServer, id int, desc []byte, threads *UBLKThreads) (*ublkQueue, error) {
	q := &ublkQueue{
		s: s, id: uint16(id), desc: desc, mapped: make(chan struct{}), wakeFD: -1,
		done: make([]*ublkRequest, 0, ublkDepth), free: make([]*ublkRequest, 0, ublkDepth),
	}
	if err := q.setUp(threads); err != nil {
		q.close()
		return nil, fmt.Errorf("queue %d: %w", id, err)
	}
	for tag := range q.requests {
		start := tag * ublkMaxRequestBytes
		q.requests[tag] = ublkRequest{queue: q, tag: uint16(tag), buf: q.mem[start : start+ublkMaxRequestBytes : start+ublkMaxRequestBytes]}
	}
	return q, nil
}

func (q *ublkQueue) setUp(threads *UBLKThreads) (err error) {
	q.mem, err = unix.Mmap(-1, 0, ublkBuffersBytes+4096, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("map %d bytes of buffers: %w", ublkBuffersBytes, err)
	}
	_ = unix.Madvise(q.mem, unix.MADV_NOHUGEPAGE) // fails where there are none
	if q.wakeFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	q.thread, err = threads.take()
	return err
}

// close frees what the queue has. Its thread must not be serving it.
func (q *ublkQueue) close() {
	if q.thread != nil {
		q.thread.close()
	}
	for _, mem := range [][]byte{q.desc, q.mem} {
		if mem != nil {
			_ = unix.Munmap(mem)
		}
	}
	if q.wakeFD >= 0 {
		unix.Close(q.wakeFD)
	}
}

// ask has the queue's thread ask for requests, and returns when it has. The thread carries
// them out from when q.mapped is closed on, and says in q.s.ended what became of that.
func (q *ublkQueue) ask() error {
	asked := make(chan error, 1)
	q.thread.use <- func() {
		// All in one system call, which nothing interrupts: kernels before 6.16 can't
		// recover a device again of which only a part of a queue was asked for.
		q.listen()
		for tag := range q.requests {
			q.command(ublkFetch, &q.requests[tag])
		}
		err := q.handIn()
		asked <- err
		if err == nil {
			<-q.mapped
			q.s.ended <- q.serve()
		}
	}
	return <-asked
}

// serve carries requests out, until the device is stopped or the server is. It runs on the
// queue's thread.
func (q *ublkQueue) serve() error {
	for !q.finished() {
		q.prepared = 0
		if err := q.thread.ring.Enter(1, q.patience()); err != nil {
			return fmt.Errorf("queue %d: %w", q.id, err)
		}
		if err := q.round(); err != nil {
			return err
		}
	}
	// Answers that are not handed in would be worked out again by the next server.
	return q.handIn()
}

// finished says whether there is nothing left to wait for.
func (q *ublkQueue) finished() bool {
	return q.taken == 0 && (q.s.stopped.Load() || q.gone == ublkDepth)
}

// patience is how long to wait for a request, 0 without limit.
func (q *ublkQueue) patience() time.Duration {
	if q.large && q.taken == 0 {
		return ublkRest
	}
	return 0
}

// round deals with what has completed.
func (q *ublkQueue) round() error {
	if q.thread.ring.Ready() == 0 && q.large && q.taken == 0 {
		// Nobody has data in the buffers: the kernel copies it only inside Enter.
		_ = unix.Madvise(q.mem[:ublkBuffersBytes], unix.MADV_DONTNEED)
		q.large = false
	}
	for range ublkDepth + 1 {
		c, ok := q.thread.ring.Take()
		if !ok {
			break
		}
		if err := q.completed(c); err != nil {
			return err
		}
		if q.prepared >= ublkCommitBatch {
			if err := q.handIn(); err != nil {
				return err
			}
		}
	}
	q.answerDone()
	if !q.listening {
		q.listen()
	}
	return nil
}

func (q *ublkQueue) completed(c uring.Completion) error {
	switch {
	case c.UserData == ublkWoken && c.Res >= 0:
		q.listening = false
		return nil
	case c.UserData == ublkWoken:
		return fmt.Errorf("queue %d: wait to be woken: %w", q.id, unix.Errno(-c.Res))
	case c.Res == 0:
		q.begin(&q.requests[c.UserData])
		return nil
	case c.Res == -int32(unix.ENODEV):
		q.gone++
		return nil
	case c.Res < 0:
		return fmt.Errorf("queue %d: ask for request %d: %w", q.id, c.UserData, explainFetch(unix.Errno(-c.Res)))
	}
	return fmt.Errorf("queue %d: the kernel says %d of request %d: %w", q.id, c.Res, c.UserData, block.ErrUnsupported)
}

// explainFetch says what the driver means when it doesn't take a command.
func explainFetch(errno unix.Errno) error {
	if errno == unix.EBUSY || errno == unix.EINVAL {
		return fmt.Errorf("%w (another server may have the device, or its queues aren't of %d requests): %w", errno, ublkDepth, block.ErrBusy)
	}
	return errno
}

// begin carries a request out, or leaves it to a helper.
func (q *ublkQueue) begin(r *ublkRequest) {
	if q.s.stopped.Load() {
		return // the kernel gives it to the next server
	}
	r.load(q.descriptor(r.tag))
	if (r.op == ublkOpRead || r.op == ublkOpWrite) && r.n > ublkLargeBytes {
		q.large = true
	}
	if q.s.pace.slow(r.kind()) {
		q.taken++
		q.s.leave(r)
		return
	}
	r.carryOut(q.s)
	q.command(ublkCommitAndFetch, r)
}

// finish gives back a request that a helper has carried out.
func (q *ublkQueue) finish(r *ublkRequest) {
	q.mu.Lock()
	q.done = append(q.done, r)
	first := len(q.done) == 1
	q.mu.Unlock()
	if first {
		q.wake()
	}
}

// wake makes the thread look for what has changed.
func (q *ublkQueue) wake() {
	// The counter can't overflow: it is read whenever it is not zero.
	_, _ = unix.Write(q.wakeFD, []byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// listen waits for a wake-up call. One that came before is heard too.
func (q *ublkQueue) listen() {
	q.thread.ring.Next().Read(q.wakeFD, q.mem[ublkBuffersBytes:ublkBuffersBytes+8], ublkWoken)
	q.listening = true
}

// answerDone prepares the answers of requests that helpers have carried out.
func (q *ublkQueue) answerDone() {
	if q.taken == 0 {
		return
	}
	q.mu.Lock()
	done := q.done
	q.done = q.free[:0]
	q.mu.Unlock()
	for _, r := range done {
		q.command(ublkCommitAndFetch, r)
	}
	q.taken -= len(done)
	q.free = done
}

// command prepares a command for a tag, with the request's result if it is a commit. There
// is always room: each tag has one command at a time.
func (q *ublkQueue) command(number uint32, r *ublkRequest) {
	cmd := (*ublkIOCommand)(q.thread.ring.Next().Command(q.s.fd, number, uint64(r.tag)))
	*cmd = ublkIOCommand{queue: q.id, tag: r.tag, result: r.result, addr: uint64(uintptr(unsafe.Pointer(&r.buf[0])))}
	q.prepared++
}

// handIn submits what is prepared.
func (q *ublkQueue) handIn() error {
	q.prepared = 0
	if err := q.thread.ring.Enter(0, 0); err != nil {
		return fmt.Errorf("queue %d: %w", q.id, err)
	}
	return nil
}
