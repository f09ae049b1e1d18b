package vhdx

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// The metadata region ([MS-VHDX] 2.6): a table of 64 KiB, and items behind it.
const (
	metadataSignature  = "metadata"
	metadataTableBytes = 64 << 10
	metadataEntryBytes = 32
	maxMetadataEntries = 2047
	maxItemBytes       = mib

	itemUser     = 1
	itemVDisk    = 2
	itemRequired = 4

	paramLeaveAllocated = 1 // fixed: blocks keep their place
	paramHasParent      = 2

	minBlockBytes = mib
	maxBlockBytes = 256 * mib
	maxSizeBytes  = 64 << 40
)

// Known items.
var (
	itemFileParameters = mustGUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
	itemVirtualSize    = mustGUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
	itemPage83         = mustGUID("beca12ab-b2e6-4523-93ef-c309e000c746")
	itemLogicalSector  = mustGUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
	itemPhysicalSector = mustGUID("cda348c7-445d-4471-9cc9-e9885251c556")
	itemParentLocator  = mustGUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")

	locatorVHDX = mustGUID("b04aefb7-d19e-4a81-b789-25b8e9445913")
)

// itemLengths are the known items' lengths; 0: any.
var itemLengths = map[guid]uint32{
	itemFileParameters: 8, itemVirtualSize: 8, itemPage83: 16, itemLogicalSector: 4, itemPhysicalSector: 4, itemParentLocator: 0,
}

// item is an entry of the metadata table.
type item struct {
	id          guid
	off, length uint32 // in the region
	flags       uint32
}

// metadata is what the metadata region says.
type metadata struct {
	at     int64 // of the region in the file
	length int64
	items  []item

	blockBytes     int64
	leaveAllocated bool
	hasParent      bool
	sizeBytes      int64
	diskID         guid
	logicalSector  int64
	physicalSector int64
	locator        map[string]string // nil without a parent
}

// readMetadata reads and validates the metadata region.
func readMetadata(f vfs.File, r region) (*metadata, error) {
	m := &metadata{at: int64(r.off), length: int64(r.length)}
	table := make([]byte, metadataTableBytes)
	if err := readFull(f, table, m.at); err != nil {
		return nil, err
	}
	if string(table[:8]) != metadataSignature {
		return nil, corrupt("metadata table: wrong signature")
	}
	n := int(binary.LittleEndian.Uint16(table[10:]))
	if n > maxMetadataEntries {
		return nil, corrupt("metadata table: %d entries, want at most %d", n, maxMetadataEntries)
	}
	for i := range n {
		e := table[metadataEntryBytes*(1+i):]
		it := item{
			off: binary.LittleEndian.Uint32(e[16:]), length: binary.LittleEndian.Uint32(e[20:]), flags: binary.LittleEndian.Uint32(e[24:]),
		}
		copy(it.id[:], e)
		m.items = append(m.items, it)
	}
	values, err := m.readItems(f)
	if err != nil {
		return nil, err
	}
	return m, m.take(values)
}

// readItems reads the values of the known items, each of which may be there once.
func (m *metadata) readItems(f vfs.File) (map[guid][]byte, error) {
	values := map[guid][]byte{}
	for i, it := range m.items {
		want, known := itemLengths[it.id]
		switch {
		case !known && it.flags&itemRequired != 0:
			return nil, unsupported("metadata item %s is required and unknown", it.id)
		case it.length == 0 && it.off == 0 && !known:
			continue
		case it.length > maxItemBytes || it.off < metadataTableBytes || int64(it.off)+int64(it.length) > m.length:
			return nil, corrupt("metadata entry %d, %s: %d bytes at %#x, want at most %d inside the region, behind its table",
				i, it.id, it.length, it.off, maxItemBytes)
		case !known:
			continue
		case want != 0 && it.length != want:
			return nil, corrupt("metadata item %s has %d bytes, want %d", it.id, it.length, want)
		case values[it.id] != nil:
			return nil, corrupt("metadata item %s is there twice", it.id)
		}
		p := make([]byte, it.length)
		if err := readFull(f, p, m.at+int64(it.off)); err != nil {
			return nil, fmt.Errorf("metadata item %s: %w", it.id, err)
		}
		values[it.id] = p
	}
	for id := range itemLengths {
		if values[id] == nil && id != itemParentLocator {
			return nil, corrupt("metadata item %s is missing", id)
		}
	}
	return values, nil
}

