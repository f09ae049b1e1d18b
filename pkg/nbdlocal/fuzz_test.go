package nbdlocal

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"syscall"
	"testing"
	"time"
)

// script is a client that has said everything in advance.
type script struct {
	io.Reader
	out bytes.Buffer
}

func (s *script) Write(p []byte) (int, error) { return s.out.Write(p) }

// FuzzHandshake: whatever a client says, the handshake ends, and its replies are well
// formed and in proportion.
func FuzzHandshake(f *testing.F) {
	begin := []byte{0, 0, 0, 3}
	f.Add(begin)
	for _, option := range [][]byte{
		optionBytes(optGo, infoData("", infoBlockSize, infoName)),
		optionBytes(optInfo, infoData("vol", infoDescription)),
		optionBytes(optStructuredReply, nil),
		optionBytes(optSetMetaContext, contextData("vol", "base:", "base:allocation", "qemu:allocation-depth")),
		optionBytes(optListMetaContext, contextData("")),
		optionBytes(optExportName, []byte("vol")),
		optionBytes(optList, nil), optionBytes(optAbort, nil), optionBytes(optStartTLS, nil), optionBytes(optExtendedHeaders, nil),
	} {
		f.Add(append(bytes.Clone(begin), option...))
		f.Add(append(append(bytes.Clone(begin), optionBytes(optStructuredReply, nil)...), option...))
	}
	f.Fuzz(func(t *testing.T, said []byte) {
		client := &script{Reader: bytes.NewReader(said)}
		e := NewExports(ExportsOptions{})
		server := NewServer(newMemDevice(mib), Options{Description: "volume"})
		if err := errors.Join(e.Add("vol", server), e.Add("other", server)); err != nil {
			t.Fatal(err)
		}
		secured := false
		h := handshake{client: client, exports: e, claim: func() bool { return true }}
		h.startTLS = func() (io.ReadWriter, error) { // what it said before no longer counts
			secured = true
			return client, nil
		}
		err := h.run()
		agreed := h.agreed
		if agreed.contexts != 0 && !agreed.structured || agreed.extended && !agreed.structured {
			t.Errorf("an impossible agreement: %+v", agreed)
		}
		if (err == nil) != (h.server != nil) || secured != h.secure {
			t.Errorf("handshake: %v, with a server: %v, secure: %v", err, h.server != nil, h.secure)
		}
		if err == nil && len(said) < 4+16 {
			t.Error("an agreement out of nothing")
		}
		if most := 1000 + 64*len(said); client.out.Len() > most {
			t.Errorf("%d bytes said, %d answered", len(said), client.out.Len())
		}
	})
}

// FuzzRequests: whatever arrives in the transmission phase, the connection ends, and
// what it answers are replies to requests that were made.
func FuzzRequests(f *testing.F) {
	write := append(requestHeader(cmdWrite, 0, 2, 100, 5), "hello"...)
	f.Add(requestHeader(cmdRead, 0, 1, 0, 100))
	f.Add(write)
	f.Add(append(bytes.Clone(write), write[:30]...))
	f.Add(append(requestHeader(cmdWrite, 0, 3, 1<<40, 5), write...))
	f.Add(append(requestHeader(cmdRead, 0, 3, 0, 1<<31), write...))
	f.Add(append(requestHeader(cmdWriteZeroes, cmdFlagNoHole|cmdFlagFUA, 4, 0, memPage), requestHeader(cmdDisc, 0, 0, 0, 0)...))
	f.Add(append(requestHeader(cmdTrim, 0, 5, 0, mib), requestHeader(cmdFlush, 0, 6, 0, 0)...))
	f.Add(append(requestHeader(cmdBlockStatus, 0, 7, 0, mib), requestHeader(99, 0xffff, 8, -1, -1)...))
	f.Fuzz(func(t *testing.T, sent []byte) {
		checkReplies(t, sent, transmission(t, sent, session{kernel: true}))
	})
}

// transmission serves a connection on which sent arrives, and returns what was answered.
func transmission(t *testing.T, sent []byte, agreed session) []byte {
	server, conn := socketPair(t)
	s := NewServer(newMemDevice(mib), Options{Workers: 3, BufferBytes: MinBufferBytes})
	own, err := adoptSocket(server)
	if err != nil {
		t.Fatal(err)
	}
	result := make(chan error, 1)
	go func() { result <- s.transmit(context.Background(), own, agreed) }()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	go func() {
		_, _ = conn.Write(sent)
		_ = conn.(interface{ CloseWrite() error }).CloseWrite()
	}()
	var got bytes.Buffer
	ended := make(chan error, 1)
	go func() {
		_, err := io.Copy(&got, conn)
		ended <- err
	}()
	<-result
	_ = server.Close()
	if err := <-ended; err != nil && !errors.Is(err, syscall.ECONNRESET) { // what it had not read
		t.Errorf("replies: %v", err)
	}
	return got.Bytes()
}

