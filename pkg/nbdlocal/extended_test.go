package nbdlocal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"net"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

func TestExtendedHeaders_Negotiation(t *testing.T) {
	c := unixClient(t, NewServer(newMemDevice(mib), Options{}))
	c.greet(flagFixedNewstyle | flagNoZeroes)
	refused := func(option uint32, want uint32) {
		t.Helper()
		if got := c.option(option, nil); got[0].kind != want || got[0].payload == "" {
			t.Errorf("option %d answered %+v, want %#x and a text", option, got, want)
		}
	}
	flags := func() uint16 {
		t.Helper()
		return binary.BigEndian.Uint16([]byte(c.option(optInfo, infoData(""))[0].payload[10:]))
	}
	if c.option(optExtendedHeaders, nil)[0].kind != repAck {
		t.Fatal("extended headers are refused")
	}
	refused(optExtendedHeaders, repErrInvalid)
	refused(optStructuredReply, repErrExtHeaderReq)
	if got := flags(); got&flagSendDF == 0 || got&flagBlockStatusPayload != 0 {
		t.Errorf("flags %#x before a context is selected", got)
	}
	c.option(optSetMetaContext, contextData("", "base:allocation"))
	if got := flags(); got&flagBlockStatusPayload == 0 {
		t.Errorf("flags %#x with a context selected", got)
	}
	c.sendOption(optExportName, nil)
	if _, err := io.ReadFull(c.conn, make([]byte, 10)); err == nil {
		t.Error("EXPORT_NAME after extended headers is answered")
	}
}

// TestExtendedHeaders_EveryCommand: each command works in its extended form, and each
// reply has the extended form, too.
func TestExtendedHeaders_EveryCommand(t *testing.T) {
	dev := newMemDevice(64 * memPage)
	c := unixClient(t, NewServer(dev, Options{}))
	c.enterExtended()
	for _, n := range []int{1, 513, smallBytes, largeBytes, granuleBytes + 1, mib} {
		want := bytes.Repeat([]byte{byte(n), 7}, n)[:n]
		c.write(100, want)
		if got := c.read(100, n); !bytes.Equal(got, want) {
			t.Errorf("%d bytes read back differently", n)
		}
	}
	if a := c.do(cmdRead, 0, 60*memPage, memPage, nil); !slices.Equal(a.chunks, []string{"hole"}) {
		t.Errorf("read of a hole: %v", a.chunks)
	}
	if a := c.do(cmdRead, 0, 0, 0, nil); !slices.Equal(a.chunks, []string{"none"}) {
		t.Errorf("read of nothing: %v", a.chunks)
	}
	for _, cmd := range []uint16{cmdFlush, cmdTrim, cmdWriteZeroes, cmdCache} {
		n := 0
		if cmd != cmdFlush {
			n = memPage
		}
		if a := c.do(cmd, 0, 0, n, nil); a.errno != 0 || !slices.Equal(a.chunks, []string{"none"}) {
			t.Errorf("command %d: %v, chunks %v", cmd, a.errno, a.chunks)
		}
	}
	if a := c.do(cmdRead, 0, dev.size, 1, nil); a.errno != syscall.EINVAL || a.text == "" {
		t.Errorf("read past the end: %v %q", a.errno, a.text)
	}
}

