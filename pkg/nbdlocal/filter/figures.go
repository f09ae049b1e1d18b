package filter

import (
	"slices"
	"time"
)

// Figures are what a Meter has counted since it was made.
type Figures struct {
	Ops []OpFigures `json:"ops"` // in the order of the variable Ops
}

// OpFigures are the figures of one kind of request. Counters count requests that have
// ended, whether well or not.
type OpFigures struct {
	Op          string            `json:"op"`
	Bytes       uint64            `json:"bytes"` // of those that succeeded
	Nanoseconds uint64            `json:"nanoseconds"`
	Latency     Latency           `json:"latency"`           // by bucket
	Errors      map[string]uint64 `json:"errors,omitempty"`  // by the error number's name
	InFlight    int               `json:"inFlight"`          // now
	Stalled     int               `json:"stalled,omitempty"` // now, for longer than StallAfter
}

// Count returns how many requests have ended.
func (f OpFigures) Count() uint64 { return f.Latency.Count() }

// Stalls returns how many of the requests that have ended took longer than StallAfter.
func (f OpFigures) Stalls() uint64 { return f.Latency.Above(stallBucket) }

// Failed returns how many requests have failed.
func (f OpFigures) Failed() uint64 {
	var n uint64
	for _, v := range f.Errors {
		n += v
	}
	return n
}

// Op returns the figures of one kind of request; zeroes if there are none.
func (f Figures) Op(op Op) OpFigures {
	for _, figures := range f.Ops {
		if figures.Op == op.String() {
			return figures
		}
	}
	return OpFigures{Op: op.String()}
}

// Total returns the figures of all kinds together.
func (f Figures) Total() OpFigures {
	total := OpFigures{Op: "all", Errors: map[string]uint64{}}
	for _, figures := range f.Ops {
		total.Bytes += figures.Bytes
		total.Nanoseconds += figures.Nanoseconds
		total.Latency = total.Latency.Plus(figures.Latency)
		total.InFlight += figures.InFlight
		total.Stalled += figures.Stalled
		for name, n := range figures.Errors {
			total.Errors[name] += n
		}
	}
	return total
}

// Figures returns the counters as they are. Requests that end meanwhile are in some of
// them and not yet in others.
func (m *Meter) Figures() Figures {
	f := Figures{Ops: make([]OpFigures, len(Ops))}
	now := clock()
	for _, op := range Ops {
		figures := &f.Ops[op]
		figures.Op = op.String()
		figures.Latency = make(Latency, Buckets)
		for i := range m.stripes {
			m.stripes[i].ops[op].addTo(figures)
		}
		figures.Latency = trimmed(figures.Latency)
		figures.Errors = m.errorsOf(op)
	}
	for i := range m.stripes {
		for slot := range m.stripes[i].slots {
			mark := m.stripes[i].slots[slot].Load()
			if mark == 0 {
				continue
			}
			figures := &f.Ops[mark&(1<<kindBits-1)]
			figures.InFlight++
			if now-time.Duration(mark>>kindBits) > StallAfter {
				figures.Stalled++
			}
		}
	}
	return f
}

func (c *opCounters) addTo(f *OpFigures) {
	for i := range c.buckets {
		f.Latency[i] += c.buckets[i].Load()
	}
	f.Bytes += c.bytes.Load()
	f.Nanoseconds += c.nanos.Load()
}

func (m *Meter) errorsOf(op Op) map[string]uint64 {
	var errors map[string]uint64
	for i := range m.errors[op] {
		if n := m.errors[op][i].Load(); n > 0 {
			if errors == nil {
				errors = map[string]uint64{}
			}
			errors[errnoName(i)] = n
		}
	}
	return errors
}

// trimmed drops zeroes at the end.
func trimmed(l Latency) Latency {
	last := len(l)
	for last > 0 && l[last-1] == 0 {
		last--
	}
	return slices.Clip(l[:last])
}
