package volumes

import (
	"slices"
	"testing"

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
			if parameters["transport"] == "fuse" && slices.Contains(victims, node.Server) && slices.Contains(victims, node.Supervisor) {
				continue // they are all who hold the connection
			}
			l.await(20 + rng.Int64N(100))
			if killed := n.Kill(victims...); killed < len(victims) {
				t.Logf("killed %d of %v: the others were starting", killed, victims)
			}
		}
		l.await(50)
		l.end()
	})
}

// TestGrowUnderLoad: the device grows again and again while it is written, and servers
// die.
func TestGrowUnderLoad(t *testing.T) {
	on(t, "volumes")
	perTransport(t, func(t *testing.T, n *node.Node, parameters map[string]string) {
		l := loadVolume(t, n, "v", parameters, busy)
		for i := range 5 {
			must(t, l.volume.Grow(t.Context(), l.volume.SizeBytes+4*mib+int64(i)*load.BlockBytes))
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
		for i, name := range []string{"first", "second", "third"} {
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
