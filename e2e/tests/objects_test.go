package tests

import (
	"context"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/install"
)

var (
	snapshots = schema.GroupVersionResource{Group: "snapshot.storage.k8s.io", Version: "v1", Resource: "volumesnapshots"}
	contents  = schema.GroupVersionResource{Group: "snapshot.storage.k8s.io", Version: "v1", Resource: "volumesnapshotcontents"}
	classes   = schema.GroupVersionResource{Group: "snapshot.storage.k8s.io", Version: "v1", Resource: "volumesnapshotclasses"}
)

// class makes a StorageClass with parameters, and returns its name.
func (e *env) class(parameters map[string]string) string {
	e.Helper()
	made, err := world.client.StorageV1().StorageClasses().Create(e.Context(), &storagev1.StorageClass{
		ObjectMeta:           metav1.ObjectMeta{GenerateName: e.ns + "-"},
		Provisioner:          install.Driver,
		Parameters:           parameters,
		AllowVolumeExpansion: ptr(true),
	}, metav1.CreateOptions{})
	e.ok(err)
	e.after = append(e.after, func(ctx context.Context) {
		_ = world.client.StorageV1().StorageClasses().Delete(ctx, made.Name, metav1.DeleteOptions{})
	})
	return made.Name
}

// claim is a PersistentVolumeClaim to make. Zero values: the chart's class, 64Mi, a file
// system, ReadWriteOnce.
type claim struct {
	name, class, size string
	block             bool
	mode              corev1.PersistentVolumeAccessMode
	volume            string // of a PersistentVolume that exists
	snapshot, clone   string // made from
}

func (e *env) claim(c claim) string {
	e.Helper()
	pvc := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Name: c.name},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{or(c.mode, corev1.ReadWriteOnce)},
			Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{
				corev1.ResourceStorage: resource.MustParse(or(c.size, "64Mi")),
			}},
			StorageClassName: ptr(or(c.class, install.StorageClass)),
			VolumeName:       c.volume,
		},
	}
	if c.volume != "" {
		pvc.Spec.StorageClassName = ptr("")
	}
	if c.block {
		pvc.Spec.VolumeMode = ptr(corev1.PersistentVolumeBlock)
	}
	if c.snapshot != "" {
		pvc.Spec.DataSource = &corev1.TypedLocalObjectReference{APIGroup: ptr(snapshots.Group), Kind: "VolumeSnapshot", Name: c.snapshot}
	}
	if c.clone != "" {
		pvc.Spec.DataSource = &corev1.TypedLocalObjectReference{Kind: "PersistentVolumeClaim", Name: c.clone}
	}
	_, err := world.client.CoreV1().PersistentVolumeClaims(e.ns).Create(e.Context(), pvc, metav1.CreateOptions{})
	e.ok(err)
	return c.name
}

