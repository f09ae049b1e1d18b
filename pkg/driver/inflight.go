package driver

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"

	"k8s.io/klog/v2"
)

// inflight lets one operation at a time work on a volume or snapshot.
type inflight struct {
	mu   sync.Mutex
	keys map[string]chan struct{} // closed when the key is free
}

// lock takes a key; errPending if another operation holds it.
func (f *inflight) lock(key string) (unlock func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.keys[key] != nil {
		return nil, fmt.Errorf("%s: %w", key, errPending)
	}
	if f.keys == nil {
		f.keys = map[string]chan struct{}{}
	}
	free := make(chan struct{})
	f.keys[key] = free
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.keys, key)
		close(free)
	}, nil
}

// wait takes a key once no other operation holds it; errPending if ctx ends before. It is for
// callers of which there is one for each key, and which come back after a pause that gets
// longer each time: what has taken longer than one call is over for them when it is over.
func (f *inflight) wait(ctx context.Context, key string) (unlock func(), err error) {
	for {
		unlock, err := f.lock(key)
		if err == nil {
			return unlock, nil
		}
		f.mu.Lock()
		free := f.keys[key]
		f.mu.Unlock()
		if free == nil {
			continue
		}
		select {
		case <-free:
		case <-ctx.Done():
			return nil, err
		}
	}
}

// flights is work that may hang longer than the call that began it. It goes on when
// the call has ended, and the next call with the same key joins it.
type flights struct {
	mu      sync.Mutex
	flights map[flightKey]*flight
}

// flightKey names work: what is done, for which volume, where.
type flightKey struct {
	work, volume, path string
}

type flight struct {
	done   chan struct{}
	result any // once done
	err    error
}

// do runs work, or joins it if it is under way, until it ends or ctx does.
func (f *flights) do(ctx context.Context, key flightKey, work func() (any, error)) (any, error) {
	return f.start(key, work).wait(ctx, key)
}

// join waits for work that is under way, if there is any, until it ends or ctx does.
func (f *flights) join(ctx context.Context, key flightKey) error {
	f.mu.Lock()
	fl := f.flights[key]
	f.mu.Unlock()
	if fl == nil {
		return nil
	}
	_, err := fl.wait(ctx, key)
	return err
}

func (fl *flight) wait(ctx context.Context, key flightKey) (any, error) {
	select {
	case <-fl.done:
		return fl.result, fl.err
	case <-ctx.Done():
		return nil, fmt.Errorf("%s %s is still under way, as it is when the store does not answer: %w", key.work, key.path, ctx.Err())
	}
}

func (f *flights) start(key flightKey, work func() (any, error)) *flight {
	f.mu.Lock()
	defer f.mu.Unlock()
	if fl := f.flights[key]; fl != nil {
		return fl
	}
	if f.flights == nil {
		f.flights = map[flightKey]*flight{}
	}
	fl := &flight{done: make(chan struct{})}
	f.flights[key] = fl
	go func() {
		defer f.land(key, fl)
		fl.result, fl.err = guard(work)
	}()
	return fl
}

func (f *flights) land(key flightKey, fl *flight) {
	f.mu.Lock()
	delete(f.flights, key)
	f.mu.Unlock()
	close(fl.done)
}

// underWay returns errPending if work for a volume has not ended.
func (f *flights) underWay(work, volume string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for key := range f.flights {
		if key.work == work && key.volume == volume {
			return fmt.Errorf("%s %s of volume %s has not ended: %w", work, key.path, volume, errPending)
		}
	}
	return nil
}

// guard turns a panic into an error, where no interceptor does.
func guard(work func() (any, error)) (result any, err error) {
	defer func() {
		if p := recover(); p != nil {
			klog.Background().Error(nil, "panic", "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("%w: %v", errPanic, p)
		}
	}()
	return work()
}
