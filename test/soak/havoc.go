package main

import (
	"context"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/test/internal/node"
)

const (
	// havocPause is between two things that happen to all volumes, on average.
	havocPause = 3 * time.Second
	// stall is how long the store stalls at most.
	stall = 8 * time.Second
)

// havoc lets things happen to all volumes at once, until ctx ends.
func (s *soak) havoc(ctx context.Context, rng *rand.Rand) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Duration(rng.Int64N(int64(2 * havocPause)))):
		}
		switch p := rng.IntN(100); {
		case p < 30:
			s.tally.addN(eventKillSuper, s.shoot(ctx, func() int { return s.node.Kill(node.Supervisor) }))
		case p < 55:
			s.tally.addN(eventKillDriver, s.node.Kill(node.Driver))
		case p < 70:
			s.tally.addN(eventKillAll, s.shoot(ctx, s.killAll))
		case p < 80:
			s.failed("stall", s.store.Stall(ctx, time.Duration(rng.Int64N(int64(stall)))))
			s.tally.add(eventStall)
		default:
			s.upgrade(ctx)
		}
	}
}

func (s *soak) killAll() int {
	return min(s.node.Kill(node.Driver, node.Supervisor, node.Server), 1)
}

// shoot kills something and returns how many that were.
//
// While nobody but supervisor and server holds a FUSE connection, it ends with both of
// them: then all have to be well before one is killed.
func (s *soak) shoot(ctx context.Context, kill func() int) int {
	if !slices.Contains(s.transports, "fuse") {
		return kill()
	}
	s.shooting.Lock()
	defer s.shooting.Unlock()
	if err := s.node.AwaitServing(ctx); err != nil {
		if ctx.Err() == nil {
			s.failed("wait until all are served", err)
		}
		return 0
	}
	return kill()
}

// upgrade replaces all servers, while their volumes are in use.
func (s *soak) upgrade(ctx context.Context) {
}
