package nbdlocal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"syscall"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// request is one request in flight; it lives in one of its connection's slots and is
// used again and again. One worker at a time touches it, whoever took it from the
// connection's lists; the lists are guarded by the connection's lock.
type request struct {
	conn  *conn
	slot  int
	small []byte   // the slot's own buffer
	next  *request // in whichever list holds it

	// The request as it arrived.
	cmd, flags uint16
	cookie     uint64
	off        int64
	n          int // bytes that it is about
	payload    int // bytes that follow the header
	kind       int // for pace
	err        error

	// Its buffer: payload of a write, data of a read.
	buf     []byte
	granule int                 // first one in the arena, -1 if buf is the slot's own or nil
	filled  int                 // bytes of the payload that have arrived
	query   [maxQueryBytes]byte // payload of a block status

	// Its place among the writes.
	ordered    bool // entered in rangeOrder and not left
	waitsFor   int  // guarded by rangeOrder.mu, as is
	rangeIndex int  // in rangeOrder.active

	// Its reply.
	head    [maxHeadBytes]byte
	headLen int
	tail    []byte // sent after head
}

// requestList is a first-in, first-out list of requests. The zero value is empty.
type requestList struct {
	head, last *request
	count      int
}

func (l *requestList) push(r *request) {
	r.next = nil
	if l.head == nil {
		l.head = r
	} else {
		l.last.next = r
	}
	l.last = r
	l.count++
}

func (l *requestList) pop() *request {
	r := l.head
	l.head = r.next
	if l.head == nil {
		l.last = nil
	}
	r.next = nil
	l.count--
	return r
}

// remove takes r out, which comes after before (nil: r is the first).
func (l *requestList) remove(before, r *request) {
	if before == nil {
		l.pop()
		return
	}
	before.next = r.next
	if l.last == r {
		l.last = before
	}
	r.next = nil
	l.count--
}

// pushAll moves all of m to the end of l.
func (l *requestList) pushAll(m *requestList) {
	if m.head == nil {
		return
	}
	if l.head == nil {
		*l = *m
	} else {
		l.last.next = m.head
		l.last = m.last
		l.count += m.count
	}
	*m = requestList{}
}

// decode reads a request's header. It reports false when the magic number is wrong.
func (r *request) decode(header []byte) bool {
	r.flags = binary.BigEndian.Uint16(header[4:])
	r.cmd = binary.BigEndian.Uint16(header[6:])
	r.cookie = binary.BigEndian.Uint64(header[8:])
	r.off = int64(binary.BigEndian.Uint64(header[16:])) // beyond 2^63 becomes negative, which check refuses
	magic := uint32(requestMagic)
	if r.conn.session.extended {
		magic = extendedRequestMagic
		r.decodeLength(clampLength(binary.BigEndian.Uint64(header[24:])))
	} else {
		r.n = int(binary.BigEndian.Uint32(header[24:]))
		r.payload = 0
		if r.cmd == cmdWrite {
			r.payload = r.n
		}
	}
	r.kind = kindOf(r.cmd, r.flags, r.n)
	r.err = nil
	r.buf, r.granule, r.filled = nil, -1, 0
	r.ordered = false
	r.headLen, r.tail = 0, nil
	return binary.BigEndian.Uint32(header) == magic
}

// decodeLength decides what the length in an extended header is: of the payload, of the
// range, or of both. A write has a payload even without the flag that it should have:
// QEMU's client, as of version 10, leaves it away.
func (r *request) decodeLength(length int) {
	r.n, r.payload = length, 0
	if r.cmd == cmdWrite || r.flags&cmdFlagPayloadLen != 0 {
		r.payload = length
	}
	if r.cmd == cmdBlockStatus && r.payload > 0 {
		r.n = 0 // the payload tells
	}
}

// clampLength turns a length into one that is as far outside any device.
func clampLength(n uint64) int { return int(min(n, math.MaxInt64)) }

