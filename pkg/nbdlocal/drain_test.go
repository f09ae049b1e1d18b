package nbdlocal

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestDrain_StopsBetweenMessages: a message that has begun to arrive is taken whole and
// answered, and not a byte of the next one is read: a successor goes on with it.
func TestDrain_StopsBetweenMessages(t *testing.T) {
	for _, tc := range []struct {
		name string
		off  int64
		want syscall.Errno
	}{{"write", 10, 0}, {"refused write", mib, syscall.ENOSPC}} {
		t.Run(tc.name, func(t *testing.T) {
			dev := newMemDevice(mib)
			s := NewServer(dev, Options{})
			server, conn := socketPair(t)
			result := make(chan error, 1)
			go func() { result <- s.ServeConn(context.Background(), server) }()
			c := newClient(t, conn)
			c.write(10, []byte("B"))

			messages := append(requestHeader(cmdWrite, 0, 50, tc.off, 1000), make([]byte, 1000)...)
			messages[requestBytes] = 'A'
			messages = append(messages, requestHeader(cmdRead, 0, 51, 10, 1)...)
			c.sent[50] = command{cmd: cmdWrite, n: 1000}
			c.sent[51] = command{cmd: cmdRead, n: 1}
			drained := make(chan error, 1)
			last := len(messages) - requestBytes/2 // half of the next message's header stays behind
			for i, part := range [][]byte{messages[:10], messages[10:40], messages[40:600], messages[600:last]} {
				if _, err := conn.Write(part); err != nil {
					t.Fatal(err)
				}
				time.Sleep(30 * time.Millisecond)
				if i == 0 {
					go func() { drained <- s.Drain(context.Background()) }()
					time.Sleep(30 * time.Millisecond)
				}
			}
			if a, err := c.receive(); err != nil || a.errno != tc.want || a.cookie != 50 {
				t.Fatalf("reply: %+v, %v", a, err)
			}
			if err := errors.Join(<-drained, <-result); err != nil {
				t.Error(err)
			}
			want := dev.snapshot(10, 1)[0]
			if (want == 'A') != (tc.want == 0) {
				t.Errorf("the device holds %q", want)
			}

			next := NewServer(dev, Options{})
			go func() { result <- next.ServeConn(context.Background(), server) }()
			if _, err := conn.Write(messages[last:]); err != nil {
				t.Fatal(err)
			}
			if a, err := c.receive(); err != nil || a.cookie != 51 || a.data[0] != want {
				t.Errorf("the successor's reply: %+v, %v", a, err)
			}
			c.send(cmdDisc, 0, 0, 0, nil)
			if err := <-result; err != nil {
				t.Errorf("the successor's ServeConn: %v", err)
			}
		})
	}
}

// TestServeConn_LeftoversAreDropped: a successor that finds requests in a socket that the
// kernel has given up must not carry them out.
func TestServeConn_LeftoversAreDropped(t *testing.T) {
	dev := newMemDevice(mib)
	server, conn := socketPair(t)
	c := newClient(t, conn)
	c.send(cmdWrite, 0, 0, 3, []byte("old"))
	_ = conn.Close()
	if err := NewServer(dev, Options{}).ServeConn(context.Background(), server); err != nil {
		t.Errorf("ServeConn: %v", err)
	}
	if got := dev.snapshot(0, 3); string(got) == "old" {
		t.Error("a write was carried out that the kernel may have sent elsewhere since")
	}
}

// TestDrain_UnderLoad hands a connection from server to server while requests keep
// coming: each is answered exactly once.
func TestDrain_UnderLoad(t *testing.T) {
	dev := newMemDevice(mib)
	server, conn := socketPair(t)
	c := newClient(t, conn)
	var stop atomic.Bool
	finished := make(chan error, 1)
	go func() {
		for !stop.Load() {
			s := NewServer(dev, Options{})
			result := make(chan error, 1)
			go func() { result <- s.ServeConn(context.Background(), server) }()
			time.Sleep(3 * time.Millisecond)
			if err := errors.Join(s.Drain(context.Background()), <-result); err != nil {
				finished <- err
				return
			}
		}
		finished <- NewServer(dev, Options{}).ServeConn(context.Background(), server)
	}()
	data := make([]byte, 3000)
	for i := range 20_000 {
		if i%2 == 0 {
			c.send(cmdWrite, 0, int64(i), len(data), data)
		} else {
			c.send(cmdRead, 0, int64(i), len(data), nil)
		}
		if i < 20 {
			continue
		}
		if a, err := c.receive(); err != nil || a.errno != 0 {
			t.Fatalf("reply: %v %v", err, a.errno)
		}
	}
	for len(c.sent) > 0 {
		if a, err := c.receive(); err != nil || a.errno != 0 {
			t.Fatalf("reply: %v %v", err, a.errno)
		}
	}
	stop.Store(true)
	_ = conn.Close()
	if err := <-finished; err != nil {
		t.Error(err)
	}
}

// TestDrain_AnswersWhatWasTaken: requests that the device is slow with are answered too.
func TestDrain_AnswersWhatWasTaken(t *testing.T) {
	dev := newMemDevice(mib)
	g := newGate(t)
	dev.before = func(string, int64, int64) error { g.wait(); return nil }
	s := NewServer(dev, Options{})
	c, result := pipeClient(t, s)
	requests := make([]command, 40)
	for i := range requests {
		requests[i] = command{cmd: cmdRead, off: int64(i), n: 1}
	}
	c.sendAll(requests...)
	if !eventually(func() bool { return s.Stats().InFlight == 40 }) {
		t.Fatalf("%d requests in flight, want 40", s.Stats().InFlight)
	}
	drained := make(chan error, 1)
	go func() { drained <- s.Drain(context.Background()) }()
	select {
	case err := <-drained:
		t.Fatalf("Drain returned before the requests were answered: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	g.open()
	for range 40 {
		if a, err := c.receive(); err != nil || a.errno != 0 {
			t.Fatalf("reply: %v %v", err, a.errno)
		}
	}
	if err := errors.Join(<-drained, <-result); err != nil {
		t.Error(err)
	}
}

// TestDrain_GivesUp: a device that never answers doesn't hold Drain beyond its context.
func TestDrain_GivesUp(t *testing.T) {
	dev := newMemDevice(mib)
	g := newGate(t)
	dev.before = func(string, int64, int64) error { g.wait(); return nil }
	s := NewServer(dev, Options{})
	c, result := pipeClient(t, s)
	c.send(cmdRead, 0, 0, 1, nil)
	<-g.entered
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := s.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("drain: %v, want deadline exceeded", err)
	}
	if _, err := c.receive(); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client sees %v, want the connection's end", err)
	}
	g.open()
	if err := <-result; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("ServeConn: %v", err)
	}
}

// TestDrain_Quiet: a connection on which nothing arrives any more ends at once, in
// whichever way it happens to be waiting.
func TestDrain_Quiet(t *testing.T) {
	for _, pause := range []time.Duration{0, 5 * time.Millisecond, 15 * time.Millisecond, 60 * time.Millisecond} {
		s := NewServer(newMemDevice(mib), Options{})
		c, result := pipeClient(t, s)
		c.read(0, 1)
		time.Sleep(pause)
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		if err := s.Drain(ctx); err != nil {
			t.Errorf("drain %v after the last request: %v", pause, err)
		}
		cancel()
		if err := <-result; err != nil {
			t.Errorf("ServeConn: %v", err)
		}
	}
}
