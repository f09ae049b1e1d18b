package main

import (
	"errors"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// kinds are what the chart may have, and the types that they have to be.
var kinds = map[string]func() any{
	"v1/ConfigMap":                                    func() any { return &corev1.ConfigMap{} },
	"v1/Namespace":                                    func() any { return &corev1.Namespace{} },
	"v1/Service":                                      func() any { return &corev1.Service{} },
	"v1/ServiceAccount":                               func() any { return &corev1.ServiceAccount{} },
	"apps/v1/DaemonSet":                               func() any { return &appsv1.DaemonSet{} },
	"apps/v1/Deployment":                              func() any { return &appsv1.Deployment{} },
	"networking.k8s.io/v1/NetworkPolicy":              func() any { return &networkingv1.NetworkPolicy{} },
	"policy/v1/PodDisruptionBudget":                   func() any { return &policyv1.PodDisruptionBudget{} },
	"rbac.authorization.k8s.io/v1/ClusterRole":        func() any { return &rbacv1.ClusterRole{} },
	"rbac.authorization.k8s.io/v1/ClusterRoleBinding": func() any { return &rbacv1.ClusterRoleBinding{} },
	"rbac.authorization.k8s.io/v1/Role":               func() any { return &rbacv1.Role{} },
	"rbac.authorization.k8s.io/v1/RoleBinding":        func() any { return &rbacv1.RoleBinding{} },
	"storage.k8s.io/v1/CSIDriver":                     func() any { return &storagev1.CSIDriver{} },
	"storage.k8s.io/v1/StorageClass":                  func() any { return &storagev1.StorageClass{} },
	// Custom resources, whose types are not Kubernetes' own.
	"snapshot.storage.k8s.io/v1/VolumeSnapshotClass": custom,
	"monitoring.coreos.com/v1/ServiceMonitor":        custom,
	"monitoring.coreos.com/v1/PrometheusRule":        custom,
}

func custom() any { return &map[string]any{} }

// decodeAll decodes manifests strictly: a field that the API does not know, or that is
// there twice, is an error.
func decodeAll(text []byte) error {
	var errs []error
	for _, doc := range documents(text) {
		var head struct {
			metav1.TypeMeta   `json:",inline"`
			metav1.ObjectMeta `json:"metadata"`
		}
		if err := yaml.Unmarshal(doc, &head); err != nil {
			errs = append(errs, err)
			continue
		}
		what := fmt.Sprintf("%s/%s %s", head.APIVersion, head.Kind, head.Name)
		made, known := kinds[head.APIVersion+"/"+head.Kind]
		switch {
		case !known:
			errs = append(errs, fmt.Errorf("%s: the chart should have no such thing", what))
			continue
		case head.Name == "":
			errs = append(errs, fmt.Errorf("%s has no name", what))
		}
		if err := yaml.UnmarshalStrict(doc, made()); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	return errors.Join(errs...)
}
