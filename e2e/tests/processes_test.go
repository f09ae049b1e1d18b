package tests

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/cluster"
	"github.com/csi-imgdisk/csi-imgdisk/e2e/install"
)

var bothNodes = []string{cluster.NodeA, cluster.NodeB}

// The driver's processes are killed and replaced while volumes on both nodes are written
// to: requests wait, none fails, and everything that was asked for comes about.
func TestProcesses(t *testing.T) {
	e := newEnv(t)
	pauses := newTable("processes", "what happened", "longest pause of a request")
	var loads []pod
	for _, node := range bothNodes {
		p := pod{name: "load-" + node, node: node}
		p.files = []string{e.claim(claim{name: "files-" + node, class: e.class(map[string]string{"store": "main", "format": "vmdk"})})}
		p.blocks = []string{e.claim(claim{name: "disk-" + node, block: true})}
		e.writerPod(&p, 1)
		loads = append(loads, p)
	}
	var writers []*writer
	for _, p := range loads {
		writers = append(writers, e.writing(p)...)
	}
	dirs := e.bound("files-"+cluster.NodeA, "disk-"+cluster.NodeA, "files-"+cluster.NodeB, "disk-"+cluster.NodeB)

	disturb := func(what string, do func()) {
		for _, w := range writers {
			w.mark()
		}
		do()
		var longest time.Duration
		for _, w := range writers {
			w.advances() // fails at an error
			longest = max(longest, w.pause())
		}
		pauses.add(what, longest)
	}
	kill := func(argument string) func() {
		return func() {
			for _, node := range bothNodes {
				e.on(node, signal("KILL", argument))
			}
		}
	}
	disturb("nothing", func() { time.Sleep(5 * time.Second) })
	disturb("servers of all volumes killed", kill("server"))
	disturb("supervisors killed", kill("supervisor"))
	disturb("supervisors and servers killed together", func() { kill("supervisor")(); kill("server")() })
	disturb("node plugins killed", kill("node"))
	disturb("node plugins rolled to another version", func() { rollNodePlugin(e) })
	disturb("controllers killed in the middle of everything", func() { controllersKilled(e) })
	pauses.print(e)

	e.stop(writers[:2])
	e.stop(writers[2:])
	e.check(dirs...)
}

// rollNodePlugin upgrades the release to the next version's image, which parts has made. The
// data plane's pods stay as they are.
func rollNodePlugin(e *env) {
	before := daemonSet(e, "csi-imgdisk-node")
	tag := world.driverImage[strings.LastIndex(world.driverImage, ":")+1:] + "-next"
	e.ok(install.Upgrade(e.Context(), world.cluster, "image.tag="+tag))
	e.eventually(longer, "the node plugins are replaced", func(ctx context.Context) (string, error) {
		now := daemonSet(e, "csi-imgdisk-node")
		s := now.Status
		if now.Generation == before.Generation || s.ObservedGeneration < now.Generation || s.UpdatedNumberScheduled < 2 || s.NumberReady < 2 {
			return fmt.Sprintf("%+v", s), nil
		}
		return "", nil
	})
}

func daemonSet(e *env, name string) *appsv1.DaemonSet {
	e.Helper()
	ds, err := world.client.AppsV1().DaemonSets(install.Namespace).Get(e.Context(), name, metav1.GetOptions{})
	e.ok(err)
	return ds
}

// controllersKilled has volumes made, snapshotted, restored, attached, grown and deleted, and
// kills all controllers in the middle of each.
func controllersKilled(e *env) {
	const sets = 3
	var claims, snaps, restored []string
	for i := range sets {
		claims = append(claims, e.claim(claim{name: fmt.Sprint("made-", i), block: true}))
	}
	time.Sleep(time.Second)
	// At first the processes, which the kubelet starts again; then the pods, which does not
	// wait longer each time.
	for _, node := range bothNodes {
		e.on(node, signal("KILL", "controller"))
	}
	e.bound(claims...)

	kill := func() {
		pods, err := world.client.CoreV1().Pods(install.Namespace).List(e.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=controller"})
		e.ok(err)
		for _, p := range pods.Items {
			err := world.client.CoreV1().Pods(install.Namespace).Delete(e.Context(), p.Name, metav1.DeleteOptions{GracePeriodSeconds: ptr(int64(0))})
			if err != nil && !apierrors.IsNotFound(err) {
				e.Fatal(err)
			}
		}
	}
	user := pod{name: "user", node: cluster.NodeB, blocks: claims, script: untilTold}
	e.pod(user)
	for i, name := range claims {
		snaps = append(snaps, e.snapshot(fmt.Sprint("snap-", i), name, ""))
		// As large as the snapshot may be, which is taken before or after the volume grows.
		restored = append(restored, e.claim(claim{name: fmt.Sprint("restored-", i), size: "96Mi", block: true, snapshot: snaps[i]}))
	}
	for _, name := range claims {
		e.grow(name, "96Mi")
	}
	time.Sleep(time.Second)
	kill()
	e.running("user")
	e.ready(snaps...)
	e.bound(restored...)
	for _, name := range claims {
		e.expand(name, "96Mi")
	}
	e.end("user")
	for i := range claims {
		e.deleteClaim(claims[i])
		e.deleteSnapshot(snaps[i])
		e.deleteClaim(restored[i])
	}
	kill()
	e.gone(append(append(claims, snaps...), restored...)...)
}
