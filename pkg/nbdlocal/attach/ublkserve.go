package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// UBLKOptions are ServeUBLK's knobs; zero values are the defaults.
type UBLKOptions struct {
	// Threads are made before the process is confined, which can make no rings
	// afterwards. Nil: they are made when they are needed.
	Threads *UBLKThreads
	// Helpers is how many requests of a slow device can wait for it at a time, besides
	// one for each queue; 1 to 64, default 16.
	Helpers int
}

const (
	ublkDefaultHelpers = 16
	ublkMaxHelpers     = 64
)

// ServeUBLK serves dev on file, a descriptor of /dev/ublkcN that the ublk transport handed
// out, until the device is stopped (nil), ctx ends (nil), or the kernel says something
// that makes no sense. It takes no requests after ctx has ended, and returns once those it
// was carrying out are answered; all others wait in the kernel for the next server.
//
// The caller keeps file, and closes it once ServeUBLK has returned: the kernel gives the
// device to no other server before. It keeps dev and must not close it before either.
// There is one ServeUBLK for a device at a time.
//
// Each queue of the device has an operating system thread, which takes requests and
// carries them out as long as that is fast. Those that are expected to take longer, by what
// requests of their kind took lately, it leaves to helpers, so that the next can be taken
// meanwhile. So when fast storage stalls, a queue waits for one request; after that, for
// none.
func ServeUBLK(ctx context.Context, file *os.File, dev block.Device, opts UBLKOptions) error {
	if opts.Helpers == 0 {
		opts.Helpers = ublkDefaultHelpers
	}
	if opts.Helpers < 1 || opts.Helpers > ublkMaxHelpers {
		return fmt.Errorf("ublk: %d helpers: %w: 1 to %d are accepted", opts.Helpers, block.ErrInvalid, ublkMaxHelpers)
	}
	s, err := newUBLKServer(file, dev, opts.Threads)
	if err != nil {
		return fmt.Errorf("serve ublk on %s: %w", file.Name(), err)
	}
	defer s.close()
	defer context.AfterFunc(ctx, s.stop)()
	if err := s.run(opts.Helpers); err != nil {
		return fmt.Errorf("serve ublk on %s: %w", file.Name(), err)
	}
	return nil
}

type ublkServer struct {
	dev     block.Device
	fd      int // a descriptor of our own for the device
	queues  []*ublkQueue
	pace    ublkPace
	work    chan *ublkRequest // for helpers; has room for all requests there can be
	flushes chan *ublkRequest // … as has this, for which there is one more
	ended   chan error        // what became of each queue's thread
	stopped atomic.Bool

	ending sync.Mutex // guards against a stop that comes when all is closed
	closed bool
}

// newUBLKServer makes a server of as many queues as the device has. They have asked for
// requests when it returns, and begin with them when run is called.
func newUBLKServer(file *os.File, dev block.Device, threads *UBLKThreads) (*ublkServer, error) {
	fd, err := dupDescriptor(file)
	if err != nil {
		return nil, err
	}
	s := &ublkServer{
		dev: dev, fd: fd,
		work:    make(chan *ublkRequest, ublkMaxQueues*ublkDepth),
		flushes: make(chan *ublkRequest, ublkMaxQueues*ublkDepth),
		ended:   make(chan error, ublkMaxQueues),
	}
	if err := s.ask(threads); err != nil {
		s.stop()
		for _, q := range s.queues {
			close(q.mapped)
		}
		s.close()
		return nil, err
	}
	return s, nil
}

