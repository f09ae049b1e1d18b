package nbdlocal

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

func TestHandshake_Options(t *testing.T) {
	const size = 3*memPage + 5
	exportInfo := func(flags uint16) string {
		b := binary.BigEndian.AppendUint16(nil, infoExport)
		b = binary.BigEndian.AppendUint64(b, size)
		return string(binary.BigEndian.AppendUint16(b, flags))
	}
	const plain = flagHasFlags | flagSendFlush | flagSendFUA | flagSendTrim | flagSendWriteZeroes | flagCanMultiConn | flagSendFastZero | flagSendCache
	blockSize := "\x00\x03\x00\x00\x00\x01\x00\x00\x10\x00\x02\x00\x00\x00"
	allocation0 := optReply{repMetaContext, "\x00\x00\x00\x00base:allocation"}
	allocation1 := optReply{repMetaContext, "\x00\x00\x00\x01base:allocation"}
	depth0 := optReply{repMetaContext, "\x00\x00\x00\x00qemu:allocation-depth"}
	depth2 := optReply{repMetaContext, "\x00\x00\x00\x02qemu:allocation-depth"}
	ack := optReply{kind: repAck}
	refused := func(kind uint32) []optReply { return []optReply{{kind: kind}} }
	for _, tc := range []struct {
		name       string
		structured bool
		option     uint32
		data       []byte
		want       []optReply // the text of an error isn't compared
	}{
		{name: "list", option: optList, want: []optReply{{repServer, "\x00\x00\x00\x03vola test's volume"}, ack}},
		{name: "list with data", option: optList, data: []byte("x"), want: refused(repErrInvalid)},
		{name: "structured replies", option: optStructuredReply, want: []optReply{ack}},
		{name: "structured replies with data", option: optStructuredReply, data: []byte("x"), want: refused(repErrInvalid)},
		{name: "TLS without a certificate", option: optStartTLS, want: refused(repErrPolicy)},
		{name: "extended headers", option: optExtendedHeaders, want: []optReply{ack}},
		{name: "extended headers after structured replies", structured: true, option: optExtendedHeaders, want: []optReply{ack}},
		{name: "extended headers with data", option: optExtendedHeaders, data: []byte("x"), want: refused(repErrInvalid)},
		{name: "unknown", option: 4711, data: []byte("whatever"), want: refused(repErrUnsup)},
		{name: "too long", option: optInfo, data: make([]byte, maxOptionBytes+1), want: refused(repErrTooBig)},

		{name: "info", option: optInfo, data: infoData(""), want: []optReply{{repInfo, exportInfo(plain)}, ack}},
		{name: "info by name", option: optInfo, data: infoData("vol"), want: []optReply{{repInfo, exportInfo(plain)}, ack}},
		{name: "info, structured", structured: true, option: optInfo, data: infoData(""), want: []optReply{{repInfo, exportInfo(plain | flagSendDF)}, ack}},
		{name: "all info", option: optInfo, data: infoData("", infoName, infoBlockSize, 99, infoDescription, infoName),
			want: []optReply{{repInfo, exportInfo(plain)}, {repInfo, "\x00\x01vol"}, {repInfo, blockSize}, {repInfo, "\x00\x02a test's volume"}, ack}},
		{name: "info of another export", option: optInfo, data: infoData("other"), want: refused(repErrUnknown)},
		{name: "info without data", option: optInfo, want: refused(repErrInvalid)},
		{name: "info cut short", option: optInfo, data: infoData("vol", infoName)[:8], want: refused(repErrInvalid)},
		{name: "info with a name past the end", option: optInfo, data: []byte("\xff\xff\xff\xffxy"), want: refused(repErrInvalid)},
		{name: "info with too many kinds", option: optInfo, data: append(appendString(nil, ""), 0xff, 0xff, 0, 1), want: refused(repErrInvalid)},
		{name: "info with a name that isn't UTF-8", option: optInfo, data: infoData("\xff"), want: refused(repErrInvalid)},
		{name: "info with a name too long", option: optInfo, data: infoData(strings.Repeat("x", maxNameBytes+1)), want: refused(repErrInvalid)},

		{name: "contexts before structured replies", option: optListMetaContext, data: contextData(""), want: refused(repErrInvalid)},
		{name: "all contexts", structured: true, option: optListMetaContext, data: contextData(""), want: []optReply{allocation0, depth0, ack}},
		{name: "contexts of a namespace", structured: true, option: optListMetaContext, data: contextData("", "base:"), want: []optReply{allocation0, ack}},
		{name: "contexts of another namespace", structured: true, option: optListMetaContext, data: contextData("", "qemu:", "base:x"), want: []optReply{depth0, ack}},
		{name: "contexts of namespaces that aren't there", structured: true, option: optListMetaContext, data: contextData("", "qemux:", "x-y:z"), want: []optReply{ack}},
		{name: "contexts of another export", structured: true, option: optListMetaContext, data: contextData("other"), want: refused(repErrUnknown)},
		{name: "select", structured: true, option: optSetMetaContext, data: contextData("vol", "x:y", "base:allocation"), want: []optReply{allocation1, ack}},
		{name: "select all there are", structured: true, option: optSetMetaContext, data: contextData("vol", "qemu:allocation-depth", "base:allocation"), want: []optReply{allocation1, depth2, ack}},
		{name: "select nothing", structured: true, option: optSetMetaContext, data: contextData(""), want: []optReply{ack}},
		{name: "select a wildcard", structured: true, option: optSetMetaContext, data: contextData("", "base:"), want: []optReply{ack}},
		{name: "too many queries", structured: true, option: optSetMetaContext, data: append(appendString(nil, ""), 0xff, 0xff, 0xff, 0xff), want: refused(repErrInvalid)},
		{name: "query past the end", structured: true, option: optSetMetaContext, data: contextData("", "base:x")[:15], want: refused(repErrInvalid)},
		{name: "bytes after the queries", structured: true, option: optSetMetaContext, data: append(contextData(""), 1), want: refused(repErrInvalid)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			server := NewServer(newMemDevice(size), Options{Description: "a test's volume"})
			c, _ := exportsClient(t, exportsOf(t, "vol", server, ExportsOptions{}))
			c.greet(flagFixedNewstyle | flagNoZeroes)
			if tc.structured {
				c.option(optStructuredReply, nil)
			}
			got := c.option(tc.option, tc.data)
			for i, r := range got {
				if r.kind&(1<<31) != 0 {
					if r.payload == "" {
						t.Error("an error without a text")
					}
					got[i].payload = ""
				}
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
			if got := c.option(optAbort, []byte("ignored")); !slices.Equal(got, []optReply{ack}) {
				t.Errorf("abort: %+v", got)
			}
			if n, err := c.conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Errorf("after abort: %d bytes, %v; want the end", n, err)
			}
		})
	}
}

