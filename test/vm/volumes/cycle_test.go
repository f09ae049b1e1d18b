package volumes

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/test/internal/node"
)

const (
	cycles       = 200
	cycleVolumes = 5 // that are attached and detached at the same time
)

// TestCyclesLeaveNothing attaches and detaches volumes 200 times over each transport while
// processes are being killed: afterwards the machine holds nothing that it did not hold
// before.
func TestCyclesLeaveNothing(t *testing.T) {
	on(t, "volumes")
	var names []string
	t.Run("warm-up", func(t *testing.T) { // what the kernel makes once and keeps
		names = transports(t, startNode(t, storeDir(t)))
	})
	for _, transport := range names {
		if transport == "fuse" {
			continue // tested where attaching is fast, on any machine
		}
		t.Run(transport, func(t *testing.T) {
			rng := testenv.Rand(t)
			before, err := node.Inventory()
			must(t, err)
			t.Run("cycles", func(t *testing.T) { cycle(t, startNode(t, storeDir(t)), transport, rng) })
			after, err := node.Inventory()
			must(t, err)
			fail(t, "left behind", node.Difference(before, after))
		})
	}
}

// cycle attaches and detaches volumes under fire.
func cycle(t *testing.T, n *node.Node, transport string, rng *rand.Rand) {
	ctx, cancel := context.WithCancel(t.Context())
	var killer, volumes sync.WaitGroup
	kills := 0
	killRand := rand.New(rand.NewPCG(rng.Uint64(), rng.Uint64()))
	killer.Go(func() { kills = killAtRandom(ctx, n, killRand) })
	var done atomic.Int64
	for i := range cycleVolumes {
		volumes.Go(func() {
			v, err := n.Create(ctx, fmt.Sprintf("%s-%d", transport, i), 16*mib, map[string]string{"transport": transport})
			for err == nil && done.Add(1) <= cycles {
				if err = v.Attach(ctx); err == nil {
					err = v.Detach(ctx)
				}
			}
			if err == nil {
				err = v.Delete(ctx)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	volumes.Wait()
	cancel()
	killer.Wait()
	t.Logf("%d kills, %d calls repeated", kills, n.Repeats())
}

// killAtRandom kills one process or another until ctx ends.
func killAtRandom(ctx context.Context, n *node.Node, rng *rand.Rand) (kills int) {
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(rng.Int64N(int64(4 * time.Second)))):
			kills += n.Kill([]node.Role{node.Server, node.Server, node.Supervisor, node.Driver}[rng.IntN(4)])
		}
	}
	return kills
}