// TestExtendedHeaders_LongLengths: one request reaches as far as the device, beyond the
// 4 GiB of a compact header.
func TestExtendedHeaders_LongLengths(t *testing.T) {
	const size = 6 << 30
	dev := newMemDevice(size)
	asked := make(chan [2]int64, 10)
	dev.before = func(op string, off, n int64) error {
		if op == "zero" || op == "discard" {
			asked <- [2]int64{off, n}
			return block.ErrNoSpace // it is enough to be asked
		}
		return nil
	}
	c := unixClient(t, NewServer(dev, Options{}))
	c.enterExtended()
	last := int64(size - memPage)
	c.write(last, []byte{1})
	a := c.do(cmdBlockStatus, 0, 0, size, nil)
	want := [][2]uint64{{uint64(last), stateHole | stateZero}, {memPage, 0}}
	if a.errno != 0 || !slices.Equal(a.statuses[1], want) {
		t.Errorf("block status of %d bytes: %v %v, want %v", int64(size), a.errno, a.statuses[1], want)
	}
	for _, cmd := range []uint16{cmdWriteZeroes, cmdTrim} {
		if a := c.do(cmd, 0, 512, size-512, nil); a.errno != syscall.ENOSPC {
			t.Fatalf("command %d: %v, want the device's answer", cmd, a.errno)
		}
		if got, want := <-asked, ([2]int64{512, size - 512}); got != want {
			t.Errorf("command %d: the device was asked for %v, want %v", cmd, got, want)
		}
	}
	for _, n := range []uint64{size + 1, 1 << 63, math.MaxUint64} {
		for _, cmd := range []uint16{cmdRead, cmdWriteZeroes, cmdTrim, cmdCache, cmdBlockStatus} {
			if errno := c.extended1(cmd, 0, 0, n, nil).errno; errno == 0 || errno == syscall.EIO {
				t.Errorf("command %d of %d bytes answered %v", cmd, n, errno)
			}
		}
	}
	if len(asked) > 0 {
		t.Errorf("the device was asked for %v", <-asked)
	}
}

// extended1 sends one request with a length of any size, and waits for its reply.
func (c *client) extended1(cmd, flags uint16, off int64, n uint64, payload []byte) answer {
	c.tb.Helper()
	c.cookie++
	c.sent[c.cookie] = command{cmd: cmd, off: off}
	if _, err := c.conn.Write(append(extendedHeader(cmd, flags, c.cookie, off, n), payload...)); err != nil {
		c.tb.Fatal(err)
	}
	a, err := c.receive()
	if err != nil {
		c.tb.Fatalf("reply to command %d: %v", cmd, err)
	}
	return a
}

// TestExtendedHeaders_Payloads: what follows a header is taken off the connection whether
// it makes sense or not.
func TestExtendedHeaders_Payloads(t *testing.T) {
	dev := newMemDevice(16 * memPage)
	c := unixClient(t, NewServer(dev, Options{}))
	c.enterExtended()
	query := func(n uint64, ids ...uint32) []byte {
		b := binary.BigEndian.AppendUint64(nil, n)
		for _, id := range ids {
			b = binary.BigEndian.AppendUint32(b, id)
		}
		return b
	}
	for _, tc := range []struct {
		name    string
		cmd     uint16
		payload []byte
		want    syscall.Errno
		ids     []uint32
	}{
		{"read", cmdRead, []byte("hello"), syscall.EINVAL, nil},
		{"flush", cmdFlush, make([]byte, 100_000), syscall.EINVAL, nil},
		{"unknown command", 77, []byte("hello"), syscall.EINVAL, nil},
		{"status of one context", cmdBlockStatus, query(memPage, 2), 0, []uint32{2}},
		{"status of both", cmdBlockStatus, query(memPage, 2, 1), 0, []uint32{1, 2}},
		{"status of one twice", cmdBlockStatus, query(memPage, 1, 1), syscall.EINVAL, nil},
		{"status of none", cmdBlockStatus, query(memPage), syscall.EINVAL, nil},
		{"status of an unknown one", cmdBlockStatus, query(memPage, 3), syscall.EINVAL, nil},
		{"status of number 0", cmdBlockStatus, query(memPage, 0), syscall.EINVAL, nil},
		{"status of too many", cmdBlockStatus, query(memPage, 1, 2, 3), syscall.EINVAL, nil},
		{"status, odd", cmdBlockStatus, query(memPage, 1, 2)[:15], syscall.EINVAL, nil},
		{"status, cut short", cmdBlockStatus, []byte{1, 2, 3}, syscall.EINVAL, nil},
		{"status of nothing", cmdBlockStatus, query(0, 1), syscall.EINVAL, nil},
		{"status past the end", cmdBlockStatus, query(1<<40, 1), syscall.EINVAL, nil},
		{"status of all there is", cmdBlockStatus, query(math.MaxUint64, 1), syscall.EINVAL, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := c.extended1(tc.cmd, cmdFlagPayloadLen, 0, uint64(len(tc.payload)), tc.payload)
			if a.errno != tc.want {
				t.Errorf("answered %v %s, want %v", a.errno, a.text, tc.want)
			}
			if len(a.statuses) != len(tc.ids) {
				t.Errorf("status of %d contexts, want %v", len(a.statuses), tc.ids)
			}
			for _, id := range tc.ids {
				if len(a.statuses[id]) != 1 {
					t.Errorf("context %d: %v", id, a.statuses[id])
				}
			}
			c.read(0, 1)
		})
	}
	if a := c.extended1(cmdWrite, 0, 0, 5, []byte("hello")); a.errno != 0 || string(c.read(0, 5)) != "hello" {
		t.Errorf("write whose payload no flag announces, as QEMU's: %v", a.errno)
	}
	if a := c.extended1(cmdWrite, 0, 0, 0, nil); a.errno != 0 {
		t.Errorf("write of nothing: %v", a.errno)
	}
}

