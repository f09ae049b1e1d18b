package nbdlocal

import (
	"sync/atomic"
	"time"
)

// watch looks after connections whose device was expected to answer at once and
// doesn't: it wakes another worker for what else there is to do. It runs only while
// requests come and go.
type watch struct {
	asleep atomic.Bool
	alarm  chan struct{}
}

// The watch looks after watchInterval at first, then after twice as long each time that
// nothing has happened, and sleeps when that would be longer than watchLongest: a request now
// and then costs a few looks, and none that waits for storage costs more.
const (
	watchInterval = 2 * time.Millisecond
	watchLongest  = 8 * time.Millisecond
)

func newWatch() watch { return watch{alarm: make(chan struct{}, 1)} }

// stir makes sure that the watch runs. It costs next to nothing when it does.
func (w *watch) stir() {
	if w.asleep.Load() && w.asleep.CompareAndSwap(true, false) {
		select {
		case w.alarm <- struct{}{}:
		default: // it has been alarmed already
		}
	}
}

// run watches until stop is closed.
func (w *watch) run(s *Server, stop <-chan struct{}) {
	interval := watchInterval
	timer := time.NewTimer(interval)
	defer timer.Stop()
	for {
		select {
		case <-stop:
			return
		case <-timer.C:
		}
		interval *= 2
		if s.nudgeAll() {
			interval = watchInterval
		}
		if interval > watchLongest {
			if !w.sleep(s, stop) {
				return
			}
			interval = watchInterval
		}
		timer.Reset(interval)
	}
}

// sleep returns when there is something to watch again, or false when stop is closed.
func (w *watch) sleep(s *Server, stop <-chan struct{}) bool {
	w.asleep.Store(true)
	// What has begun since the last look saw that the watch runs; what begins now wakes it.
	if s.nudgeAll() && w.asleep.CompareAndSwap(true, false) {
		return true
	}
	select {
	case <-stop:
		return false
	case <-w.alarm:
		return true
	}
}

// nudgeAll nudges every connection. It reports whether anything happens on any.
func (s *Server) nudgeAll() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	busy := false
	for c := range s.conns {
		busy = c.nudge() || busy
	}
	return busy
}

// nudge wakes a worker if there has been something to do since the last nudge and
// nothing was done. It reports whether anything was done, or is now.
func (c *conn) nudge() bool {
	c.mu.Lock()
	moved := c.progress != c.nudged
	c.nudged = c.progress
	waiting := c.ready.head != nil && !c.starved || c.done.head != nil && !c.sending || !c.receiving && !c.ended && !c.stalled
	able := len(c.idle) > 0 || c.workers < c.server.opts.Workers
	var help *sleeper
	if waiting && able && !moved {
		help = c.helper()
	}
	if waiting && able && !moved {
		c.server.pace.stopTrials() // or a worker that is woken would sleep again
	}
	c.mu.Unlock()
	if help != nil {
		help.wake()
	}
	return moved || waiting && able
}
