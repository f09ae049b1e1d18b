package vmdk

import (
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// detailReadOnly says why an image is not written; qemu-img has nothing like it.
const detailReadOnly = "read-only-because"

// Describe returns what the descriptor says, under qemu-img's names.
func (m *image) Describe() engine.Description {
	extents := make([]map[string]any, 0, len(m.extents))
	for i := range m.extents {
		extents = append(extents, m.describeExtent(&m.extents[i]))
	}
	details := []engine.Detail{
		{Name: "cid", Value: m.cid},
		{Name: "parent-cid", Value: m.parentCID},
		{Name: "create-type", Value: m.createType},
		{Name: "extents", Value: extents},
	}
	if m.readOnly != "" {
		details = append(details, engine.Detail{Name: detailReadOnly, Value: m.readOnly})
	}
	return engine.Description{Subformat: m.createType, Details: details}
}

func (m *image) describeExtent(e *extent) map[string]any {
	d := map[string]any{"virtual-size": e.guestEnd - e.guestOff, "format": "FLAT"}
	if e.zero {
		d["format"] = "ZERO"
		return d
	}
	d["filename"] = m.layer.Files[e.file].Name()
	if e.se != nil {
		d["format"], d["cluster-size"] = "SESPARSE", int64(seGrainBytes)
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