// take decodes and validates the known items' values.
func (m *metadata) take(values map[guid][]byte) error {
	le := binary.LittleEndian
	params := values[itemFileParameters]
	m.blockBytes = int64(le.Uint32(params))
	flags := le.Uint32(params[4:])
	m.leaveAllocated, m.hasParent = flags&paramLeaveAllocated != 0, flags&paramHasParent != 0
	m.logicalSector = int64(le.Uint32(values[itemLogicalSector]))
	m.physicalSector = int64(le.Uint32(values[itemPhysicalSector]))
	copy(m.diskID[:], values[itemPage83])
	size := le.Uint64(values[itemVirtualSize])
	switch {
	case !isBlockSize(m.blockBytes):
		return corrupt("file parameters: block size %d, want a power of two from %d to %d", m.blockBytes, minBlockBytes, maxBlockBytes)
	case !isSectorSize(m.logicalSector):
		return corrupt("logical sector size %d, want 512 or 4096", m.logicalSector)
	case !isSectorSize(m.physicalSector):
		return corrupt("physical sector size %d, want 512 or 4096", m.physicalSector)
	case size == 0 || size > maxSizeBytes || size%uint64(m.logicalSector) != 0:
		return corrupt("virtual disk size %d, want a multiple of the sector size %d, at most %d", size, m.logicalSector, int64(maxSizeBytes))
	}
	m.sizeBytes = int64(size)
	if !m.hasParent {
		return nil
	}
	if values[itemParentLocator] == nil {
		return corrupt("file parameters: it has a parent, but there is no parent locator")
	}
	var err error
	m.locator, err = decodeLocator(values[itemParentLocator])
	return err
}

func isBlockSize(n int64) bool {
	return n >= minBlockBytes && n <= maxBlockBytes && n&(n-1) == 0
}

func isSectorSize(n int64) bool { return n == 512 || n == 4096 }

// A parent locator ([MS-VHDX] 2.6.2.6): keys and values as UTF-16.
const (
	locatorHeaderBytes = 20
	locatorEntryBytes  = 12
	maxLocatorEntries  = 64

	keyLinkage      = "parent_linkage"
	keyLinkage2     = "parent_linkage2"
	keyRelativePath = "relative_path"
	keyVolumePath   = "volume_path"
	keyWin32Path    = "absolute_win32_path"
)

func decodeLocator(p []byte) (map[string]string, error) {
	if len(p) < locatorHeaderBytes {
		return nil, corrupt("parent locator: %d bytes, want at least %d", len(p), locatorHeaderBytes)
	}
	if kind := guid(p[:16]); kind != locatorVHDX {
		return nil, unsupported("parent locator: its type is %s, want %s (VHDX)", kind, locatorVHDX)
	}
	n := int(binary.LittleEndian.Uint16(p[18:]))
	if n > maxLocatorEntries || locatorHeaderBytes+n*locatorEntryBytes > len(p) {
		return nil, corrupt("parent locator: %d entries in %d bytes, want at most %d", n, len(p), maxLocatorEntries)
	}
	locator := map[string]string{}
	for i := range n {
		e := p[locatorHeaderBytes+i*locatorEntryBytes:]
		key, ok := locatorText(p, binary.LittleEndian.Uint32(e), binary.LittleEndian.Uint16(e[8:]))
		value, ok2 := locatorText(p, binary.LittleEndian.Uint32(e[4:]), binary.LittleEndian.Uint16(e[10:]))
		if !ok || !ok2 {
			return nil, corrupt("parent locator: entry %d lies outside of it", i)
		}
		if _, ok := locator[key]; ok {
			return nil, corrupt("parent locator: key %q is there twice", key)
		}
		locator[key] = value
	}
	return locator, nil
}

func locatorText(p []byte, off uint32, n uint16) (string, bool) {
	if int64(off)+int64(n) > int64(len(p)) {
		return "", false
	}
	return decodeUTF16(p[off : off+uint32(n)]), true
}

