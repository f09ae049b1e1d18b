package engine

import (
	"runtime"
	"sync"
	"sync/atomic"
)

// mappingLock is a read-write lock for sections of a microsecond or so: who finds it taken
// looks again for a moment before it sleeps. A goroutine that sleeps here costs the most
// where it has a thread of its own, as a block server's has: two switches of threads, for
// less than one's work.
type mappingLock struct{ lock sync.RWMutex }

const (
	// lockTries times lockPause iterations take some microseconds.
	lockTries = 40
	lockPause = 40
)

// canSpin says whether somebody else can be at work while this thread looks again.
var canSpin = runtime.NumCPU() > 1

// RLock takes the lock beside other readers.
func (l *mappingLock) RLock() {
	if !l.spin(l.lock.TryRLock) {
		l.lock.RLock()
	}
}

// RUnlock gives a reader's lock back.
func (l *mappingLock) RUnlock() { l.lock.RUnlock() }

// Lock takes the lock alone.
func (l *mappingLock) Lock() {
	if !l.spin(l.lock.TryLock) {
		l.lock.Lock()
	}
}

// Unlock gives the lock back.
func (l *mappingLock) Unlock() { l.lock.Unlock() }

// spin reports whether try succeeded within a moment.
func (l *mappingLock) spin(try func() bool) bool {
	if try() {
		return true
	}
	if !canSpin {
		return false
	}
	var pause atomic.Uint32
	for range lockTries {
		for range lockPause {
			pause.Load()
		}
		if try() {
			return true
		}
	}
	return false
}
