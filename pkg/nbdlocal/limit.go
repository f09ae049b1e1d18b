package nbdlocal

import (
	"fmt"
	"sync"
	"time"
)

const (
	// errorBurst is how many errors LimitErrors passes on at once, errorInterval after
	// how long there is room for another.
	errorBurst    = 10
	errorInterval = 10 * time.Second
)

// LimitErrors returns a function for ExportsOptions.ClientError that passes errors on to
// report, but no more than ten at once and six a minute: how many were kept back is
// said with the next that isn't. It is safe for concurrent use; report is called by one
// at a time.
func LimitErrors(report func(error)) func(error) {
	l := &errorLimit{report: report, room: errorBurst, now: clock}
	l.since = l.now()
	return l.take
}

type errorLimit struct {
	report func(error)
	now    func() time.Duration

	mu    sync.Mutex
	room  int           // errors that may be passed on now
	since time.Duration // when room was last looked at
	kept  int           // errors kept back since the last one passed on
}

func (l *errorLimit) take(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if more := (now - l.since) / errorInterval; more > 0 {
		l.room = int(min(time.Duration(l.room)+more, errorBurst))
		l.since += more * errorInterval
	}
	if l.room == 0 {
		l.kept++
		return
	}
	l.room--
	if l.kept > 0 {
		err = fmt.Errorf("%w (and %d others before, not shown)", err, l.kept)
		l.kept = 0
	}
	l.report(err)
}