// encodeLocator returns a locator with the keys in order.
func encodeLocator(locator map[string]string) ([]byte, error) {
	keys := slices.Sorted(func(yield func(string) bool) {
		for k := range locator {
			if !yield(k) {
				return
			}
		}
	})
	p := make([]byte, locatorHeaderBytes+len(keys)*locatorEntryBytes)
	copy(p, locatorVHDX[:])
	binary.LittleEndian.PutUint16(p[18:], uint16(len(keys)))
	for i, key := range keys {
		if !utf8.ValidString(locator[key]) || strings.ContainsRune(locator[key], 0) {
			return nil, invalid("%s %q: want valid UTF-8", key, locator[key])
		}
		k, v := encodeUTF16(key), encodeUTF16(locator[key])
		if len(v) == 0 || len(v) > 1<<15 {
			return nil, invalid("%s of %d bytes, want 1 to %d", key, len(v)/2, 1<<14)
		}
		e := p[locatorHeaderBytes+i*locatorEntryBytes:]
		binary.LittleEndian.PutUint32(e, uint32(len(p)))
		binary.LittleEndian.PutUint32(e[4:], uint32(len(p)+len(k)))
		binary.LittleEndian.PutUint16(e[8:], uint16(len(k)))
		binary.LittleEndian.PutUint16(e[10:], uint16(len(v)))
		p = append(append(p, k...), v...)
	}
	return p, nil
}

// encodeTable returns the metadata table for items.
func encodeTable(items []item) []byte {
	p := make([]byte, metadataTableBytes)
	copy(p, metadataSignature)
	binary.LittleEndian.PutUint16(p[10:], uint16(len(items)))
	for i, it := range items {
		e := p[metadataEntryBytes*(1+i):]
		copy(e, it.id[:])
		binary.LittleEndian.PutUint32(e[16:], it.off)
		binary.LittleEndian.PutUint32(e[20:], it.length)
		binary.LittleEndian.PutUint32(e[24:], it.flags)
	}
	return p
}

// item returns the entry of a known item.
func (m *metadata) item(id guid) *item {
	i := slices.IndexFunc(m.items, func(it item) bool { return it.id == id })
	if i < 0 {
		return nil
	}
	return &m.items[i]
}

// encode returns the whole region with the known items, for a new image. Each item has a
// place of its own, so that one can be replaced without the others.
func (m *metadata) encode() ([]byte, error) {
	le := binary.LittleEndian
	flags := uint32(0)
	if m.leaveAllocated {
		flags |= paramLeaveAllocated
	}
	if m.hasParent {
		flags |= paramHasParent
	}
	values := []struct {
		id    guid
		flags uint32
		value []byte
	}{
		{itemFileParameters, itemRequired, le.AppendUint32(le.AppendUint32(nil, uint32(m.blockBytes)), flags)},
		{itemVirtualSize, itemRequired | itemVDisk, le.AppendUint64(nil, uint64(m.sizeBytes))},
		{itemPage83, itemRequired | itemVDisk, m.diskID[:]},
		{itemLogicalSector, itemRequired | itemVDisk, le.AppendUint32(nil, uint32(m.logicalSector))},
		{itemPhysicalSector, itemRequired | itemVDisk, le.AppendUint32(nil, uint32(m.physicalSector))},
	}
	if m.hasParent {
		locator, err := encodeLocator(m.locator)
		if err != nil {
			return nil, err
		}
		values = append(values, struct {
			id    guid
			flags uint32
			value []byte
		}{itemParentLocator, itemRequired, locator})
	}
	body := make([]byte, 0, 4096)
	m.items = nil
	for _, v := range values {
		m.items = append(m.items, item{id: v.id, off: uint32(metadataTableBytes + len(body)), length: uint32(len(v.value)), flags: v.flags})
		body = append(body, v.value...)
		body = append(body, make([]byte, -len(body)&7)...)
	}
	if int64(metadataTableBytes+len(body)) > m.length {
		return nil, invalid("the metadata need %d bytes, want at most %d: use shorter names", metadataTableBytes+len(body), m.length)
	}
	return append(encodeTable(m.items), body...), nil
}
