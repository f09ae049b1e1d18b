package nbdlocal

import "sync"

// rangeOrder puts overlapping writes in the order in which they were received, over
// all connections. It spends a short scan on a write that overlaps nothing, and
// blocks no thread: a write that must wait is handed back by whoever ends the last
// one it waits for.
type rangeOrder struct {
	mu      sync.Mutex
	active  []activeRange // entered and not left, in no particular order
	waiting int           // of active, how many wait
	next    uint64        // place in the order of the next to enter
}

// activeRange is a write in flight: guest bytes [off, end).
type activeRange struct {
	off, end int64
	place    uint64
	req      *request
}

func (a *activeRange) overlaps(off, end int64) bool { return a.off < end && off < a.end }

// enter gives r its place. It reports whether r may run at once; otherwise leave
// returns it later.
func (o *rangeOrder) enter(r *request) bool {
	off, end := r.off, r.off+int64(r.n)
	o.mu.Lock()
	defer o.mu.Unlock()
	r.waitsFor = 0
	for i := range o.active {
		if o.active[i].overlaps(off, end) {
			r.waitsFor++
		}
	}
	if r.waitsFor > 0 {
		o.waiting++
	}
	r.rangeIndex = len(o.active)
	o.active = append(o.active, activeRange{off, end, o.next, r})
	o.next++
	return r.waitsFor == 0
}

// leave ends r's place and returns, linked by their next fields, the requests that may
// run now because of it, in their order.
func (o *rangeOrder) leave(r *request) requestList {
	o.mu.Lock()
	defer o.mu.Unlock()
	left := o.remove(r)
	var runnable requestList
	if r.waitsFor > 0 { // it was dropped before its turn
		o.waiting--
	}
	if o.waiting == 0 {
		return runnable
	}
	// Those that run now overlap one another in nothing: one that overlaps an
	// earlier one still waits for that. So their order doesn't matter.
	for i := range o.active {
		a := &o.active[i]
		if a.place > left.place && a.overlaps(left.off, left.end) {
			if a.req.waitsFor--; a.req.waitsFor == 0 {
				o.waiting--
				runnable.push(a.req)
			}
		}
	}
	return runnable
}

// remove takes r out of active.
func (o *rangeOrder) remove(r *request) activeRange {
	i, last := r.rangeIndex, len(o.active)-1
	left := o.active[i]
	if left.req != r {
		panic("nbdlocal: request left a range it had not entered")
	}
	o.active[i] = o.active[last]
	o.active[i].req.rangeIndex = i
	o.active[last] = activeRange{}
	o.active = o.active[:last]
	return left
}
