package attach

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// The threads of a FUSE server. A few readers wait for requests. When requests turn
// out to take long, because storage is far away, helpers join in, so that as many
// requests as there are threads wait for storage at the same time; fusewatch.go is for
// when it does not answer at all.

const (
	// slowRequest is what calls a helper: longer than memory ever takes.
	slowRequest = 300 * time.Microsecond
	// helperRest is after how long without work a helper gives its memory back.
	helperRest = 5 * time.Second
	// standInLook is how often a helper that stands in looks whether it is still wanted.
	standInLook = 100 * time.Millisecond
)

// run serves until all threads have ended.
func (s *fuseServer) run() error {
	n := len(s.slots)
	ended := make(chan error, n)
	for i := range n {
		work := s.helper
		if i < s.readers {
			work = s.reader
			s.slots[i].serving.Store(true)
		}
		go func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			err := work(&s.slots[i])
			s.stop() // one has seen the end: the others need not
			ended <- err
		}()
	}
	watched := make(chan struct{})
	go func() {
		s.watchThreads()
		close(watched)
	}()
	var errs []error
	for range n {
		errs = append(errs, <-ended)
	}
	<-watched
	return errors.Join(errs...)
}

// reader waits for requests and answers them.
func (s *fuseServer) reader(slot *fuseSlot) error {
	t, err := s.newThread(slot)
	if err != nil {
		return err
	}
	defer t.close()
	_, err = t.serve(-1, func() bool { return true })
	return err
}

// serve waits for requests and answers them, as long as wanted says so, which it asks
// every so many milliseconds. ended says that there will be no more requests.
func (t *fuseThread) serve(lookMillis int, wanted func() bool) (ended bool, err error) {
	epoll, err := t.newEpoll()
	if err != nil {
		return true, err
	}
	defer unix.Close(epoll)
	var events [2]unix.EpollEvent
	for wanted() {
		if ended, err := t.drain(); ended || err != nil {
			return true, err
		}
		if _, err := unix.EpollWait(epoll, events[:], lookMillis); err != nil && err != unix.EINTR {
			return true, fmt.Errorf("fuse: wait for a request: %w", err)
		}
	}
	return false, nil
}

// newEpoll returns an epoll instance that wakes one of its users for a request, and
// all of them to stop.
func (s *fuseServer) newEpoll() (int, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fuse: create an epoll instance: %w", err)
	}
	for fd, events := range map[int]uint32{s.fd: unix.EPOLLIN | unix.EPOLLEXCLUSIVE, s.stopFD: unix.EPOLLIN} {
		if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)}); err != nil {
			unix.Close(epoll)
			return -1, fmt.Errorf("fuse: add a descriptor to an epoll instance: %w", err)
		}
	}
	return epoll, nil
}

// callHelper wakes a helper, if one rests.
func (s *fuseServer) callHelper() {
	select {
	case s.need <- struct{}{}:
	default:
	}
}

// helper answers requests while there are more than the readers manage.
func (s *fuseServer) helper(slot *fuseSlot) error {
	var t *fuseThread
	release := func() {
		if t != nil {
			t.close()
			t = nil
		}
	}
	defer release()
	rest := time.NewTimer(helperRest)
	for {
		work := (*fuseThread).drain
		select {
		case <-s.stopped:
			return nil
		case <-rest.C:
			release()
			continue
		case <-s.need:
		case <-s.standIn:
			work = (*fuseThread).replaceReader
		}
		if t == nil {
			var err error
			if t, err = s.newThread(slot); err != nil {
				return err
			}
		}
		if ended, err := work(t); ended || err != nil {
			return err
		}
		rest.Reset(helperRest)
	}
}

// replaceReader does a reader's work while none of them can.
func (t *fuseThread) replaceReader() (ended bool, err error) {
	t.slot.serving.Store(true)
	defer t.slot.serving.Store(false)
	return t.serve(int(standInLook.Milliseconds()), t.short.Load)
}

// A fuseThread's memory is one mapping: a page that ends with the request's two
// headers, then the data. So a request is read in one piece with the payload of a
// write page-aligned, and a reply's header, which fits right before the data, is
// written with it in one piece.
//
// The mapping is populated, locked and kept out of huge pages: the kernel copies to
// and from it while it holds a request, and if a page is missing then and the process
// is being killed, it fails the request instead of leaving it to the next server.
const (
	memData    = 4096
	memRequest = memData - fuseInHeaderBytes - fuseWriteInBytes
	memArgs    = memRequest + fuseInHeaderBytes
	memReply   = memData - fuseOutHeaderBytes
	memBytes   = memData + fuseMaxRequestBytes
)

type fuseThread struct {
	*fuseServer
	slot *fuseSlot
	mem  []byte
}

func (s *fuseServer) newThread(slot *fuseSlot) (*fuseThread, error) {
	mem, err := unix.Mmap(-1, 0, memBytes, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("fuse: map a buffer of %d bytes: %w", memBytes, err)
	}
	_ = unix.Madvise(mem, unix.MADV_NOHUGEPAGE) // fails where there are none
	for i := 0; i < len(mem); i += os.Getpagesize() {
		mem[i] = 1
	}
	_ = unix.Mlock(mem) // a limit on locked memory leaves it merely populated
	return &fuseThread{fuseServer: s, slot: slot, mem: mem}, nil
}

func (t *fuseThread) close() { _ = unix.Munmap(t.mem) }

// drain takes and answers requests until there are none or the server stops. ended
// says that there will be no more.
func (t *fuseThread) drain() (ended bool, err error) {
	for !t.stopping() {
		n, err := unix.Read(t.fd, t.mem[memRequest:])
		switch {
		case err == nil && n == 0:
			return true, nil // not a FUSE connection's end, but a socket's, in tests
		case err == nil:
			start := time.Now()
			t.begin(t.slot)
			err := t.handle(n)
			t.slot.turns.Add(1)
			if err != nil {
				return true, err
			}
			if time.Since(start) >= slowRequest {
				t.callHelper()
			}
		case err == unix.EAGAIN:
			return false, nil
		case err == unix.EINTR, err == unix.ENOENT: // ENOENT: given up by its sender meanwhile
		case err == unix.ENODEV, err == unix.ECONNABORTED:
			return true, nil
		default:
			return true, fmt.Errorf("fuse: read a request: %w", err)
		}
	}
	return true, nil
}
