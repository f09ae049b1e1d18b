package nbdlocal

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// maxQueryBytes is the longest payload of a block status: the range's length, and the
// number of each context there is.
const maxQueryBytes = 8 + 4*len(metaContexts)

// parseQuery takes the payload of a block status apart: how many bytes it is about, and
// which of the contexts that were agreed on. It is used with extended headers only.
func (r *request) parseQuery() (contextSet, error) {
	query := r.query[:r.payload]
	r.n = clampLength(binary.BigEndian.Uint64(query))
	var set contextSet
	for query = query[8:]; len(query) > 0; query = query[4:] {
		id := binary.BigEndian.Uint32(query)
		i, known := contextByID(id)
		if !known || !r.conn.session.contexts.has(i) || set.has(i) {
			return 0, fmt.Errorf("block status of metadata context %d: %w: unknown or asked for twice", id, block.ErrInvalid)
		}
		set = set.with(i)
	}
	if r.n == 0 {
		return 0, errNoStatus
	}
	return set, r.conn.server.checkRange(r.off, int64(r.n))
}

var errNoStatus = fmt.Errorf("block status of no bytes: %w", block.ErrInvalid)

// blockStatus describes the range, as far as the slot's buffer goes, in a chunk for each
// context.
func (r *request) blockStatus(dev block.Device) error {
	set := r.conn.session.contexts
	if r.payload > 0 {
		var err error
		if set, err = r.parseQuery(); err != nil {
			return err
		}
	}
	var lists [len(metaContexts)]statusList
	open := r.statusLists(&lists, set)
	for off, end := r.off, r.off+int64(r.n); off < end && open > 0; {
		e, err := dev.Map(off, end-off)
		if err != nil {
			return err
		}
		n := min(e.Off+e.Len, end) - off
		if e.Off > off || n <= 0 {
			return fmt.Errorf("map at %d: %w: extent [%d, +%d) doesn't hold it", off, block.ErrCorrupt, e.Off, e.Len)
		}
		for i := range lists {
			if l := &lists[i]; l.room > 0 && !l.add(uint64(n), uint64(metaContexts[i].status(e))) {
				open--
			}
		}
		off += n
	}
	r.replyStatus(&lists, set)
	return nil
}

// statusLists gives each context of set its share of the buffer. It returns how many
// there are.
func (r *request) statusLists(lists *[len(metaContexts)]statusList, set contextSet) int {
	count := bits.OnesCount8(uint8(set))
	share, extended := len(r.buf)/max(count, 1), r.conn.session.extended
	next := 0
	for i := range lists {
		if !set.has(i) {
			continue
		}
		l := &lists[i]
		l.extended = extended
		// replyStatus puts the header of a list's chunk before it.
		l.out = binary.BigEndian.AppendUint32(r.buf[next+maxHeadBytes:][:0], contextID(i))
		if extended {
			l.out = binary.BigEndian.AppendUint32(l.out, 0) // the number of descriptors
		}
		l.room = (share - maxHeadBytes - len(l.out)) / l.descriptorBytes()
		if r.flags&cmdFlagReqOne != 0 {
			l.room = 1
		}
		next += share
	}
	return count
}

// statusList is the payload of one context's chunk in the making.
type statusList struct {
	out      []byte
	room     int // descriptors there is room for, with the one in the making; 0: closed
	extended bool

	length, status uint64 // of the descriptor in the making, if length > 0
}

func (l *statusList) descriptorBytes() int {
	if l.extended {
		return 16
	}
	return 8
}

// add appends n bytes of a status. It reports false when they, or the next, find no
// room: the list is closed then.
func (l *statusList) add(n, status uint64) bool {
	if l.length > 0 && status != l.status {
		l.close()
		if l.room == 0 {
			return false
		}
	}
	l.status = status
	l.length += n // at most the request's length
	return true
}

// close ends the descriptor in the making, if there is one.
func (l *statusList) close() {
	switch {
	case l.length == 0:
		return
	case l.extended:
		l.out = binary.BigEndian.AppendUint64(l.out, l.length)
		l.out = binary.BigEndian.AppendUint64(l.out, l.status)
		binary.BigEndian.PutUint32(l.out[4:], binary.BigEndian.Uint32(l.out[4:])+1)
	default:
		l.out = binary.BigEndian.AppendUint32(l.out, uint32(l.length))
		l.out = binary.BigEndian.AppendUint32(l.out, uint32(l.status))
	}
	l.length = 0
	l.room--
}
