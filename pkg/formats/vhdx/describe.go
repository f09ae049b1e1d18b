package vhdx

import (
	"maps"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// Describe returns what the metadata, the headers and the parent locator say.
func (m *image) Describe() engine.Description {
	d := engine.Description{Subformat: m.subformat()}
	add := func(name string, value any) { d.Details = append(d.Details, engine.Detail{Name: name, Value: value}) }
	add("block_size", m.meta.blockBytes)
	add("log_size", int64(m.header.logLength))
	add("logical_sector_size", m.meta.logicalSector)
	add("physical_sector_size", m.meta.physicalSector)
	add("disk_id", m.meta.diskID.String())
	add("file_write_guid", m.header.fileWrite.String())
	add("data_write_guid", m.header.dataWrite.String())
	creator := make([]byte, creatorBytes)
	if readPadded(m.file, creator, int64(len(fileSignature))) == nil {
		add("creator", decodeUTF16(creator))
	}
	add("log_replay_pending", m.file.pending.Load() != nil)
	for _, key := range slices.Sorted(maps.Keys(m.meta.locator)) {
		add(key, m.meta.locator[key])
	}
	return d
}

func (m *image) subformat() string {
	switch {
	case m.meta.hasParent:
		return subformatDifferencing
	case m.isFixed():
		return subformatFixed
	}
	return subformatDynamic
}