// FuzzExtendedRequests: the same with extended headers and every metadata context.
func FuzzExtendedRequests(f *testing.F) {
	query := binary.BigEndian.AppendUint64(nil, mib)
	query = binary.BigEndian.AppendUint32(query, 2)
	f.Add(extendedHeader(cmdRead, 0, 1, 0, 100_000))
	f.Add(append(extendedHeader(cmdWrite, cmdFlagPayloadLen, 2, 100, 5), "hello"...))
	f.Add(append(extendedHeader(cmdBlockStatus, cmdFlagPayloadLen, 3, 0, uint64(len(query))), query...))
	f.Add(append(extendedHeader(cmdBlockStatus, 0, 4, 0, mib), extendedHeader(cmdDisc, 0, 5, 0, 0)...))
	f.Add(append(extendedHeader(cmdTrim, 0, 6, 0, 1<<63), extendedHeader(cmdFlush, cmdFlagPayloadLen, 7, 0, 1<<40)...))
	f.Add(append(extendedHeader(cmdCache, 0, 8, 0, mib), extendedHeader(cmdWriteZeroes, cmdFlagFastZero, 9, 1, mib-1)...))
	f.Fuzz(func(t *testing.T, sent []byte) {
		all := contextSet(1<<len(metaContexts) - 1)
		checkExtendedReplies(t, sent, transmission(t, sent, session{structured: true, extended: true, contexts: all}))
	})
}

// checkExtendedReplies makes sure that got consists of whole replies to the requests in
// sent, each ended once.
func checkExtendedReplies(t *testing.T, sent, got []byte) {
	offsets := map[uint64]uint64{} // by cookie
	for len(sent) >= extendedRequestBytes && binary.BigEndian.Uint32(sent) == extendedRequestMagic {
		flags, cmd, n := binary.BigEndian.Uint16(sent[4:]), binary.BigEndian.Uint16(sent[6:]), binary.BigEndian.Uint64(sent[24:])
		cookie := binary.BigEndian.Uint64(sent[8:])
		if _, again := offsets[cookie]; again {
			return // whose reply is whose cannot be told
		}
		offsets[cookie] = binary.BigEndian.Uint64(sent[16:])
		sent = sent[extendedRequestBytes:]
		if cmd == cmdWrite || flags&cmdFlagPayloadLen != 0 {
			sent = sent[min(n, uint64(len(sent))):]
		}
	}
	for len(got) > 0 {
		if len(got) < extendedReplyBytes || binary.BigEndian.Uint32(got) != extendedReplyMagic {
			t.Fatalf("reply begins with %x", got[:min(len(got), extendedReplyBytes)])
		}
		cookie, n := binary.BigEndian.Uint64(got[8:]), binary.BigEndian.Uint64(got[24:])
		off, known := offsets[cookie]
		if !known || off != binary.BigEndian.Uint64(got[16:]) {
			t.Fatalf("reply to %#x at %d, which was not asked, or has been answered", cookie, binary.BigEndian.Uint64(got[16:]))
		}
		if binary.BigEndian.Uint16(got[4:])&replyFlagDone != 0 {
			delete(offsets, cookie)
		}
		if got = got[extendedReplyBytes:]; n > uint64(len(got)) {
			t.Fatalf("reply with %d bytes, want %d", len(got), n)
		}
		got = got[n:]
	}
}

// checkReplies makes sure that got consists of whole replies to the requests in sent.
func checkReplies(t *testing.T, sent, got []byte) {
	readBytes := map[uint64]int{} // by cookie; -1: known, and no read
	for len(sent) >= requestBytes && binary.BigEndian.Uint32(sent) == requestMagic {
		cmd, cookie, n := binary.BigEndian.Uint16(sent[6:]), binary.BigEndian.Uint64(sent[8:]), int(binary.BigEndian.Uint32(sent[24:]))
		sent = sent[requestBytes:]
		if _, again := readBytes[cookie]; again {
			return // whose reply is whose cannot be told
		}
		readBytes[cookie] = -1
		switch cmd {
		case cmdRead:
			readBytes[cookie] = n
		case cmdWrite:
			sent = sent[min(n, len(sent)):]
		}
	}
	for len(got) > 0 {
		if len(got) < simpleReplyBytes || binary.BigEndian.Uint32(got) != simpleReplyMagic {
			t.Fatalf("reply begins with %x", got[:min(len(got), simpleReplyBytes)])
		}
		cookie, errno := binary.BigEndian.Uint64(got[8:]), binary.BigEndian.Uint32(got[4:])
		n, known := readBytes[cookie]
		if !known {
			t.Fatalf("reply to %#x, which was not asked, or a second one", cookie)
		}
		delete(readBytes, cookie)
		got = got[simpleReplyBytes:]
		if errno == 0 && n > 0 {
			if len(got) < n {
				t.Fatalf("reply with %d bytes of data, want %d", len(got), n)
			}
			got = got[n:]
		}
	}
}
