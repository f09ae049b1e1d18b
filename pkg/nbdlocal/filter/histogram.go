package filter

import (
	"math/bits"
	"time"
)

// Latencies are counted in buckets whose bounds double: bucket i holds what took at most
// BucketBound(i), and longer than the bound before; the last one holds the rest.
const (
	// Buckets is how many there are.
	Buckets = 26
	// stallBucket is the last one with requests that are not stalls.
	stallBucket = 20
	// StallAfter is how long a request takes at most that is no stall: a little more
	// than a second.
	StallAfter = time.Microsecond << stallBucket
)

// BucketBound returns the longest time that bucket i counts, for i from 0 to Buckets-2.
func BucketBound(i int) time.Duration { return time.Microsecond << i }

// bucketOf returns the bucket for a time.
func bucketOf(d time.Duration) int {
	micros := uint64(max(d, 1)-1) / uint64(time.Microsecond)
	return min(bits.Len64(micros), Buckets-1)
}

// Latency counts requests by bucket. It has at most Buckets elements; those after its
// end are zero.
type Latency []uint64

// Count returns how many requests there are in all buckets.
func (l Latency) Count() uint64 {
	var n uint64
	for _, v := range l {
		n += v
	}
	return n
}

// Above returns how many requests took longer than BucketBound(i).
func (l Latency) Above(i int) uint64 {
	if i+1 >= len(l) {
		return 0
	}
	return l[i+1:].Count()
}

// Minus returns what was counted after earlier was. If that is not possible because
// counting began anew in between, it returns l itself.
func (l Latency) Minus(earlier Latency) Latency {
	delta := make(Latency, len(l))
	copy(delta, l)
	for i, v := range earlier {
		if i >= len(l) || l[i] < v {
			return l
		}
		delta[i] -= v
	}
	return delta
}

// Plus returns the sum of two counts.
func (l Latency) Plus(m Latency) Latency {
	sum := make(Latency, max(len(l), len(m)))
	copy(sum, l)
	for i, v := range m {
		sum[i] += v
	}
	return sum
}

// Quantile returns the time within which a share q (from 0 to 1) of the requests ended,
// taking them as evenly spread within a bucket; 0 without any. For what is in the last
// bucket it returns that bucket's lower bound.
func (l Latency) Quantile(q float64) time.Duration {
	total := l.Count()
	if total == 0 {
		return 0
	}
	rank := q * float64(total)
	var below float64
	for i, v := range l {
		n := float64(v)
		if v == 0 || below+n < rank {
			below += n
			continue
		}
		if i == Buckets-1 {
			break
		}
		lower := time.Duration(0)
		if i > 0 {
			lower = BucketBound(i - 1)
		}
		return lower + time.Duration(float64(BucketBound(i)-lower)*max(rank-below, 0)/n)
	}
	return BucketBound(Buckets - 2)
}
