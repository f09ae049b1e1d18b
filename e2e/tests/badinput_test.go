package tests

import (
	"context"
	"fmt"
	"regexp"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/cluster"
	"github.com/csi-imgdisk/csi-imgdisk/e2e/install"
)

// wrong is a claim that cannot be had, and what its event has to say.
type wrong struct {
	claim
	parameters map[string]string
	says       string // a regular expression
}

// badInput: what cannot be had is refused, with the reason in an event of the claim.
func badInput(e *env) {
	e.refused([]wrong{
		{claim{name: "parameter"}, map[string]string{"colour": "blue"}, `parameter "colour" \(value "blue"\) is unknown.*: want one of store, format`},
		{claim{name: "format"}, map[string]string{"format": "vmkd"}, `parameter format "vmkd".*want one of .*vmdk`},
		{claim{name: "cluster-size"}, map[string]string{"clusterSize": "60Ki"}, `parameter clusterSize "60Ki".*want a power of two`},
		{claim{name: "limit"}, map[string]string{"iops": "many"}, `parameter iops "many".*want a number`},
		{claim{name: "file-system"}, map[string]string{"csi.storage.k8s.io/fstype": "ntfs"}, `file system "ntfs".*want one of ext4, xfs`},
		{claim{name: "access-mode", mode: corev1.ReadWriteMany}, nil, `access mode "MULTI_NODE_MULTI_WRITER".*only one node at a time can write`},
		{claim{name: "small", size: "10Mi"}, map[string]string{"csi.storage.k8s.io/fstype": "xfs"}, `xfs.*300Mi`},
		{claim{name: "store"}, map[string]string{"store": "nowhere"}, `parameter store "nowhere".*want one of absent, main, small`},
		{claim{name: "no-image"}, map[string]string{"image": "none/such.vmdk"}, `none/such.vmdk.*not found`},
	})
}

// badStores: a store that is not there, one that is full, an image that is none.
func badStores(e *env) {
	small := install.StorePath(install.StoreSmall)
	images := install.StorePath(install.StoreMain) + "/images/" + e.ns
	e.eventually(soon, "the controller has made the store", func(ctx context.Context) (string, error) {
		_, err := world.cluster.Machine(cluster.NFS).Run(ctx, "test -e "+small+"/store.json")
		return "", err
	})
	e.on(cluster.NFS, fmt.Sprintf(`mkdir -p %[1]s
printf 'KDMV\003\000\000\000' >%[1]s/cut.vmdk; head -c 65536 /dev/zero >>%[1]s/cut.vmdk
head -c 100000 /dev/urandom >%[1]s/noise.vmdk
dd if=/dev/zero of=%[2]s/filler bs=1M 2>/dev/null || true`, images, small))
	e.after = append(e.after, func(ctx context.Context) {
		_, _ = world.cluster.Machine(cluster.NFS).Run(ctx, "rm -rf "+images+" "+small+"/filler")
	})
	e.refused([]wrong{
		{claim{name: "absent"}, map[string]string{"store": install.StoreAbsent}, `store.* unavailable: mount .*/export/absent.*[Nn]o such file`},
		{claim{name: "full"}, map[string]string{"store": install.StoreSmall, "format": "raw", "preallocation": "full"}, `no space`},
		{claim{name: "cut"}, map[string]string{"image": e.ns + "/cut.vmdk"}, `cut\.vmdk.*(corrupt|invalid)`},
		{claim{name: "noise"}, map[string]string{"image": e.ns + "/noise.vmdk"}, `noise\.vmdk`},
	})
}

// refused makes claims and waits for an event of each that says what is wrong in one
// sentence.
func (e *env) refused(all []wrong) {
	e.Helper()
	for _, w := range all {
		if w.parameters["store"] == "" && w.parameters != nil {
			w.parameters["store"] = install.StoreMain
		}
		if w.parameters != nil {
			w.class = e.class(w.parameters)
		}
		e.claim(w.claim)
	}
	for _, w := range all {
		e.complains("PersistentVolumeClaim", w.name, w.says)
	}
}

