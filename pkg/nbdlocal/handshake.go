package nbdlocal

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

const (
	// maxOptionBytes bounds an option's data: a name of the longest kind and
	// plenty of queries. Longer ones are answered without being kept.
	maxOptionBytes = 32 << 10
	// maxSkippedBytes bounds what is read and thrown away of an option too long.
	maxSkippedBytes = 1 << 20
	// maxOptions bounds how long a client may haggle.
	maxOptions = 1000
)

// errGoodbye says that a client ended the handshake as the protocol provides.
var errGoodbye = errors.New("client left")

// shakeHands brings a client to the transmission phase, within the time allowed.
func (s *Server) shakeHands(ctx context.Context, client net.Conn) (session, error) {
	stop := context.AfterFunc(ctx, func() { _ = client.Close() })
	defer stop()
	if err := client.SetDeadline(time.Now().Add(s.opts.HandshakeTimeout)); err != nil {
		return session{}, err
	}
	h := handshake{
		client: client,
		export: export{
			name:        s.opts.ExportName,
			description: s.opts.Description,
			info:        s.dev.Info(),
			readOnly:    s.readOnly(),
		},
	}
	agreed, err := h.run()
	if err != nil {
		return session{}, err
	}
	return agreed, client.SetDeadline(time.Time{})
}

// export is what clients can see of a device before the transmission phase.
type export struct {
	name, description string
	info              block.Info
	readOnly          bool
}

// known reports whether a client may call the export name.
func (e *export) known(name string) bool { return name == "" || name == e.name }

// flags are the transmission flags.
func (e *export) flags(structured bool) uint16 {
	flags := uint16(flagHasFlags | flagSendFlush | flagSendFUA | flagCanMultiConn)
	if e.readOnly {
		flags |= flagReadOnly
	} else {
		flags |= flagSendWriteZeroes | flagSendFastZero
		if e.info.CanDiscard {
			flags |= flagSendTrim
		}
	}
	if structured {
		flags |= flagSendDF
	}
	return flags
}

// handshake is the state of the haggling with one client.
type handshake struct {
	client   io.ReadWriter
	export   export
	noZeroes bool
	agreed   session
	// context is the export for which base:allocation was selected; valid if
	// agreed.allocation.
	context string
	out     []byte // the reply in the making
}

// run greets the client and answers its options until one of them ends the handshake.
func (h *handshake) run() (session, error) {
	h.agreed.readOnly = h.export.readOnly
	if err := h.greet(); err != nil {
		return session{}, err
	}
	for range maxOptions {
		option, data, err := h.readOption()
		if err != nil {
			return session{}, err
		}
		done, err := h.answer(option, data)
		if err != nil {
			return session{}, err
		}
		if err := h.send(); err != nil {
			return session{}, err
		}
		if done {
			return h.agreed, nil
		}
	}
	return session{}, fmt.Errorf("handshake: more than %d options", maxOptions)
}

func (h *handshake) greet() error {
	h.out = binary.BigEndian.AppendUint64(h.out[:0], initMagic)
	h.out = binary.BigEndian.AppendUint64(h.out, optMagic)
	h.out = binary.BigEndian.AppendUint16(h.out, flagFixedNewstyle|flagNoZeroes)
	if err := h.send(); err != nil {
		return err
	}
	var reply [4]byte
	if _, err := io.ReadFull(h.client, reply[:]); err != nil {
		return fmt.Errorf("handshake: read client flags: %w", err)
	}
	flags := binary.BigEndian.Uint32(reply[:])
	if unknown := flags &^ (flagFixedNewstyle | flagNoZeroes); unknown != 0 {
		return fmt.Errorf("handshake: client flags %#x: want none beyond %#x", flags, flagFixedNewstyle|flagNoZeroes)
	}
	h.noZeroes = flags&flagNoZeroes != 0
	return nil
}

func (h *handshake) send() error {
	if len(h.out) == 0 {
		return nil
	}
	if _, err := h.client.Write(h.out); err != nil {
		return fmt.Errorf("handshake: write reply: %w", err)
	}
	h.out = h.out[:0]
	return nil
}

