package volumes

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/test/internal/node"
)

const (
	defaultCycles = 40 // 200 take most of half an hour where machines are emulated
	cycleVolumes  = 6  // that are attached and detached at the same time
)

// wantedCycles is how often to attach and detach: IMGDISK_CYCLES.
func wantedCycles(t *testing.T) int {
	t.Helper()
	text := os.Getenv("IMGDISK_CYCLES")
	if text == "" {
		return defaultCycles
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("IMGDISK_CYCLES=%s: want a number of 1 or more", text)
	}
	return n
}

// TestCyclesLeaveNothing attaches and detaches volumes many times while processes are being
// killed: afterwards the machine holds nothing that it did not hold before.
func TestCyclesLeaveNothing(t *testing.T) {
	on(t, "volumes")
	var names []string
	t.Run("warm-up", func(t *testing.T) { // what the kernel makes once and keeps
		names = transports(t, startNode(t, storeDir(t)))
	})
	// Tested where attaching is fast, on any machine.
	names = slices.DeleteFunc(names, func(name string) bool { return name == "fuse" })
	rng := testenv.Rand(t)
	before, err := node.Inventory()
	must(t, err)
	t.Run("cycles", func(t *testing.T) { cycle(t, startNode(t, storeDir(t)), names, rng) })
	after, err := node.Inventory()
	must(t, err)
	fail(t, "left behind", node.Difference(before, after))
}

// cycle attaches and detaches volumes under fire.
func cycle(t *testing.T, n *node.Node, transports []string, rng *rand.Rand) {
	cycles := wantedCycles(t)
	k := &killer{
		node: n, rng: rand.New(rand.NewPCG(rng.Uint64(), rng.Uint64())),
		done: make([]atomic.Int64, cycleVolumes), over: make(chan struct{}),
	}
	var killing, volumes sync.WaitGroup
	killing.Go(k.run)
	var begun atomic.Int64
	for i := range cycleVolumes {
		transport := transports[i%len(transports)]
		volumes.Go(func() {
			v, err := n.Create(t.Context(), fmt.Sprintf("%s-%d", transport, i), 16*mib, map[string]string{"transport": transport})
			for err == nil && begun.Add(1) <= int64(cycles) {
				if err = v.Attach(t.Context()); err == nil {
					k.done[i].Add(1)
					err = v.Detach(t.Context())
				}
				k.done[i].Add(1)
			}
			k.done[i].Store(ended)
			if err == nil {
				err = v.Delete(t.Context())
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	volumes.Wait()
	close(k.over)
	killing.Wait()
	t.Logf("%d kills, %d calls repeated", k.kills, n.Repeats())
	if k.kills < cycles/20 {
		t.Errorf("only %d kills", k.kills)
	}
}

// ended is what a volume has done that does nothing any more.
const ended = math.MaxInt64

// killer kills one process or another. On a slow machine killing at a pace of its own it
// would let nothing be done, and killing at the pace of some volumes would keep others from
// ever getting anywhere: so it waits for each to have attached or detached once more.
type killer struct {
	node  *node.Node
	rng   *rand.Rand
	done  []atomic.Int64 // attaches and detaches, of each volume
	over  chan struct{}
	kills int
}

func (k *killer) run() {
	for last := make([]int64, len(k.done)); ; {
		pause := time.Duration(k.rng.Int64N(int64(time.Second)))
		select {
		case <-k.over:
			return
		case <-time.After(pause):
		}
		if !k.allHaveDoneMore(last) {
			continue
		}
		for i := range k.done {
			last[i] = k.done[i].Load()
		}
		k.kills += k.node.Kill([]node.Role{node.Server, node.Server, node.Supervisor, node.Driver}[k.rng.IntN(4)])
	}
}

// allHaveDoneMore reports whether each volume has done something since last, or has ended.
func (k *killer) allHaveDoneMore(last []int64) bool {
	for i := range k.done {
		if now := k.done[i].Load(); now != ended && now <= last[i] {
			return false
		}
	}
	return true
}