func or[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

// bound waits until claims are, and returns their volumes' directories: "main/pvc-…".
func (e *env) bound(names ...string) (dirs []string) {
	e.Helper()
	for _, name := range names {
		var pvc *corev1.PersistentVolumeClaim
		e.eventually(soon, "claim "+name+" is bound", func(ctx context.Context) (missing string, err error) {
			pvc, err = world.client.CoreV1().PersistentVolumeClaims(e.ns).Get(ctx, name, metav1.GetOptions{})
			if err == nil && pvc.Status.Phase != corev1.ClaimBound {
				missing = string(pvc.Status.Phase)
			}
			return missing, err
		})
		pv, err := world.client.CoreV1().PersistentVolumes().Get(e.Context(), pvc.Spec.VolumeName, metav1.GetOptions{})
		e.ok(err)
		dirs = append(dirs, pv.Spec.CSI.VolumeHandle)
		if pv.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete {
			e.volumes[pv.Spec.CSI.VolumeHandle] = true
		}
	}
	return dirs
}

func (e *env) deleteClaim(name string) {
	e.Helper()
	err := world.client.CoreV1().PersistentVolumeClaims(e.ns).Delete(e.Context(), name, metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		e.Fatal(err)
	}
}

// deleteClaims deletes all claims, and says which are left, and which volumes of theirs.
func (e *env) deleteClaims(ctx context.Context) (left string, err error) {
	pvcs, err := world.client.CoreV1().PersistentVolumeClaims(e.ns).List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	for _, pvc := range pvcs.Items {
		left += "claim " + pvc.Name + ", "
		if pvc.DeletionTimestamp == nil {
			_ = world.client.CoreV1().PersistentVolumeClaims(e.ns).Delete(ctx, pvc.Name, metav1.DeleteOptions{})
		}
	}
	pvs, err := world.client.CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	for _, pv := range pvs.Items {
		if pv.Spec.ClaimRef == nil || pv.Spec.ClaimRef.Namespace != e.ns {
			continue
		}
		left += "volume " + pv.Name + " " + string(pv.Status.Phase) + ", "
		if pv.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimRetain && pv.Status.Phase == corev1.VolumeReleased {
			_ = world.client.CoreV1().PersistentVolumes().Delete(ctx, pv.Name, metav1.DeleteOptions{})
		}
	}
	return left, nil
}

// object makes something whose type this package does not know.
func object(gvr schema.GroupVersionResource, kind, name string, fields map[string]any) *unstructured.Unstructured {
	o := &unstructured.Unstructured{Object: map[string]any{}}
	for k, v := range fields {
		o.Object[k] = v
	}
	o.SetAPIVersion(gvr.GroupVersion().String())
	o.SetKind(kind)
	o.SetName(name)
	return o
}

// snapshot makes a VolumeSnapshot of a claim; class "": the chart's.
func (e *env) snapshot(name, ofClaim, class string) string {
	e.Helper()
	_, err := world.dynamic.Resource(snapshots).Namespace(e.ns).Create(e.Context(), object(snapshots, "VolumeSnapshot", name, map[string]any{
		"spec": map[string]any{
			"volumeSnapshotClassName": or(class, install.SnapshotClass),
			"source":                  map[string]any{"persistentVolumeClaimName": ofClaim},
		},
	}), metav1.CreateOptions{})
	e.ok(err)
	return name
}

// ready waits until snapshots can be restored.
func (e *env) ready(names ...string) {
	e.Helper()
	for _, name := range names {
		e.eventually(soon, "snapshot "+name+" is ready", func(ctx context.Context) (string, error) {
			o, err := world.dynamic.Resource(snapshots).Namespace(e.ns).Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return "", err
			}
			if done, _, _ := unstructured.NestedBool(o.Object, "status", "readyToUse"); !done {
				return fmt.Sprint(o.Object["status"]), nil
			}
			return "", nil
		})
	}
}

func (e *env) deleteSnapshot(name string) {
	e.Helper()
	err := world.dynamic.Resource(snapshots).Namespace(e.ns).Delete(e.Context(), name, metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		e.Fatal(err)
	}
}

func (e *env) deleteSnapshots(ctx context.Context) {
	list, err := world.dynamic.Resource(snapshots).Namespace(e.ns).List(ctx, metav1.ListOptions{})
	if err != nil {
		return
	}
	for _, o := range list.Items {
		if o.GetDeletionTimestamp() == nil {
			_ = world.dynamic.Resource(snapshots).Namespace(e.ns).Delete(ctx, o.GetName(), metav1.DeleteOptions{})
		}
	}
}

// gone waits until claims and snapshots of these names, and the claims' volumes, are
// deleted.
func (e *env) gone(names ...string) {
	e.Helper()
	e.eventually(longer, fmt.Sprint(names, " are gone"), func(ctx context.Context) (string, error) {
		var left []string
		for _, name := range names {
			_, claimErr := world.client.CoreV1().PersistentVolumeClaims(e.ns).Get(ctx, name, metav1.GetOptions{})
			_, snapErr := world.dynamic.Resource(snapshots).Namespace(e.ns).Get(ctx, name, metav1.GetOptions{})
			if !apierrors.IsNotFound(claimErr) || !apierrors.IsNotFound(snapErr) {
				left = append(left, name)
			}
		}
		pvs, err := world.client.CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return "", err
		}
		for _, pv := range pvs.Items {
			for _, name := range names {
				if r := pv.Spec.ClaimRef; r != nil && r.Namespace == e.ns && r.Name == name {
					left = append(left, pv.Name)
				}
			}
		}
		return strings.Join(left, " "), nil
	})
}