// layeredDevice has clusters of one page that are, in turn, in no layer, in the top one,
// zero in the second, and in the third.
type layeredDevice struct{ *memDevice }

func (d layeredDevice) Map(off, n int64) (block.Extent, error) {
	end := min(off-off%memPage+memPage, off+n)
	e := block.Extent{Off: off, Len: end - off, FileOff: -1}
	switch off / memPage % 4 {
	case 0:
		e.Depth = 7 // means nothing
	case 1:
		e.State, e.Depth = block.Data, 0
	case 2:
		e.State, e.Depth = block.Zero, 1
	case 3:
		e.State, e.Depth = block.Data, 2
	}
	return e, nil
}

// TestBlockStatus_Depth: qemu:allocation-depth numbers the layers, alone and beside
// base:allocation, in both forms of reply.
func TestBlockStatus_Depth(t *testing.T) {
	const hole = stateHole | stateZero
	allocation := [][2]uint64{{memPage, hole}, {memPage, 0}, {memPage, hole}, {memPage, 0}, {memPage, hole}}
	depth := [][2]uint64{{memPage, 0}, {memPage, 1}, {memPage, 2}, {memPage, 3}, {memPage, 0}}
	for _, extended := range []bool{false, true} {
		for _, queries := range [][]string{{"qemu:allocation-depth"}, {"base:allocation"}, {"qemu:allocation-depth", "base:allocation"}} {
			c := unixClient(t, NewServer(layeredDevice{newMemDevice(5 * memPage)}, Options{}))
			c.greet(flagFixedNewstyle | flagNoZeroes)
			option := uint32(optStructuredReply)
			if extended {
				option = optExtendedHeaders
			}
			c.option(option, nil)
			c.structured, c.extended = true, extended
			c.option(optSetMetaContext, contextData("", queries...))
			c.goTo("")
			a := c.do(cmdBlockStatus, 0, 0, 5*memPage, nil)
			if len(a.statuses) != len(queries) {
				t.Errorf("extended %v: status of %d contexts, want those of %v", extended, len(a.statuses), queries)
			}
			for id, want := range map[uint32][][2]uint64{1: allocation, 2: depth} {
				if got, asked := a.statuses[id]; asked && !slices.Equal(got, want) {
					t.Errorf("extended %v, %v: context %d: %v, want %v", extended, queries, id, got, want)
				}
			}
			a = c.do(cmdBlockStatus, cmdFlagReqOne, memPage, 3*memPage, nil)
			for id, list := range a.statuses {
				if len(list) != 1 || list[0][0] != memPage {
					t.Errorf("extended %v, %v: context %d, one asked for: %v", extended, queries, id, list)
				}
			}
		}
	}
}

