package driver

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// Whoever waits for a key gets it when it is free, one after another, or is told that an
// operation is pending when its call ends.
func TestInflight_Wait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f inflight
		unlock, err := f.lock("v")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.lock("v"); !errors.Is(err, errPending) {
			t.Errorf("lock of a key that is held: %v, want %v", err, errPending)
		}
		const waiting = 3
		taken := make(chan func(), waiting)
		for range waiting {
			go func() {
				unlock, err := f.wait(t.Context(), "v")
				if err != nil {
					t.Error(err)
				}
				taken <- unlock
			}()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := f.wait(ctx, "v"); !errors.Is(err, errPending) {
			t.Errorf("wait until the call has ended: %v, want %v", err, errPending)
		}
		if len(taken) > 0 {
			t.Fatal("a key that is held was taken")
		}
		for n := range waiting {
			unlock()
			synctest.Wait()
			if len(taken) != 1 {
				t.Fatalf("%d wait for a key that is free, and %d have it, want 1", waiting-n, len(taken))
			}
			unlock = <-taken
		}
		unlock()
		if _, err := f.wait(t.Context(), "v"); err != nil {
			t.Error(err)
		}
	})
}
