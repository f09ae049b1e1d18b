package nbdlocal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// metaContext is something that block status can tell about a device.
type metaContext struct {
	name   string // as clients ask for it, the namespace in front
	status func(block.Extent) uint32
}

// metaContexts are those there are. A context's number on the wire is one more than its
// place here.
var metaContexts = [...]metaContext{
	{name: "base:allocation", status: allocationStatus},
	{name: "qemu:allocation-depth", status: depthStatus},
}

// allocationStatus is what base:allocation calls an extent. A cluster that is
// explicitly zero may or may not have space of its own: hole is the answer that
// promises less.
func allocationStatus(e block.Extent) uint32 {
	if e.State == block.Data {
		return 0
	}
	return stateHole | stateZero
}

// depthStatus is the number of the layer that answers, the top one being 1; 0 if none
// does.
func depthStatus(e block.Extent) uint32 {
	if e.State == block.Unallocated {
		return 0
	}
	return uint32(e.Depth) + 1
}

// contextSet is a set of metaContexts: a bit for each place.
type contextSet uint8

func (s contextSet) has(i int) bool           { return s&(1<<i) != 0 }
func (s contextSet) with(i int) contextSet    { return s | 1<<i }
func (s contextSet) without(i int) contextSet { return s &^ (1 << i) }

// contextByID returns the place of the context that has a number on the wire.
func contextByID(id uint32) (i int, known bool) {
	return int(id) - 1, id >= 1 && id <= uint32(len(metaContexts))
}

func contextID(i int) uint32 { return uint32(i) + 1 }

// matchContexts returns the contexts that queries ask for. Listing knows wildcards: no
// query at all, and a bare namespace.
func matchContexts(listing bool, queries []string) contextSet {
	var set contextSet
	for i, c := range metaContexts {
		namespace, _, _ := strings.Cut(c.name, ":")
		if slices.Contains(queries, c.name) ||
			listing && (len(queries) == 0 || slices.Contains(queries, namespace+":")) {
			set = set.with(i)
		}
	}
	return set
}

// answerMetaContext lists or selects metadata contexts.
func (h *handshake) answerMetaContext(option uint32, data []byte) {
	listing := option == optListMetaContext
	if !listing {
		h.agreed.contexts = 0 // also when the option fails
	}
	name, queries, err := parseMetaContext(data)
	_, found := h.exports.find(name)
	switch {
	case !h.agreed.structured:
		h.refuse(option, repErrInvalid, "structured replies or extended headers have to be negotiated first")
		return
	case err != nil:
		h.refuse(option, repErrInvalid, err.Error())
		return
	case !found:
		h.refuse(option, repErrUnknown, notKnown(name))
		return
	}
	set := matchContexts(listing, queries)
	for i, c := range metaContexts {
		if !set.has(i) {
			continue
		}
		id := contextID(i)
		if listing {
			id = 0 // reserved
		}
		payload := binary.BigEndian.AppendUint32(nil, id)
		h.reply(option, repMetaContext, append(payload, c.name...))
	}
	if !listing {
		h.agreed.contexts, h.contextsOf = set, name
	}
	h.reply(option, repAck, nil)
}

// parseMetaContext takes apart the data of LIST_META_CONTEXT and SET_META_CONTEXT.
func parseMetaContext(data []byte) (name string, queries []string, err error) {
	name, data, err = cutString(data, maxNameBytes)
	if err != nil {
		return "", nil, fmt.Errorf("export name: %w", err)
	}
	if len(data) < 4 {
		return "", nil, errors.New("it ends before the number of queries")
	}
	count := binary.BigEndian.Uint32(data)
	data = data[4:]
	if int64(count) > int64(len(data)/4) {
		return "", nil, fmt.Errorf("%d queries in %d bytes", count, len(data))
	}
	for i := range count {
		var query string
		if query, data, err = cutString(data, maxNameBytes); err != nil {
			return "", nil, fmt.Errorf("query %d: %w", i, err)
		}
		queries = append(queries, query)
	}
	if len(data) != 0 {
		return "", nil, fmt.Errorf("%d bytes after the last query", len(data))
	}
	return name, queries, nil
}
