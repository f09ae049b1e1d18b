package filter

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// patience is for anything to happen on a busy machine.
const patience = 60 * time.Second

// fakeDevice does nothing, at once, unless its fields say otherwise.
type fakeDevice struct {
	block.Device       // of methods nobody calls
	err          error // what requests fail with
	sizeBytes    int64
	gate         chan struct{} // requests wait until it is closed, if not nil
	calls        atomic.Int64
	closed       atomic.Bool
}

func (d *fakeDevice) do() error {
	d.calls.Add(1)
	if d.gate != nil {
		<-d.gate
	}
	return d.err
}

func (d *fakeDevice) ReadAt(p []byte, _ int64) (int, error) {
	if err := d.do(); err != nil {
		return 0, err
	}
	return len(p), nil
}
func (d *fakeDevice) WriteAt(p []byte, off int64) (int, error)        { return d.ReadAt(p, off) }
func (d *fakeDevice) WriteZeroes(int64, int64, block.ZeroFlags) error { return d.do() }
func (d *fakeDevice) Discard(int64, int64) error                      { return d.do() }
func (d *fakeDevice) Flush() error                                    { return d.do() }
func (d *fakeDevice) Close() error                                    { d.closed.Store(true); return nil }
func (d *fakeDevice) Info() block.Info {
	return block.Info{SizeBytes: d.sizeBytes, LogicalBlockBytes: 512}
}
func (d *fakeDevice) Map(off, n int64) (block.Extent, error) {
	return block.Extent{Off: off, Len: n}, nil
}

// requests are one of each kind.
func requests(dev block.Device) map[Op]func() error {
	return map[Op]func() error{
		Read:    func() error { _, err := dev.ReadAt(make([]byte, 100), 0); return err },
		Write:   func() error { _, err := dev.WriteAt(make([]byte, 200), 0); return err },
		Zero:    func() error { return dev.WriteZeroes(0, 300, 0) },
		Discard: func() error { return dev.Discard(0, 400) },
		Flush:   dev.Flush,
	}
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for start := time.Now(); !f(); time.Sleep(time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatalf("%s: not after %v", what, patience)
		}
	}
}

func TestMeter_CountsEachKind(t *testing.T) {
	m := NewMeter(&fakeDevice{sizeBytes: 42})
	bytes := map[Op]uint64{Read: 100, Write: 200, Zero: 300, Discard: 400}
	for op, request := range requests(m) {
		for range int(op) + 1 {
			if err := request(); err != nil {
				t.Fatal(err)
			}
		}
	}
	figures := m.Figures()
	for _, op := range Ops {
		f, n := figures.Op(op), uint64(op)+1
		if f.Op != op.String() || f.Count() != n || f.Bytes != n*bytes[op] || f.Failed() != 0 || f.InFlight != 0 {
			t.Errorf("%s: %+v, want %d requests of %d bytes", op, f, n, bytes[op])
		}
	}
	if total := figures.Total(); total.Count() != 15 || total.Bytes != 100+400+900+1600 {
		t.Errorf("total: %+v", total)
	}
	if info := m.Info(); info.SizeBytes != 42 {
		t.Errorf("info is not the device's: %+v", info)
	}
}

func TestMeter_ErrorsByNumber(t *testing.T) {
	dev := &fakeDevice{}
	m := NewMeter(dev)
	for _, err := range []error{block.ErrNoSpace, fmt.Errorf("write: %w", block.ErrNoSpace), errors.New("odd"), block.ErrExists} {
		dev.err = err
		if _, got := m.WriteAt(make([]byte, 512), 0); !errors.Is(got, err) {
			t.Errorf("an error came through as %v, was %v", got, err)
		}
	}
	f := m.Figures().Op(Write)
	if f.Errors["ENOSPC"] != 2 || f.Errors["EIO"] != 1 || f.Errors["other"] != 1 || f.Failed() != 4 {
		t.Errorf("errors: %v", f.Errors)
	}
	if f.Count() != 4 || f.Bytes != 0 {
		t.Errorf("failed requests are to be counted, and their bytes not: %+v", f)
	}
}

