package nbdlocal

import (
	"sync"
	"sync/atomic"
	"time"
)

// pace remembers how long the device takes for each kind of request, to decide
// whether it is worth waking another worker before carrying one out. It is shared by
// all connections of a device and safe for concurrent use; lost updates do no harm.
//
// Several workers at once may make the device slow themselves, by waiting for one another's
// locks and for processors; once called they would be called forever. So from time to time
// a slow device is tried again with one worker: if it answers at once then, it is not slow.
type pace struct {
	kinds  [paceKinds]paceOfKind
	busy   atomic.Int32 // requests being carried out
	trials atomic.Int32 // under way
}

// paceOfKind is the pace of one kind of request.
type paceOfKind struct {
	average atomic.Int64 // nanoseconds, times averageWeight
	beside  atomic.Int64 // requests carried out beside others, slow ones, since the last trial
	trying  atomic.Bool
	keep    atomic.Int64 // requests between trials; 0 is trialFirst

	mu    sync.Mutex
	trial paceTrial
}

// paceTrial is what has been seen since a trial began.
type paceTrial struct {
	alone, beside int // requests
	nanos         int64
}

const (
	// trialAlone is how many requests that nobody disturbs a trial needs; trialBeside is
	// after how many others it ends without them.
	trialAlone  = 8
	trialBeside = 256
	// trialLimitNanos is how much one request counts for in a trial: accidents happen.
	trialLimitNanos = 100_000
	// trialFirst and trialLast are how many requests lie between trials: each trial that
	// finds the device slow doubles them.
	trialFirst = 128
	trialLast  = 64 << 10
)

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
	k := &p.kinds[kind]
	return k.average.Load() > slowNanos*averageWeight && !k.trying.Load()
}

// stretch is a request that is being carried out.
type stretch struct {
	since time.Duration
	alone bool // no other was being carried out when it began
}

// begin says that a request is going to be carried out.
func (p *pace) begin() stretch { return stretch{alone: p.busy.Add(1) == 1, since: clock()} }

// end says that it has been, and records how long it took.
func (p *pace) end(kind int, s stretch) {
	d := clock() - s.since
	alone := p.busy.Add(-1) == 0 && s.alone
	p.took(kind, d)
	if k := &p.kinds[kind]; k.trying.Load() {
		p.try(k, d, alone)
	} else if !alone && p.slow(kind) {
		p.countToTrial(k)
	}
}

// took records how long a request took.
func (p *pace) took(kind int, d time.Duration) {
	average := &p.kinds[kind].average
	sample := min(int64(d), sampleLimitNanos)
	sum := average.Load()
	average.Store(sum + sample - sum/averageWeight)
}

// countToTrial begins a trial when it is time for one.
func (p *pace) countToTrial(k *paceOfKind) {
	if k.beside.Add(1) < max(k.keep.Load(), trialFirst) {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.trying.Load() {
		k.trial = paceTrial{}
		k.trying.Store(true)
		p.trials.Add(1)
	}
}

// try adds a request to the trial, which may end with it.
func (p *pace) try(k *paceOfKind, d time.Duration, alone bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.trying.Load() {
		return
	}
	t := &k.trial
	if alone {
		t.alone++
		t.nanos += min(int64(d), trialLimitNanos)
	} else {
		t.beside++
	}
	slow := t.nanos > trialAlone*slowNanos
	switch {
	case slow || t.beside >= trialBeside:
		p.endTrial(k)
	case t.alone >= trialAlone:
		p.endTrial(k)
		k.keep.Store(trialFirst)
		k.average.Store(t.nanos / trialAlone * averageWeight)
	}
}

// endTrial ends a trial, and has the next one come later than this one. The lock of the kind
// is held.
func (p *pace) endTrial(k *paceOfKind) {
	k.keep.Store(min(2*max(k.keep.Load(), trialFirst), trialLast))
	k.beside.Store(0)
	k.trying.Store(false)
	p.trials.Add(-1)
}

// trying reports whether workers shall leave one of them alone.
func (p *pace) trying() bool { return p.trials.Load() > 0 }

// stopTrials ends trials because a request takes long: the device is slow.
func (p *pace) stopTrials() {
	for i := range p.kinds {
		k := &p.kinds[i]
		k.mu.Lock()
		if k.trying.Load() {
			p.endTrial(k)
		}
		k.mu.Unlock()
	}
}