func TestHandshake_ReadOnly(t *testing.T) {
	for _, tc := range []struct {
		name           string
		device, option bool
	}{{"device", true, false}, {"option", false, true}} {
		t.Run(tc.name, func(t *testing.T) {
			dev := newMemDevice(mib)
			dev.readOnly = tc.device
			c := unixClient(t, NewServer(dev, Options{ReadOnly: tc.option}))
			c.enter(false)
			if want := uint16(flagHasFlags | flagReadOnly | flagSendFlush | flagSendFUA | flagCanMultiConn | flagSendCache); c.flags != want {
				t.Errorf("flags %#x, want %#x", c.flags, want)
			}
		})
	}
}

// TestHandshake_ExportName enters the transmission phase the old way.
func TestHandshake_ExportName(t *testing.T) {
	for _, flags := range []uint32{0, flagFixedNewstyle, flagFixedNewstyle | flagNoZeroes} {
		c, _ := exportsClient(t, exportsOf(t, "vol", NewServer(newMemDevice(mib), Options{}), ExportsOptions{}))
		c.greet(flags)
		c.sendOption(optExportName, []byte("vol"))
		reply := make([]byte, 10)
		if flags&flagNoZeroes == 0 {
			reply = make([]byte, 10+exportNameZeroes)
		}
		if _, err := io.ReadFull(c.conn, reply); err != nil {
			t.Fatal(err)
		}
		if size := binary.BigEndian.Uint64(reply); size != mib {
			t.Errorf("flags %d: size %d, want %d", flags, size, mib)
		}
		c.write(5, []byte("abc"))
		if got := c.read(5, 3); string(got) != "abc" {
			t.Errorf("flags %d: read %q", flags, got)
		}
	}
}

