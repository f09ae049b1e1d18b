package nbdlocal

import (
	"testing"
	"time"
)

// carry has so many requests at once carried out, each of which takes so long.
func carry(p *pace, together int, d time.Duration) {
	list := make([]stretch, together)
	for i := range list {
		list[i] = p.begin()
	}
	for _, s := range list {
		s.since = clock() - d
		p.end(paceWrite, s)
	}
}

// A device that is slow only because many use it at once is used by one again.
func TestPace_Crowd(t *testing.T) {
	var p pace
	for range averageWeight {
		carry(&p, 8, time.Millisecond)
	}
	if !p.slow(paceWrite) {
		t.Fatal("not slow")
	}
	for range trialFirst {
		if !p.slow(paceWrite) {
			break
		}
		carry(&p, 8, time.Millisecond)
	}
	if p.slow(paceWrite) {
		t.Fatal("no trial")
	}
	carry(&p, 8, time.Millisecond) // workers that are still awake
	for range trialAlone {
		carry(&p, 1, 5*time.Microsecond)
	}
	carry(&p, 1, 5*time.Microsecond)
	if p.slow(paceWrite) || p.kinds[paceWrite].trying.Load() {
		t.Error("slow after a trial that found otherwise")
	}
}

// A device that is slow for one, too, stays so, and is tried less and less often.
func TestPace_SlowAlone(t *testing.T) {
	for name, alone := range map[string]int{"one connection": 1, "two connections": 2} {
		t.Run(name, func(t *testing.T) {
			var p pace
			trials, inTrial, requests := 0, 0, 0
			for requests < 4*trialLast {
				if p.slow(paceWrite) || requests < averageWeight {
					carry(&p, 32, time.Millisecond)
					requests += 32
					continue
				}
				if inTrial == 0 || !p.kinds[paceWrite].trying.Load() {
					trials++
				}
				inTrial += alone
				requests += alone
				carry(&p, alone, time.Millisecond)
			}
			if trials == 0 || inTrial > requests/50 {
				t.Errorf("%d of %d requests were carried out without help", inTrial, requests)
			}
			if got := p.kinds[paceWrite].keep.Load(); got != trialLast {
				t.Errorf("the next trial comes after %d requests, want %d", got, trialLast)
			}
		})
	}
}
