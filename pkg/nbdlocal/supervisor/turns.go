package supervisor

import (
	"context"
	"sync"
)

// turns lets few servers start at the same time. Where a node's volumes are all to be
// attached at once, as after a reboot, or all servers were killed, processors that start them
// all together start none in time; one after another, the first serve soon. A turn
// is for the start of the process, not for the opening of its image: a store that does not
// answer holds up nobody's.
type turns struct{ slots chan struct{} }

func newTurns(atOnce int) turns { return turns{make(chan struct{}, atOnce)} }

// take waits for a turn, first come, first served, or until ctx ends. The turn ends with the
// first call of done, which may be called again.
func (t turns) take(ctx context.Context) (done func(), err error) {
	select {
	case t.slots <- struct{}{}:
		return sync.OnceFunc(func() { <-t.slots }), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}
