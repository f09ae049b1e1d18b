package nbdlocal

import (
	"time"

	"golang.org/x/sys/unix"
)

// spin decides whether to look for the next request for a moment before sleeping until
// it comes. A client that sends one request at a time, the next as soon as it has the
// answer, may be served up to twice as fast that way, for falling asleep, being woken and
// coming to run take longer than its turn; or slower, if the machine is busy and the
// client needs this very processor. So both are tried, for a few requests each, and what
// was faster is kept for many; sleeping unless looking is clearly better. It is not for
// several requests in flight: sleeping lets more of them arrive.
type spin struct {
	phase  spinPhase
	done   int              // requests of the phase
	took   [2]time.Duration // by the trials, sleeping and looking
	on     bool             // what the trials decided
	misses int              // in a row, of looking in vain
	last   time.Duration    // when the last request began to be waited for; 0 if it doesn't count
}

type spinPhase uint8

const (
	spinTrialSleep spinPhase = iota // also how trials are numbered in spin.took
	spinTrialLook
	spinSettled
)

const (
	// spinTime is how long to look: what a request may cost in vain.
	spinTime = 50 * time.Microsecond
	// spinSample is the most that one request counts for in a trial: from there on it
	// is the client's time, or an accident, that is measured.
	spinSample = 4 * spinTime
	// spinTrial and spinKeep are how many requests are tried, and how many follow.
	spinTrial = 64
	spinKeep  = 4096
	// spinMisses is how many misses in a row end looking before the next trial.
	spinMisses = 16
)

// interrupt says that the next request does not follow on one that came alone.
func (s *spin) interrupt() { s.last = 0 }

// worthwhile reports whether to look for the next request, which is going to be waited
// for since now.
func (s *spin) worthwhile(now time.Duration) bool {
	if s.last > 0 {
		s.count(min(now-s.last, spinSample))
	}
	s.last = now
	switch s.phase {
	case spinTrialSleep:
		return false
	case spinTrialLook:
		return true
	}
	return s.on
}

// count takes note of how long a request took, from one wait to the next.
func (s *spin) count(d time.Duration) {
	if s.phase != spinSettled {
		s.took[s.phase] += d
	}
	if s.done++; s.done < s.length() {
		return
	}
	s.done = 0
	switch s.phase {
	case spinTrialSleep:
		s.phase = spinTrialLook
	case spinTrialLook:
		s.phase = spinSettled
		s.on = s.took[spinTrialLook] < s.took[spinTrialSleep]*9/10
	case spinSettled:
		s.phase, s.took = spinTrialSleep, [2]time.Duration{}
	}
}

// length is how many requests the phase lasts.
func (s *spin) length() int {
	if s.phase == spinSettled {
		return spinKeep
	}
	return spinTrial
}

// receive looks for something to receive. It returns EAGAIN when nothing has come in time.
func (s *spin) receive(from *socket, msg *unix.Msghdr, since time.Duration) (int, error) {
	for {
		n, err := from.receive(msg, unix.MSG_DONTWAIT)
		if !wouldBlock(err) {
			s.misses = 0
			return n, err
		}
		if clock()-since > spinTime {
			if s.misses++; s.misses >= spinMisses {
				s.misses, s.on = 0, false
			}
			return 0, err
		}
	}
}
