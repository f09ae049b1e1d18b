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
// the other node, and the old writer, should it live, cannot write any more. The same volumes
// go from node to node: what a failure harmed, also later, the next writers find.
func TestNodes(t *testing.T) {
	e := newEnv(t)
	v := moving{env: e, node: cluster.NodeA, other: cluster.NodeB}
	v.files = []string{e.claim(claim{name: "files"})}
	v.blocks = []string{e.claim(claim{name: "disk", block: true, class: e.class(map[string]string{"store": "main", "format": "vmdk"})})}
	v.write(nil)
	dirs := e.bound("files", "disk")

	outcomes := newTable("nodes", "what failed", "detached after", "written to on the other node after", "the old writer")
	cut := func(from ...string) func(context.Context, *cluster.Machine) error {
		return func(ctx context.Context, m *cluster.Machine) error { return m.Cut(ctx, from...) }
	}
	heal := func(ctx context.Context, m *cluster.Machine) error { return m.Heal(ctx) }
	off := func(_ context.Context, m *cluster.Machine) error { return m.PowerOff() }
	on := func(ctx context.Context, m *cluster.Machine) error { return m.PowerOn(ctx) }
	for _, f := range []failure{
		{"PoweredOff", off, on, true, true},
		{"CutFromAPI", cut("api"), heal, true, false},
		{"CutFromNFS", cut("nfs"), heal, false, false},
		{"CutFromBoth", cut("api", "nfs"), heal, true, false},
	} {
		if !t.Run(f.name, func(t *testing.T) { v.survive(t, f, outcomes) }) {
			return // the volumes may be anywhere
		}
	}
	outcomes.print(e)
	if t.Run("NFSServerRestarted", func(t *testing.T) { v.serverRestarted(t) }) {
		e.stop(v.writers) // everything is what they wrote
		e.check(dirs...)
	}
}

// failure is one of a node's.
type failure struct {
	name       string
	begin, end func(context.Context, *cluster.Machine) error
	noticed    bool // the node does not report to the API server
	off        bool // nothing runs there
}

// moving are volumes that are written to on a node, and that node fails again and again.
type moving struct {
	*env
	node, other   string
	files, blocks []string
	run           int
	pod           string
	writers       []*writer
}

// write starts the next run of writers, on v.node.
func (v *moving) write(flushed []int) {
	v.Helper()
	v.run++
	v.pod = fmt.Sprint("run-", v.run)
	v.writers = v.env.write(pod{name: v.pod, node: v.node, files: v.files, blocks: v.blocks}, v.run, flushed...)
}

// survive lets the node fail, and moves the volumes to the other one as the documentation of
// Kubernetes says: with the taint out-of-service.
func (v *moving) survive(t *testing.T, f failure, outcomes *table) {
	parent := v.T
	v.T = t
	defer func() { v.T = parent }()
	node, m := v.node, world.cluster.Machine(v.node)
	old, oldPod := v.writers, v.pod

	defer v.recover(node, func(ctx context.Context) error { return f.end(ctx, m) })
	flushed := flushedOf(old) // of a machine without power nothing more can be known
	failed := time.Now()
	v.ok(f.begin(v.Context(), m))
	if f.noticed {
		v.nodeReady(node, false)
	}
	v.taint(node, true)
	if !f.noticed {
		// Kubernetes deletes the pods of nodes that it takes for dead; here a person does.
		err := world.client.CoreV1().Pods(v.ns).Delete(v.Context(), oldPod, metav1.DeleteOptions{GracePeriodSeconds: ptr(int64(0))})
		v.ok(err)
	}
	v.detached("files", "disk")
	detached := time.Since(failed)

	// The new writers begin while the old ones may still try.
	if !f.off {
		flushed = flushedOf(old)
	}
	v.node, v.other = v.other, v.node
	v.write(flushed)
	moved := time.Since(failed)
	fate := "gone with its node"
	if !f.off {
		fate = v.fenced(old, v.writers)
	}

	v.ok(f.end(v.Context(), m))
	v.taint(node, false)
	v.nodeReady(node, true)
	if !f.off {
		v.ended(node, oldPod)
	}
	for _, w := range v.writers {
		w.mark()
		w.advances() // after all that the old ones could still do
	}
	outcomes.add(f.name, detached, moved, fate)
}

// ended waits until no process of a pod is left on a node that the pod was removed from.
func (v *moving) ended(node, pod string) {
	v.Helper()
	v.eventually(longer, "the old writers' processes end", func(ctx context.Context) (string, error) {
		out, err := world.cluster.Machine(node).Run(ctx, fmt.Sprintf("grep -lzx -e '%s' /proc/[0-9]*/cmdline 2>/dev/null | grep -v /self/ | wc -l", v.tag(pod)))
		// The command itself has the argument, too.
		if n, _ := strconv.Atoi(strings.TrimSpace(out)); n > 1 {
			return out + " processes", err
		}
		return "", err
	})
}

var found = regexp.MustCompile(`found \d+ of \d+ blocks written, up to (\d+)`)

// fenced looks at the old writers, whose node runs: what they have flushed since, the new
// ones have found.
func (e *env) fenced(old, fresh []*writer) string {
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
func (e *env) recover(node string, end func(context.Context) error) {
	if !e.Failed() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), longer)
	defer cancel()
	e.report(ctx)
	if err := end(ctx); err != nil {
		e.Log(err)
	}
	if err := setTaint(ctx, node, false); err != nil {
		e.Log(err)
	}
}

// taint sets or removes the taint that says that a node is not in service.
func (e *env) taint(node string, set bool) {
	e.Helper()
	e.ok(setTaint(e.Context(), node, set))
}

func setTaint(ctx context.Context, name string, set bool) error {
	outOfService := corev1.Taint{Key: corev1.TaintNodeOutOfService, Value: "nodeshutdown", Effect: corev1.TaintEffectNoExecute}
	is := func(t corev1.Taint) bool { return t.MatchTaint(&outOfService) }
	return poll(ctx, soon, func(ctx context.Context) (string, error) {
		node, err := world.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
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

// serverRestarted: the NFS server is without power for a minute. Requests wait, none fails.
func (v *moving) serverRestarted(t *testing.T) {
	parent := v.T
	v.T = t
	defer func() { v.T = parent }()
	pauses := newTable("nfs-restarted", "NFS server without power for a minute", "longest pause of a request")
	for _, w := range v.writers {
		w.mark()
	}
	nfs := world.cluster.Machine(cluster.NFS)
	v.ok(nfs.PowerOff())
	time.Sleep(time.Minute)
	v.ok(nfs.PowerOn(v.Context()))
	v.eventually(soon, "the NFS server has its exports", func(ctx context.Context) (string, error) {
		return "", install.PrepareServer(ctx, world.cluster)
	})
	for i, w := range v.writers {
		w.advances()
		pauses.add(append(v.files, v.blocks...)[i]+" on "+v.node, w.pause())
	}
	pauses.print(v.env)
}