func TestHandshake_ContextsAreForOneExport(t *testing.T) {
	c, _ := exportsClient(t, exportsOf(t, "vol", NewServer(newMemDevice(mib), Options{}), ExportsOptions{}))
	c.greet(flagFixedNewstyle)
	c.option(optStructuredReply, nil)
	c.structured = true
	c.option(optSetMetaContext, contextData("vol", "base:allocation"))
	c.option(optGo, infoData(""))
	if a := c.do(cmdBlockStatus, 0, 0, 5, nil); a.errno == 0 {
		t.Error("block status of an export for which no context was selected")
	}
}

// TestHandshake_HungUpOn lists what ends a connection.
func TestHandshake_HungUpOn(t *testing.T) {
	greeting := []byte{0, 0, 0, flagFixedNewstyle}
	after := func(options ...byte) []byte { return append(slices.Clone(greeting), options...) }
	for _, tc := range []struct {
		name    string
		send    []byte
		problem string
	}{
		{"unknown client flag", []byte{0, 0, 0, 8}, "client flags"},
		{"garbage", after(bytes.Repeat([]byte("garbage!"), 100)...), "option begins with"},
		{"an option of 4 GiB", after([]byte("IHAVEOPT\x00\x00\x00\x06\xff\xff\xff\xff")...), "want at most"},
		{"another export", after(optionBytes(optExportName, []byte("other"))...), "not known"},
		{"name too long", after(optionBytes(optExportName, make([]byte, maxOptionBytes+1))...), "more than"},
		{"nothing at all, late", nil, "i/o timeout"},
		{"half an option, late", after(optionBytes(optInfo, infoData(""))[:20]...), "i/o timeout"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			problems := make(chan error, 1)
			c, _ := exportsClient(t, exportsOf(t, "vol", NewServer(newMemDevice(mib), Options{}), ExportsOptions{
				HandshakeTimeout: 200 * time.Millisecond,
				ClientError:      func(err error) { problems <- err },
			}))
			_, _ = c.conn.Write(tc.send)
			if _, err := io.Copy(io.Discard, c.conn); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the server didn't hang up")
			}
			if err := <-problems; !strings.Contains(err.Error(), tc.problem) {
				t.Errorf("problem %q, want one about %q", err, tc.problem)
			}
		})
	}
}

func TestHandshake_EndlessOptions(t *testing.T) {
	problems := make(chan error, 1)
	c, _ := exportsClient(t, exportsOf(t, "", NewServer(newMemDevice(mib), Options{}),
		ExportsOptions{ClientError: func(err error) { problems <- err }}))
	c.greet(flagFixedNewstyle)
	go func() { _, _ = io.Copy(io.Discard, c.conn) }()
	for {
		if _, err := c.conn.Write(optionBytes(optList, nil)); err != nil {
			break
		}
	}
	if err := <-problems; !strings.Contains(err.Error(), "options") {
		t.Errorf("problem: %v", err)
	}
}

func TestServe_MaxClients(t *testing.T) {
	problems := make(chan error, 100)
	e := exportsOf(t, "", NewServer(newMemDevice(mib), Options{}),
		ExportsOptions{MaxClients: 2, ClientError: func(err error) { problems <- err }})
	first, socket := exportsClient(t, e)
	first.enter(false)
	dialClient(t, socket).enter(true)
	third := dialClient(t, socket)
	third.greet(flagFixedNewstyle)
	if got := third.option(optList, nil); got[0].kind != repServer {
		t.Errorf("a third client may look, but was told %+v", got)
	}
	if got := third.option(optGo, infoData("")); got[0].kind != repErrPolicy || !strings.Contains(got[0].payload, "too many clients") {
		t.Errorf("a third client was answered %+v", got)
	}
	if _, err := third.conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("a third client reads on: %v", err)
	}
	if err := <-problems; !errors.Is(err, errTooManyClients) {
		t.Errorf("problem: %v", err)
	}
	first.send(cmdDisc, 0, 0, 0, nil)
	if !eventually(func() bool {
		c := dialClient(t, socket)
		c.greet(flagFixedNewstyle)
		return c.option(optGo, infoData(""))[0].kind == repInfo
	}) {
		t.Error("no room for another client after one has left")
	}
}

