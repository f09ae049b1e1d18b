package qcow2

import (
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// Describe returns what the header says, under qemu-img's names.
func (m *image) Describe() engine.Description {
	h := m.header
	d := engine.Description{}
	add := func(name string, value any) { d.Details = append(d.Details, engine.Detail{Name: name, Value: value}) }
	compat, method := "0.10", "zlib"
	if h.version >= 3 {
		compat = "1.1"
	}
	if h.compressionType == compressionZstd {
		method = "zstd"
	}
	add("compat", compat)
	add("compression-type", method)
	if h.version >= 3 {
		add("lazy-refcounts", h.compatible&compatLazyRefcounts != 0)
	}
	add("refcount-bits", int64(1)<<h.refcountOrder)
	if h.version >= 3 {
		add("corrupt", h.incompatible&incompatCorrupt != 0)
		add("extended-l2", h.extended())
	}
	if m.dataFile != 0 {
		add("data-file", m.layer.Files[m.dataFile].Name())
		add("data-file-raw", h.rawData())
	}
	if h.incompatible&incompatDirty != 0 {
		add("dirty-flag", true)
	}
	if len(m.bitmaps) > 0 {
		add("bitmaps", m.describeBitmaps())
	}
	if len(m.snapshots) > 0 {
		add("snapshots", m.describeSnapshots())
	}
	return d
}

func (m *image) describeBitmaps() []map[string]any {
	var all []map[string]any
	for _, b := range m.bitmaps {
		flags := []string{}
		if b.flags&bitmapInUse != 0 {
			flags = append(flags, "in-use")
		}
		if b.flags&bitmapAuto != 0 {
			flags = append(flags, "auto")
		}
		all = append(all, map[string]any{"name": b.name, "granularity": int64(1) << min(b.granularityBits, 62), "flags": flags})
	}
	return all
}

func (m *image) describeSnapshots() []map[string]any {
	const second = 1_000_000_000
	var all []map[string]any
	for _, s := range m.snapshots {
		d := map[string]any{
			"id": s.id, "name": s.name, "vm-state-size": s.vmStateSize, "date-sec": s.dateSec, "date-nsec": s.dateNsec,
			"vm-clock-sec": s.vmClockNsec / second, "vm-clock-nsec": s.vmClockNsec % second,
		}
		if s.icount != noIcount {
			d["icount"] = s.icount
		}
		all = append(all, d)
	}
	return all
}
