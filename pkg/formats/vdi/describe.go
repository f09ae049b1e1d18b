package vdi

import "github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"

// Describe returns what the header says.
func (m *image) Describe() engine.Description {
	d := engine.Description{Subformat: subDynamic}
	switch m.h.kind() {
	case typeStatic:
		d.Subformat = subStatic
	case typeDifferencing:
		d.Subformat = "differencing"
	}
	d.Details = []engine.Detail{
		{Name: "image-type", Value: d.Subformat},
		{Name: "blocks", Value: m.h.blocks()},
		{Name: "blocks-allocated", Value: m.h.allocated()},
		{Name: "uuid", Value: m.h.uuid(fieldUUID).String()},
		{Name: "uuid-modification", Value: m.h.uuid(fieldUUIDModified).String()},
	}
	if m.h.isChild() {
		d.Details = append(d.Details,
			engine.Detail{Name: "uuid-parent", Value: m.h.uuid(fieldUUIDLink).String()},
			engine.Detail{Name: "uuid-parent-modification", Value: m.h.uuid(fieldUUIDParent).String()})
	}
	if text := m.h.description(); text != "" {
		d.Details = append(d.Details, engine.Detail{Name: "description", Value: text})
	}
	return d
}
