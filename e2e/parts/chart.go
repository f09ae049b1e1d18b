package parts

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// chartImages are the images that the chart names, with its default values.
type chartImages struct {
	driver   string
	sidecars []string // sorted
}

// readChart reads the names from the chart itself, so that what is tested is what is installed.
func readChart(dir string) (chartImages, error) {
	var values struct {
		Image    struct{ Repository, Tag string }
		Sidecars map[string]struct {
			Image   string
			Enabled *bool // nil where there is no choice
		}
	}
	var chart struct{ AppVersion string }
	for name, to := range map[string]any{"values.yaml": &values, "Chart.yaml": &chart} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return chartImages{}, err
		}
		if err := yaml.Unmarshal(data, to); err != nil {
			return chartImages{}, fmt.Errorf("read %s: %w", filepath.Join(dir, name), err)
		}
	}
	if values.Image.Tag == "" {
		values.Image.Tag = "v" + chart.AppVersion
	}
	images := chartImages{driver: values.Image.Repository + ":" + values.Image.Tag}
	for _, sidecar := range values.Sidecars {
		if sidecar.Enabled == nil || *sidecar.Enabled {
			images.sidecars = append(images.sidecars, sidecar.Image)
		}
	}
	slices.Sort(images.sidecars)
	return images, nil
}

// programOf returns the name of the program in a sidecar's image: the image's without
// registry and tag.
func programOf(image string) string {
	name, _, _ := strings.Cut(path.Base(image), ":")
	return name
}
