// Command helm renders the chart without a helm binary: it lints it with each of its
// values files, renders it, decodes what comes out strictly into the API's types, and
// writes the results that are committed:
//
//	go generate ./...             writes them; the test fails where one differs
//	go run . -values FILE         prints the chart rendered with values of your own
//
// The rendered chart for charts/csi-imgdisk/ci/NAME.yaml is testdata/NAME.yaml there. The
// manifests in deploy/ are those of ci/nfs.yaml.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
	"sigs.k8s.io/yaml"
)

//go:generate go run .

const (
	releaseName = "csi-imgdisk"
	namespace   = "csi-imgdisk"
	// kubeVersion is what the chart is rendered for.
	kubeVersion = "v1.36.3"
	// deployValues is the values file that deploy/ is made of.
	deployValues = "nfs"
)

func main() {
	chartDir := flag.String("chart", "../../charts/csi-imgdisk", "the chart's directory")
	deployDir := flag.String("deploy", "../../deploy", "directory of plain manifests")
	check := flag.Bool("check", false, "change nothing, and fail if a file would be changed")
	values := flag.String("values", "", "print the chart rendered with this values file, and do nothing else")
	flag.Parse()
	if err := run(*chartDir, *deployDir, *values, *check); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(chartDir, deployDir, valuesFile string, check bool) error {
	if valuesFile != "" {
		text, err := renderFile(chartDir, valuesFile)
		if err == nil {
			_, err = os.Stdout.Write(text)
		}
		return err
	}
	if err := lintChart(chartDir, nil); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(chartDir, "ci", "*.yaml"))
	if err != nil || len(files) == 0 {
		return fmt.Errorf("values files in %s/ci: there is none (%v)", chartDir, err)
	}
	var errs []error
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".yaml")
		text, err := renderFile(chartDir, file)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, put(filepath.Join(chartDir, "testdata", name+".yaml"), text, check))
		if name == deployValues {
			errs = append(errs, put(filepath.Join(deployDir, "csi-imgdisk.yaml"), append(deployHeader(), text...), check))
		}
	}
	return errors.Join(errs...)
}

func deployHeader() []byte {
	return fmt.Appendf(nil, `# Made of charts/csi-imgdisk/ci/%s.yaml by tools/helm: change those, or better use the chart.
# Change the server and path of the store below before applying this.
---
apiVersion: v1
kind: Namespace
metadata:
  name: %s
  labels:
    # The node plugin and the data plane make block devices and mounts.
    pod-security.kubernetes.io/enforce: privileged
`, deployValues, namespace)
}

// put writes a file, or says that it would be changed.
func put(name string, text []byte, check bool) error {
	old, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	switch {
	case bytes.Equal(old, text):
		return nil
	case check:
		return fmt.Errorf("%s is not what the chart renders: run go generate in tools/helm, and look at the difference", name)
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	return os.WriteFile(name, text, 0o644)
}

// renderFile lints and renders the chart with a values file, and checks what comes out.
func renderFile(chartDir, valuesFile string) ([]byte, error) {
	values, err := chartutil.ReadValuesFile(valuesFile)
	if err != nil {
		return nil, err
	}
	if err := lintChart(chartDir, values); err != nil {
		return nil, fmt.Errorf("%s: %w", valuesFile, err)
	}
	text, err := render(chartDir, values)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", valuesFile, err)
	}
	if err := decodeAll(text); err != nil {
		return nil, fmt.Errorf("%s: %w", valuesFile, err)
	}
	return text, nil
}

func lintChart(chartDir string, values map[string]any) error {
	var errs []error
	version := &chartutil.KubeVersion{Version: kubeVersion, Major: "1", Minor: "36"}
	for _, m := range lint.AllWithKubeVersion(chartDir, values, namespace, version).Messages {
		// An icon is recommended; that is no warning.
		if m.Severity >= support.WarningSev {
			errs = append(errs, m)
		}
	}
	return errors.Join(errs...)
}

// render returns the manifests, in the order of their files' names.
func render(chartDir string, values map[string]any) ([]byte, error) {
	c, err := loader.Load(chartDir)
	if err != nil {
		return nil, err
	}
	all, err := renderValues(c, values)
	if err != nil {
		return nil, err
	}
	files, err := engine.Render(c, all)
	if err != nil {
		return nil, err
	}
	var names []string
	for name := range files {
		if path.Ext(name) == ".yaml" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	var out bytes.Buffer
	for _, name := range names {
		for _, doc := range documents([]byte(files[name])) {
			fmt.Fprintf(&out, "---\n# Source: %s\n%s\n", name, bytes.TrimSpace(doc))
		}
	}
	return out.Bytes(), nil
}

func renderValues(c *chart.Chart, values map[string]any) (chartutil.Values, error) {
	capabilities := chartutil.DefaultCapabilities.Copy()
	capabilities.KubeVersion = chartutil.KubeVersion{Version: kubeVersion, Major: "1", Minor: "36"}
	// Checks the schema, too.
	return chartutil.ToRenderValues(c, values, chartutil.ReleaseOptions{
		Name: releaseName, Namespace: namespace, Revision: 1, IsInstall: true,
	}, capabilities)
}

// documents splits a YAML file into those of its documents that say something.
func documents(text []byte) (docs [][]byte) {
	for part := range bytes.SplitSeq(append([]byte("\n"), text...), []byte("\n---")) {
		var v any
		if err := yaml.Unmarshal(part, &v); err != nil || v != nil {
			docs = append(docs, part)
		}
	}
	return docs
}
