package tests

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/cluster"
	"github.com/csi-imgdisk/csi-imgdisk/e2e/install"
)

// Nodes and the NFS server fail while volumes are written to. What was flushed is there on
// the other node, and the old writer, should it live, cannot write any more.
func TestNodes(t *testing.T) {
	outcomes := newTable("nodes", "what failed", "detached after", "written to on the other node after", "the old writer")
	a := func() *cluster.Machine { return world.cluster.Machine(cluster.NodeA) }
	heal := func(ctx context.Context) error { return a().Heal(ctx) }
	cut := func(from ...string) func(context.Context) error {
		return func(ctx context.Context) error { return a().Cut(ctx, from...) }
	}
	for _, f := range []failure{
		{"PoweredOff", func(context.Context) error { return a().PowerOff() }, func(ctx context.Context) error { return a().PowerOn(ctx) }, true, true},
		{"CutFromAPI", cut("api"), heal, true, false},
		{"CutFromNFS", cut("nfs"), heal, false, false},
		{"CutFromBoth", cut("api", "nfs"), heal, true, false},
	} {
		t.Run(f.name, func(t *testing.T) { f.test(newEnv(t), outcomes) })
	}
	t.Run("NFSServerRestarted", func(t *testing.T) { serverRestarted(newEnv(t)) })
	e := &env{T: t}
	if world.cluster != nil {
		outcomes.print(e)
	}
}

// failure is one of node-a's.
type failure struct {
	name       string
	begin, end func(context.Context) error
	noticed    bool // the node does not report to the API server
	off        bool // nothing runs there
}

// test writes on node-a, lets it fail, and moves the volumes to node-b as the documentation
// of Kubernetes says: with the taint out-of-service.
func (f failure) test(e *env, outcomes *table) {
	e.claim(claim{name: "files"})
	e.claim(claim{name: "disk", block: true, class: e.class(map[string]string{"store": "main", "format": "vmdk"})})
	p := pod{name: "old", node: cluster.NodeA, files: []string{"files"}, blocks: []string{"disk"}}
	old := e.write(p, 1)
	dirs := e.bound("files", "disk")

	defer e.recover(f)
	flushed := flushedOf(old) // of a machine without power nothing more can be known
	failed := time.Now()
	e.ok(f.begin(e.Context()))
	if f.noticed {
		e.nodeReady(cluster.NodeA, false)
	}
	e.taint(true)
	if !f.noticed {
		// Kubernetes deletes the pods of nodes that it takes for dead; here a person does.
		err := world.client.CoreV1().Pods(e.ns).Delete(e.Context(), "old", metav1.DeleteOptions{GracePeriodSeconds: ptr(int64(0))})
		e.ok(err)
	}
	e.detached("files", "disk")
	detached := time.Since(failed)

	// The new writers begin while the old ones may still try.
	if !f.off {
		flushed = flushedOf(old)
	}
	p.name, p.node = "new", cluster.NodeB
	fresh := e.write(p, 2, flushed...)
	moved := time.Since(failed)
	fate := "gone with its node"
	if !f.off {
		fate = f.fenced(e, old, fresh)
	}

	e.ok(f.end(e.Context()))
	e.taint(false)
	e.nodeReady(cluster.NodeA, true)
	if !f.off {
		e.eventually(longer, "the old writers' processes end", func(ctx context.Context) (string, error) {
			out, err := world.cluster.Machine(cluster.NodeA).Run(ctx, fmt.Sprintf("grep -lzx -e '%s' /proc/[0-9]*/cmdline 2>/dev/null | grep -v /self/ | wc -l", e.tag("old")))
			// The command itself has the argument, too.
			if n, _ := strconv.Atoi(strings.TrimSpace(out)); n > 1 {
				return out + " processes", err
			}
			return "", err
		})
	}
	for _, w := range fresh {
		w.mark()
		w.advances()
	}
	flushed = e.stop(fresh) // everything is what the new writers wrote
	e.check(dirs...)
	outcomes.add(f.name, detached, moved, fate)

	// The node takes volumes again, these too.
	p.name, p.node = "back", cluster.NodeA
	e.stop(e.write(p, 3, flushed...))
}

var found = regexp.MustCompile(`found \d+ of \d+ blocks written, up to (\d+)`)

// fenced looks at the old writers, whose node runs: what they have flushed since, the new
// ones have found.
func (f failure) fenced(e *env, old, fresh []*writer) string {
	e.Helper()
	fate := "its requests wait"
	for i := range old {
		_, text := fresh[i].lines(allLines)
		m := found.FindStringSubmatch(text)
		if m == nil {
			e.Fatalf("the new writer did not say what it found: %s", text)
		}
		upTo, _ := strconv.Atoi(m[1])
		lines, text := old[i].lines(10)
		if len(lines) == 0 {
			e.Fatalf("the old writer's log has only: %s", text)
		}
		if last := lines[len(lines)-1].flushed; last > upTo {
			e.Errorf("the old writer flushed up to %d, the new one found up to %d", last, upTo)
		}
		if _, message, failed := strings.Cut(text, "failed: "); failed {
			fate = strings.TrimSpace(strings.SplitN(message, "\n", 2)[0])
		}
	}
	return fate
}

