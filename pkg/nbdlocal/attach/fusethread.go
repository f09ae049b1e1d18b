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
// requests as there are threads wait for storage at the same time.

const (
	// slowRequest is what calls a helper: longer than memory ever takes.
	slowRequest = 300 * time.Microsecond
	// helperRest is after how long without work a helper gives its memory back.
	helperRest = 5 * time.Second
)

// run serves with n threads, until they have all ended.
func (s *fuseServer) run(n int) error {
	readers := min(n, fuseReaders)
	ended := make(chan error, n)
	for i := range n {
		work := s.helper
		if i < readers {
			work = s.reader
		}
		go func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			err := work()
			s.stop() // one has seen the end: the others need not
			ended <- err
		}()
	}
	var errs []error
	for range n {
		errs = append(errs, <-ended)
	}
	return errors.Join(errs...)
}

// reader waits for requests and answers them.
func (s *fuseServer) reader() error {
	t, err := s.newThread()
	if err != nil {
		return err
	}
	defer t.close()
	epoll, err := s.newEpoll()
	if err != nil {
		return err
	}
	defer unix.Close(epoll)
	var events [2]unix.EpollEvent
	for {
		if ended, err := t.drain(); ended || err != nil {
			return err
		}
		if _, err := unix.EpollWait(epoll, events[:], -1); err != nil && err != unix.EINTR {
			return fmt.Errorf("fuse: wait for a request: %w", err)
		}
	}
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
func (s *fuseServer) helper() error {
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
		select {
		case <-s.stopped:
			return nil
		case <-rest.C:
			release()
			continue
		case <-s.need:
		}
		if t == nil {
			var err error
			if t, err = s.newThread(); err != nil {
				return err
			}
		}
		if ended, err := t.drain(); ended || err != nil {
			return err
		}
		rest.Reset(helperRest)
	}
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
	mem []byte
}

func (s *fuseServer) newThread() (*fuseThread, error) {
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
	return &fuseThread{fuseServer: s, mem: mem}, nil
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
			if err := t.handle(n); err != nil {
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
