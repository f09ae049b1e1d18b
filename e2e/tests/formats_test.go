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

// formats are the names of all that volumes can be made of; VHD is called as QEMU does.
var formats = []string{"vmdk", "vhdx", "vdi", "qcow", "qcow2", "vpc", "raw"}

// Each is what a user does; none disturbs the others, and the cluster is busy.
func TestUse(t *testing.T) {
	for i, format := range formats {
		t.Run("Format_"+format, func(t *testing.T) {
			t.Parallel()
			moves(newEnv(t), format, bothNodes[i%2], bothNodes[(i+1)%2])
		})
	}
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

// fill writes something to claims ext4, xfs and block, and says its checksums.
const fill = `
test "$(stat -f -c %T /ext4)" = ext2/ext3; test "$(stat -f -c %T /xfs)" = xfs
for dir in /ext4 /xfs; do head -c 4194304 /dev/urandom >$dir/data; sync $dir/data; done
head -c 4194304 /dev/urandom | dd of=/dev/block bs=1M seek=100 iflag=fullblock oflag=direct conv=fsync status=none
` + sums

// sums says the checksums of what fill wrote.
const sums = `
{ cat /ext4/data | sha256sum; cat /xfs/data | sha256sum
  dd if=/dev/block bs=1M skip=100 count=4 iflag=direct status=none | sha256sum; } >/dev/termination-log
`

// moves: a volume of each kind in a format is filled on one node and read on the other.
func moves(e *env, format, from, to string) {
	e.claim(claim{name: "ext4", size: "128Mi", class: e.class(map[string]string{"store": "main", "format": format})})
	e.claim(claim{name: "xfs", size: "320Mi", class: e.class(map[string]string{"store": "main", "format": format, "csi.storage.k8s.io/fstype": "xfs"})})
	e.claim(claim{name: "block", size: "128Mi", block: true, class: e.class(map[string]string{"store": "main", "format": format})})
	dirs := e.bound("ext4", "xfs", "block")
	claims := pod{name: "first", node: from, files: []string{"ext4", "xfs"}, blocks: []string{"block"}, script: fill}
	wrote := e.do(claims)
	claims.name, claims.node, claims.script = "second", to, sums
	if read := e.do(claims); read != wrote || strings.Count(wrote, "-") != 3 {
		e.Errorf("wrote on %s, with checksums\n%s\nread on %s\n%s", from, wrote, to, read)
	}
	e.check(dirs...)
}

// check runs `image check` on all layers of volumes that are not attached.
func (e *env) check(dirs ...string) {
	e.Helper()
	script := ""
	for _, dir := range dirs {
		_, volume, _ := strings.Cut(dir, "/")
		e.volumeDetached(volume) // which comes after a pod is gone
		script += fmt.Sprintf(`for image in /store/volumes/%s/%[1]s*; do
  case $image in *.raw|*.img) ;; *) csi-imgdisk image check $image;; esac
done
`, volume)
	}
	e.do(pod{name: "check-" + fmt.Sprint(len(e.volumes)), store: true, script: script})
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
	read := ""
	for _, fs := range fileSystems {
		e.claim(claim{name: fs, size: "320Mi", class: e.class(map[string]string{"store": "main", "csi.storage.k8s.io/fstype": fs})})
		e.do(pod{name: "fill-" + fs, files: []string{fs}, node: cluster.NodeA, script: fmt.Sprintf("seq 100000 >/%s/data", fs)})
		e.bound(fs)
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
