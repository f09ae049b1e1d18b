package tests

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/cluster"
	"github.com/csi-imgdisk/csi-imgdisk/e2e/install"
)

// importInPlace: a VMDK that lies on the export becomes a volume, once by a PersistentVolume
// that names it and once by a class; pods read it and write beside it, and it stays what
// it was.
func importInPlace(e *env) {
	// 24 MiB of contents are enough to see whether they were copied.
	file := e.ns + "/web01.vmdk"
	dir := install.StorePath(install.StoreMain) + "/images/" + e.ns
	e.after = append(e.after, func(ctx context.Context) {
		records := install.StorePath(install.StoreMain) + "/volumes/*/volume.json"
		out, err := world.cluster.Machine(cluster.NFS).Run(ctx, "grep -l "+e.ns+" "+records+" 2>/dev/null || true; rm -rf "+dir)
		if err != nil || strings.TrimSpace(out) != "" {
			e.Errorf("volumes on the image are left in the store: %s %v", out, err)
		}
	})
	e.do(pod{name: "vmware", store: true, script: fmt.Sprintf(`
mkdir -p /tmp/contents /store/images/%[1]s
seq 100000 >/tmp/contents/numbers; head -c 25165824 /dev/urandom >/tmp/contents/random
truncate -s 64M /tmp/web01.raw; mkfs.ext4 -q -d /tmp/contents /tmp/web01.raw
csi-imgdisk image convert /tmp/web01.raw /store/images/%[2]s`, e.ns, file)})
	image := dir + "/web01.vmdk"
	digest := e.on(cluster.NFS, "sha256sum "+image)
	if size := e.kilobytes(image); size < 24<<10 {
		e.Fatalf("the image has %d KiB", size)
	}

	e.persistentVolume(e.ns+"-web01", "main/images/"+file, "64Mi")
	e.claim(claim{name: "named", volume: e.ns + "-web01"})
	e.claim(claim{name: "classed", class: e.class(map[string]string{"store": "main", "image": file})})
	dirs := e.bound("named", "classed")
	if _, volume, _ := strings.Cut(dirs[1], "/"); e.kilobytes(install.StorePath("main")+"/volumes/"+volume) > 2<<10 {
		e.Error("a volume that stands on the image takes more than 2 MiB before it is written to")
	}
	use := pod{name: "first", node: cluster.NodeB, files: []string{"named", "classed"}, script: `
for dir in /named /classed; do seq 100000 | cmp - $dir/numbers; echo new >$dir/new; rm $dir/random; sync; done`}
	e.do(use)
	use.name, use.node, use.script = "second", cluster.NodeA, `
for dir in /named /classed; do seq 100000 | cmp - $dir/numbers; grep new $dir/new; ! test -e $dir/random; done`
	e.do(use)
	if now := e.on(cluster.NFS, "sha256sum "+image); now != digest {
		e.Errorf("the image's digest was %s and is %s", digest, now)
	}
}

// kilobytes is what a file or directory takes on the NFS server.
func (e *env) kilobytes(path string) int64 {
	e.Helper()
	out := e.on(cluster.NFS, "du -sk "+path)
	n, err := strconv.ParseInt(strings.Fields(out + " -")[0], 10, 64)
	e.ok(err)
	return n
}

// persistentVolume makes one by hand.
func (e *env) persistentVolume(name, handle, size string) {
	e.Helper()
	_, err := world.client.CoreV1().PersistentVolumes().Create(e.Context(), &corev1.PersistentVolume{
		// The annotation lets the provisioner delete the volume; the image stays.
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{"pv.kubernetes.io/provisioned-by": install.Driver}},
		Spec: corev1.PersistentVolumeSpec{
			Capacity:                      corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(size)},
			AccessModes:                   []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimDelete,
			ClaimRef:                      &corev1.ObjectReference{Namespace: e.ns, Name: "named"},
			PersistentVolumeSource: corev1.PersistentVolumeSource{
				CSI: &corev1.CSIPersistentVolumeSource{Driver: install.Driver, VolumeHandle: handle},
			},
		},
	}, metav1.CreateOptions{})
	e.ok(err)
}
