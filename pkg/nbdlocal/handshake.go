package nbdlocal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
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

// handshake is the state of the haggling with one client.
type handshake struct {
	client  io.ReadWriter
	exports *Exports
	// startTLS makes the connection a secure one; nil if there is no TLS, or it has
	// been started.
	startTLS func() (io.ReadWriter, error)
	// claim makes room for a client in the transmission phase; false if there is none.
	claim    func() bool
	secure   bool // TLS has been started
	noZeroes bool
	agreed   session
	// contextsOf is the export for which agreed.contexts were selected.
	contextsOf string
	server     *Server // of the export that was agreed on
	out        []byte  // the reply in the making
}

// run greets the client and answers its options until one of them ends the handshake.
// h.agreed and h.server say then what was agreed.
func (h *handshake) run() error {
	if err := h.greet(); err != nil {
		return err
	}
	for range maxOptions {
		option, data, err := h.readOption()
		if err != nil {
			return err
		}
		done, err := h.answer(option, data)
		if err != nil {
			return err
		}
		if err := h.send(); err != nil {
			return err
		}
		if done {
			return nil
		}
	}
	return fmt.Errorf("handshake: more than %d options", maxOptions)
}

func notKnown(name string) string {
	return fmt.Sprintf("export %.80q is not known: want one that LIST tells", name)
}