// TestServe_SilentClientsKeepNobodyOut: thousands of clients that connect and say nothing
// cost the oldest of them their connections, and nobody else.
func TestServe_SilentClientsKeepNobodyOut(t *testing.T) {
	e := exportsOf(t, "", NewServer(newMemDevice(mib), Options{}), ExportsOptions{MaxClients: 1})
	served, socket := exportsClient(t, e)
	served.enter(false)
	served.send(cmdDisc, 0, 0, 0, nil)
	count := 3000
	if testing.Short() {
		count = 600
	}
	for i := range count {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		defer conn.Close()
	}
	last := dialClient(t, socket)
	last.enter(true)
	last.write(5, []byte("served"))
	e.mu.Lock()
	defer e.mu.Unlock()
	if n := e.greeting.Len(); n > maxGreeting {
		t.Errorf("%d clients in the handshake, want at most %d", n, maxGreeting)
	}
}

func TestServe_ContextEnds(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "nbd"))
	if err != nil {
		t.Fatal(err)
	}
	e := exportsOf(t, "", NewServer(newMemDevice(mib), Options{}), ExportsOptions{})
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- e.Serve(ctx, l) }()
	greeting, transmitting := dialClient(t, l.Addr().String()), dialClient(t, l.Addr().String())
	greeting.greet(flagFixedNewstyle)
	transmitting.enter(false)
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("Serve: %v, want context.Canceled", err)
	}
	for _, c := range []*client{greeting, transmitting} {
		if _, err := c.conn.Read(make([]byte, 1)); err == nil {
			t.Error("a client is still connected")
		}
	}
}

func TestServe_AfterDrain(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "nbd"))
	if err != nil {
		t.Fatal(err)
	}
	e := exportsOf(t, "", NewServer(newMemDevice(mib), Options{}), ExportsOptions{})
	stopExports(t, e)
	if err := e.Serve(context.Background(), l); err == nil {
		t.Error("Serve after Drain: no error")
	}
}

// TestServe_ManyClients: clients come and go at the same time as Drain.
func TestServe_ManyClients(t *testing.T) {
	dir := t.TempDir()
	for round := range 20 {
		socket := filepath.Join(dir, fmt.Sprint("nbd", round))
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		s := NewServer(newMemDevice(mib), Options{})
		e := exportsOf(t, "", s, ExportsOptions{})
		served := make(chan error, 1)
		go func() { served <- e.Serve(context.Background(), l) }()
		var clients sync.WaitGroup
		for range 8 {
			clients.Go(func() {
				for {
					conn, err := net.Dial("unix", socket)
					if err != nil {
						return
					}
					_, _ = conn.Write(append([]byte{0, 0, 0, 3}, optionBytes(optGo, infoData(""))...))
					_, _ = conn.Write(requestHeader(cmdRead, 0, 1, 0, 4096))
					_, _ = io.ReadFull(conn, make([]byte, 200))
					_ = conn.Close()
				}
			})
		}
		if !eventually(func() bool { return s.Stats().Reads > 0 }) {
			t.Fatal("nobody is served")
		}
		stopExports(t, e)
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		clients.Wait()
		if n := s.Stats().Connections; n != 0 {
			t.Errorf("%d connections left", n)
		}
	}
}

// flatDevice is a device without clusters, such as a raw file.
type flatDevice struct{ *memDevice }

func (d flatDevice) Info() block.Info {
	info := d.memDevice.Info()
	info.ClusterBytes = 0
	return info
}

// TestStructuredReplies_FlatDeviceIsNotSearched: finding where data ends in a flat file can
// take longer than reading it, so a read must not ask.
func TestStructuredReplies_FlatDeviceIsNotSearched(t *testing.T) {
	for _, flat := range []bool{false, true} {
		mem := newMemDevice(16 * memPage)
		var dev block.Device = mem
		if flat {
			dev = flatDevice{mem}
		}
		c := unixClient(t, NewServer(dev, Options{}))
		c.enter(true)
		want := "hole"
		if flat {
			want = "data"
		}
		a := c.do(cmdRead, 0, 0, memPage, nil)
		if a.errno != 0 || len(a.chunks) != 1 || a.chunks[0] != want {
			t.Errorf("flat %v: read of a hole: %v, chunks %v, want %s", flat, a.errno, a.chunks, want)
		}
	}
}

