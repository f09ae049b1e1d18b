package parts

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestReadChart(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"Chart.yaml": "appVersion: \"1.2.3\"\n",
		"values.yaml": "image: {repository: example.org/driver, tag: \"\"}\n" +
			"sidecars:\n  b: {image: \"example.org/b:v2\"}\n  a: {enabled: true, image: \"example.org/a:v1\"}\n  c: {enabled: false, image: \"example.org/c:v1\"}\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := readChart(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := chartImages{driver: "example.org/driver:v1.2.3", sidecars: []string{"example.org/a:v1", "example.org/b:v2"}}
	if !cmp.Equal(got, want, cmp.AllowUnexported(want)) {
		t.Errorf("got %+v", got)
	}
}

// What is built is what the chart names: the versions in the modules are those of its images.
func TestChart_Versions(t *testing.T) {
	root, err := repository()
	if err != nil {
		t.Fatal(err)
	}
	var modules strings.Builder
	for _, name := range []string{"e2e/sidecars/go.mod", "e2e/sidecars/provisioner/go.mod"} {
		data, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		modules.Write(data)
	}
	images, err := readChart(filepath.Join(root, "charts/csi-imgdisk"))
	if err != nil {
		t.Fatal(err)
	}
	standIns := []string{"csi-node-driver-registrar", "livenessprobe"}
	for _, image := range images.sidecars {
		name := programOf(image)
		if slices.Contains(standIns, name) {
			continue
		}
		version := image[strings.LastIndexByte(image, ':')+1:]
		module := regexp.MustCompile(`kubernetes-csi/external-` + strings.TrimPrefix(name, "csi-") + `/v\d+ ` + regexp.QuoteMeta(version) + `\s`)
		if !module.MatchString(modules.String()) {
			t.Errorf("the chart has %s, no go.mod has external-%s %s", image, strings.TrimPrefix(name, "csi-"), version)
		}
	}
}
