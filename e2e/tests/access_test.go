package tests

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/cluster"
)

// Each is what a user does; none disturbs the others, and the cluster is busy.
func TestUse(t *testing.T) {
	for name, test := range map[string]func(*env){
		"ReadWriteOncePod":                        readWriteOncePod,
		"ReadOnlyMany_SnapshotOnBothNodes":        readOnlyMany,
		"Snapshot_RestoreCloneExpand_UnderLoad":   snapshotUnderLoad,
		"Delete_InEveryOrder":                     deleteInEveryOrder,
		"Import_VMDKOnTheExport_IsNotCopied":      importInPlace,
		"BadInput_EventSaysWhatIsWrong":           badInput,
		"BadInput_FullStore_CorruptImage_OnStore": badStores,
		"BadInput_SnapshotClasses":                badSnapshots,
	} {
		t.Run(name, func(t *testing.T) { t.Parallel(); test(newEnv(t)) })
	}
}

// untilTold waits in a script until the test calls end.
const untilTold = "trap 'exit 0' TERM; while :; do sleep 1; done"

// check runs `image check` on all layers of volumes that are not attached, beside the data
// plane's pod on node-b, where the store is mounted. Space that nothing refers to (exit code 3)
// is what a server leaves that was killed.
func (e *env) check(dirs ...string) {
	e.Helper()
	script := ""
	for _, dir := range dirs {
		store, volume, _ := strings.Cut(dir, "/")
		e.volumeDetached(volume) // which comes after a pod is gone
		script += fmt.Sprintf(`for image in /var/lib/csi-imgdisk/stores/%s/volumes/%s/%[2]s*; do
  case $image in *.raw|*.img) ;; *) csi-imgdisk image check $image || test $? = 3;; esac
done
`, store, volume)
	}
	// The pattern is not to be found in the command line of its own search.
	e.on(cluster.NodeB, fmt.Sprintf("guard=$(grep -lzx -e '--guar[d]' /proc/[0-9]*/cmdline 2>/dev/null | head -n 1 | cut -d/ -f3)\nnsenter -t $guard -m sh -ec '%s'", script))
}

// readWriteOncePod: a second pod on the same node waits until the first is gone.
func readWriteOncePod(e *env) {
	e.claim(claim{name: "data", mode: corev1.ReadWriteOncePod})
	first := pod{name: "first", files: []string{"data"}, script: untilTold}
	e.pod(first)
	e.running("first")
	e.bound("data")
	p, err := world.client.CoreV1().Pods(e.ns).Get(e.Context(), "first", metav1.GetOptions{})
	e.ok(err)
	second := first
	second.name, second.node = "second", p.Spec.NodeName
	e.pod(second)
	e.eventually(soon, "the second pod is told why it waits", func(ctx context.Context) (string, error) {
		p, err := world.client.CoreV1().Pods(e.ns).Get(ctx, "second", metav1.GetOptions{})
		if err != nil || strings.Contains(podState(p), "ReadWriteOncePod") {
			return "", err
		}
		if p.Status.Phase != corev1.PodPending {
			e.Fatalf("the second pod %s", podState(p))
		}
		return podState(p), nil
	})
	e.deletePods("first")
	e.running("second")
}

// readOnlyMany: a snapshot is read on both nodes at once. One of a volume whose file system
// was mounted has a journal to replay, which takes writing: the pod is told.
func readOnlyMany(e *env) {
	fileSystems := []string{"ext4", "xfs"}
	restored := func(name, fs, snapshot string) {
		e.ready(snapshot)
		class := e.class(map[string]string{"store": "main", "csi.storage.k8s.io/fstype": fs})
		e.claim(claim{name: name, size: "320Mi", class: class, snapshot: snapshot, mode: corev1.ReadOnlyMany})
	}
	for _, fs := range fileSystems {
		e.claim(claim{name: fs, size: "320Mi", class: e.class(map[string]string{"store": "main", "csi.storage.k8s.io/fstype": fs})})
	}
	e.do(pod{name: "fill", files: fileSystems, node: cluster.NodeA, script: "seq 100000 >/ext4/data; seq 100000 >/xfs/data"})
	e.bound(fileSystems...)
	read := ""
	for _, fs := range fileSystems {
		e.snapshot("snap-"+fs, fs, "")
		restored("many-"+fs, fs, "snap-"+fs)
		read += fmt.Sprintf("seq 100000 | cmp - /many-%[1]s/data; ! touch /many-%[1]s/new 2>/dev/null\n", fs)
	}
	e.pod(pod{name: "user", node: cluster.NodeA, files: fileSystems, script: "echo more >/ext4/more; echo more >/xfs/more; sync\n" + untilTold})
	e.running("user")
	for _, fs := range fileSystems {
		e.snapshot("used-"+fs, fs, "")
		restored("used-many-"+fs, fs, "used-"+fs)
	}
	e.bound("many-ext4", "many-xfs", "used-many-ext4", "used-many-xfs")
	for _, node := range bothNodes {
		e.pod(pod{name: "reader-" + node, node: node, files: []string{"many-ext4", "many-xfs"}, readOnly: true, script: read + "echo read\n" + untilTold})
	}
	for _, node := range bothNodes {
		e.running("reader-" + node)
		e.says("reader-"+node, "read")
	}
	for _, fs := range fileSystems {
		e.pod(pod{name: "unclean-" + fs, node: cluster.NodeB, files: []string{"used-many-" + fs}, readOnly: true, script: "true"})
		e.complains("Pod", "unclean-"+fs, "was mounted when it was snapshotted.*journal")
	}
	e.end("user")
	for _, node := range bothNodes { // both have it still
		e.end("reader-" + node)
	}
}

// volumeName is the PersistentVolume's of a claim.
func (e *env) volumeName(claim string) string {
	e.Helper()
	pvc, err := world.client.CoreV1().PersistentVolumeClaims(e.ns).Get(e.Context(), claim, metav1.GetOptions{})
	e.ok(err)
	return pvc.Spec.VolumeName
}

// orders returns all orders of some words.
func orders(words ...string) (all [][]string) {
	if len(words) == 0 {
		return [][]string{nil}
	}
	for i, first := range words {
		rest := slices.Concat(words[:i], words[i+1:])
		for _, order := range orders(rest...) {
			all = append(all, append([]string{first}, order...))
		}
	}
	return all
}
