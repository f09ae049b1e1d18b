package attach

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// FUSEOptions are ServeFUSE's knobs; zero values are the defaults.
type FUSEOptions struct {
	// Threads is how many requests are worked on at a time at the most, each by an
	// operating system thread; 1 to 64, default 16.
	Threads int
}

const (
	fuseDefaultThreads = 16
	fuseMaxThreads     = 64
	// fuseReaders is how many threads wait for requests. More of them only get in
	// one another's way while requests are answered from memory.
	fuseReaders = 4
	// fuseBackground is how many asynchronous requests the kernel hands out before
	// it makes the next one wait: the loop device's whole queue.
	fuseBackground = 128
	fuseForever    = 1 << 40 // seconds: only this side changes attributes, and says so
)

// ServeFUSE serves dev on file, a descriptor for the FUSE connection that the fuse
// transport handed out, until the connection ends (nil), ctx ends (nil), or the kernel
// says something that makes no sense. It returns after every request it has taken is
// answered; those not taken wait for the next server. It may be started on a
// connection that another server has served: there is no state on this side.
//
// The caller keeps file and dev and must not close dev before ServeFUSE has returned.
// Several calls may serve one connection at the same time.
func ServeFUSE(ctx context.Context, file *os.File, dev block.Device, opts FUSEOptions) error {
	n := opts.Threads
	if n == 0 {
		n = fuseDefaultThreads
	}
	if n < 1 || n > fuseMaxThreads {
		return fmt.Errorf("fuse: %d threads: %w: 1 to %d are accepted", n, block.ErrInvalid, fuseMaxThreads)
	}
	s, err := newFUSEServer(file, dev, n)
	if err != nil {
		return err
	}
	defer s.close()
	defer context.AfterFunc(ctx, s.stop)()
	return s.run()
}

type fuseServer struct {
	dev    block.Device
	fd     int // a descriptor of our own for the connection, non-blocking
	stopFD int // eventfd, readable once the server shall stop

	stopOnce sync.Once
	stopped  chan struct{}
	need     chan struct{} // a helper is wanted
	standIn  chan struct{} // … that stays until it isn't

	slots    []fuseSlot // of each thread; the readers' come first
	readers  int
	short    atomic.Bool   // no reader takes requests
	watching atomic.Bool   // somebody looks at the threads
	begun    chan struct{} // … or is to begin that
}

func newFUSEServer(file *os.File, dev block.Device, threads int) (*fuseServer, error) {
	fd, err := dupDescriptor(file)
	if err != nil {
		return nil, err
	}
	// Non-blocking, so that a thread can wait for a request and for stop at once.
	// The flag belongs to the shared open file: every server sets it.
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("fuse: make descriptor non-blocking: %w", err)
	}
	stopFD, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("fuse: eventfd: %w", err)
	}
	return &fuseServer{
		dev: dev, fd: fd, stopFD: stopFD,
		stopped: make(chan struct{}), need: make(chan struct{}), standIn: make(chan struct{}), begun: make(chan struct{}, 1),
		slots: make([]fuseSlot, threads), readers: min(threads, fuseReaders),
	}, nil
}

// close releases the descriptors. A stop that comes at the same time has happened when they
// are closed, and one that comes later does nothing: their numbers are others' then, an
// image's perhaps.
func (s *fuseServer) close() {
	s.stop()
	unix.Close(s.fd)
	unix.Close(s.stopFD)
}