// commandRules says what each command may carry and what is wrong with a range
// outside the device.
var commandRules = [...]struct {
	known     bool
	flags     uint16
	modifies  bool
	data      bool // its length is a length of data
	payload   bool // it may have one
	pastEnd   error
	needRange bool
}{
	cmdRead:        {known: true, flags: cmdFlagDF, data: true, needRange: true, pastEnd: block.ErrOutOfRange},
	cmdWrite:       {known: true, modifies: true, data: true, payload: true, needRange: true, pastEnd: block.ErrNoSpace},
	cmdFlush:       {known: true},
	cmdTrim:        {known: true, modifies: true, needRange: true, pastEnd: block.ErrOutOfRange},
	cmdCache:       {known: true, needRange: true, pastEnd: block.ErrOutOfRange},
	cmdWriteZeroes: {known: true, flags: cmdFlagNoHole | cmdFlagFastZero, modifies: true, needRange: true, pastEnd: block.ErrNoSpace},
	cmdBlockStatus: {known: true, flags: cmdFlagReqOne, payload: true, needRange: true, pastEnd: block.ErrOutOfRange},
}

// check returns nil for a request that the device can be asked to carry out.
func (r *request) check() error {
	if int(r.cmd) >= len(commandRules) || !commandRules[r.cmd].known {
		return fmt.Errorf("command %d: %w: not known", r.cmd, block.ErrInvalid)
	}
	rule := &commandRules[r.cmd]
	allowed := rule.flags | cmdFlagFUA // any command may carry FUA
	if !r.conn.session.structured {
		allowed &^= cmdFlagDF
	}
	if r.conn.session.extended && rule.payload {
		allowed |= cmdFlagPayloadLen
	}
	switch {
	case r.flags&^allowed != 0:
		return fmt.Errorf("flags %#x of command %d: %w: want none beyond %#x", r.flags, r.cmd, block.ErrInvalid, allowed)
	case rule.modifies && r.conn.session.readOnly:
		return fmt.Errorf("command %d: %w", r.cmd, block.ErrReadOnly)
	case rule.data && r.n > maxPayloadBytes:
		return fmt.Errorf("%d bytes of data: %w: want at most %d", r.n, block.ErrInvalid, maxPayloadBytes)
	case !rule.needRange && (r.off != 0 || r.n != 0):
		return fmt.Errorf("offset %d and length %d of command %d: %w: want zeroes", r.off, r.n, r.cmd, block.ErrInvalid)
	case r.cmd == cmdBlockStatus:
		if err := r.checkStatus(); err != nil {
			return err
		}
	}
	if err := r.conn.server.checkRange(r.off, int64(r.n)); rule.needRange && err != nil {
		return fmt.Errorf("%w: %w", rule.pastEnd, err)
	}
	return nil
}

// checkStatus checks what block status has and others don't.
func (r *request) checkStatus() error {
	switch {
	case r.conn.session.contexts == 0:
		return fmt.Errorf("block status: %w: no metadata context was negotiated", block.ErrInvalid)
	case r.payload > 0 && (r.payload < 8+4 || r.payload > maxQueryBytes || r.payload%4 != 0):
		return fmt.Errorf("payload of %d bytes of a block status: %w: want 8 and 4 for each of at most %d contexts",
			r.payload, block.ErrInvalid, len(metaContexts))
	case r.payload == 0 && r.n == 0:
		return errNoStatus
	}
	return nil
}

// hasPayload reports whether data follows the header.
func (r *request) hasPayload() bool { return r.payload > 0 }

// bufferBytes is the size of the buffer that the request needs in order to be carried
// out.
func (r *request) bufferBytes() int {
	switch {
	case r.err != nil:
		return 0
	case r.cmd == cmdRead || r.cmd == cmdWrite:
		return r.n
	case r.cmd == cmdBlockStatus:
		return smallBytes
	case r.cmd == cmdCache:
		return min(r.n, cachePieceBytes)
	}
	return 0
}

