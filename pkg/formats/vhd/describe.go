package vhd

import (
	"strings"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// Describe returns what footer and header say.
func (m *image) Describe() engine.Description {
	d := engine.Description{Subformat: subDynamic}
	switch m.footer.kind() {
	case kindFixed:
		d.Subformat = subFixed
	case kindDifferencing:
		d.Subformat = "differencing"
	}
	g := m.footer.geometry()
	d.Details = []engine.Detail{
		{Name: "disk-type", Value: d.Subformat},
		{Name: "uuid", Value: m.footer.uuid().String()},
		{Name: "timestamp", Value: time.Unix(int64(m.footer.timestamp())+timestampSeconds, 0).UTC().Format(time.RFC3339)},
		{Name: "creator", Value: strings.ToValidUTF8(strings.TrimRight(m.footer.creator(), " \x00"), "?")},
		{Name: "cylinders", Value: g.cylinders},
		{Name: "heads", Value: g.heads},
		{Name: "sectors-per-track", Value: g.tracks},
	}
	if m.footer.kind() == kindDifferencing {
		d.Details = append(d.Details,
			engine.Detail{Name: "uuid-parent", Value: m.header.parentUUID().String()},
			engine.Detail{Name: "parent-name", Value: m.header.parentName()})
	}
	return d
}
