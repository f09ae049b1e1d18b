package tests

import (
	"context"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/cluster"
	"github.com/csi-imgdisk/csi-imgdisk/e2e/install"
	"github.com/csi-imgdisk/csi-imgdisk/e2e/parts"
)

// pod is one to make. It runs on a node with claims at "/NAME", or as devices "/dev/NAME".
type pod struct {
	name, node string
	files      []string // claims that are mounted at /NAME
	blocks     []string // claims that are devices /dev/NAME
	readOnly   bool     // the claims are used read-only
	store      bool     // the whole main store is mounted at /store, by the kubelet
	// script is what sh -e runs. What it writes to /dev/termination-log is the result.
	script string
	// writers are arguments of programs that write and check, each in a container.
	writers [][]string
}

func (e *env) pod(p pod) string {
	e.Helper()
	made := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: p.name},
		Spec: corev1.PodSpec{
			RestartPolicy:                 corev1.RestartPolicyNever,
			TerminationGracePeriodSeconds: ptr(int64(1)),
			AutomountServiceAccountToken:  ptr(false),
			EnableServiceLinks:            ptr(false),
		},
	}
	if p.node != "" {
		made.Spec.NodeSelector = map[string]string{corev1.LabelHostname: p.node}
	}
	for _, name := range append(p.files, p.blocks...) {
		made.Spec.Volumes = append(made.Spec.Volumes, corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name, ReadOnly: p.readOnly},
		}})
	}
	if p.store {
		made.Spec.Volumes = append(made.Spec.Volumes, corev1.Volume{Name: "store", VolumeSource: corev1.VolumeSource{
			NFS: &corev1.NFSVolumeSource{Server: cluster.NFSAddress, Path: install.StorePath(install.StoreMain)},
		}})
	}
	if p.script != "" {
		c := p.container("script", world.driverImage, []string{"/bin/sh", "-ec", p.script, e.tag(p.name)})
		c.TerminationMessagePolicy = corev1.TerminationMessageFallbackToLogsOnError
		made.Spec.Containers = append(made.Spec.Containers, c)
	}
	for i, args := range p.writers {
		name := fmt.Sprint("writer-", i)
		args = append([]string{"/bin/writer", e.tag(p.name)}, args...)
		c := p.container(name, parts.PodImage, args)
		c.TerminationMessagePolicy = corev1.TerminationMessageFallbackToLogsOnError
		made.Spec.Containers = append(made.Spec.Containers, c)
	}
	_, err := world.client.CoreV1().Pods(e.ns).Create(e.Context(), made, metav1.CreateOptions{})
	e.ok(err)
	return p.name
}

func (p pod) container(name, image string, command []string) corev1.Container {
	c := corev1.Container{
		Name: name, Image: image, ImagePullPolicy: corev1.PullNever, Command: command,
		// To reach devices, which belong to root and group disk, nothing more is needed.
		SecurityContext: &corev1.SecurityContext{RunAsUser: ptr(int64(0))},
	}
	for _, claim := range p.files {
		c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: claim, MountPath: "/" + claim, ReadOnly: p.readOnly})
	}
	for _, claim := range p.blocks {
		c.VolumeDevices = append(c.VolumeDevices, corev1.VolumeDevice{Name: claim, DevicePath: "/dev/" + claim})
	}
	if p.store {
		c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "store", MountPath: "/store"})
	}
	return c
}

// tag is an argument of all programs of a pod, by which they are found on their node.
func (e *env) tag(pod string) string { return "-name=" + e.ns + "/" + pod }

// where returns a pod's node, and the directory of its containers' logs there.
func (e *env) where(pod string) (node, logs string) {
	e.Helper()
	p, err := world.client.CoreV1().Pods(e.ns).Get(e.Context(), pod, metav1.GetOptions{})
	e.ok(err)
	return p.Spec.NodeName, fmt.Sprintf("/var/log/pods/%s_%s_%s", e.ns, pod, p.UID)
}

