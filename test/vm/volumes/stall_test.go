package volumes

import (
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/test/internal/node"
)

// stallTime is longer than the kernel's and our own timers, and shorter than what makes
// the NFS server forget its clients.
const stallTime = 70 * time.Second

// TestStalledNFS: the file server of the store is stopped for 70 s and started again, with
// volumes under load over every transport: no request fails, no block differs.
func TestStalledNFS(t *testing.T) {
	on(t, "stall")
	server := startNFS(t)
	defer server.goOn(t)
	n := startNode(t, server.mount(t)+"/store")
	var all []*loaded
	for _, transport := range transports(t, n) {
		all = append(all, loadVolume(t, n, transport, map[string]string{"transport": transport}, busy))
	}
	for _, l := range all {
		l.await(100)
	}
	server.stop(t)
	time.Sleep(stallTime)
	before := make([]int64, len(all))
	for i, l := range all {
		before[i] = l.model.Counts().Requests
	}
	time.Sleep(time.Second)
	for i, l := range all {
		if now := l.model.Counts().Requests; now != before[i] {
			t.Logf("%s: the load went on without the file server: %d requests", l.volume.ID, now-before[i])
		}
	}
	server.start(t)
	for _, l := range all {
		l.await(100)
	}
	for _, l := range all {
		if longest := l.model.Counts().Longest; longest < stallTime/2 {
			t.Errorf("%s: the longest request took %v: it has not seen the stall", l.volume.ID, longest)
		}
		l.end()
	}
}

// TestStalledNFSAndKilledServers: servers die while the file server is stopped.
func TestStalledNFSAndKilledServers(t *testing.T) {
	on(t, "stall")
	server := startNFS(t)
	defer server.goOn(t)
	n := startNode(t, server.mount(t)+"/store")
	var all []*loaded
	for _, transport := range transports(t, n) {
		all = append(all, loadVolume(t, n, transport, map[string]string{"transport": transport}, busy))
	}
	for _, l := range all {
		l.await(100)
	}
	server.stop(t)
	for range 3 {
		time.Sleep(5 * time.Second)
		n.Kill(node.Server)
	}
	server.start(t)
	for _, l := range all {
		l.await(100)
		l.end()
	}
}