func TestStructuredReplies(t *testing.T) {
	dev := newMemDevice(16 * memPage)
	broken := errors.New("a text that is to reach the client")
	dev.before = func(op string, off, _ int64) error {
		if op == "read" && off == 13 {
			return broken
		}
		return nil
	}
	c := unixClient(t, NewServer(dev, Options{}))
	c.enter(true)
	c.write(4*memPage, bytes.Repeat([]byte{7}, 2*memPage))
	for _, tc := range []struct {
		name   string
		flags  uint16
		off    int64
		n      int
		chunks []string
		text   string
	}{
		{name: "small read", off: 4 * memPage, n: 100, chunks: []string{"data"}},
		{name: "large read", off: 3*memPage + 1, n: 3 * memPage, chunks: []string{"data"}},
		{name: "hole", off: 0, n: memPage, chunks: []string{"hole"}},
		{name: "hole, not to be fragmented", flags: cmdFlagDF, off: 0, n: memPage, chunks: []string{"data"}},
		{name: "nothing", n: 0, chunks: []string{"none"}},
		{name: "past the end", off: 16 * memPage, n: 1, chunks: []string{"error"}, text: "outside the device"},
		{name: "device's error", off: 13, n: 1, chunks: []string{"error"}, text: broken.Error()},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := c.do(cmdRead, tc.flags, tc.off, tc.n, nil)
			if !slices.Equal(a.chunks, tc.chunks) {
				t.Errorf("chunks %q, want %q", a.chunks, tc.chunks)
			}
			if !strings.Contains(a.text, tc.text) || (tc.text == "") != (a.errno == 0) {
				t.Errorf("error %v with text %q, want %q", a.errno, a.text, tc.text)
			}
			if a.errno == 0 && !bytes.Equal(a.data, dev.snapshot(tc.off, tc.n)) {
				t.Error("wrong bytes")
			}
		})
	}
}

func TestBlockStatus(t *testing.T) {
	const pages = 8000
	dev := newMemDevice(pages * memPage)
	c := unixClient(t, NewServer(dev, Options{}))
	c.enter(true)
	c.write(2*memPage, make([]byte, 3*memPage))
	const hole, data = stateHole | stateZero, 0
	for _, tc := range []struct {
		name  string
		flags uint16
		off   int64
		n     int
		want  [][2]uint32
	}{
		{"all kinds", 0, 0, 8 * memPage, [][2]uint32{{2 * memPage, hole}, {3 * memPage, data}, {3 * memPage, hole}}},
		{"unaligned", 0, memPage + 1, 2 * memPage, [][2]uint32{{memPage - 1, hole}, {memPage + 1, data}}},
		{"one", cmdFlagReqOne, 3 * memPage, 5 * memPage, [][2]uint32{{2 * memPage, data}}},
		{"one byte", 0, 2 * memPage, 1, [][2]uint32{{1, data}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := c.do(cmdBlockStatus, tc.flags, tc.off, tc.n, nil)
			if a.errno != 0 || !slices.Equal(a.status, tc.want) {
				t.Errorf("status %v (%v), want %v", a.status, a.errno, tc.want)
			}
		})
	}
	for i := int64(0); i < pages; i += 2 {
		c.write(i*memPage, []byte{1})
	}
	a := c.do(cmdBlockStatus, 0, 0, pages*memPage, nil)
	if len(a.status) < 1000 || len(a.status) > smallBytes/8 {
		t.Errorf("%d descriptors of a device of %d pieces; want as many as a buffer holds", len(a.status), pages)
	}
	for i, s := range a.status {
		if i >= 5 && (s[0] != memPage || (s[1] == data) != (i%2 == 0)) {
			t.Fatalf("descriptor %d: %v", i, s)
		}
	}
}

// nonsense is a device whose map never gets anywhere.
type nonsense struct{ *memDevice }

func (nonsense) Map(off, _ int64) (block.Extent, error) { return block.Extent{Off: off}, nil }

func TestBlockStatus_DeviceWithNonsense(t *testing.T) {
	c := unixClient(t, NewServer(nonsense{newMemDevice(mib)}, Options{}))
	c.enter(true)
	if a := c.do(cmdBlockStatus, 0, 0, mib, nil); a.errno == 0 {
		t.Errorf("status %v, want an error", a.status)
	}
}
