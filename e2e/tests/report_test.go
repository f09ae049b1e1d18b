package tests

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// report prints what there is to know of a test that failed: its objects and their events.
func (e *env) report(ctx context.Context) {
	all := metav1.ListOptions{}
	var b strings.Builder
	fmt.Fprintf(&b, "namespace %s at %s\n", e.ns, time.Now().Format(time.TimeOnly))
	if pods, err := world.client.CoreV1().Pods(e.ns).List(ctx, all); err == nil {
		for _, p := range pods.Items {
			fmt.Fprintf(&b, "pod %s: %s\n", p.Name, podState(&p))
		}
	}
	if pvcs, err := world.client.CoreV1().PersistentVolumeClaims(e.ns).List(ctx, all); err == nil {
		for _, c := range pvcs.Items {
			fmt.Fprintf(&b, "claim %s: %s, volume %q, conditions %v\n", c.Name, c.Status.Phase, c.Spec.VolumeName, c.Status.Conditions)
		}
	}
	if snaps, err := world.dynamic.Resource(snapshots).Namespace(e.ns).List(ctx, all); err == nil {
		for _, s := range snaps.Items {
			fmt.Fprintf(&b, "snapshot %s: %v\n", s.GetName(), s.Object["status"])
		}
	}
	if attachments, err := world.client.StorageV1().VolumeAttachments().List(ctx, all); err == nil {
		for _, a := range attachments.Items {
			fmt.Fprintf(&b, "attachment of %s to %s: %t, attach error %v, detach error %v\n",
				*a.Spec.Source.PersistentVolumeName, a.Spec.NodeName, a.Status.Attached, a.Status.AttachError, a.Status.DetachError)
		}
	}
	for _, ev := range e.events(ctx) {
		fmt.Fprintf(&b, "event %s %s/%s %s: %s (%d times)\n", when(ev).Format(time.TimeOnly), ev.InvolvedObject.Kind,
			ev.InvolvedObject.Name, ev.Reason, ev.Message, ev.Count)
	}
	e.Log(b.String())
}

func (e *env) events(ctx context.Context) []corev1.Event {
	list, err := world.client.CoreV1().Events(e.ns).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil
	}
	slices.SortFunc(list.Items, func(a, b corev1.Event) int { return when(a).Compare(when(b)) })
	return list.Items
}

func when(ev corev1.Event) time.Time {
	for _, t := range []time.Time{ev.LastTimestamp.Time, ev.EventTime.Time} {
		if !t.IsZero() {
			return t
		}
	}
	return ev.CreationTimestamp.Time
}

// table is what a test measured. A row is of something that went without an error and lost
// nothing: else the test ends before it.
type table struct {
	name string
	mu   sync.Mutex
	rows [][]string
}

func newTable(name string, heads ...string) *table {
	return &table{name: name, rows: [][]string{heads}}
}

func (t *table) add(cells ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var row []string
	for _, c := range cells {
		if d, ok := c.(time.Duration); ok {
			c = fmt.Sprintf("%.1f s", d.Seconds())
		}
		row = append(row, fmt.Sprint(c))
	}
	t.rows = append(t.rows, row)
}

// print prints the table, and writes it to a file.
func (t *table) print(e *env) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, row := range t.rows {
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	e.ok(w.Flush())
	e.Logf("%s\n%s", t.name, b.String())
	dir := or(os.Getenv("IMGDISK_E2E_TABLES"), filepath.Join(filepath.Dir(os.Getenv("IMGDISK_E2E")), "tables"))
	e.ok(os.MkdirAll(dir, 0o755))
	e.ok(os.WriteFile(filepath.Join(dir, t.name+".txt"), []byte(b.String()), 0o644))
}