// flags are the transmission flags of an export.
func (h *handshake) flags(s *Server, name string) uint16 {
	flags := uint16(flagHasFlags | flagSendFlush | flagSendFUA | flagCanMultiConn | flagSendCache)
	info := s.dev.Info()
	if s.readOnly() {
		flags |= flagReadOnly
	} else {
		flags |= flagSendWriteZeroes | flagSendFastZero
		if info.CanDiscard {
			flags |= flagSendTrim
		}
	}
	if h.agreed.structured {
		flags |= flagSendDF
	}
	if h.agreed.extended && h.agreed.contexts != 0 && h.contextsOf == name {
		flags |= flagBlockStatusPayload
	}
	return flags
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
	if option == optExportName { // which has no way to refuse
		return true, h.answerExportName(data)
	}
	switch {
	case data == nil:
		h.refuse(option, repErrTooBig, fmt.Sprintf("more than %d bytes", maxOptionBytes))
		return false, nil
	case h.exports.opts.TLSRequired && !h.secure && option != optStartTLS && option != optAbort:
		h.refuse(option, repErrTLSReqd, "nothing is served without TLS")
		return false, nil
	}
	switch option {
	case optAbort:
		h.reply(option, repAck, nil)
		return false, errors.Join(h.send(), errGoodbye)
	case optList:
		h.answerList(data)
	case optStartTLS:
		return false, h.answerStartTLS(data)
	case optStructuredReply, optExtendedHeaders:
		h.answerHeaders(option, data)
	case optInfo:
		h.answerInfo(option, data)
	case optGo:
		return h.answerGo(data)
	case optListMetaContext, optSetMetaContext:
		h.answerMetaContext(option, data)
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

// answerExportName enters the transmission phase the old way.
func (h *handshake) answerExportName(data []byte) error {
	x, found := h.exports.find(string(data))
	switch {
	case data == nil:
		return fmt.Errorf("handshake: export name of more than %d bytes", maxNameBytes)
	case h.exports.opts.TLSRequired && !h.secure:
		return errors.New("handshake: the client wants to be served without TLS")
	case h.agreed.extended:
		return errors.New("handshake: EXPORT_NAME after extended headers: want GO")
	case !found:
		return errors.New("handshake: " + notKnown(string(data)))
	case !h.claim():
		return errTooManyClients
	}
	h.out = binary.BigEndian.AppendUint64(h.out, uint64(x.server.dev.Info().SizeBytes))
	h.out = binary.BigEndian.AppendUint16(h.out, h.flags(x.server, string(data)))
	if !h.noZeroes {
		h.out = append(h.out, make([]byte, exportNameZeroes)...)
	}
	h.settle(x.server, string(data))
	return nil
}

// settle makes an export the session's. Metadata contexts hold for the export that they
// were selected for.
func (h *handshake) settle(s *Server, name string) {
	h.server = s
	h.agreed.readOnly = s.readOnly()
	if h.contextsOf != name {
		h.agreed.contexts = 0
	}
}

func (h *handshake) answerList(data []byte) {
	if len(data) != 0 {
		h.refuse(optList, repErrInvalid, "want no data")
		return
	}
	for _, e := range h.exports.all() {
		payload := appendString(nil, e.name)
		h.reply(optList, repServer, append(payload, e.server.opts.Description...))
	}
	h.reply(optList, repAck, nil)
}

// answerHeaders answers the options that decide what messages look like.
func (h *handshake) answerHeaders(option uint32, data []byte) {
	switch {
	case len(data) != 0:
		h.refuse(option, repErrInvalid, "want no data")
		return
	case h.agreed.extended && option == optStructuredReply:
		h.refuse(option, repErrExtHeaderReq, "extended headers have been negotiated, which do more")
		return
	case h.agreed.extended:
		h.refuse(option, repErrInvalid, "extended headers have been negotiated")
		return
	}
	h.agreed.structured, h.agreed.extended = true, option == optExtendedHeaders
	h.reply(option, repAck, nil)
}

// answerStartTLS makes the connection a secure one. What was agreed before is forgotten:
// anybody could have said it.
func (h *handshake) answerStartTLS(data []byte) error {
	switch {
	case len(data) != 0:
		h.refuse(optStartTLS, repErrInvalid, "want no data")
		return nil
	case h.secure:
		h.refuse(optStartTLS, repErrInvalid, "TLS has been started")
		return nil
	case h.startTLS == nil:
		h.refuse(optStartTLS, repErrPolicy, "this server has no certificate")
		return nil
	}
	h.reply(optStartTLS, repAck, nil)
	if err := h.send(); err != nil {
		return err
	}
	client, err := h.startTLS()
	if err != nil {
		return fmt.Errorf("handshake: start TLS: %w", err)
	}
	h.client, h.secure = client, true
	h.agreed, h.contextsOf = session{}, ""
	return nil
}

// answerGo answers GO. It reports whether the export was granted.
func (h *handshake) answerGo(data []byte) (granted bool, err error) {
	s, name := h.answerInfo(optGo, data)
	if s == nil {
		return false, nil
	}
	if !h.claim() {
		h.out = h.out[:0]
		h.refuse(optGo, repErrPolicy, errTooManyClients.Error())
		return false, errors.Join(h.send(), errTooManyClients)
	}
	h.settle(s, name)
	return true, nil
}

// answerInfo answers INFO, or GO in the same way. It returns the server of the export
// that it granted, nil for none, and the name it was asked for by.
func (h *handshake) answerInfo(option uint32, data []byte) (*Server, string) {
	name, wanted, err := parseInfo(data)
	if err != nil {
		h.refuse(option, repErrInvalid, err.Error())
		return nil, ""
	}
	x, found := h.exports.find(name)
	if !found {
		h.refuse(option, repErrUnknown, notKnown(name))
		return nil, ""
	}
	s := x.server
	payload := binary.BigEndian.AppendUint16(nil, infoExport)
	payload = binary.BigEndian.AppendUint64(payload, uint64(s.dev.Info().SizeBytes))
	payload = binary.BigEndian.AppendUint16(payload, h.flags(s, name))
	h.reply(option, repInfo, payload)
	for i := 0; i < len(wanted); i += 2 {
		if payload := x.info(binary.BigEndian.Uint16(wanted[i:])); payload != nil {
			h.reply(option, repInfo, payload)
		}
	}
	h.reply(option, repAck, nil)
	return s, name
}

// info returns the information of a kind, nil if there is none.
func (x *export) info(kind uint16) []byte {
	payload := binary.BigEndian.AppendUint16(nil, kind)
	switch kind {
	case infoName:
		return append(payload, x.name...)
	case infoDescription:
		if text := x.server.opts.Description; text != "" {
			return append(payload, text...)
		}
	case infoBlockSize:
		// Devices accept any alignment; what costs them least is a page.
		preferred := max(x.server.dev.Info().LogicalBlockBytes, 4096)
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
	if !validString(s) {
		return "", nil, fmt.Errorf("string %.80q: want UTF-8 without NUL", s)
	}
	return s, data[length:], nil
}

// validString reports whether the protocol allows s as a string, its length aside.
func validString(s string) bool { return utf8.ValidString(s) && !strings.ContainsRune(s, 0) }

func appendString(out []byte, s string) []byte {
	out = binary.BigEndian.AppendUint32(out, uint32(len(s)))
	return append(out, s...)
}
