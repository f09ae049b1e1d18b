package nbdlocal

import "encoding/binary"

// replyDone says that a request without data in its reply was carried out.
func (r *request) replyDone() {
	if r.conn.session.structured {
		r.chunk(replyNone, 0)
		return
	}
	r.simple(0)
}

// replyData sends r.buf, which holds what was read.
func (r *request) replyData() {
	switch {
	case !r.conn.session.structured:
		r.simple(0)
	case r.n == 0: // a content chunk must have content
		r.chunk(replyNone, 0)
	default:
		r.chunk(replyOffsetData, 8+r.n)
		binary.BigEndian.PutUint64(r.head[r.headLen:], uint64(r.off))
		r.headLen += 8
	}
	r.tail = r.buf
}

// replyHole says that the range of a read is all zeroes. Structured replies only.
func (r *request) replyHole() {
	r.chunk(replyOffsetHole, 12)
	binary.BigEndian.PutUint64(r.head[r.headLen:], uint64(r.off))
	binary.BigEndian.PutUint32(r.head[r.headLen+8:], uint32(r.n))
	r.headLen += 12
}

// replyStatus sends a block status. Structured replies only.
func (r *request) replyStatus(payload []byte) {
	r.chunk(replyBlockStatus, len(payload))
	r.tail = payload
}

// replyError says why the request was not carried out; where the protocol has room
// for a text, with the text.
func (r *request) replyError() {
	errno := r.wireErrno()
	r.tail = nil
	if !r.conn.session.structured {
		r.simple(errno)
		return
	}
	text := r.errorText()
	r.chunk(replyError, 6+len(text))
	binary.BigEndian.PutUint32(r.head[r.headLen:], errno)
	binary.BigEndian.PutUint16(r.head[r.headLen+4:], uint16(len(text)))
	r.headLen += 6
	r.tail = append(r.small[:0], text...)
}

func (r *request) simple(errno uint32) {
	binary.BigEndian.PutUint32(r.head[:], simpleReplyMagic)
	binary.BigEndian.PutUint32(r.head[4:], errno)
	binary.BigEndian.PutUint64(r.head[8:], r.cookie)
	r.headLen = simpleReplyBytes
}

// chunk starts the one chunk of a structured reply.
func (r *request) chunk(kind uint16, payloadBytes int) {
	binary.BigEndian.PutUint32(r.head[:], structuredReplyMagic)
	binary.BigEndian.PutUint16(r.head[4:], replyFlagDone)
	binary.BigEndian.PutUint16(r.head[6:], kind)
	binary.BigEndian.PutUint64(r.head[8:], r.cookie)
	binary.BigEndian.PutUint32(r.head[16:], uint32(payloadBytes))
	r.headLen = structuredReplyBytes
}