// ask makes the queues and has them ask for requests.
//
// Kernels before 6.16 cannot recover a device any more whose server has died after it had
// mapped descriptors and before a queue had asked for requests: they let nobody else map
// them. Devices have one queue there, so the first one asks before its descriptors are
// mapped. Whether there is another one, mapping its descriptors shows.
func (s *ublkServer) ask(threads *UBLKThreads) error {
	for id := 0; ; id++ {
		var desc []byte
		if id > 0 {
			var err error
			desc, err = mapUBLKDescriptors(s.fd, id)
			if errors.Is(err, unix.EINVAL) {
				return nil
			}
			if err == nil && id == ublkMaxQueues {
				err = errors.Join(fmt.Errorf("the device has more than %d queues: %w", ublkMaxQueues, block.ErrUnsupported), unix.Munmap(desc))
			}
			if err != nil {
				return err
			}
		}
		q, err := newUBLKQueue(s, id, desc, threads)
		if err != nil {
			return err
		}
		if err := q.ask(); err != nil {
			q.close()
			return err
		}
		s.queues = append(s.queues, q)
		if id == 0 {
			if q.desc, err = mapUBLKDescriptors(s.fd, id); err != nil {
				return err
			}
		}
	}
}

// mapUBLKDescriptors maps the descriptors of a queue's requests. EINVAL means that the
// device has no such queue.
func mapUBLKDescriptors(fd, queue int) ([]byte, error) {
	page := os.Getpagesize()
	whole := func(n int) int { return (n + page - 1) / page * page }
	desc, err := unix.Mmap(fd, int64(queue*whole(ublkDescStride)), whole(ublkDepth*ublkDescBytes), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map the descriptors of queue %d: %w", queue, err)
	}
	return desc, nil
}

func (s *ublkServer) close() {
	s.ending.Lock()
	defer s.ending.Unlock()
	s.closed = true
	for _, q := range s.queues {
		q.close()
	}
	unix.Close(s.fd)
}

// stop makes the queues take no more requests.
func (s *ublkServer) stop() {
	s.ending.Lock()
	defer s.ending.Unlock()
	s.stopped.Store(true)
	if s.closed {
		return
	}
	for _, q := range s.queues {
		q.wake()
	}
}

// run serves until all queues have ended.
func (s *ublkServer) run(helpers int) error {
	var helping sync.WaitGroup
	for range helpers {
		helping.Go(func() { s.help(s.work, s.flushes) })
	}
	// A flush waits for no limit: it must not wait for helpers who do.
	helping.Go(func() { s.help(nil, s.flushes) })
	for _, q := range s.queues {
		close(q.mapped)
	}
	var errs []error
	for range s.queues {
		err := <-s.ended
		if err != nil {
			s.stop() // a device is served whole or not at all
		}
		errs = append(errs, err)
	}
	close(s.work)
	close(s.flushes)
	helping.Wait()
	return errors.Join(errs...)
}

// leave leaves a request to the helpers.
func (s *ublkServer) leave(r *ublkRequest) {
	if r.op == ublkOpFlush {
		s.flushes <- r
	} else {
		s.work <- r
	}
}

// help carries out requests that queues leave to helpers, until there will be no more.
func (s *ublkServer) help(work, flushes <-chan *ublkRequest) {
	for work != nil || flushes != nil {
		var r *ublkRequest
		select {
		case r = <-work:
			if r == nil {
				work = nil
				continue
			}
		case r = <-flushes:
			if r == nil {
				flushes = nil
				continue
			}
		}
		r.carryOut(s)
		r.queue.finish(r)
	}
}

// A ublkRequest is a request in flight, one for each tag of a queue. It belongs to its
// queue's thread, but for the time that it is with a helper.
type ublkRequest struct {
	queue  *ublkQueue
	tag    uint16
	buf    []byte // ublkMaxRequestBytes
	op     uint32
	flags  uint32
	off, n int64
	result int32
}

// load takes over what the driver has written of the request.
func (r *ublkRequest) load(d *ublkDesc) {
	r.op, r.flags = d.opFlags&0xff, d.opFlags&^0xff
	r.off, r.n = int64(d.startSector)*sectorBytes, int64(d.sectors)*sectorBytes
}