// modifies reports whether the request takes part in the order of writes.
func (r *request) modifies() bool {
	return r.err == nil && r.n > 0 && commandRules[r.cmd].modifies
}

// carryOut does what the request asks for and leaves the reply in it.
func (r *request) carryOut(dev block.Device) {
	if r.err == nil {
		r.err = r.do(dev)
	}
	switch {
	case r.err != nil:
		r.replyError()
	case r.headLen == 0:
		r.replyDone()
	}
}

func (r *request) do(dev block.Device) error {
	switch r.cmd {
	case cmdRead:
		return r.read(dev)
	case cmdWrite:
		if n, err := dev.WriteAt(r.buf, r.off); err != nil {
			return err
		} else if n != len(r.buf) {
			return fmt.Errorf("write of %d bytes at %d: %w after %d", r.n, r.off, io.ErrShortWrite, n)
		}
	case cmdTrim:
		if err := dev.Discard(r.off, int64(r.n)); err != nil {
			return err
		}
	case cmdWriteZeroes:
		if err := dev.WriteZeroes(r.off, int64(r.n), zeroFlags(r.flags)); err != nil {
			return err
		}
	case cmdBlockStatus:
		return r.blockStatus(dev)
	case cmdCache:
		return r.cache(dev)
	case cmdFlush:
		return dev.Flush()
	}
	if r.flags&cmdFlagFUA != 0 {
		return dev.Flush()
	}
	return nil
}

func zeroFlags(flags uint16) block.ZeroFlags {
	var z block.ZeroFlags
	if flags&cmdFlagNoHole != 0 {
		z |= block.ZeroKeepAllocated
	}
	if flags&cmdFlagFastZero != 0 {
		z |= block.ZeroFastOnly
	}
	return z
}

func (r *request) read(dev block.Device) error {
	if r.conn.session.structured && r.flags&cmdFlagDF == 0 && r.n >= largeBytes && r.conn.server.holes.cover(dev, r.off, int64(r.n)) {
		r.replyHole()
		return nil
	}
	if n, err := dev.ReadAt(r.buf, r.off); err != nil {
		return err
	} else if n != len(r.buf) {
		return fmt.Errorf("read of %d bytes at %d: %w after %d", r.n, r.off, io.ErrUnexpectedEOF, n)
	}
	r.replyData()
	return nil
}

const (
	cachePieceBytes = 256 << 10
	// cacheBytes is how much of a range is read ahead: the client asks, but does not
	// say what else the memory and the store are needed for.
	cacheBytes = 32 << 20
)

// cache reads the beginning of the range and forgets it: what is below the device keeps
// what it can.
func (r *request) cache(dev block.Device) error {
	for off, end := r.off, r.off+int64(min(r.n, cacheBytes)); off < end; {
		piece := r.buf[:min(int64(len(r.buf)), end-off)]
		if _, err := dev.ReadAt(piece, off); err != nil {
			return err
		}
		off += int64(len(piece))
	}
	return nil
}

// wireErrno returns the number that err has on the wire, which knows fewer than
// block.Errno does.
func (r *request) wireErrno() uint32 {
	errno := block.Errno(r.err)
	switch errno {
	case syscall.EPERM, syscall.EIO, syscall.ENOMEM, syscall.EINVAL, syscall.ENOSPC, syscall.ESHUTDOWN:
		return uint32(errno)
	case syscall.ENOTSUP:
		if r.cmd == cmdWriteZeroes && r.flags&cmdFlagFastZero != 0 {
			return uint32(errno)
		}
		return uint32(block.Errno(block.ErrInvalid)) // ENOTSUP means "not fast" and nothing else
	}
	return uint32(block.Errno(errUnspecific))
}

// errUnspecific is what block.Errno knows no better name for than EIO.
var errUnspecific = errors.New("input/output error")

// errorText is r.err for the person at the client, bounded.
func (r *request) errorText() string {
	const most = 512
	text := r.err.Error()
	return text[:min(len(text), most)]
}
