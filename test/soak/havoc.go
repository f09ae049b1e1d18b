package main

import (
	"context"
	"math/rand/v2"
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
			s.tally.addN(eventKillSuper, s.node.Kill(node.Supervisor))
		case p < 55:
			s.tally.addN(eventKillDriver, s.node.Kill(node.Driver))
		case p < 70:
			s.tally.addN(eventKillAll, s.killAll())
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

// upgrade replaces all processes but the driver by another program's.
func (s *soak) upgrade(ctx context.Context) {
	servers, pause, err := s.node.Upgrade(ctx)
	if err != nil {
		if ctx.Err() == nil {
			s.failed("upgrade", err)
		}
		return
	}
	s.tally.addN(eventUpgrade, servers)
	s.tally.addPause(pause)
}