// readOption reads one option. Data too long is skipped, and reported by data being nil.
func (h *handshake) readOption() (option uint32, data []byte, err error) {
	var header [16]byte
	if _, err := io.ReadFull(h.client, header[:]); err != nil {
		if errors.Is(err, io.EOF) { // between two options
			return 0, nil, errGoodbye
		}
		return 0, nil, fmt.Errorf("handshake: read option: %w", err)
	}
	if magic := binary.BigEndian.Uint64(header[:]); magic != optMagic {
		return 0, nil, fmt.Errorf("handshake: option begins with %#x: want %#x", magic, uint64(optMagic))
	}
	option = binary.BigEndian.Uint32(header[8:])
	length := binary.BigEndian.Uint32(header[12:])
	switch {
	case length > maxSkippedBytes:
		return 0, nil, fmt.Errorf("handshake: option %d of %d bytes: want at most %d", option, length, maxOptionBytes)
	case length > maxOptionBytes:
		_, err = io.CopyN(io.Discard, h.client, int64(length))
	default:
		data = make([]byte, length)
		_, err = io.ReadFull(h.client, data)
	}
	if err != nil {
		return 0, nil, fmt.Errorf("handshake: read option %d of %d bytes: %w", option, length, err)
	}
	return option, data, nil
}

// answer puts the reply to an option into h.out. It reports whether the transmission
// phase follows.
func (h *handshake) answer(option uint32, data []byte) (done bool, err error) {
	if data == nil {
		if option == optExportName { // which has no way to refuse
			return false, fmt.Errorf("handshake: export name of more than %d bytes", maxNameBytes)
		}
		h.refuse(option, repErrTooBig, fmt.Sprintf("more than %d bytes", maxOptionBytes))
		return false, nil
	}
	switch option {
	case optExportName:
		return true, h.answerExportName(string(data))
	case optAbort:
		h.reply(option, repAck, nil)
		return false, errors.Join(h.send(), errGoodbye)
	case optList:
		h.answerList(data)
	case optStructuredReply:
		h.answerStructuredReply(data)
	case optInfo, optGo:
		return h.answerInfo(option, data) && option == optGo, nil
	case optListMetaContext, optSetMetaContext:
		h.answerMetaContext(option, data)
	case optStartTLS:
		h.refuse(option, repErrUnsup, "this server has no TLS: its socket is local")
	case optExtendedHeaders:
		h.refuse(option, repErrUnsup, "no extended headers")
	default:
		h.refuse(option, repErrUnsup, fmt.Sprintf("option %d is not known", option))
	}
	return false, nil
}

// reply appends one reply to an option.
func (h *handshake) reply(option, kind uint32, payload []byte) {
	h.out = binary.BigEndian.AppendUint64(h.out, optReplyMagic)
	h.out = binary.BigEndian.AppendUint32(h.out, option)
	h.out = binary.BigEndian.AppendUint32(h.out, kind)
	h.out = binary.BigEndian.AppendUint32(h.out, uint32(len(payload)))
	h.out = append(h.out, payload...)
}

// refuse answers an option with an error and a text for the person at the client.
func (h *handshake) refuse(option, kind uint32, why string) {
	h.reply(option, kind, []byte(why))
}

func (h *handshake) answerExportName(name string) error {
	if !h.export.known(name) {
		return fmt.Errorf("handshake: export %.80q is not known: want %q", name, h.export.name)
	}
	h.settle(name)
	h.out = binary.BigEndian.AppendUint64(h.out, uint64(h.export.info.SizeBytes))
	h.out = binary.BigEndian.AppendUint16(h.out, h.export.flags(h.agreed.structured))
	if !h.noZeroes {
		h.out = append(h.out, make([]byte, exportNameZeroes)...)
	}
	return nil
}

// settle makes name the session's export. Metadata contexts hold for the export that
// they were selected for.
func (h *handshake) settle(name string) {
	h.agreed.allocation = h.agreed.allocation && h.context == name
}

func (h *handshake) answerList(data []byte) {
	if len(data) != 0 {
		h.refuse(optList, repErrInvalid, "want no data")
		return
	}
	payload := appendString(nil, h.export.name)
	h.reply(optList, repServer, append(payload, h.export.description...))
	h.reply(optList, repAck, nil)
}

func (h *handshake) answerStructuredReply(data []byte) {
	if len(data) != 0 {
		h.refuse(optStructuredReply, repErrInvalid, "want no data")
		return
	}
	h.agreed.structured = true
	h.reply(optStructuredReply, repAck, nil)
}

// answerInfo answers INFO and GO. It reports whether the export was granted.
func (h *handshake) answerInfo(option uint32, data []byte) bool {
	name, wanted, err := parseInfo(data)
	if err != nil {
		h.refuse(option, repErrInvalid, err.Error())
		return false
	}
	if !h.export.known(name) {
		h.refuse(option, repErrUnknown, fmt.Sprintf("export %.80q is not known: want %q", name, h.export.name))
		return false
	}
	payload := binary.BigEndian.AppendUint16(nil, infoExport)
	payload = binary.BigEndian.AppendUint64(payload, uint64(h.export.info.SizeBytes))
	payload = binary.BigEndian.AppendUint16(payload, h.export.flags(h.agreed.structured))
	h.reply(option, repInfo, payload)
	for i := 0; i < len(wanted); i += 2 {
		if payload := h.info(binary.BigEndian.Uint16(wanted[i:])); payload != nil {
			h.reply(option, repInfo, payload)
		}
	}
	h.reply(option, repAck, nil)
	if option == optGo {
		h.settle(name)
	}
	return true
}