// carryOut does what the request asks for, and leaves its result for the driver: the
// number of bytes that were read or written, 0 for other operations, or a negative error
// number.
func (r *ublkRequest) carryOut(s *ublkServer) {
	start := time.Now()
	kind := r.kind()
	err := r.do(s.dev)
	s.pace.took(kind, time.Since(start))
	switch {
	case err != nil:
		r.result = -int32(block.Errno(err))
	case r.op == ublkOpRead || r.op == ublkOpWrite:
		r.result = int32(r.n)
	default:
		r.result = 0
	}
}

func (r *ublkRequest) do(dev block.Device) error {
	if err := r.transfer(dev); err != nil {
		return err
	}
	if r.flags&ublkFlagFUA != 0 && r.op != ublkOpRead {
		return dev.Flush()
	}
	return nil
}

func (r *ublkRequest) transfer(dev block.Device) (err error) {
	switch r.op {
	case ublkOpRead, ublkOpWrite:
		if r.n > int64(len(r.buf)) {
			return fmt.Errorf("ublk: a request of %d bytes, want at most %d: %w", r.n, len(r.buf), block.ErrInvalid)
		}
		if r.op == ublkOpRead {
			_, err = dev.ReadAt(r.buf[:r.n], r.off)
		} else {
			_, err = dev.WriteAt(r.buf[:r.n], r.off)
		}
		return err
	case ublkOpFlush:
		return dev.Flush()
	case ublkOpDiscard:
		return dev.Discard(r.off, r.n)
	case ublkOpWriteZeroes:
		if r.flags&ublkFlagNoUnmap != 0 {
			return dev.WriteZeroes(r.off, r.n, block.ZeroKeepAllocated)
		}
		return dev.WriteZeroes(r.off, r.n, 0)
	}
	return fmt.Errorf("ublk: operation %d: %w", r.op, block.ErrUnsupported)
}

// Kinds of requests that take similar times.
const (
	ublkSmallRead = iota
	ublkLargeRead
	ublkSmallWrite
	ublkLargeWrite
	ublkOther
	ublkKinds
)

const ublkLargeBytes = 64 << 10

func (r *ublkRequest) kind() int {
	switch {
	case r.op == ublkOpRead && r.n < ublkLargeBytes:
		return ublkSmallRead
	case r.op == ublkOpRead:
		return ublkLargeRead
	case r.op != ublkOpWrite || r.flags&ublkFlagFUA != 0:
		return ublkOther
	case r.n < ublkLargeBytes:
		return ublkSmallWrite
	}
	return ublkLargeWrite
}

// ublkPace remembers how long the device takes for each kind of request. It is shared by
// all queues and helpers; updates that are lost do no harm.
type ublkPace struct {
	averages [ublkKinds]atomic.Int64 // nanoseconds, times ublkPaceWeight
}

const (
	// ublkSlow is where waiting for the device outweighs handing the request over and
	// its result back.
	ublkSlow = 40 * time.Microsecond
	// ublkPaceLimit is how much one request counts for: less than it takes to pass for
	// slow, since its thread may merely have lost its processor.
	ublkPaceLimit  = 400 * time.Microsecond
	ublkPaceWeight = 16
)

// slow says whether requests of a kind are expected to keep a thread waiting.
func (p *ublkPace) slow(kind int) bool {
	return p.averages[kind].Load() > int64(ublkSlow)*ublkPaceWeight
}

// took records how long a request took.
func (p *ublkPace) took(kind int, d time.Duration) {
	sum := p.averages[kind].Load()
	p.averages[kind].Store(sum + int64(min(d, ublkPaceLimit)) - sum/ublkPaceWeight)
}

// descriptor returns the descriptor of a tag. The driver fills it before it completes the
// command that says so, and leaves it alone until the request is answered.
func (q *ublkQueue) descriptor(tag uint16) *ublkDesc {
	return (*ublkDesc)(unsafe.Pointer(&q.desc[int(tag)*ublkDescBytes]))
}