// recover has the node back when the test ends early.
func (e *env) recover(f failure) {
	if !e.Failed() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), longer)
	defer cancel()
	e.report(ctx)
	if err := f.end(ctx); err != nil {
		e.Log(err)
	}
	setTaint(ctx, false)
}

// taint sets or removes the taint that says that a node is not in service.
func (e *env) taint(set bool) {
	e.Helper()
	e.ok(setTaint(e.Context(), set))
}

func setTaint(ctx context.Context, set bool) error {
	outOfService := corev1.Taint{Key: corev1.TaintNodeOutOfService, Value: "nodeshutdown", Effect: corev1.TaintEffectNoExecute}
	is := func(t corev1.Taint) bool { return t.MatchTaint(&outOfService) }
	return poll(ctx, soon, func(ctx context.Context) (string, error) {
		node, err := world.client.CoreV1().Nodes().Get(ctx, cluster.NodeA, metav1.GetOptions{})
		if err != nil || slices.ContainsFunc(node.Spec.Taints, is) == set {
			return "", err
		}
		if set {
			node.Spec.Taints = append(node.Spec.Taints, outOfService)
		} else {
			node.Spec.Taints = slices.DeleteFunc(node.Spec.Taints, is)
		}
		_, err = world.client.CoreV1().Nodes().Update(ctx, node, metav1.UpdateOptions{}) // refused if it has changed
		return "it has only just been changed", err
	})
}

// nodeReady waits until a node is ready, with the driver on it, or is not.
func (e *env) nodeReady(name string, want bool) {
	e.Helper()
	e.eventually(longer, fmt.Sprintf("node %s ready: %t", name, want), func(ctx context.Context) (string, error) {
		node, err := world.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return "", err
		}
		for _, c := range node.Status.Conditions {
			if c.Type == corev1.NodeReady && (c.Status == corev1.ConditionTrue) != want {
				return fmt.Sprintf("%s %s", c.Status, c.Message), nil
			}
		}
		if !want {
			return "", nil
		}
		pods, err := world.client.CoreV1().Pods(install.Namespace).List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + name})
		if err != nil {
			return "", err
		}
		runs := map[string]bool{}
		for _, p := range pods.Items {
			for _, c := range p.Status.Conditions {
				if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
					runs[p.Labels["app.kubernetes.io/component"]] = true
				}
			}
		}
		if !runs["node"] || !runs["dataplane"] {
			return fmt.Sprint("the driver's pods that run there: ", runs), nil
		}
		return "", nil
	})
}

// detached waits until claims' volumes are attached to no node.
func (e *env) detached(claims ...string) {
	e.Helper()
	for _, name := range claims {
		e.volumeDetached(e.volumeName(name))
	}
}

// volumeDetached waits until the volume of a PersistentVolume is attached to no node.
func (e *env) volumeDetached(volume string) {
	e.Helper()
	e.eventually(longer, "volume "+volume+" is detached", func(ctx context.Context) (string, error) {
		list, err := world.client.StorageV1().VolumeAttachments().List(ctx, metav1.ListOptions{})
		if err != nil {
			return "", err
		}
		for _, a := range list.Items {
			if *a.Spec.Source.PersistentVolumeName == volume {
				return fmt.Sprintf("attached to %s, %v", a.Spec.NodeName, a.Status.DetachError), nil
			}
		}
		return "", nil
	})
}

// serverRestarted: the NFS server is without power for a minute while volumes on both nodes are
// written to. Requests wait, none fails.
func serverRestarted(e *env) {
	pauses := newTable("nfs-restarted", "NFS server without power for a minute", "longest pause of a request")
	var loads []pod
	var dirs []string
	for _, node := range bothNodes {
		files, disk := "files-"+node, "disk-"+node
		e.claim(claim{name: files, class: e.class(map[string]string{"store": "main", "format": "vhdx"})})
		e.claim(claim{name: disk, block: true})
		p := pod{name: "load-" + node, node: node, files: []string{files}, blocks: []string{disk}}
		e.writerPod(&p, 1)
		loads = append(loads, p)
		dirs = append(dirs, e.bound(files, disk)...)
	}
	var all [][]*writer
	for _, p := range loads {
		all = append(all, e.writing(p))
	}
	for _, ws := range all {
		for _, w := range ws {
			w.mark()
		}
	}
	nfs := world.cluster.Machine(cluster.NFS)
	e.ok(nfs.PowerOff())
	time.Sleep(time.Minute)
	e.ok(nfs.PowerOn(e.Context()))
	e.eventually(soon, "the NFS server has its exports", func(ctx context.Context) (string, error) {
		return "", install.PrepareServer(ctx, world.cluster)
	})
	for i, ws := range all {
		for _, w := range ws {
			w.advances()
			pauses.add(w.pod+" "+w.log[strings.LastIndex(w.log, "writer-"):len(w.log)-len("/0.log")], w.pause())
		}
		e.stop(all[i])
	}
	e.check(dirs...)
	pauses.print(e)
}