// info returns the information of a kind, nil if there is none.
func (h *handshake) info(kind uint16) []byte {
	payload := binary.BigEndian.AppendUint16(nil, kind)
	switch kind {
	case infoName:
		return append(payload, h.export.name...)
	case infoDescription:
		if h.export.description != "" {
			return append(payload, h.export.description...)
		}
	case infoBlockSize:
		// Devices accept any alignment; what costs them least is a page.
		preferred := max(h.export.info.LogicalBlockBytes, 4096)
		payload = binary.BigEndian.AppendUint32(payload, 1)
		payload = binary.BigEndian.AppendUint32(payload, uint32(preferred))
		return binary.BigEndian.AppendUint32(payload, maxPayloadBytes)
	}
	return nil
}

// parseInfo takes apart the data of INFO and GO: an export's name, and the kinds of
// information wanted, two bytes each.
func parseInfo(data []byte) (name string, wanted []byte, err error) {
	name, data, err = cutString(data, maxNameBytes)
	if err != nil {
		return "", nil, fmt.Errorf("export name: %w", err)
	}
	if len(data) < 2 {
		return "", nil, errors.New("it ends before the number of information requests")
	}
	count := int(binary.BigEndian.Uint16(data))
	if wanted = data[2:]; len(wanted) != 2*count {
		return "", nil, fmt.Errorf("%d bytes of information requests: want %d for %d of them", len(wanted), 2*count, count)
	}
	// Each kind once: a list of repetitions would make the reply far larger than
	// the option.
	var seen uint32
	kept := wanted[:0:0]
	for i := 0; i < len(wanted); i += 2 {
		kind := binary.BigEndian.Uint16(wanted[i:])
		if kind > infoBlockSize || seen&(1<<kind) != 0 {
			continue
		}
		seen |= 1 << kind
		kept = append(kept, wanted[i:i+2]...)
	}
	return name, kept, nil
}

// answerMetaContext lists or selects metadata contexts: base:allocation or nothing.
func (h *handshake) answerMetaContext(option uint32, data []byte) {
	if option == optSetMetaContext {
		h.agreed.allocation = false // also when the option fails
	}
	name, queries, err := parseMetaContext(data)
	switch {
	case !h.agreed.structured:
		h.refuse(option, repErrInvalid, "structured replies have to be negotiated first")
		return
	case err != nil:
		h.refuse(option, repErrInvalid, err.Error())
		return
	case !h.export.known(name):
		h.refuse(option, repErrUnknown, fmt.Sprintf("export %.80q is not known: want %q", name, h.export.name))
		return
	}
	if matchesAllocation(option, queries) {
		id := uint32(0) // reserved when listing
		if option == optSetMetaContext {
			id = contextAllocationID
			h.agreed.allocation, h.context = true, name
		}
		payload := binary.BigEndian.AppendUint32(nil, id)
		h.reply(option, repMetaContext, append(payload, contextAllocation...))
	}
	h.reply(option, repAck, nil)
}

// matchesAllocation reports whether queries ask for base:allocation. Listing knows
// wildcards: no query at all, and the bare namespace.
func matchesAllocation(option uint32, queries []string) bool {
	if option == optListMetaContext && len(queries) == 0 {
		return true
	}
	for _, q := range queries {
		if q == contextAllocation || option == optListMetaContext && q == "base:" {
			return true
		}
	}
	return false
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

// cutString takes a string with its length in front off data.
func cutString(data []byte, most int) (s string, rest []byte, err error) {
	if len(data) < 4 {
		return "", nil, errors.New("it ends before the string's length")
	}
	length := binary.BigEndian.Uint32(data)
	data = data[4:]
	switch {
	case int64(length) > int64(most):
		return "", nil, fmt.Errorf("string of %d bytes: want at most %d", length, most)
	case int64(length) > int64(len(data)):
		return "", nil, fmt.Errorf("string of %d bytes in %d", length, len(data))
	}
	s = string(data[:length])
	if !utf8.ValidString(s) || strings.ContainsRune(s, 0) {
		return "", nil, fmt.Errorf("string %.80q: want UTF-8 without NUL", s)
	}
	return s, data[length:], nil
}

func appendString(out []byte, s string) []byte {
	out = binary.BigEndian.AppendUint32(out, uint32(len(s)))
	return append(out, s...)
}
