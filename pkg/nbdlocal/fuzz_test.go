package nbdlocal

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
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
		optionBytes(optSetMetaContext, contextData("vol", "base:", contextAllocation)),
		optionBytes(optListMetaContext, contextData("")),
		optionBytes(optExportName, []byte("vol")),
		optionBytes(optList, nil), optionBytes(optAbort, nil), optionBytes(optStartTLS, nil),
	} {
		f.Add(append(bytes.Clone(begin), option...))
		f.Add(append(append(bytes.Clone(begin), optionBytes(optStructuredReply, nil)...), option...))
	}
	f.Fuzz(func(t *testing.T, said []byte) {
		client := &script{Reader: bytes.NewReader(said)}
		h := handshake{client: client, export: export{name: "vol", description: "volume", info: block.Info{SizeBytes: mib}}}
		agreed, err := h.run()
		if agreed.allocation && !agreed.structured {
			t.Error("metadata context without structured replies")
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
		server, conn := socketPair(t)
		s := NewServer(newMemDevice(mib), Options{Workers: 3, BufferBytes: MinBufferBytes})
		result := make(chan error, 1)
		go func() { result <- s.ServeConn(context.Background(), server) }()
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
		if err := <-ended; err != nil {
			t.Errorf("replies: %v", err)
		}
		checkReplies(t, sent, got.Bytes())
	})
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
