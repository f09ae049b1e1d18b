// Package storage is Kubernetes' own storage suite for drivers outside of its tree, and nothing
// else of its tests, as a program that the ginkgo command runs:
//
//	go test -c -o storage.test ./storage
//	ginkgo -p -focus='External.Storage' storage.test -- -kubeconfig=… -storage.testdriver=driver.yaml
//
// Package suite of module e2e runs it. See k8s.io/kubernetes/test/e2e/storage/external.
package storage
