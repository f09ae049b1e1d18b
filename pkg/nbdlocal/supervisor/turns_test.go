package supervisor

import (
	"fmt"
	"sync/atomic"
	"testing"
)

// Servers that are wanted all at once start in turns, and all of them do; also when each of
// them is killed.
func TestAttach_ServersStartInTurns(t *testing.T) {
	const volumes, atOnce = 12, 2
	h := newHarness(t)
	var starting, most, turns atomic.Int32
	h.prepare = func(s *Supervisor) {
		s.turns = newTurns(atOnce)
		s.at = func(step string) {
			switch step {
			case "start: spawned":
				turns.Add(1)
				n := starting.Add(1)
				for was := most.Load(); n > was && !most.CompareAndSwap(was, n); was = most.Load() {
				}
			case "start: ready":
				starting.Add(-1)
			}
		}
	}
	h.startHere()
	errs := make(chan error, volumes)
	for i := range volumes {
		req := request(h.newImage(fmt.Sprint("v", i)))
		go func() {
			_, err := h.client.Attach(h.ctx, req)
			errs <- err
		}()
	}
	for range volumes {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if turns.Load() < volumes || most.Load() > atOnce {
		t.Errorf("%d servers started, %d at once; want %d, %d at once", turns.Load(), most.Load(), volumes, atOnce)
	}
}
