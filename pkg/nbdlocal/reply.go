package nbdlocal

import "encoding/binary"

// maxHeadBytes is the most that is sent of a reply before its data: the header of an
// extended chunk, and the longest beginning of its payload.
const maxHeadBytes = extendedReplyBytes + 12

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

// replyStatus sends a chunk for each context of set. Structured replies only.
func (r *request) replyStatus(lists *[len(metaContexts)]statusList, set contextSet) {
	kind := uint16(replyBlockStatus)
	if r.conn.session.extended {
		kind = replyBlockStatusExt
	}
	left := set
	for i := range lists {
		if !set.has(i) {
			continue
		}
		l := &lists[i]
		l.close()
		flags := uint16(0)
		if left = left.without(i); left == 0 {
			flags = replyFlagDone
		}
		if r.headLen == 0 {
			r.headLen = len(r.appendChunk(r.head[:0], flags, kind, len(l.out)))
			r.tail = l.out
			continue
		}
		// The lists lie in one buffer, in this order, with room for a header before
		// each: what is moved moves towards the buffer's beginning.
		r.tail = r.appendChunk(r.tail, flags, kind, len(l.out))
		r.tail = append(r.tail, l.out...)
	}
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
	r.headLen = len(r.appendChunk(r.head[:0], replyFlagDone, kind, payloadBytes))
}

// appendChunk appends the header of a chunk of a structured or extended reply.
func (r *request) appendChunk(out []byte, flags, kind uint16, payloadBytes int) []byte {
	extended := r.conn.session.extended
	magic := uint32(structuredReplyMagic)
	if extended {
		magic = extendedReplyMagic
	}
	out = binary.BigEndian.AppendUint32(out, magic)
	out = binary.BigEndian.AppendUint16(out, flags)
	out = binary.BigEndian.AppendUint16(out, kind)
	out = binary.BigEndian.AppendUint64(out, r.cookie)
	if !extended {
		return binary.BigEndian.AppendUint32(out, uint32(payloadBytes))
	}
	out = binary.BigEndian.AppendUint64(out, uint64(r.off))
	return binary.BigEndian.AppendUint64(out, uint64(payloadBytes))
}
