package filter

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Limiter is a device that lets requests pass at a rate. A request that comes too early
// waits, in the thread that brings it; requests pass in the order in which they came. A
// flush never waits: it moves no data, and others wait for it already.
//
// There is a bucket of tokens for requests, and one for bytes. A request begins when
// neither is overdrawn, and may overdraw them: one that is larger than a bucket passes
// like any other, and those after it wait until what it took has come back.
type Limiter struct {
	block.Device
	limiting atomic.Bool // there are limits

	mu       sync.Mutex
	limits   Limits
	lifted   bool
	requests bucket
	bytes    bucket
	refilled time.Duration
	timer    *time.Timer // calls admit when the first in the queue may pass

	first, last *waiter // the queue
	unused      *waiter // so that waiting allocates only when more wait than ever before
	waits       Waits
}

// waiter is a request that waits.
type waiter struct {
	next  *waiter
	bytes int
	began time.Duration
	pass  chan struct{} // gets a value when it may
}

// Waits are what a Limiter has made of its requests.
type Waits struct {
	Waiting     int    `json:"waiting"`     // now
	Delayed     uint64 `json:"delayed"`     // requests that have had to wait
	Nanoseconds uint64 `json:"nanoseconds"` // that those have waited, together
}

// NewLimiter returns a device that passes requests on to dev, without limits until Set
// sets some.
func NewLimiter(dev block.Device) *Limiter {
	l := &Limiter{Device: dev}
	l.timer = time.AfterFunc(time.Hour, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.admit()
	})
	l.timer.Stop()
	return l
}

// Set changes the limits, which must be valid, also for the requests that wait.
func (l *Limiter) Set(limits Limits) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.lifted {
		l.set(limits)
	}
}

// Lift ends limiting for good: what waits passes at once.
func (l *Limiter) Lift() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lifted = true
	l.set(Limits{})
}

// set changes the limits. The lock is held.
func (l *Limiter) set(limits Limits) {
	l.refill()
	l.limits = limits
	l.requests.set(limits.IOPS, limits.Burst())
	l.bytes.set(limits.BytesPerSecond, limits.Burst())
	l.limiting.Store(!limits.None())
	l.admit()
}

// Limits returns the limits as they are.
func (l *Limiter) Limits() Limits {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.limits
}

// Waits returns the counters as they are.
func (l *Limiter) Waits() Waits {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.waits
}

// pass returns when a request that moves n bytes may begin.
func (l *Limiter) pass(n int) {
	if !l.limiting.Load() {
		return
	}
	l.mu.Lock()
	l.refill()
	if l.first == nil {
		delay := l.take(n)
		if delay == 0 {
			l.mu.Unlock()
			return
		}
		l.timer.Reset(delay)
	}
	w := l.queue(n)
	l.mu.Unlock()
	<-w.pass
	l.mu.Lock()
	w.next, l.unused = l.unused, w
	l.mu.Unlock()
}

// queue makes a request the last to wait. The lock is held.
func (l *Limiter) queue(n int) *waiter {
	w := l.unused
	if w == nil {
		w = &waiter{pass: make(chan struct{}, 1)}
	} else {
		l.unused = w.next
	}
	w.next, w.bytes, w.began = nil, n, clock()
	if l.first == nil {
		l.first = w
	} else {
		l.last.next = w
	}
	l.last = w
	l.waits.Waiting++
	return w
}

// admit lets those pass who may, and has itself called for the next one. All who may are
// woken at once: were they to wake one another, a busy machine would make the limit lower
// than it is. The lock is held.
func (l *Limiter) admit() {
	l.refill()
	for w := l.first; w != nil; w = l.first {
		if delay := l.take(w.bytes); delay > 0 {
			l.timer.Reset(delay)
			return
		}
		l.first = w.next
		l.waits.Waiting--
		l.waits.Delayed++
		l.waits.Nanoseconds += uint64(l.refilled - w.began)
		w.pass <- struct{}{}
	}
}

// take takes a request's tokens and returns 0; or it takes nothing and returns how long
// it will be until that is possible. The lock is held.
func (l *Limiter) take(n int) time.Duration {
	if delay := max(l.requests.delay(), l.bytes.delay()); delay > 0 {
		return delay
	}
	l.requests.take(1)
	l.bytes.take(n)
	return 0
}

// refill adds the tokens that have come since the last time. The lock is held.
func (l *Limiter) refill() {
	now := clock()
	elapsed := now - l.refilled
	l.refilled = now
	l.requests.refill(elapsed)
	l.bytes.refill(elapsed)
}

// bucket holds tokens. They may be overdrawn. Without a rate it is endless.
type bucket struct {
	rate   float64 // per second; 0: endless
	most   float64
	tokens float64
}

// set changes the rate. Tokens that there are stay, as far as they may, and so does what
// is owed.
func (b *bucket) set(rate int64, burst time.Duration) {
	if rate == 0 {
		*b = bucket{}
		return
	}
	b.rate = float64(rate)
	b.most = b.rate * burst.Seconds()
	b.tokens = min(b.tokens, b.most)
}

func (b *bucket) refill(elapsed time.Duration) {
	b.tokens = min(b.tokens+b.rate*elapsed.Seconds(), b.most)
}

// delay returns how long it takes until the bucket is not overdrawn.
func (b *bucket) delay() time.Duration {
	if b.tokens >= 0 || b.rate == 0 {
		return 0
	}
	return time.Duration(-b.tokens/b.rate*float64(time.Second)) + 1
}

func (b *bucket) take(n int) {
	if b.rate > 0 {
		b.tokens -= float64(n)
	}
}

// ReadAt implements block.Device.
func (l *Limiter) ReadAt(p []byte, off int64) (int, error) {
	l.pass(len(p))
	return l.Device.ReadAt(p, off)
}

// WriteAt implements block.Device.
func (l *Limiter) WriteAt(p []byte, off int64) (int, error) {
	l.pass(len(p))
	return l.Device.WriteAt(p, off)
}

// WriteZeroes implements block.Device.
func (l *Limiter) WriteZeroes(off, n int64, flags block.ZeroFlags) error {
	l.pass(0)
	return l.Device.WriteZeroes(off, n, flags)
}

// Discard implements block.Device.
func (l *Limiter) Discard(off, n int64) error {
	l.pass(0)
	return l.Device.Discard(off, n)
}

// Close implements block.Device.
func (l *Limiter) Close() error {
	l.Lift()
	return l.Device.Close()
}
