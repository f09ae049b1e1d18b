package attach

import (
	"sync/atomic"
	"time"
)

// A helper is called when a slow request has ended. That is no help while none ends,
// because storage stalls and every reader waits for it: requests that would not have to
// wait for storage would wait for the readers. So while there are requests somebody looks
// at the threads from time to time, and when none of those that wait for requests has
// moved, has a helper stand in until a reader moves again.

// fuseLookInterval is how long a request may be held up by readers that are stuck.
const fuseLookInterval = 10 * time.Millisecond

// fuseSlot is what is to be seen of a thread from outside.
type fuseSlot struct {
	turns   atomic.Uint64 // odd while it carries out a request
	serving atomic.Bool   // it waits for requests when there are none
	_       [64 - 8 - 4]byte
}

// begin notes that the slot's thread has a request.
func (s *fuseServer) begin(slot *fuseSlot) {
	slot.turns.Add(1)
	if !s.watching.Load() && s.watching.CompareAndSwap(false, true) {
		s.begun <- struct{}{} // has room: it is empty while nobody watches
	}
}

// watchThreads looks at the threads while they work, until the server stops.
func (s *fuseServer) watchThreads() {
	w := fuseWatch{fuseServer: s, ticker: time.NewTicker(fuseLookInterval)}
	defer w.ticker.Stop()
	for {
		w.ticker.Stop()
		select {
		case <-s.stopped:
			return
		case <-s.begun:
		}
		w.ticker.Reset(fuseLookInterval)
		w.untilQuiet()
	}
}

// fuseWatch is what the last look at the threads has shown.
type fuseWatch struct {
	*fuseServer
	ticker *time.Ticker
	turns  [fuseMaxThreads]uint64
}

// untilQuiet looks at the threads until none has worked for a while.
func (w *fuseWatch) untilQuiet() {
	for {
		select {
		case <-w.stopped:
			return
		case <-w.ticker.C:
		}
		if w.look() {
			continue
		}
		// In this order, as begin has it: who has begun meanwhile is seen here, or sees
		// that nobody watches.
		w.watching.Store(false)
		if !w.look() || !w.watching.CompareAndSwap(false, true) {
			return
		}
	}
}

// look has a helper stand in if need be. It reports whether any thread has worked since
// the last look.
func (w *fuseWatch) look() (worked bool) {
	readerFree, free := false, false
	for i := range w.slots {
		slot := &w.slots[i]
		turns := slot.turns.Load()
		busy, moved := turns%2 == 1, turns != w.turns[i]
		w.turns[i] = turns
		worked = worked || busy || moved
		if slot.serving.Load() && (!busy || moved) {
			free, readerFree = true, readerFree || i < w.readers
		}
	}
	w.short.Store(!readerFree)
	if !free {
		select {
		case w.standIn <- struct{}{}:
		default: // none rests
		}
	}
	return worked
}
