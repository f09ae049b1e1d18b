package tests

import (
	"context"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/rand"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/cluster"
	"github.com/csi-imgdisk/csi-imgdisk/e2e/install"
)

// Limits of waits, generous: emulated machines on a loaded one are slow.
const (
	soon   = 6 * time.Minute
	longer = 12 * time.Minute
)

// world is the cluster that all tests use.
var world struct {
	cluster     *cluster.Cluster
	client      *kubernetes.Clientset
	dynamic     dynamic.Interface
	driverImage string
}

func TestMain(m *testing.M) {
	flag.Parse()
	if dir := os.Getenv("IMGDISK_E2E"); dir != "" {
		if err := connect(dir); err != nil {
			fmt.Fprintln(os.Stderr, "error:", err)
			os.Exit(1)
		}
		// More of them would take no less time: the machines' processors are busy with these.
		if err := flag.Set("test.parallel", "5"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

func connect(dir string) error {
	c, err := cluster.Open(dir)
	if err != nil {
		return err
	}
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err != nil {
		return err
	}
	config.QPS, config.Burst = 100, 200
	world.cluster = c
	if world.client, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	if world.dynamic, err = dynamic.NewForConfig(config); err != nil {
		return err
	}
	node, err := world.client.AppsV1().DaemonSets(install.Namespace).Get(context.Background(), "csi-imgdisk-node", metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("the chart is not installed: %w", err)
	}
	world.driverImage = node.Spec.Template.Spec.Containers[0].Image
	return nil
}

// env is a test's own part of the cluster: a namespace, and what is outside of it.
type env struct {
	*testing.T
	ns string
	// volumes are the directories in stores of the volumes that the test had, once it
	// asked: nothing may be left of them.
	volumes map[string]bool
	// after is done when the namespace is empty.
	after []func(ctx context.Context)
}

// newEnv makes a namespace for the test, and removes it with all that is in it.
func newEnv(t *testing.T) *env {
	t.Helper()
	if world.cluster == nil {
		t.Skip("needs a cluster: IMGDISK_E2E names none, see e2e/main.go")
	}
	words := strings.Split(strings.ToLower(t.Name()), "/")
	e := &env{T: t, ns: "e2e-" + strings.ReplaceAll(words[len(words)-1], "_", "-") + "-" + rand.String(4), volumes: map[string]bool{}}
	_, err := world.client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: e.ns, Labels: map[string]string{"pod-security.kubernetes.io/enforce": "privileged"},
	}}, metav1.CreateOptions{})
	e.ok(err)
	t.Cleanup(e.remove)
	return e
}

func (e *env) ok(err error) {
	e.Helper()
	if err != nil {
		e.Fatal(err)
	}
}

// eventually polls until check says nothing more is missing, and fails the test when that
// takes longer than limit. What is missing is said then.
func (e *env) eventually(limit time.Duration, what string, check func(ctx context.Context) (missing string, err error)) {
	e.Helper()
	begun := time.Now()
	if err := poll(e.Context(), limit, check); err != nil {
		e.Fatalf("%s: %v", what, err)
	}
	if took := time.Since(begun); took > 10*time.Second {
		e.Logf("%s %5.1f s until %s", begun.Format(time.TimeOnly), took.Seconds(), what)
	}
}

func poll(ctx context.Context, limit time.Duration, check func(ctx context.Context) (missing string, err error)) error {
	end := time.Now().Add(limit)
	for pause := 250 * time.Millisecond; ; pause = min(pause*5/4, 3*time.Second) {
		missing, err := check(ctx)
		if err == nil && missing == "" {
			return nil
		}
		if err != nil {
			missing = err.Error()
		}
		if time.Now().After(end) {
			return fmt.Errorf("not after %s: %s", limit, missing)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", missing, ctx.Err())
		case <-time.After(pause):
		}
	}
}

// on runs a command on a machine.
func (e *env) on(machine, command string) string {
	e.Helper()
	out, err := world.cluster.Machine(machine).Run(e.Context(), command)
	if err != nil {
		e.Fatalf("on %s: %s: %v\n%s", machine, command, err, out)
	}
	return out
}

// remove removes what the test made, in an order in which everything can go, and looks at
// the store afterwards.
func (e *env) remove() {
	ctx, cancel := context.WithTimeout(context.Background(), longer)
	defer cancel()
	if e.Failed() {
		e.report(ctx)
	}
	now := metav1.DeleteOptions{GracePeriodSeconds: ptr(int64(1))}
	all := metav1.ListOptions{}
	err := poll(ctx, longer, func(ctx context.Context) (string, error) {
		pods, err := world.client.CoreV1().Pods(e.ns).List(ctx, all)
		if err != nil {
			return "", err
		}
		for _, p := range pods.Items {
			if p.DeletionTimestamp == nil {
				_ = world.client.CoreV1().Pods(e.ns).Delete(ctx, p.Name, now)
			}
		}
		e.deleteSnapshots(ctx)
		e.letGo(ctx)
		left, err := e.deleteClaims(ctx)
		return left + strings.Repeat("pods ", min(len(pods.Items), 1)), err
	})
	if err != nil {
		e.Errorf("removing what the test made: %v", err)
		e.report(ctx)
	}
	if err == nil {
		e.nothingLeft(ctx)
	}
	for _, do := range e.after {
		do(ctx)
	}
	_ = world.client.CoreV1().Namespaces().Delete(ctx, e.ns, metav1.DeleteOptions{})
}

// nothingLeft looks on the NFS server for what is left of the test's volumes.
func (e *env) nothingLeft(ctx context.Context) {
	err := poll(ctx, soon, func(ctx context.Context) (string, error) {
		out, err := world.cluster.Machine(cluster.NFS).Run(ctx, "cd "+cluster.ExportPath+" && ls -d */volumes/* 2>/dev/null || true")
		var left []string
		for _, path := range strings.Fields(out) {
			if e.volumes[strings.Replace(path, "/volumes/", "/", 1)] {
				left = append(left, path)
			}
		}
		return strings.Join(left, " "), err
	})
	if err != nil {
		e.Errorf("left in the store: %v", err)
	}
}

func ptr[T any](v T) *T { return &v }