// complains waits for an event of an object.
func (e *env) complains(kind, name, says string) {
	e.Helper()
	want := regexp.MustCompile(says)
	e.eventually(soon, kind+" "+name+" has an event that says "+says, func(ctx context.Context) (string, error) {
		var others []string
		for _, ev := range e.events(ctx) {
			if ev.InvolvedObject.Kind != kind || ev.InvolvedObject.Name != name || ev.Type != corev1.EventTypeWarning {
				continue
			}
			if want.MatchString(ev.Message) && !strings.Contains(ev.Message, "\n") {
				e.Logf("%s: %s", name, ev.Message)
				return "", nil
			}
			others = append(others, ev.Message)
		}
		return fmt.Sprintf("%d others: %s", len(others), strings.Join(others, "; ")), nil
	})
}

// badSnapshots: a snapshot class of another driver, one with parameters, and a class that
// names another store than the snapshot's.
func badSnapshots(e *env) {
	e.claim(claim{name: "data"})
	e.bound("data")
	e.snapshot("elsewhere", "data", e.snapshotClass("other.example.org", nil))
	e.snapshot("parameters", "data", e.snapshotClass(install.Driver, map[string]any{"colour": "blue"}))
	e.snapshot("good", "data", "")
	e.ready("good")
	e.refused([]wrong{
		{claim{name: "other-store", snapshot: "good"}, map[string]string{"store": install.StoreSmall}, `parameter store "small".*want main, which main/pvc-.* is in`},
		{claim{name: "none", snapshot: "never-made"}, nil, `never-made.*not found`},
		{claim{name: "foreign", snapshot: "elsewhere"}, nil, `elsewhere|other\.example\.org`},
	})
	e.eventually(soon, "snapshot parameters says what is wrong", func(ctx context.Context) (string, error) {
		s, err := world.dynamic.Resource(snapshots).Namespace(e.ns).Get(ctx, "parameters", metav1.GetOptions{})
		if err != nil {
			return "", err
		}
		says, _, err := unstructured.NestedString(s.Object, "status", "error", "message")
		if !strings.Contains(says, `snapshot parameter colour \"blue\"`) || !strings.Contains(says, "want none") {
			return "it says: " + says, err
		}
		return "", nil
	})
}

// letGo lets snapshots of the test be deleted that another driver would have to delete, which
// does not exist.
func (e *env) letGo(ctx context.Context) {
	list, err := world.dynamic.Resource(contents).List(ctx, metav1.ListOptions{})
	if err != nil {
		return // it is tried again
	}
	for _, c := range list.Items {
		of, _, _ := unstructured.NestedString(c.Object, "spec", "volumeSnapshotRef", "namespace")
		driver, _, _ := unstructured.NestedString(c.Object, "spec", "driver")
		if of == e.ns && driver != install.Driver && c.GetDeletionTimestamp() != nil {
			_, _ = world.dynamic.Resource(contents).Patch(ctx, c.GetName(), types.MergePatchType,
				[]byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{})
		}
	}
}

func (e *env) snapshotClass(driver string, parameters map[string]any) string {
	e.Helper()
	fields := map[string]any{"driver": driver, "deletionPolicy": "Delete"}
	if parameters != nil {
		fields["parameters"] = parameters
	}
	o := object(classes, "VolumeSnapshotClass", "", fields)
	o.SetGenerateName(e.ns + "-")
	var made *unstructured.Unstructured
	made, err := world.dynamic.Resource(classes).Create(e.Context(), o, metav1.CreateOptions{})
	e.ok(err)
	e.after = append(e.after, func(ctx context.Context) {
		_ = world.dynamic.Resource(classes).Delete(ctx, made.GetName(), metav1.DeleteOptions{})
	})
	return made.GetName()
}