// says waits until a pod's script, which runs, has printed a line with these words, and
// returns all that it printed.
func (e *env) says(pod, words string) (all string) {
	e.Helper()
	node, logs := e.where(pod)
	e.eventually(longer, "pod "+pod+" says "+words, func(ctx context.Context) (string, error) {
		out, err := world.cluster.Machine(node).Run(ctx, "cat "+logs+"/script/0.log 2>/dev/null || true")
		if all = out; err != nil || strings.Contains(out, words) {
			return "", err
		}
		p, err := world.client.CoreV1().Pods(e.ns).Get(ctx, pod, metav1.GetOptions{})
		if err == nil && p.Status.Phase == corev1.PodFailed {
			e.Fatalf("pod %s: %s", pod, podState(p))
		}
		return "it said: " + out, err
	})
	return all
}

// end tells a pod's programs to end, waits until they have ended well, removes the pod, and
// returns what it said.
func (e *env) end(pod string) string {
	e.Helper()
	node, _ := e.where(pod)
	e.on(node, signal("TERM", e.tag(pod)))
	result := e.result(pod)
	e.deletePods(pod)
	return result
}

// running waits until a pod's containers run.
func (e *env) running(names ...string) {
	e.Helper()
	for _, name := range names {
		e.eventually(longer, "pod "+name+" runs", func(ctx context.Context) (string, error) {
			p, err := world.client.CoreV1().Pods(e.ns).Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return "", err
			}
			if p.Status.Phase == corev1.PodFailed {
				e.Fatalf("pod %s: %s", name, podState(p))
			}
			for _, s := range p.Status.ContainerStatuses {
				if s.State.Running == nil {
					return podState(p), nil
				}
			}
			if p.Status.Phase != corev1.PodRunning {
				return podState(p), nil
			}
			return "", nil
		})
	}
}

// result waits until a pod's script has ended well, and returns what it said.
func (e *env) result(name string) string {
	e.Helper()
	var message string
	e.eventually(longer, "pod "+name+" ends", func(ctx context.Context) (string, error) {
		p, err := world.client.CoreV1().Pods(e.ns).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return "", err
		}
		switch p.Status.Phase {
		case corev1.PodFailed:
			e.Fatalf("pod %s: %s", name, podState(p))
		case corev1.PodSucceeded:
			for _, s := range p.Status.ContainerStatuses {
				message += s.State.Terminated.Message
			}
			return "", nil
		}
		return podState(p), nil
	})
	return strings.TrimSpace(message)
}

// podState says what a pod does, for people.
func podState(p *corev1.Pod) string {
	state := string(p.Status.Phase) + " on " + p.Spec.NodeName
	for _, c := range p.Status.Conditions {
		if c.Status == corev1.ConditionFalse && c.Message != "" {
			state += ", " + c.Message
		}
	}
	for _, s := range p.Status.ContainerStatuses {
		switch {
		case s.State.Waiting != nil:
			state += ", " + s.Name + " waits: " + s.State.Waiting.Reason + " " + s.State.Waiting.Message
		case s.State.Terminated != nil:
			state += fmt.Sprintf(", %s ended with %d: %s", s.Name, s.State.Terminated.ExitCode, s.State.Terminated.Message)
		}
	}
	return state
}

// deletePods deletes pods and waits until they are gone: then their volumes are unmounted.
func (e *env) deletePods(names ...string) {
	e.Helper()
	for _, name := range names {
		err := world.client.CoreV1().Pods(e.ns).Delete(e.Context(), name, metav1.DeleteOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			e.Fatal(err)
		}
	}
	for _, name := range names {
		e.eventually(longer, "pod "+name+" is gone", func(ctx context.Context) (string, error) {
			p, err := world.client.CoreV1().Pods(e.ns).Get(ctx, name, metav1.GetOptions{})
			switch {
			case apierrors.IsNotFound(err):
				return "", nil
			case err != nil:
				return "", err
			}
			return podState(p), nil
		})
	}
}

// do runs a script to its end in a pod, removes the pod, and returns what the script said.
func (e *env) do(p pod) string {
	e.Helper()
	e.pod(p)
	result := e.result(p.name)
	e.deletePods(p.name)
	return result
}
