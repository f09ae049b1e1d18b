package main

import (
	"os"
	"regexp"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"
)

const chartDir = "../../charts/csi-imgdisk"

// What is committed is what the chart renders, which passes helm's linter and is what the
// API knows.
func TestCommitted(t *testing.T) {
	if err := run(chartDir, "../../deploy", "", true); err != nil {
		t.Error(err)
	}
}

func renderText(t *testing.T, values string) ([]byte, error) {
	t.Helper()
	var v map[string]any
	if err := yaml.Unmarshal([]byte(values), &v); err != nil {
		t.Fatal(err)
	}
	return render(chartDir, v)
}

func TestSchema_Refuses(t *testing.T) {
	const store = "stores: [{name: a, nfs: {server: s, path: /x}}]\n"
	if _, err := renderText(t, store); err != nil {
		t.Fatalf("what the others are changes of: %v", err)
	}
	for name, values := range map[string]string{
		"no store":           "{}",
		"unknown value":      store + "colour: blue",
		"unknown in store":   "stores: [{name: a, hostPath: {path: /x}, colour: blue}]",
		"store without kind": "stores: [{name: a}]",
		"store of two kinds": "stores: [{name: a, hostPath: {path: /x}, claim: {name: c}}]",
		"store's name":       "stores: [{name: A/b, hostPath: {path: /x}}]",
		"relative path":      "stores: [{name: a, hostPath: {path: x}}]",
		"nolock":             "stores: [{name: a, nfs: {server: s, path: /x, mountOptions: [nolock]}}]",
		"nobrl":              "stores: [{name: a, smb: {source: //s/x, mountOptions: [nobrl]}}]",
		"password":           "stores: [{name: a, smb: {source: //s/x, mountOptions: [password=x]}}]",
		"no replicas":        store + "controller: {replicas: 0}",
		"misspelt timeout":   store + "sidecars: {attacher: {image: x, timeout: soon}}",
		"reclaim policy":     store + "storageClasses: [{name: c, reclaimPolicy: Recycle}]",
	} {
		if _, err := renderText(t, values); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

// pods returns the pods of the workloads in a rendered chart, by component.
func pods(t *testing.T, text []byte) map[string]corev1.PodSpec {
	t.Helper()
	found := map[string]corev1.PodSpec{}
	for _, doc := range documents(text) {
		var w struct {
			Kind string `json:"kind"`
			Spec struct {
				Template corev1.PodTemplateSpec `json:"template"`
			} `json:"spec"`
		}
		if err := yaml.Unmarshal(doc, &w); err != nil {
			t.Fatal(err)
		}
		if w.Kind == "Deployment" || w.Kind == "DaemonSet" {
			found[w.Spec.Template.Labels["app.kubernetes.io/component"]] = w.Spec.Template.Spec
		}
	}
	return found
}

// The volumes that containers mount are there, no two have one name, and only those
// containers are privileged that make mounts or devices.
func TestPods(t *testing.T) {
	for _, test := range []struct {
		values     string
		privileged map[string]bool
	}{
		{"nfs", map[string]bool{"controller": true, "node": true, "supervisor": true}},
		{"hostpath", map[string]bool{"node": true, "supervisor": true}},
		{"everything", map[string]bool{"controller": true, "node": true, "supervisor": true}},
	} {
		text, err := os.ReadFile(chartDir + "/testdata/" + test.values + ".yaml")
		if err != nil {
			t.Fatal(err)
		}
		found := pods(t, text)
		if len(found) != 3 {
			t.Fatalf("%s: %d workloads, want controller, node and dataplane", test.values, len(found))
		}
		for component, pod := range found {
			volumes := map[string]bool{}
			for _, v := range pod.Volumes {
				if volumes[v.Name] {
					t.Errorf("%s: %s has two volumes %s", test.values, component, v.Name)
				}
				volumes[v.Name] = true
			}
			for _, c := range pod.Containers {
				for _, m := range c.VolumeMounts {
					if !volumes[m.Name] {
						t.Errorf("%s: %s/%s mounts %s, which the pod lacks", test.values, component, c.Name, m.Name)
					}
				}
				is := c.SecurityContext != nil && c.SecurityContext.Privileged != nil && *c.SecurityContext.Privileged
				if is != test.privileged[c.Name] {
					t.Errorf("%s: %s/%s: privileged %t", test.values, component, c.Name, is)
				}
			}
		}
		for _, c := range found["dataplane"].Containers {
			if c.LivenessProbe != nil || c.StartupProbe != nil || len(c.Resources.Limits) > 0 {
				t.Errorf("%s: something may kill the data plane's %s", test.values, c.Name)
			}
		}
	}
}

// The controller and the node plugin are not killed for a liveness sidecar that waits for its
// image: containers of a pod start one after another, and it is the last.
func TestProbes_WaitForSidecar(t *testing.T) {
	text, err := os.ReadFile(chartDir + "/testdata/nfs.yaml")
	if err != nil {
		t.Fatal(err)
	}
	found := pods(t, text)
	for _, component := range []string{"controller", "node"} {
		driver := found[component].Containers[0]
		if driver.LivenessProbe == nil || driver.StartupProbe == nil {
			t.Errorf("%s has no liveness or no startup probe", component)
		} else if p := driver.StartupProbe; p.PeriodSeconds*p.FailureThreshold < 10*60 {
			t.Errorf("%s is killed after %d s", component, p.PeriodSeconds*p.FailureThreshold)
		}
	}
}

func TestRBAC_NothingBroad(t *testing.T) {
	text, err := os.ReadFile(chartDir + "/testdata/everything.yaml")
	if err != nil {
		t.Fatal(err)
	}
	rules := 0
	for _, doc := range documents(text) {
		var role rbacv1.ClusterRole
		if err := yaml.Unmarshal(doc, &role); err != nil || !strings.HasSuffix(role.Kind, "Role") {
			continue
		}
		for _, rule := range role.Rules {
			rules++
			for _, word := range append(append(rule.Verbs, rule.Resources...), rule.APIGroups...) {
				if word == "*" || word == "secrets" || word == "escalate" || word == "bind" || word == "impersonate" {
					t.Errorf("%s %s has %q in %v", role.Kind, role.Name, word, rule)
				}
			}
		}
	}
	if rules == 0 {
		t.Error("there are no rules")
	}
}

// Alerts are about metrics that there are.
func TestAlerts_Metrics(t *testing.T) {
	rules, err := os.ReadFile(chartDir + "/templates/metrics.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var known string
	for _, path := range []string{"../../docs/metrics.md", "../../cmd/csi-imgdisk/health.go"} {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		known += string(text)
	}
	names := regexp.MustCompile(`csi_imgdisk_[a-z_]+`).FindAllString(string(rules), -1)
	if len(names) < 5 {
		t.Fatalf("only %q", names)
	}
	for _, name := range names {
		if !regexp.MustCompile("[`\"]" + name + "[`\"]").MatchString(known) {
			t.Errorf("there is no metric %s", name)
		}
	}
}