func (s *fuseServer) stop() {
	s.stopOnce.Do(func() {
		close(s.stopped)
		// The counter starts at 0 and is written once: the write can't block.
		_, _ = unix.Write(s.stopFD, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
}

func (s *fuseServer) stopping() bool {
	select {
	case <-s.stopped:
		return true
	default:
		return false
	}
}

var order = binary.NativeEndian

// handle answers the request of n bytes that lies at memRequest.
func (t *fuseThread) handle(n int) error {
	req := t.mem[memRequest : memRequest+n]
	if n < fuseInHeaderBytes || int(order.Uint32(req[inLen:])) != n {
		return fmt.Errorf("fuse: a request of %d bytes without a sane header", n)
	}
	opcode, unique := order.Uint32(req[inOpcode:]), order.Uint64(req[inUnique:])
	var body int
	var err error
	switch opcode {
	case fuseForget, fuseBatchForget:
		return nil // want no answer
	case fuseInit:
		body, err = t.init(n)
	case fuseLookup:
		body = t.lookup()
	case fuseGetattr:
		body = t.getattr(order.Uint64(req[inNode:]))
	case fuseOpen:
		body = t.open()
	case fuseStatfs:
		body = t.statfs()
	case fuseRead:
		body, err = t.read(n)
	case fuseWrite:
		body, err = t.write(n)
	case fuseFsync:
		err = t.dev.Flush()
	case fuseFallocate:
		err = t.fallocate(n)
	case fuseFlush, fuseRelease, fuseDestroy:
		// Nothing is held per open file, and closing promises no durability.
	default:
		// Also INTERRUPT, which the kernel then stops sending: requests take as
		// long as they take.
		return t.reply(unique, unix.ENOSYS, 0)
	}
	if err != nil {
		return t.reply(unique, block.Errno(err), 0)
	}
	return t.reply(unique, 0, body)
}

// reply sends the answer: the body's bytes are at memData already.
func (t *fuseThread) reply(unique uint64, errno unix.Errno, body int) error {
	out := t.mem[memReply : memData+body]
	order.PutUint32(out[outLen:], uint32(len(out)))
	order.PutUint32(out[outError:], uint32(-int32(errno)))
	order.PutUint64(out[outUnique:], unique)
	for {
		_, err := unix.Write(t.fd, out)
		switch err {
		case nil, unix.ENOENT, unix.ENODEV, unix.ECONNABORTED, unix.EPIPE:
			return nil // nobody waits for it any more; the next read says why
		case unix.EINTR:
		case unix.EAGAIN: // a socket's, in tests
			runtime.Gosched()
		default:
			return fmt.Errorf("fuse: reply of %d bytes: %w", len(out), err)
		}
	}
}

// body returns n zeroed bytes at memData.
func (t *fuseThread) body(n int) []byte {
	b := t.mem[memData : memData+n]
	clear(b)
	return b
}

var errFUSERequest = fmt.Errorf("fuse: request makes no sense: %w", block.ErrInvalid)

func (t *fuseThread) init(n int) (int, error) {
	in := t.mem[memArgs:]
	if n < fuseInHeaderBytes+initInBytes || order.Uint32(in[initInMajor:]) != fuseMajor || order.Uint32(in[initInMinor:]) < fuseMinor {
		return 0, fmt.Errorf("fuse: the kernel's protocol is too old: %w", block.ErrUnsupported)
	}
	offered := order.Uint32(in[initInFlags:])
	b := t.body(initOutBytes)
	order.PutUint32(b[initOutMajor:], fuseMajor)
	order.PutUint32(b[initOutMinor:], fuseMinor)
	order.PutUint32(b[initOutMaxReadahead:], fuseMaxRequestBytes)
	order.PutUint32(b[initOutFlags:], offered&(initAsyncRead|initBigWrites|initAsyncDIO|initMaxPages))
	order.PutUint16(b[initOutMaxBackground:], fuseBackground)
	order.PutUint16(b[initOutCongestion:], fuseBackground)
	order.PutUint32(b[initOutMaxWrite:], fuseMaxRequestBytes)
	order.PutUint32(b[initOutTimeGran:], 1)
	order.PutUint16(b[initOutMaxPages:], uint16(fuseMaxRequestBytes/os.Getpagesize()))
	return len(b), nil
}

// lookup finds the file under any name: only the transport sees the directory, and it
// chooses the name.
func (t *fuseThread) lookup() int {
	b := t.body(entryOutBytes)
	order.PutUint64(b[entryOutNode:], fuseFileNode)
	order.PutUint64(b[entryOutEntryValid:], fuseForever)
	order.PutUint64(b[entryOutAttrValid:], fuseForever)
	t.putAttr(b[entryOutAttr:], fuseFileNode)
	return len(b)
}

func (t *fuseThread) getattr(node uint64) int {
	b := t.body(attrOutBytes)
	order.PutUint64(b[attrOutValid:], fuseForever)
	t.putAttr(b[attrOutAttr:], node)
	return len(b)
}

func (t *fuseThread) putAttr(b []byte, node uint64) {
	order.PutUint64(b[attrIno:], node)
	order.PutUint32(b[attrNlink:], 1)
	order.PutUint32(b[attrBlksize:], 4096)
	if node == fuseRootNode {
		order.PutUint32(b[attrMode:], unix.S_IFDIR|0o700)
		return
	}
	// A loop device has whole blocks only.
	info := t.dev.Info()
	size := uint64(info.SizeBytes - info.SizeBytes%int64(max(info.LogicalBlockBytes, 512)))
	order.PutUint64(b[attrSize:], size)
	order.PutUint64(b[attrBlocks:], size/512)
	order.PutUint32(b[attrMode:], unix.S_IFREG|0o600)
}

func (t *fuseThread) open() int {
	b := t.body(openOutBytes)
	// Without NOFLUSH, every process that inherits the open file talks to the
	// server when it closes it, and waits if there is none. Parallel writes: the
	// kernel else holds a lock over each.
	order.PutUint32(b[openOutFlags:], openDirectIO|openNoFlush|openParallelWrites)
	return len(b)
}

// statfs tells the loop device, which takes the block size for its discard granularity.
func (t *fuseThread) statfs() int {
	info := t.dev.Info()
	bsize := uint32(max(info.LogicalBlockBytes, 512))
	if c := info.ClusterBytes; c > int64(bsize) && c <= 1<<30 && c&(c-1) == 0 {
		bsize = uint32(c)
	}
	b := t.body(statfsOutBytes)
	order.PutUint64(b[statfsBlocks:], uint64(info.SizeBytes)/uint64(bsize))
	order.PutUint32(b[statfsBsize:], bsize)
	order.PutUint32(b[statfsFrsize:], bsize)
	order.PutUint32(b[statfsNamelen:], 255)
	return len(b)
}

// ioRange returns the guest range of the read or write whose arguments are at memArgs.
func (t *fuseThread) ioRange(n int) (guestOff int64, size int, err error) {
	args := t.mem[memArgs:memData]
	off, size32 := order.Uint64(args[ioOff:]), order.Uint32(args[ioSize:])
	if n < fuseInHeaderBytes+fuseWriteInBytes || off > math.MaxInt64 || size32 > fuseMaxRequestBytes {
		return 0, 0, errFUSERequest
	}
	return int64(off), int(size32), nil
}

func (t *fuseThread) read(n int) (int, error) {
	guestOff, size, err := t.ioRange(n)
	if err != nil {
		return 0, err
	}
	// A file ends where it ends: reading across that is not an error.
	size = int(min(int64(size), max(0, t.dev.Info().SizeBytes-guestOff)))
	if size == 0 {
		return 0, nil
	}
	_, err = t.dev.ReadAt(t.mem[memData:memData+size], guestOff)
	return size, err
}

func (t *fuseThread) write(n int) (int, error) {
	guestOff, size, err := t.ioRange(n)
	if err != nil {
		return 0, err
	}
	if n != fuseInHeaderBytes+fuseWriteInBytes+size {
		return 0, errFUSERequest
	}
	if _, err := t.dev.WriteAt(t.mem[memData:memData+size], guestOff); err != nil {
		return 0, err
	}
	b := t.body(writeOutBytes)
	order.PutUint32(b[writeOutSize:], uint32(size))
	return len(b), nil
}

// fallocate is what the loop device makes of discard and of zeroing. It punches holes
// for both, and after zeroing the range must read as zeroes: Discard, which may keep
// the data, won't do for either.
func (t *fuseThread) fallocate(n int) error {
	args := t.mem[memArgs:memData]
	off, length := order.Uint64(args[fallocateOff:]), order.Uint64(args[fallocateLen:])
	if n < fuseInHeaderBytes+fallocateBytes || off > math.MaxInt64 || length > math.MaxInt64 {
		return errFUSERequest
	}
	switch mode := order.Uint32(args[fallocateMode:]); mode {
	case unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE:
		return t.dev.WriteZeroes(int64(off), int64(length), 0)
	case unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE:
		return t.dev.WriteZeroes(int64(off), int64(length), block.ZeroKeepAllocated)
	default:
		return fmt.Errorf("fuse: fallocate mode %#x: %w", mode, block.ErrUnsupported)
	}
}

// dupDescriptor returns a new descriptor for file's open file, closed on exec.
func dupDescriptor(file *os.File) (int, error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return -1, fmt.Errorf("duplicate descriptor of %s: %w", file.Name(), err)
	}
	dup := -1
	cerr := raw.Control(func(fd uintptr) { dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(cerr, err); err != nil {
		return -1, fmt.Errorf("duplicate descriptor of %s: %w", file.Name(), err)
	}
	return dup, nil
}
