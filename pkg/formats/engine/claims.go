package engine

import "sync"

// claims are the guest ranges whose mapping is being changed: at most one request
// changes a granule at a time. There are as many as requests in flight, so a list does.
type claims struct {
	mu     sync.Mutex
	freed  sync.Cond
	active []claim
}

type claim struct{ start, end int64 }

func (c claim) covers(start, end int64) bool { return c.start <= start && end <= c.end }

func (c *claims) init() { c.freed.L = &c.mu }

// acquire waits until nobody holds a part of [start, end), and holds it.
func (c *claims) acquire(start, end int64) claim {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.overlaps(start, end) {
		c.freed.Wait()
	}
	held := claim{start, end}
	c.active = append(c.active, held)
	return held
}

func (c *claims) overlaps(start, end int64) bool {
	for _, a := range c.active {
		if a.start < end && start < a.end {
			return true
		}
	}
	return false
}

func (c *claims) release(held claim) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, a := range c.active {
		if a == held {
			last := len(c.active) - 1
			c.active[i] = c.active[last]
			c.active = c.active[:last]
			break
		}
	}
	c.freed.Broadcast()
}
