package nbdlocal

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// TestExports_ByName: clients see every export, and reach the one that they name.
func TestExports_ByName(t *testing.T) {
	e := NewExports(ExportsOptions{})
	devices := map[string]*memDevice{"a": newMemDevice(mib), "b": newMemDevice(2 * mib)}
	for _, name := range []string{"a", "b"} {
		if err := e.Add(name, NewServer(devices[name], Options{Description: "disk " + name, ReadOnly: name == "b"})); err != nil {
			t.Fatal(err)
		}
	}
	c, socket := exportsClient(t, e)
	c.greet(flagFixedNewstyle)
	want := []optReply{{repServer, "\x00\x00\x00\x01adisk a"}, {repServer, "\x00\x00\x00\x01bdisk b"}, {kind: repAck}}
	if got := c.option(optList, nil); !slices.Equal(got, want) {
		t.Errorf("list: %+v", got)
	}
	if got := c.option(optGo, infoData("")); got[0].kind != repErrUnknown {
		t.Errorf("no name, of two: %+v", got)
	}
	c.goTo("a")
	c.write(0, []byte("in a"))
	other := dialClient(t, socket)
	other.greet(flagFixedNewstyle)
	other.goTo("b")
	if other.size != 2*mib || other.flags&flagReadOnly == 0 || c.flags&flagReadOnly != 0 {
		t.Errorf("b: %d bytes, flags %#x; a: flags %#x", other.size, other.flags, c.flags)
	}
	if got := other.read(0, 4); string(got) == "in a" {
		t.Error("one export's write is seen in another")
	}
	if got := devices["a"].snapshot(0, 4); string(got) != "in a" {
		t.Errorf("a holds %q", got)
	}
	if err := e.Add("", NewServer(newMemDevice(5), Options{})); err != nil { // while clients are served
		t.Fatal(err)
	}
	last := dialClient(t, socket)
	last.enter(false)
	if last.size != 5 {
		t.Errorf("no name, now that one has none: %d bytes", last.size)
	}
}

func TestExports_Names(t *testing.T) {
	e := NewExports(ExportsOptions{})
	s := NewServer(newMemDevice(mib), Options{})
	for _, tc := range []struct {
		name string
		want error
	}{
		{"disk", nil}, {"", nil}, {strings.Repeat("x", maxNameBytes), nil},
		{"disk", block.ErrExists},
		{strings.Repeat("y", maxNameBytes+1), block.ErrInvalid}, {"\xff", block.ErrInvalid}, {"a\x00b", block.ErrInvalid},
	} {
		if err := e.Add(tc.name, s); !errors.Is(err, tc.want) {
			t.Errorf("%.20q: %v, want %v", tc.name, err, tc.want)
		}
	}
}

// TestHandshake_SizeIsTheDevices: a client is told the size that the device has when it
// asks, not when it connected.
func TestHandshake_SizeIsTheDevices(t *testing.T) {
	dev := newMemDevice(mib)
	c := unixClient(t, NewServer(dev, Options{}))
	c.greet(flagFixedNewstyle)
	dev.grow(3 * mib)
	c.goTo("")
	if c.size != 3*mib {
		t.Errorf("size %d, want %d", c.size, 3*mib)
	}
	dev.grow(4 * mib) // also while it is served
	c.write(4*mib-1, []byte{1})
}

// TestServe_FlushCoversOtherConnections: what multi-conn promises. A write that was
// acknowledged on one connection is durable once a flush on another is.
func TestServe_FlushCoversOtherConnections(t *testing.T) {
	dev := newMemDevice(mib)
	var mu sync.Mutex
	var written, durable []string
	dev.before = func(op string, off, _ int64) error {
		mu.Lock()
		defer mu.Unlock()
		switch op {
		case "write":
			written = append(written, fmt.Sprint(off))
		case "flush":
			durable = slices.Clone(written)
		}
		return nil
	}
	first, socket := exportsClient(t, exportsOf(t, "", NewServer(dev, Options{}), ExportsOptions{}))
	second := dialClient(t, socket)
	first.enter(false)
	second.enter(true)
	if first.flags&second.flags&flagCanMultiConn == 0 {
		t.Error("multi-conn is not offered")
	}
	first.write(1, []byte{1})
	second.write(2, []byte{1})
	flushed := func() []string {
		mu.Lock()
		defer mu.Unlock()
		return durable
	}
	if a := second.do(cmdFlush, 0, 0, 0, nil); a.errno != 0 || !slices.Equal(flushed(), []string{"1", "2"}) {
		t.Errorf("flush: %v, durable are the writes at %v", a.errno, flushed())
	}
	first.write(3, []byte{1})
	if a := second.do(cmdWrite, cmdFlagFUA, 4, 1, []byte{1}); a.errno != 0 || len(flushed()) != 4 {
		t.Errorf("FUA: %v, durable are the writes at %v", a.errno, flushed())
	}
}

func TestLimitErrors(t *testing.T) {
	var got []string
	now := time.Duration(0)
	l := &errorLimit{report: func(err error) { got = append(got, err.Error()) }, room: errorBurst, now: func() time.Duration { return now }}
	for i := range 100 {
		l.take(fmt.Errorf("problem %d", i))
	}
	if len(got) != errorBurst || got[errorBurst-1] != "problem 9" {
		t.Fatalf("at once: %q", got)
	}
	now += 2*errorInterval + errorInterval/2
	for i := range 5 {
		l.take(fmt.Errorf("later problem %d", i))
	}
	want := []string{"later problem 0 (and 90 others before, not shown)", "later problem 1"}
	if !slices.Equal(got[errorBurst:], want) {
		t.Errorf("later: %q, want %q", got[errorBurst:], want)
	}
	now += 1000 * errorInterval
	got = nil
	for range 50 {
		l.take(errors.New("another"))
	}
	if len(got) != errorBurst || !strings.Contains(got[0], "and 3 others") {
		t.Errorf("after a long time: %q", got)
	}
}
