package store

import (
	"fmt"
	"slices"
	"testing"
)

func TestGroupLayers(t *testing.T) {
	own := func(n int) string { return layerFile("v", n, "vmdk") }
	for _, c := range []struct {
		name      string
		layers    int
		image     bool  // the first layer is an image
		snapshots []int // layers that are snapshots' tops
		others    []int // layers that other volumes reach
		want      []mergeGroup
	}{
		{"one layer", 1, false, nil, nil, nil},
		{"all", 3, false, nil, nil, []mergeGroup{{0, 3}}},
		{"all snapshots kept", 3, false, []int{0, 1}, nil, nil},
		{"newest deleted", 4, false, []int{0}, nil, []mergeGroup{{1, 4}}},
		{"oldest deleted", 4, false, []int{1, 2}, nil, []mergeGroup{{0, 2}, {2, 3}, {3, 4}}},
		{"one between", 4, false, []int{0, 2}, nil, []mergeGroup{{1, 3}, {3, 4}}},
		{"on an image", 3, true, nil, nil, []mergeGroup{{1, 3}}},
		{"on an image, nothing to do", 2, true, nil, nil, nil},
		{"below a clone", 4, false, nil, []int{0, 1}, []mergeGroup{{2, 4}}},
		{"a clone on the last but one", 3, false, nil, []int{0, 1}, nil},
		{"the rest is above the clone", 6, false, []int{3}, []int{0}, []mergeGroup{{1, 4}, {4, 6}}},
	} {
		rec := Record{Name: "v"}
		for i := range c.layers {
			file := own(i)
			if i == 0 && c.image {
				file = "images/i.vmdk"
			}
			rec.Layers = append(rec.Layers, LayerRecord{File: file, Format: "vmdk"})
		}
		for _, i := range c.snapshots {
			rec.Snapshots = append(rec.Snapshots, SnapshotRecord{Name: fmt.Sprint(i), Ready: true, Layer: own(i)})
		}
		others := map[string]bool{}
		for _, i := range c.others {
			others[own(i)] = true
		}
		if got := groupLayers(rec, others); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}
