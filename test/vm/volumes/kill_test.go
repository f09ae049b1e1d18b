package volumes

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/test/internal/load"
	"github.com/csi-imgdisk/csi-imgdisk/test/internal/node"
)

// busy is a load that leaves little time between requests.
var busy = load.Options{Workers: 4}

// TestKillsUnderLoad: whichever of the processes is killed at whatever moment, no request
// fails and no block differs.
func TestKillsUnderLoad(t *testing.T) {
	on(t, "volumes")
	perTransport(t, func(t *testing.T, n *node.Node, parameters map[string]string) {
		rng := testenv.Rand(t)
		l := loadVolume(t, n, "v", parameters, busy)
		for _, victims := range [][]node.Role{
			{node.Server}, {node.Supervisor}, {node.Driver}, {node.Server},
			{node.Driver, node.Supervisor}, {node.Driver, node.Server},
			{node.Server, node.Supervisor}, {node.Driver, node.Supervisor, node.Server},
			{node.Driver, node.Supervisor, node.Server},
		} {
			l.await(20 + rng.Int64N(100))
			if killed := n.Kill(victims...); killed < len(victims) {
				t.Logf("killed %d of %v: the others were starting", killed, victims)
			}
		}
		l.await(50)
		l.end()
	})
}

// TestKillsWhileDetaching: a detach flushes the device, and waits for the server as long as
// that hangs, in a system call that nothing interrupts. If all are killed then, who comes
// after them goes on all the same.
func TestKillsWhileDetaching(t *testing.T) {
	on(t, "volumes")
	perTransport(t, func(t *testing.T, n *node.Node, parameters map[string]string) {
		v, err := n.Create(t.Context(), "v", 16*mib, parameters)
		must(t, err)
		for range 2 {
			must(t, v.Attach(t.Context()))
			hanging, hung := context.WithCancel(t.Context())
			var server sync.WaitGroup
			server.Go(func() { v.HangServer(hanging, node.Patience) })
			var detached sync.WaitGroup
			detached.Go(func() { err = v.Detach(t.Context()) })
			time.Sleep(5 * time.Second) // until it waits; if that takes longer, it is killed elsewhere
			n.Kill(node.Supervisor, node.Driver)
			n.Kill(node.Server)
			hung()
			server.Wait()
			detached.Wait()
			must(t, err)
		}
		must(t, v.Delete(t.Context()))
	})
}

// TestUpgradesUnderLoad: all processes are replaced by another program's, again and again.
func TestUpgradesUnderLoad(t *testing.T) {
	on(t, "volumes")
	perTransport(t, func(t *testing.T, n *node.Node, parameters map[string]string) {
		l := loadVolume(t, n, "v", parameters, busy)
		for range 3 {
			l.await(40)
			servers, pause, err := n.Upgrade(t.Context())
			must(t, err)
			if servers != 1 {
				t.Errorf("%d servers were replaced, want 1", servers)
			}
			t.Logf("requests waited %v", pause)
		}
		l.await(40)
		l.end()
	})
}

// TestGrowUnderLoad: the device grows again and again while it is written, and servers
// die.
func TestGrowUnderLoad(t *testing.T) {
	on(t, "volumes")
	perTransport(t, func(t *testing.T, n *node.Node, parameters map[string]string) {
		l := loadVolume(t, n, "v", parameters, busy)
		for i := range 3 {
			err := l.volume.Grow(t.Context(), l.volume.SizeBytes+4*mib+int64(i)*load.BlockBytes)
			if err != nil && parameters["transport"] == "ublk" && strings.Contains(err.Error(), "attach it again") {
				t.Logf("as is to be expected before Linux 6.16: %v", err)
				break
			}
			must(t, err)
			l.model.Grow(l.volume.SizeBytes)
			l.await(30)
			if i%2 == 1 {
				n.Kill(node.Server)
			}
		}
		l.end()
	})
}

// TestSnapshotsUnderLoad: snapshots of a volume that is being written hold what it held
// at one moment, also when its server dies meanwhile.
func TestSnapshotsUnderLoad(t *testing.T) {
	on(t, "volumes")
	perTransport(t, func(t *testing.T, n *node.Node, parameters map[string]string) {
		l := loadVolume(t, n, "v", parameters, busy)
		for i, name := range []string{"first", "second"} {
			l.await(50)
			cut := l.model.BeginCut()
			if i == 1 {
				n.Kill(node.Server)
			}
			id, err := l.volume.Snapshot(t.Context(), name)
			cut.End()
			must(t, err)
			l.await(20)
			restored, err := l.volume.Restore(t.Context(), "restored-"+name, id)
			must(t, err)
			must(t, restored.Attach(t.Context()))
			if err := cut.Verify(restored.Path()); err != nil {
				t.Errorf("snapshot %s: %v", name, err)
			}
			must(t, restored.Detach(t.Context()))
			must(t, restored.Delete(t.Context()))
			must(t, l.volume.DeleteSnapshot(t.Context(), id))
		}
		l.end()
	})
}
