package vfs

import (
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

// TestPageSet compares a pageSet with a plain array.
func TestPageSet(t *testing.T) {
	r := testenv.Rand(t)
	const pages = 64
	for range 200 {
		var set pageSet
		var model [pages]bool
		for range 50 {
			first := r.Int64N(pages)
			end := first + r.Int64N(pages-first+1)
			present := r.IntN(2) == 0
			if present {
				set.add(first, end)
			} else {
				set.remove(first, end)
			}
			for i := first; i < end; i++ {
				model[i] = present
			}
			checkPageSet(t, &set, model[:])
		}
	}
}

func checkPageSet(t *testing.T, set *pageSet, model []bool) {
	t.Helper()
	var count int64
	for i, want := range model {
		if set.has(int64(i)) != want {
			t.Fatalf("page %d: %v, want %v, in %v", i, !want, want, set.runs)
		}
		if want {
			count++
		}
		if got := set.countIn(0, int64(i)+1); got != count {
			t.Fatalf("%d pages in [0, %d), want %d, in %v", got, i+1, count, set.runs)
		}
	}
	if set.count != count {
		t.Fatalf("%d pages, want %d, in %v", set.count, count, set.runs)
	}
	for i, run := range set.runs {
		if run.first >= run.end || i > 0 && set.runs[i-1].end >= run.first {
			t.Fatalf("runs are empty, overlap, touch or are out of order: %v", set.runs)
		}
	}
}
