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

const (
	watchInterval = 2 * time.Millisecond
	// watchPatience is for how many intervals in which nothing happens the watch goes on,
	// so that a steady trickle doesn't wake it each time.
	watchPatience = 50
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
	timer := time.NewTicker(watchInterval)
	defer timer.Stop()
	quiet := 0
	for {
		select {
		case <-stop:
			return
		case <-timer.C:
		}
		quiet++
		if s.nudgeAll() {
			quiet = 0
		}
		if quiet < watchPatience {
			continue
		}
		timer.Stop()
		w.asleep.Store(true)
		select {
		case <-stop:
			return
		case <-w.alarm:
		}
		timer.Reset(watchInterval)
		quiet = 0
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
