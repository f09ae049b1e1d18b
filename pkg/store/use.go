package store

import (
	"context"
	"sync/atomic"
	"time"
)

// use knows whether a volume is used, so that the records of those that are not are not
// read in vain: there may be hundreds on a node, on a store that many nodes share.
type use struct {
	seen  atomic.Bool   // since the last wait began
	begun chan struct{} // gets one when seen becomes true
}

func newUse() use { return use{begun: make(chan struct{}, 1)} }

// note says that the volume is used. It costs a look at memory that is seldom written.
func (u *use) note() {
	if u.seen.Load() || u.seen.Swap(true) {
		return
	}
	select {
	case u.begun <- struct{}{}:
	default:
	}
}

// wait waits for interval if the volume was used since the last wait, else until it is
// used, idlePolls intervals at most. Only one may wait at a time.
func (u *use) wait(ctx context.Context, interval time.Duration) error {
	select {
	case <-u.begun: // of the time before
	default:
	}
	if u.seen.Swap(false) {
		return sleep(ctx, interval)
	}
	t := time.NewTimer(idlePolls * interval)
	defer t.Stop()
	select {
	case <-u.begun:
	case <-t.C:
	case <-ctx.Done():
	}
	return ctx.Err()
}
