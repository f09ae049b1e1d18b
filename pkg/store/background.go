package store

import (
	"context"
	"fmt"
	"sync"
)

// creations are the volumes that this process is making, each in a goroutine that goes on
// when its caller's context ends: copying an image takes longer than a CSI call may.
type creations struct {
	mu     sync.Mutex
	byName map[string]*creation
	all    sync.WaitGroup
}

// creation is one volume in the making.
type creation struct {
	cancel context.CancelFunc
	done   chan struct{}
	record Record // once done
	err    error
}

// join returns the creation of a volume, begun if there is none.
func (c *creations) join(ctx context.Context, name string, begin func(context.Context) (Record, error)) *creation {
	c.mu.Lock()
	defer c.mu.Unlock()
	if one := c.byName[name]; one != nil {
		return one
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	one := &creation{cancel: cancel, done: make(chan struct{})}
	if c.byName == nil {
		c.byName = map[string]*creation{}
	}
	c.byName[name] = one
	c.all.Go(func() {
		defer cancel()
		one.record, one.err = begin(ctx)
		c.mu.Lock()
		delete(c.byName, name)
		c.mu.Unlock()
		close(one.done)
	})
	return one
}

// stop ends the creation of a volume, if there is one, and waits until it has cleaned up.
func (c *creations) stop(ctx context.Context, name string) error {
	c.mu.Lock()
	one := c.byName[name]
	c.mu.Unlock()
	if one == nil {
		return nil
	}
	one.cancel()
	return one.wait(ctx)
}

// stopAll ends all creations.
func (c *creations) stopAll() {
	c.mu.Lock()
	for _, one := range c.byName {
		one.cancel()
	}
	c.mu.Unlock()
	c.all.Wait()
}

func (c *creation) wait(ctx context.Context) error {
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// createInBackground is createVolume for a store that finishes creations.
func (s *Store) createInBackground(ctx context.Context, req CreateVolumeRequest) (Record, error) {
	one := s.creations.join(ctx, req.Name, func(ctx context.Context) (Record, error) { return s.makeOnce(ctx, req) })
	if err := one.wait(ctx); err != nil {
		return Record{}, fmt.Errorf("create volume %s: it goes on in the background: %w", req.Name, err)
	}
	if one.err != nil {
		return Record{}, one.err
	}
	return one.record, s.comparable(one.record, req) // it may have been another's request
}