// TestBlockStatus_FullBuffers: with more pieces than fit, each context gets as many as its
// share of the buffer holds, all of them right.
func TestBlockStatus_FullBuffers(t *testing.T) {
	const pages = 4000
	for _, extended := range []bool{false, true} {
		c := unixClient(t, NewServer(layeredDevice{newMemDevice(pages * memPage)}, Options{}))
		if extended {
			c.enterExtended()
		} else {
			c.greet(flagFixedNewstyle)
			c.option(optStructuredReply, nil)
			c.structured = true
			c.option(optSetMetaContext, contextData("", "base:allocation", "qemu:allocation-depth"))
			c.goTo("")
		}
		a := c.do(cmdBlockStatus, 0, 0, pages*memPage, nil)
		for id, list := range a.statuses {
			if len(list) < 400 || len(list) > smallBytes/8 {
				t.Errorf("extended %v: context %d has %d descriptors", extended, id, len(list))
			}
			for i, d := range list {
				if d[0] != memPage || id == 2 && d[1] != uint64(i%4) || id == 1 && (d[1] == 0) != (i%2 == 1) {
					t.Fatalf("extended %v: context %d, descriptor %d: %v", extended, id, i, d)
				}
			}
		}
		if len(a.statuses) != 2 {
			t.Errorf("extended %v: %d contexts", extended, len(a.statuses))
		}
	}
}

// TestCache: the cache command reads what it is asked for, in bounds, and changes nothing.
func TestCache(t *testing.T) {
	dev := newMemDevice(100 * mib)
	var read atomic.Int64
	dev.before = func(op string, off, n int64) error {
		switch {
		case op != "read":
			return errors.New("not a read")
		case off != read.Load() || n > cachePieceBytes:
			return errors.New("not the next piece")
		}
		read.Add(n)
		return nil
	}
	c := unixClient(t, NewServer(dev, Options{ReadOnly: true}))
	c.enter(false)
	for _, tc := range []struct{ n, want int64 }{{0, 0}, {1, 1}, {5*mib + 7, 5*mib + 7}, {100 * mib, cacheBytes}} {
		read.Store(0)
		if a := c.do(cmdCache, 0, 0, int(tc.n), nil); a.errno != 0 || read.Load() != tc.want {
			t.Errorf("cache of %d bytes: %v, %d bytes read, want %d", tc.n, a.errno, read.Load(), tc.want)
		}
	}
	if a := c.do(cmdCache, cmdFlagNoHole, 0, 1, nil); a.errno != syscall.EINVAL {
		t.Errorf("cache with an unknown flag answered %v", a.errno)
	}
}

// TestExtendedHeaders_HostileStreams: whatever a connection with extended headers
// receives, cut into whatever pieces, the server neither answers what was not asked nor
// goes on after nonsense.
func TestExtendedHeaders_HostileStreams(t *testing.T) {
	rnd := testenv.Rand(t)
	for range 60 {
		problems := make(chan error, 1)
		e := exportsOf(t, "", NewServer(newMemDevice(mib), Options{}), ExportsOptions{ClientError: func(err error) { problems <- err }})
		c, _ := exportsClient(t, e)
		c.enterExtended()
		c.write(0, []byte("alive"))
		var sent []byte
		for range 1 + rnd.IntN(5) {
			n := rnd.IntN(3000)
			sent = append(sent, extendedHeader(uint16(rnd.IntN(10)), uint16(rnd.IntN(64)), rnd.Uint64(), int64(rnd.IntN(2*mib)), uint64(n))...)
			sent = append(sent, make([]byte, rnd.IntN(n+1))...)
		}
		sent = append(sent, bytes.Repeat([]byte{0xee}, hostileTail)...)
		go func() {
			for len(sent) > 0 {
				n := min(1+rnd.IntN(700), len(sent))
				if _, err := c.conn.Write(sent[:n]); err != nil {
					return
				}
				sent = sent[n:]
			}
			_ = c.conn.(*net.UnixConn).CloseWrite()
		}()
		got, err := io.ReadAll(c.conn)
		if err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("the connection doesn't end: %v", err)
		}
		for len(got) >= extendedReplyBytes {
			if magic := binary.BigEndian.Uint32(got); magic != extendedReplyMagic {
				t.Fatalf("a reply begins with %#x", magic)
			}
			n := binary.BigEndian.Uint64(got[24:])
			if n > uint64(len(got)-extendedReplyBytes) {
				break // cut off by the end of the connection
			}
			got = got[extendedReplyBytes+n:]
		}
	}
}

// hostileTail is more than any request before it may claim as its payload.
const hostileTail = 40_000
