package nbdlocal

import (
	"testing"
	"testing/synctest"
	"time"
)

// The watch sleeps soon after nothing has happened, and not for 100 looks; a request wakes it.
func TestWatch_Sleeps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, s, stop := newWatch(), &Server{}, make(chan struct{})
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			w.run(s, stop)
		}()
		for range 3 {
			time.Sleep(watchInterval / 2)
			if w.asleep.Load() {
				t.Fatal("it sleeps before it has looked")
			}
			time.Sleep(2 * watchLongest)
			synctest.Wait()
			if !w.asleep.Load() {
				t.Fatalf("it does not sleep after %v in which nothing happened", 2*watchLongest)
			}
			w.stir()
		}
		close(stop)
		<-ended
	})
}
