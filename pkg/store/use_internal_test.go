package store

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// A volume that is used is looked after at each interval; one that is not, seldom, and at
// once when it is used again.
func TestUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := newUse()
		const interval = 100 * time.Millisecond
		waits := func(what string, want time.Duration) {
			t.Helper()
			start := time.Now()
			if err := u.wait(t.Context(), interval); err != nil {
				t.Fatal(err)
			}
			if got := time.Since(start); got != want {
				t.Errorf("%s: waited %v, want %v", what, got, want)
			}
		}
		waits("never used", idlePolls*interval)
		u.note()
		u.note()
		waits("used before", interval)
		waits("not used since", idlePolls*interval)
		time.AfterFunc(interval/2, u.note)
		waits("used meanwhile", interval/2)
		waits("it was used", interval)
		time.AfterFunc(interval/2, u.note)
		waits("used again", interval/2)
		time.AfterFunc(interval/2, u.note)
		waits("used while being looked after", interval)
		waits("used late in that", interval)
		waits("not any more", idlePolls*interval)

		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(interval, cancel)
		start := time.Now()
		if err := u.wait(ctx, interval); err == nil || time.Since(start) != interval {
			t.Errorf("cancelled: %v after %v", err, time.Since(start))
		}
	})
}