func TestMeter_InFlight(t *testing.T) {
	dev := &fakeDevice{gate: make(chan struct{})}
	m := NewMeter(dev)
	const readers = 7
	var all sync.WaitGroup
	for range readers {
		all.Go(func() { _, _ = m.ReadAt(nil, 0) })
	}
	all.Go(func() { _ = m.Flush() })
	eventually(t, "requests in flight", func() bool { return dev.calls.Load() == readers+1 })
	f := m.Figures()
	if f.Op(Read).InFlight != readers || f.Op(Flush).InFlight != 1 || f.Op(Write).InFlight != 0 || f.Total().Count() != 0 {
		t.Errorf("while requests wait: %+v", f)
	}
	close(dev.gate)
	all.Wait()
	if f := m.Figures(); f.Total().InFlight != 0 || f.Op(Read).Count() != readers {
		t.Errorf("afterwards: %+v", f)
	}
}

// More requests at a time than a stripe has slots are counted all the same.
func TestMeter_MoreInFlightThanSlots(t *testing.T) {
	dev := &fakeDevice{gate: make(chan struct{})}
	m := NewMeter(dev)
	n := (slotsPerStripe + 1) * len(m.stripes)
	var all sync.WaitGroup
	for range n {
		all.Go(func() { _, _ = m.ReadAt(nil, 0) })
	}
	eventually(t, "requests in flight", func() bool { return dev.calls.Load() == int64(n) })
	close(dev.gate)
	all.Wait()
	if f := m.Figures().Op(Read); f.Count() != uint64(n) || f.InFlight != 0 {
		t.Errorf("%d requests were counted as %+v", n, f)
	}
}

func TestMeter_StallNowAndEver(t *testing.T) {
	dev := &fakeDevice{gate: make(chan struct{})}
	m := NewMeter(dev)
	ended := make(chan struct{})
	go func() { defer close(ended); _, _ = m.ReadAt(nil, 0) }()
	eventually(t, "a stalled request", func() bool { return m.Figures().Op(Read).Stalled == 1 })
	if f := m.Figures().Op(Read); f.Stalls() != 0 {
		t.Errorf("a stall that has not ended counts as one that has: %+v", f)
	}
	close(dev.gate)
	<-ended
	if f := m.Figures().Op(Read); f.Stalls() != 1 || f.Stalled != 0 || f.Nanoseconds < uint64(StallAfter) {
		t.Errorf("after it has ended: %+v", f)
	}
}

func TestMeter_AllocatesNothing(t *testing.T) {
	limiter := NewLimiter(NewMeter(&fakeDevice{}))
	limiter.Set(Limits{IOPS: 1 << 40, BytesPerSecond: 1 << 50})
	buf := make([]byte, 4096)
	if n := testing.AllocsPerRun(1000, func() {
		_, _ = limiter.ReadAt(buf, 0)
		_, _ = limiter.WriteAt(buf, 0)
		_ = limiter.Flush()
	}); n != 0 {
		t.Errorf("%v allocations for three requests", n)
	}
}

func TestBucketOf(t *testing.T) {
	for d, want := range map[time.Duration]int{
		-1: 0, 0: 0, 1: 0, time.Microsecond: 0, time.Microsecond + 1: 1, 2 * time.Microsecond: 1, 2*time.Microsecond + 1: 2,
		StallAfter: stallBucket, StallAfter + 1: stallBucket + 1,
		BucketBound(Buckets - 2): Buckets - 2, BucketBound(Buckets-2) + 1: Buckets - 1, 1 << 62: Buckets - 1,
	} {
		if got := bucketOf(d); got != want {
			t.Errorf("%v is in bucket %d, want %d", d, got, want)
		}
	}
}

func TestLatency_Quantile(t *testing.T) {
	for _, test := range []struct {
		latency Latency
		q       float64
		want    time.Duration
	}{
		{nil, 0.5, 0},
		{Latency{0, 0, 10}, 0.5, 3 * time.Microsecond},
		{Latency{0, 0, 10}, 1, 4 * time.Microsecond},
		{Latency{50, 0, 0, 50}, 0.5, time.Microsecond},
		{Latency{98, 0, 0, 2}, 0.99, 6 * time.Microsecond},
		{append(make(Latency, Buckets-1), 1), 0.99, BucketBound(Buckets - 2)},
	} {
		if got := test.latency.Quantile(test.q); got != test.want {
			t.Errorf("quantile %v of %v is %v, want %v", test.q, test.latency, got, test.want)
		}
	}
}

