package volumes

import (
	"sync"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/test/internal/node"
)

// stallTime is longer than the kernel's timers and our own.
const stallTime = 70 * time.Second

// loadEveryTransport makes a volume for each transport and loads it.
func loadEveryTransport(t *testing.T, n *node.Node) (all []*loaded) {
	t.Helper()
	for _, transport := range transports(t, n) {
		all = append(all, loadVolume(t, n, transport, map[string]string{"transport": transport}, busy))
	}
	for _, l := range all {
		l.await(100)
	}
	return all
}

// TestStoppedNFS: the file server of the store is stopped, and started again after 70 s,
// with volumes under load over every transport: no request fails, no block differs.
func TestStoppedNFS(t *testing.T) {
	on(t, "stall")
	server := startNFS(t)
	n := startNode(t, server.mount(t)+"/store")
	all := loadEveryTransport(t, n)
	server.stop(t)
	time.Sleep(stallTime)
	server.start(t)
	for _, l := range all {
		l.await(100) // with the locks that it had
	}
	server.endGrace(t)
	for _, l := range all {
		if longest := l.model.Counts().Longest; longest < stallTime/2 {
			t.Errorf("%s: the longest request took %v: it has not seen the stall", l.volume.ID, longest)
		}
		l.end()
	}
}

// TestStalledNFSAndKilledServers: servers die, too, while the file server does not answer.
func TestStalledNFSAndKilledServers(t *testing.T) {
	on(t, "stall")
	server := startNFS(t)
	n := startNode(t, server.mount(t)+"/store")
	all := loadEveryTransport(t, n)
	var killing sync.WaitGroup
	killing.Go(func() {
		for range 3 {
			time.Sleep(5 * time.Second)
			n.Kill(node.Server)
		}
	})
	server.stall(t, 20*time.Second)
	killing.Wait()
	for _, l := range all {
		l.await(100)
		l.end()
	}
}
