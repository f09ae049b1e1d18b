package nbdlocal

import (
	"sync/atomic"
	"time"
)

// pace remembers how long the device takes for each kind of request, to decide
// whether it is worth waking another worker before carrying one out. It is shared by
// all connections of a device and safe for concurrent use; lost updates do no harm.
type pace struct {
	averages [paceKinds]atomic.Int64 // nanoseconds, times averageWeight
}

// Kinds of request that take similar times.
const (
	paceRead = iota
	paceReadLarge
	paceWrite
	paceWriteLarge
	paceFlush
	paceOther
	paceKinds
)

const (
	// slowNanos is where waiting for the device outweighs waking another thread
	// and moving the data to its processor.
	slowNanos = 40_000
	// sampleLimitNanos is how much one request can count for: less than it takes
	// to pass for slow, so that a thread that happened to lose its processor
	// doesn't make the device look slow, and several in a row do.
	sampleLimitNanos = 400_000
	averageWeight    = 16
	largeBytes       = 64 << 10
)

// kindOf returns the kind of a request.
func kindOf(cmd, flags uint16, n int) int {
	switch {
	case cmd == cmdFlush || flags&cmdFlagFUA != 0 && cmd != cmdRead:
		return paceFlush
	case cmd == cmdRead && n < largeBytes:
		return paceRead
	case cmd == cmdRead:
		return paceReadLarge
	case cmd == cmdWrite && n < largeBytes:
		return paceWrite
	case cmd == cmdWrite:
		return paceWriteLarge
	}
	return paceOther
}

// slow reports whether requests of a kind are expected to keep a thread waiting.
func (p *pace) slow(kind int) bool {
	return p.averages[kind].Load() > slowNanos*averageWeight
}

// took records how long a request took.
func (p *pace) took(kind int, d time.Duration) {
	sample := min(int64(d), sampleLimitNanos)
	sum := p.averages[kind].Load()
	p.averages[kind].Store(sum + sample - sum/averageWeight)
}
