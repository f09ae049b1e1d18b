package nbdlocal

import (
	"testing"
	"time"
)

// spinWith has a spin see requests of a client that takes so long in each mode, and returns
// in how many of the last thousand it looked.
func spinWith(s *spin, requests int, sleeping, looking time.Duration) (looked int) {
	now := max(s.last, time.Second)
	for i := range requests {
		look := s.worthwhile(now)
		if look && i >= requests-1000 {
			looked++
		}
		if look {
			now += looking
		} else {
			now += sleeping
		}
	}
	return looked
}

// TestSpin_KeepsWhatIsFaster: looking for requests is kept where it is clearly faster, and
// given up, and taken up, as the machine changes.
func TestSpin_KeepsWhatIsFaster(t *testing.T) {
	const us = time.Microsecond
	for _, tc := range []struct {
		name              string
		sleeping, looking time.Duration
		keeps             bool
	}{
		{"faster", 40 * us, 25 * us, true},
		{"hardly faster", 40 * us, 38 * us, false},
		{"slower", 25 * us, 70 * us, false},
		{"a client that thinks for long", 10_000 * us, 10_000 * us, false},
	} {
		var s spin
		looked := spinWith(&s, 20_000, tc.sleeping, tc.looking)
		if tc.keeps != (looked > 500) {
			t.Errorf("%s: looked for %d of 1000 requests", tc.name, looked)
		}
		if !tc.keeps && looked > spinTrial {
			t.Errorf("%s: looked for %d of 1000 requests, want at most a trial's", tc.name, looked)
		}
		// The machine changes: what was right becomes wrong, and the other way round.
		looked = spinWith(&s, 20_000, tc.looking, tc.sleeping)
		if want := tc.looking*9/10 > tc.sleeping; want != (looked > 500) {
			t.Errorf("%s, turned round: looked for %d of 1000 requests", tc.name, looked)
		}
	}
}

// TestSpin_GivesUpSoon: a client that suddenly thinks for long costs a few looks in vain,
// not all until the next trial.
func TestSpin_GivesUpSoon(t *testing.T) {
	s := spin{phase: spinSettled, on: true}
	server, _ := socketPair(t)
	sock, err := adoptSocket(server)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(sock.close)
	rx := receiver{in: make([]byte, 10)}
	rx.iov[0].Base = &rx.in[0]
	rx.iov[0].SetLen(len(rx.in))
	rx.msg.Iov = &rx.iov[0]
	rx.msg.SetIovlen(1)
	looks := 0
	for range 1000 {
		if now := clock(); s.worthwhile(now) {
			looks++
			if _, err := s.receive(&sock, &rx.msg, now); !wouldBlock(err) {
				t.Fatalf("receive: %v", err)
			}
		}
	}
	if looks != spinMisses {
		t.Errorf("looked %d times in vain, want %d", looks, spinMisses)
	}
}
