package nbdlocal

import (
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

func write(off int64, n int) *request { return &request{cmd: cmdWrite, off: off, n: n} }

func TestRangeOrder(t *testing.T) {
	var o rangeOrder
	first, beside, second, third := write(100, 50), write(150, 50), write(120, 10), write(125, 100)
	for _, c := range []struct {
		req *request
		now bool
	}{{first, true}, {beside, true}, {second, false}, {third, false}} {
		if got := o.enter(c.req); got != c.now {
			t.Errorf("write of %d at %d runs at once: %v, want %v", c.req.n, c.req.off, got, c.now)
		}
	}
	for _, c := range []struct {
		leaves   *request
		runnable *request
	}{{beside, nil}, {first, second}, {second, third}, {third, nil}} {
		got := o.leave(c.leaves)
		if got.head != c.runnable || got.count > 1 {
			t.Errorf("after the write at %d %d may run, the first %+v", c.leaves.off, got.count, got.head)
		}
	}
	if len(o.active) != 0 || o.waiting != 0 {
		t.Errorf("%d ranges and %d waiting are left", len(o.active), o.waiting)
	}
}

// TestRangeOrder_Random: no two overlapping writes ever run at the same time, they run
// in their order, and all of them get to run.
func TestRangeOrder_Random(t *testing.T) {
	rnd := testenv.Rand(t)
	var o rangeOrder
	var running, all []*request
	order := map[*request]int{}
	begin := func(r *request) {
		for _, other := range running {
			if r.off < other.off+int64(other.n) && other.off < r.off+int64(r.n) {
				t.Fatal("overlapping writes run at the same time")
			}
		}
		for _, earlier := range all[:order[r]] {
			if earlier != nil && r.off < earlier.off+int64(earlier.n) && earlier.off < r.off+int64(r.n) {
				t.Fatal("a write runs before an overlapping earlier one has ended")
			}
		}
		running = append(running, r)
	}
	end := func() {
		i := rnd.IntN(len(running))
		r := running[i]
		running = append(running[:i], running[i+1:]...)
		all[order[r]] = nil
		for runnable := o.leave(r); runnable.head != nil; {
			begin(runnable.pop())
		}
	}
	for range 5000 {
		if len(running) > 0 && rnd.IntN(2) == 0 || len(running) > 20 {
			end()
			continue
		}
		r := write(rnd.Int64N(2000), 1+rnd.IntN(100))
		order[r] = len(all)
		all = append(all, r)
		if o.enter(r) {
			begin(r)
		}
	}
	for len(running) > 0 {
		end()
	}
	for i, r := range all {
		if r != nil {
			t.Fatalf("write %d never ran", i)
		}
	}
	if len(o.active) != 0 || o.waiting != 0 {
		t.Errorf("%d ranges and %d waiting are left", len(o.active), o.waiting)
	}
}

func BenchmarkRangeOrder(b *testing.B) {
	var o rangeOrder
	for i := range 64 { // as many as wait for a slow device
		o.enter(write(int64(i)*4096, 4096))
	}
	r := write(1<<30, 4096)
	b.ReportAllocs()
	for b.Loop() {
		o.enter(r)
		o.leave(r)
	}
}
