package nbdlocal

import (
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestAdvance: a signal may end a send anywhere.
func TestAdvance(t *testing.T) {
	parts := []string{"abc", "d", "efghi"}
	const whole = "abcdefghi"
	for sent := range len(whole) + 1 {
		iov := make([]unix.Iovec, len(parts))
		for i, p := range parts {
			b := []byte(p)
			iov[i].Base = &b[0]
			iov[i].SetLen(len(b))
		}
		rest := ""
		for _, v := range advance(iov, uintptr(sent)) {
			rest += string(unsafe.Slice(v.Base, v.Len))
		}
		if rest != whole[sent:] {
			t.Errorf("after %d bytes %q is left, want %q", sent, rest, whole[sent:])
		}
	}
}

func TestPace(t *testing.T) {
	var p pace
	for range 100 {
		p.took(paceRead, 2*time.Microsecond)
	}
	p.took(paceRead, time.Second)
	if p.slow(paceRead) {
		t.Error("slow after a single request that took long")
	}
	for range 3 {
		p.took(paceRead, time.Millisecond)
	}
	if !p.slow(paceRead) || p.slow(paceWrite) {
		t.Errorf("after several: reads slow %v, writes slow %v; want true, false", p.slow(paceRead), p.slow(paceWrite))
	}
	for range 50 {
		p.took(paceRead, 2*time.Microsecond)
	}
	if p.slow(paceRead) {
		t.Error("still slow after many quick requests")
	}
}

func TestKindOf(t *testing.T) {
	for _, c := range []struct {
		cmd, flags uint16
		n, want    int
	}{
		{cmdRead, 0, 4096, paceRead}, {cmdRead, cmdFlagFUA, 4096, paceRead}, {cmdRead, 0, mib, paceReadLarge},
		{cmdWrite, 0, 4096, paceWrite}, {cmdWrite, 0, mib, paceWriteLarge}, {cmdWrite, cmdFlagFUA, 4096, paceFlush},
		{cmdFlush, 0, 0, paceFlush}, {cmdTrim, 0, mib, paceOther},
	} {
		if got := kindOf(c.cmd, c.flags, c.n); got != c.want {
			t.Errorf("kind of command %d with flags %d and %d bytes is %d, want %d", c.cmd, c.flags, c.n, got, c.want)
		}
	}
}
