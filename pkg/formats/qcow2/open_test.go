package qcow2_test

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/qcow2"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func u32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
func u64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

// newSmall returns a file system with an image of 1 MiB, in clusters of 4 KiB, in a.qcow2.
func newSmall(t testing.TB, extra map[string]string) *vfs.Mem {
	t.Helper()
	fsys := vfs.NewMem()
	memCreate(t, fsys, qcow2.Format{}, formats.CreateRequest{Name: "a.qcow2", SizeBytes: 1 << 20, ClusterBytes: 4 << 10, Extra: extra})
	return fsys
}

// allocate has the first 64 KiB of a.qcow2 take space.
func allocate(t testing.TB, fsys vfs.FS) {
	t.Helper()
	image, err := memOpen(fsys, "a.qcow2", vfs.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := image.WriteAt(make([]byte, 64<<10), 0); err != nil {
		t.Fatal(err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestOpen_Refuses(t *testing.T) {
	for name, c := range map[string]struct {
		off  int64
		p    []byte
		want error
		says string
	}{
		"no magic":               {0, []byte("QFIx"), block.ErrUnsupported, "magic"},
		"version 1":              {4, u32(1), block.ErrUnsupported, "version 1"},
		"version 4":              {4, u32(4), block.ErrUnsupported, "version 4"},
		"tiny clusters":          {20, u32(8), block.ErrUnsupported, "cluster_bits is 8"},
		"huge clusters":          {20, u32(22), block.ErrUnsupported, "cluster_bits is 22"},
		"AES":                    {32, u32(1), block.ErrUnsupported, "AES"},
		"LUKS":                   {32, u32(2), block.ErrUnsupported, "LUKS"},
		"unknown encryption":     {32, u32(3), block.ErrUnsupported, "crypt_method is 3"},
		"huge size":              {24, u64(1 << 62), block.ErrUnsupported, "size is"},
		"L1 table too short":     {24, u64(1 << 40), block.ErrCorrupt, "l1_size is 1,"},
		"L1 table too long":      {36, u32(1 << 30), block.ErrUnsupported, "l1_size"},
		"L1 table not aligned":   {40, u64(0x1001), block.ErrCorrupt, "L1 table is at 0x1001"},
		"L1 table outside":       {40, u64(1 << 40), block.ErrCorrupt, "L1 table of 8 bytes at 0x10000000000"},
		"L1 table nowhere":       {40, u64(0), block.ErrCorrupt, "L1 table is at 0x0"},
		"L1 is refcount table":   {40, u64(0x1000), block.ErrCorrupt, "overlaps the refcount table"},
		"no refcount table":      {56, u32(0), block.ErrCorrupt, "refcount_table_clusters is 0"},
		"huge refcount table":    {56, u32(1 << 20), block.ErrUnsupported, "refcount table has"},
		"refcount table outside": {48, u64(1 << 30), block.ErrCorrupt, "refcount table of"},
		"refcount width":         {96, u32(7), block.ErrCorrupt, "refcount_order is 7"},
		"header length":          {100, u32(107), block.ErrCorrupt, "header_length is 107"},
		"long header":            {100, u32(1 << 16), block.ErrCorrupt, "header_length is 65536"},
		"unknown feature":        {72, u64(1 << 17), block.ErrUnsupported, "bit 17"},
		"named feature":          {72, u64(1 << 5), block.ErrUnsupported, `"strange things" (bit 5)`},
		"compression type":       {104, []byte{1}, block.ErrCorrupt, "compression_type is 1"},
		"other compression":      {72, append(u64(8), make([]byte, 24)...), block.ErrCorrupt, "header_length"},
		"extended L2":            {72, u64(16), block.ErrCorrupt, "cluster_bits is 12 with extended L2"},
		"data file without name": {72, u64(4), block.ErrUnsupported, "external data file"},
		"extension too long":     {116, u32(1 << 20), block.ErrCorrupt, "header extension"},
		"backing name too long":  {8, append(u64(600), u32(1024)...), block.ErrCorrupt, "backing file name has 1024 bytes"},
		"backing name outside":   {8, append(u64(5000), u32(10)...), block.ErrCorrupt, "backing file name"},
		"snapshots outside":      {60, append(u32(1), u64(1<<30)...), block.ErrCorrupt, "snapshot table"},
		"too many snapshots":     {60, append(u32(1<<20), u64(0x3000)...), block.ErrUnsupported, "nb_snapshots"},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := newSmall(t, nil)
			nameFeature(t, fsys)
			poke(t, fsys, "a.qcow2", c.off, c.p...)
			_, err := memOpen(fsys, "a.qcow2", vfs.ReadOnly)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "a.qcow2") {
				t.Errorf("opened with error %v, want %v that says %q", err, c.want, c.says)
			}
		})
	}
}

// nameFeature makes the first entry of the table of feature names name bit 5.
func nameFeature(t testing.TB, fsys *vfs.Mem) {
	t.Helper()
	head := string(peek(t, fsys, "a.qcow2")[:512])
	at := strings.Index(head, string(u32(0x6803f857)))
	if at < 0 {
		t.Fatal("no feature name table")
	}
	poke(t, fsys, "a.qcow2", int64(at)+8, append([]byte{0, 5}, "strange things\x00"...)...)
}

// Names in an image lead nowhere outside its store.
func TestOpen_RefusesNames(t *testing.T) {
	for _, link := range []string{"/etc/passwd", "../../x", "json:{}", "nbd:localhost", "file:x", "/dev/sda"} {
		t.Run(link, func(t *testing.T) {
			fsys := newSmall(t, nil)
			poke(t, fsys, "a.qcow2", 600, []byte(link)...)
			poke(t, fsys, "a.qcow2", 8, append(u64(600), u32(uint32(len(link)))...)...)
			if _, err := memOpen(fsys, "a.qcow2", vfs.ReadOnly); err == nil || !strings.Contains(err.Error(), "backing file") {
				t.Errorf("opened with error %v", err)
			}
		})
	}
	fsys := newSmall(t, map[string]string{"data_file": "data"})
	head := string(peek(t, fsys, "a.qcow2")[:512])
	at := strings.Index(head, string(u32(0x44415441)))
	for _, link := range []string{"/etc", "../d", "a:bc"} {
		poke(t, fsys, "a.qcow2", int64(at)+4, append(u32(uint32(len(link))), link...)...)
		if _, err := memOpen(fsys, "a.qcow2", vfs.ReadOnly); err == nil || !strings.Contains(err.Error(), "external data file") {
			t.Errorf("data file %q: opened with error %v", link, err)
		}
	}
}

// An entry that points to where no guest data can be is an error for whoever reads there,
// and harms nobody else.
func TestLookup_BadEntries(t *testing.T) {
	fsys := newSmall(t, nil)
	allocate(t, fsys)
	p := peek(t, fsys, "a.qcow2")
	l1 := binary.BigEndian.Uint64(p[40:])
	l2 := binary.BigEndian.Uint64(p[l1:]) & (1<<56 - 1)
	block1 := binary.BigEndian.Uint64(p[binary.BigEndian.Uint64(p[48:]):])
	const copied, compressed = 1 << 63, 1 << 62
	for name, entry := range map[string]uint64{
		"header":                   copied,
		"L1 table":                 l1 | copied,
		"its own table":            l2 | copied,
		"refcount table":           binary.BigEndian.Uint64(p[48:]) | copied,
		"refcount block":           block1 | copied,
		"outside":                  1<<40 | copied,
		"not aligned":              l2 + 512 | copied,
		"compressed outside":       1<<40 | compressed,
		"compressed in the header": 100 | compressed,
		"compressed and copied":    0x8000 | compressed | copied,
	} {
		t.Run(name, func(t *testing.T) {
			fsys := fsys.Clone()
			poke(t, fsys, "a.qcow2", int64(l2)+8, u64(entry)...)
			image, err := memOpen(fsys, "a.qcow2", vfs.ReadWrite)
			if err != nil {
				t.Fatal(err)
			}
			defer image.Close()
			if _, err := image.WriteAt([]byte{1}, 100<<10); err != nil { // now the refcounts are known, too
				t.Fatal(err)
			}
			if _, err := image.ReadAt(make([]byte, 1), 5000); !errors.Is(err, block.ErrCorrupt) {
				t.Errorf("read: %v, want %v", err, block.ErrCorrupt)
			}
			if _, err := image.WriteAt(make([]byte, 1), 5000); !errors.Is(err, block.ErrCorrupt) {
				t.Errorf("write: %v, want %v", err, block.ErrCorrupt)
			}
			if _, err := image.ReadAt(make([]byte, 8<<10), 8<<10); err != nil {
				t.Errorf("read beside it: %v", err)
			}
		})
	}
}

// Where another program has left no room in the first cluster for an identity, an image can
// still be written to; a journal is replayed onto nothing then.
func TestBegin_NoRoom(t *testing.T) {
	fsys := vfs.NewMem()
	memCreate(t, fsys, qcow2.Format{}, formats.CreateRequest{Name: "a.qcow2", SizeBytes: 1 << 20, ClusterBytes: 512})
	filler := append(u32(0x11111111), u32(380)...)
	poke(t, fsys, "a.qcow2", 112, append(filler, make([]byte, 384)...)...)
	before := peek(t, fsys, "a.qcow2")[:512]
	image, err := memOpen(fsys, "a.qcow2", vfs.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := image.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	if after := peek(t, fsys, "a.qcow2")[:512]; string(before) != string(after) {
		t.Error("the header has changed")
	}
	one, err := memOpen(fsys, "a.qcow2", vfs.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	another, err := memOpen(fsys, "a.qcow2", vfs.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	defer another.Close()
	if string(one.Layers()[0].Codec.Identity()) == string(another.Layers()[0].Codec.Identity()) {
		t.Error("an image without an identity has the same one twice")
	}
}

func TestCreate_Refuses(t *testing.T) {
	for name, c := range map[string]struct {
		req  formats.CreateRequest
		says string
	}{
		"no size":              {formats.CreateRequest{}, "size 0"},
		"odd size":             {formats.CreateRequest{SizeBytes: 1000}, "size 1000"},
		"too large":            {formats.CreateRequest{SizeBytes: 1 << 40, ClusterBytes: 512}, "want at most 137438953472"},
		"cluster size":         {formats.CreateRequest{SizeBytes: 512, ClusterBytes: 3000}, "cluster size 3000"},
		"subformat":            {formats.CreateRequest{SizeBytes: 512, Subformat: "thin"}, "subformat"},
		"unknown option":       {formats.CreateRequest{SizeBytes: 512, Extra: map[string]string{"colour": "red"}}, `option "colour"`},
		"v2 with zstd":         {formats.CreateRequest{SizeBytes: 512, Extra: map[string]string{"compat": "0.10", "compression_type": "zstd"}}, "compat 0.10"},
		"refcount width":       {formats.CreateRequest{SizeBytes: 512, Extra: map[string]string{"refcount_bits": "3"}}, "refcount_bits"},
		"small extended":       {formats.CreateRequest{SizeBytes: 512, ClusterBytes: 4096, Extra: map[string]string{"extended_l2": "on"}}, "extended_l2"},
		"raw without file":     {formats.CreateRequest{SizeBytes: 512, Extra: map[string]string{"data_file_raw": "on"}}, "data_file_raw"},
		"data file elsewhere":  {formats.CreateRequest{SizeBytes: 512, Extra: map[string]string{"data_file": "/tmp/x"}}, "data_file"},
		"data file is itself":  {formats.CreateRequest{SizeBytes: 512, Extra: map[string]string{"data_file": "a.qcow2"}}, "itself"},
		"two cluster sizes":    {formats.CreateRequest{SizeBytes: 512, ClusterBytes: 512, Extra: map[string]string{"cluster_size": "1k"}}, "cluster_size"},
		"unknown compression":  {formats.CreateRequest{SizeBytes: 512, Extra: map[string]string{"compression_type": "lzma"}}, "compression_type"},
		"unknown preallocated": {formats.CreateRequest{SizeBytes: 512, Preallocation: "half"}, "preallocation"},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := vfs.NewMem()
			c.req.FS, c.req.Name = fsys, "a.qcow2"
			err := qcow2.Format{}.Create(t.Context(), c.req)
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("created with error %v, want one that says %q", err, c.says)
			}
			if left, err := fsys.ReadDir("."); err != nil || len(left) > 0 {
				t.Errorf("%v is left, error %v", left, err)
			}
		})
	}
}

// What Measure says is what an image takes, or little more.
func TestMeasure(t *testing.T) {
	for _, req := range []formats.CreateRequest{
		{SizeBytes: 5 << 20}, {SizeBytes: 5 << 20, ClusterBytes: 512}, {SizeBytes: 5 << 20, Preallocation: formats.PreallocateMetadata},
		{SizeBytes: 5 << 20, ClusterBytes: 512, Extra: map[string]string{"refcount_bits": "64"}},
		{SizeBytes: 5 << 20, Extra: map[string]string{"data_file": "d"}},
	} {
		fsys := vfs.NewMem()
		req.Name = "a.qcow2"
		memCreate(t, fsys, qcow2.Format{}, req)
		image, err := memOpen(fsys, "a.qcow2", vfs.ReadWrite)
		if err != nil {
			t.Fatal(err)
		}
		const data = 3 << 20
		if _, err := image.WriteAt(make([]byte, data), 0); err != nil {
			t.Fatal(err)
		}
		if err := image.Close(); err != nil {
			t.Fatal(err)
		}
		measured, err := qcow2.Format{}.Measure(req, data)
		if err != nil {
			t.Fatal(err)
		}
		length := int64(len(peek(t, fsys, "a.qcow2")))
		if req.Extra["data_file"] != "" {
			length += int64(len(peek(t, fsys, "d")))
		}
		// Data that is spread over the disk needs more tables.
		if measured < length || measured > length+length/50 {
			t.Errorf("%+v: measured %d bytes, it takes %d", req, measured, length)
		}
	}
}
