package vmdk

import (
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// Describe returns what the descriptor says, under qemu-img's names.
func (m *image) Describe() engine.Description {
	extents := make([]map[string]any, 0, len(m.extents))
	for i := range m.extents {
		extents = append(extents, m.describeExtent(&m.extents[i]))
	}
	return engine.Description{
		Subformat: m.createType,
		Details: []engine.Detail{
			{Name: "cid", Value: m.cid},
			{Name: "parent-cid", Value: m.parentCID},
			{Name: "create-type", Value: m.createType},
			{Name: "extents", Value: extents},
		},
	}
}

func (m *image) describeExtent(e *extent) map[string]any {
	d := map[string]any{
		"filename":     m.layer.Files[e.file].Name(),
		"virtual-size": e.guestEnd - e.guestOff,
		"format":       "FLAT",
	}
	if s := e.sparse; s != nil {
		d["format"] = "SPARSE"
		d["cluster-size"] = s.grainBytes()
		if s.header.compressed() {
			d["compressed"] = true
		}
	}
	return d
}