func TestLatency_Minus(t *testing.T) {
	later := Latency{5, 0, 7}
	if d := later.Minus(Latency{2}); d.Count() != 10 || d[0] != 3 {
		t.Errorf("delta: %v", d)
	}
	if d := later.Minus(Latency{9}); d.Count() != 12 {
		t.Errorf("counting began anew, and the delta is %v", d)
	}
	if d := (Latency{5}).Minus(Latency{1, 1}); d.Count() != 5 {
		t.Errorf("counting began anew, and the delta is %v", d)
	}
}

func TestLimits_Validate(t *testing.T) {
	for _, good := range []Limits{{}, {IOPS: MinIOPS}, {BytesPerSecond: MinBytesPerSecond, BurstMillis: MaxBurstMillis}} {
		if err := good.Validate(); err != nil {
			t.Errorf("%+v: %v", good, err)
		}
	}
	for says, bad := range map[string]Limits{
		"at least 10":      {IOPS: 9},
		"at least 1048576": {BytesPerSecond: 100},
		"-1":               {IOPS: -1},
		"at most 3600000":  {BurstMillis: MaxBurstMillis + 1},
	} {
		if err := bad.Validate(); !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), says) {
			t.Errorf("%+v: %v, want %q in it", bad, err, says)
		}
	}
}

// load asks for reads from some threads until it has been answered n times, and returns
// how long that took.
func load(dev block.Device, threads, n, size int) time.Duration {
	var left atomic.Int64
	left.Store(int64(n))
	start := time.Now()
	var all sync.WaitGroup
	for range threads {
		all.Go(func() {
			buf := make([]byte, size)
			for left.Add(-1) >= 0 {
				_, _ = dev.ReadAt(buf, 0)
			}
		})
	}
	all.Wait()
	return time.Since(start)
}

// However busy the machine, a limit is never exceeded; a test of not falling short of it
// would be one of the machine.
func TestLimiter_KeepsRate(t *testing.T) {
	for name, test := range map[string]struct {
		limits Limits
		n      int
		size   int
		least  time.Duration
	}{
		// What a burst of 100 ms lets pass, the rest at the rate.
		"requests":             {Limits{IOPS: 1000}, 600, 4096, 490 * time.Millisecond},
		"bytes":                {Limits{BytesPerSecond: 10 << 20}, 60, 100 << 10, 470 * time.Millisecond},
		"the stricter of both": {Limits{IOPS: 100000, BytesPerSecond: 10 << 20}, 60, 100 << 10, 470 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dev := &fakeDevice{}
			l := NewLimiter(dev)
			l.Set(test.limits)
			took := load(l, 32, test.n, test.size)
			if took < test.least {
				t.Errorf("%d requests of %d bytes took %v, want at least %v", test.n, test.size, took, test.least)
			}
			if w := l.Waits(); w.Waiting != 0 || w.Delayed == 0 || w.Nanoseconds == 0 {
				t.Errorf("waits: %+v", w)
			}
			t.Logf("%d requests of %d bytes took %v: %.3g a second", test.n, test.size, took, float64(test.n)/took.Seconds())
		})
	}
}

func TestLimiter_LargeRequestPassesAndIsPaidFor(t *testing.T) {
	l := NewLimiter(&fakeDevice{})
	l.Set(Limits{BytesPerSecond: MinBytesPerSecond})
	start := time.Now()
	_, _ = l.ReadAt(make([]byte, 2*MinBytesPerSecond), 0)
	if w := l.Waits(); w.Delayed != 0 {
		t.Errorf("a request larger than the bucket had to wait: %+v", w)
	}
	_, _ = l.ReadAt(make([]byte, 1), 0)
	if took := time.Since(start); took < 1900*time.Millisecond {
		t.Errorf("two seconds' worth was paid for in %v", took)
	}
}

