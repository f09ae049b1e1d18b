package tests

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/cluster"
)

// 60 volumes at once: made, attached on both nodes, snapshotted, deleted.
func TestMany(t *testing.T) {
	e := newEnv(t)
	const volumes = 60
	times := newTable("many", "60 volumes at once", "took")
	since := time.Now()
	step := func(what string) {
		times.add(what, time.Since(since))
		since = time.Now()
	}
	var names []string
	for i := range volumes {
		names = append(names, e.claim(claim{name: fmt.Sprintf("v%02d", i), size: "32Mi", block: i%10 > 0}))
	}
	e.bound(names...)
	step("created: all claims bound")

	pods := map[string]*pod{}
	for i, name := range names {
		node := []string{cluster.NodeA, cluster.NodeB}[i%2]
		p := pods[node]
		if p == nil {
			p = &pod{name: "on-" + node, node: node}
			pods[node] = p
		}
		if i%10 > 0 {
			p.blocks = append(p.blocks, name)
			p.script += fmt.Sprintf("echo %s | dd of=/dev/%[1]s conv=fsync,sync status=none\n", name)
		} else {
			p.files = append(p.files, name)
			p.script += fmt.Sprintf("echo %s >/%[1]s/name; sync /%[1]s/name\n", name)
		}
	}
	for _, p := range pods {
		p.script += "echo written\n" + untilTold
		e.pod(*p)
	}
	for _, p := range pods {
		e.running(p.name)
	}
	step("attached: 54 block devices and 6 new file systems in two pods that run")
	for _, p := range pods {
		e.says(p.name, "written")
	}
	step("a first write to each flushed")

	var snaps []string
	for _, name := range names {
		snaps = append(snaps, e.snapshot("s-"+name, name, ""))
	}
	e.ready(snaps...)
	step("snapshotted while attached: all ready")

	for _, p := range pods {
		e.end(p.name)
	}
	e.detached(names...)
	step("unmounted and detached: both pods gone")
	for i := range names {
		e.deleteClaim(names[i])
		e.deleteSnapshot(snaps[i])
	}
	e.gone(append(names, snaps...)...)
	step("volumes and snapshots deleted")
	e.nothingLeft(t.Context())
	step("nothing left in the store")
	times.print(e)
	if strings.Contains(e.on(cluster.NodeA, "lsblk -dno NAME,SIZE 2>/dev/null || true"), " 32M") {
		t.Error("a device of 32 MiB is left on", cluster.NodeA)
	}
}