// waitingRead makes a limiter's request wait, and returns a channel that is closed when it has
// passed.
func waitingRead(t *testing.T, l *Limiter) <-chan struct{} {
	t.Helper()
	before := l.Waits().Waiting
	passed := make(chan struct{})
	go func() { defer close(passed); _, _ = l.ReadAt(make([]byte, 1), 0) }()
	eventually(t, "a request waits", func() bool { return l.Waits().Waiting > before })
	return passed
}

// indebted returns a limiter whose next request would have to wait for an hour.
func indebted(dev block.Device) *Limiter {
	l := NewLimiter(dev)
	l.Set(Limits{IOPS: MinIOPS, BytesPerSecond: MinBytesPerSecond})
	l.mu.Lock()
	l.bytes.tokens = -3600 * MinBytesPerSecond
	l.mu.Unlock()
	return l
}

func wait(t *testing.T, what string, passed <-chan struct{}) {
	t.Helper()
	select {
	case <-passed:
	case <-time.After(patience):
		t.Fatalf("%s: a request still waits", what)
	}
}

func TestLimiter_FlushAndMapPass(t *testing.T) {
	dev := &fakeDevice{}
	l := indebted(dev)
	defer l.Lift()
	passed := waitingRead(t, l)
	if err := l.Flush(); err != nil || dev.calls.Load() != 1 {
		t.Errorf("flush: %v", err)
	}
	if _, err := l.Map(0, 1); err != nil {
		t.Errorf("map: %v", err)
	}
	select {
	case <-passed:
		t.Error("a read did not wait")
	default:
	}
}

func TestLimiter_ChangeFreesWhoWaits(t *testing.T) {
	for name, limits := range map[string]Limits{
		"none":   {},
		"higher": {BytesPerSecond: 1 << 50},
		"other":  {IOPS: 1 << 40},
	} {
		l := indebted(&fakeDevice{})
		first, second := waitingRead(t, l), waitingRead(t, l)
		l.Set(limits)
		wait(t, name, first)
		wait(t, name, second)
		if got := l.Limits(); got != limits {
			t.Errorf("limits are %+v, set were %+v", got, limits)
		}
	}
}

func TestLimiter_LoweredWhileWaiting(t *testing.T) {
	l := indebted(&fakeDevice{})
	passed := waitingRead(t, l)
	l.Set(Limits{IOPS: MinIOPS, BytesPerSecond: MinBytesPerSecond})
	l.Set(Limits{IOPS: 2 * MinIOPS, BytesPerSecond: 2 * MinBytesPerSecond})
	select {
	case <-passed:
		t.Error("what was owed is forgotten")
	case <-time.After(20 * time.Millisecond):
	}
	l.Lift()
	wait(t, "lift", passed)
}

func TestLimiter_LiftAndCloseFreeWhoWaits(t *testing.T) {
	dev := &fakeDevice{}
	l := indebted(dev)
	first := waitingRead(t, l)
	l.Lift()
	wait(t, "lift", first)
	l.Set(Limits{IOPS: MinIOPS})
	if got := l.Limits(); !got.None() {
		t.Errorf("limits are set after they were lifted for good: %v", got)
	}
	l = indebted(dev)
	second := waitingRead(t, l)
	if err := l.Close(); err != nil || !dev.closed.Load() {
		t.Errorf("close: %v", err)
	}
	wait(t, "close", second)
}

// Requests pass in the order in which they came.
func TestLimiter_Fair(t *testing.T) {
	l := indebted(&fakeDevice{})
	const n = 8
	const large = 3600 * MinBytesPerSecond // leaves the next to wait for an hour
	order := make(chan int, n)
	for i := range n {
		go func() {
			l.pass(large)
			order <- i
		}()
		eventually(t, "a request waits", func() bool { return l.Waits().Waiting == i+1 })
	}
	for want := range n {
		l.mu.Lock()
		l.bytes.tokens = 0
		l.mu.Unlock()
		l.Set(l.Limits())
		select {
		case got := <-order:
			if got != want {
				t.Errorf("request %d passed when it was %d's turn", got, want)
			}
		case <-time.After(patience):
			t.Fatal("requests still wait")
		}
	}
}
