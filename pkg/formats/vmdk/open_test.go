package vmdk_test

import (
	"bytes"
	"compress/zlib"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vmdk"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// header returns a descriptor's first lines.
func header(createType string) string {
	return "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\ncreateType=\"" + createType + "\"\n"
}

func TestOpen_RefusesDescriptor(t *testing.T) {
	flat := header("monolithicFlat")
	for name, c := range map[string]struct {
		text, message string
		is            error
	}{
		"absolute extent":     {flat + `RW 8 FLAT "/etc/passwd" 0`, "absolute paths are refused", fs.ErrInvalid},
		"escaping extent":     {flat + `RW 8 FLAT "../x/flat" 0`, "leaves the store", fs.ErrInvalid},
		"protocol":            {flat + `RW 8 FLAT "nbd:localhost:1" 0`, "only plain file names", fs.ErrInvalid},
		"json":                {flat + `RW 8 FLAT "json:{}" 0`, "only plain file names", fs.ErrInvalid},
		"empty name":          {flat + `RW 8 FLAT "" 0`, "it is empty", fs.ErrInvalid},
		"missing extent":      {flat + `RW 8 FLAT "nothing" 0`, "nothing", fs.ErrNotExist},
		"itself":              {flat + `RW 1 FLAT "a.vmdk" 0`, "a.vmdk is used twice", block.ErrCorrupt},
		"twice":               {flat + "RW 8 FLAT \"flat\" 0\nRW 8 FLAT \"./flat\" 0", "flat is used twice", block.ErrCorrupt},
		"short flat":          {flat + `RW 9 FLAT "flat" 0`, "flat has 4096 bytes, want 4608 from 0 on", block.ErrCorrupt},
		"offset past the end": {flat + `RW 8 FLAT "flat" 1`, "it was truncated", block.ErrCorrupt},
		"no access":           {flat + `NOACCESS 8 FLAT "flat" 0`, "NOACCESS", block.ErrUnsupported},
		"no extents":          {flat, "names no extents", block.ErrCorrupt},
		"sparse that is flat": {flat + `RW 8 SPARSE "flat"`, "does not start with the header", block.ErrCorrupt},
		"COWD extent":         {flat + `RW 8 SPARSE "cowd"`, "header of cowd: not supported: COWD header version 0", block.ErrUnsupported},
		"device extent":       {flat + `RW 8 VMFSRDM "flat"`, "a device of the host, through VMFS", block.ErrUnsupported},
		"seSparse extent":     {header("monolithicSparse") + `RW 8 SESPARSE "flat"`, "header of flat: image is corrupt: it does not start with the header of an seSparse", block.ErrCorrupt},
		"endless zeroes":      {flat + strings.Repeat("RW 9007199254740992 ZERO\n", 4), "more than 72057594037927936 bytes", block.ErrCorrupt},
		"unknown extent":      {flat + `RW 8 HOLOGRAM "flat"`, `kind "HOLOGRAM", want SPARSE, FLAT, VMFS, VMFSSPARSE, SESPARSE or ZERO`, block.ErrUnsupported},
		"seSparse":            {header("seSparse") + `RW 8 SESPARSE "cowd"`, "does not start with the header of an seSparse", block.ErrCorrupt},
		"COWD":                {header("vmfsSparse") + `RW 8 VMFSSPARSE "flat"`, "flat does not start with the header of a sparse", block.ErrCorrupt},
		"device":              {header("fullDevice") + `RW 8 FLAT "flat" 0`, "a whole disk of the host", block.ErrUnsupported},
		"partitions":          {header("partitionedDevice") + `RW 8 FLAT "flat" 0`, "partitions of a disk", block.ErrUnsupported},
		"unknown type":        {header("holographic") + `RW 8 FLAT "flat" 0`, `createType "holographic", want one of`, block.ErrUnsupported},
		"encrypted":           {flat + "encryption.keySafe = \"x\"\nRW 8 FLAT \"flat\" 0", "encrypted", block.ErrUnsupported},
		"encryption keys":     {flat + "encryptionKeys=\"vmware:key/list/()\"\nRW 8 FLAT \"flat\" 0", "encrypted", block.ErrUnsupported},
		"encrypting filter":   {flat + "RW 8 FLAT \"flat\" 0\nddb.iofilters = \"vmwarevmcrypt\"", "encrypted", block.ErrUnsupported},
		"no CID":              {"version=1\ncreateType=\"monolithicFlat\"\nRW 8 FLAT \"flat\" 0", "no line CID", block.ErrCorrupt},
		"no type":             {"version=1\nCID=1\nRW 8 FLAT \"flat\" 0", `createType ""`, block.ErrUnsupported},
		"VirtualBox's child": {flat + "RW 8 FLAT \"flat\" 0\nddb.uuid.parent=\"b75cb268-b7a5-47db-ba37-434d072f7480\"",
			`stands on the image with ddb.uuid.image b75cb268-b7a5-47db-ba37-434d072f7480, which is not beside it`, block.ErrUnsupported},
		"hint without CID": {flat + "parentFileNameHint=\"b.vmdk\"\nRW 8 FLAT \"flat\" 0", "parentCID is ffffffff", block.ErrCorrupt},
		"CID without hint": {strings.Replace(flat, "ffffffff", "00000007", 1) + "RW 8 FLAT \"flat\" 0", "there is no parentFileNameHint", block.ErrCorrupt},
		"absolute parent": {strings.Replace(flat, "ffffffff", "00000007", 1) + "parentFileNameHint=\"/vmfs/b.vmdk\"\nRW 8 FLAT \"flat\" 0",
			"parentFileNameHint: link", fs.ErrInvalid},
		"its own parent":   {strings.Replace(flat, "ffffffff", "00000001", 1) + "parentFileNameHint=\"a.vmdk\"\nRW 8 FLAT \"flat\" 0", "stands on itself", block.ErrCorrupt},
		"not a descriptor": {"hello, world\n", "neither a sparse extent nor a descriptor", block.ErrUnsupported},
		"empty":            {"", "neither a sparse extent nor a descriptor", block.ErrUnsupported},
		"too long":         {flat + strings.Repeat("# comment\n", 60000), "neither a sparse extent nor a descriptor", block.ErrUnsupported},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := vfs.NewMem()
			addFile(t, fsys, "flat", make([]byte, 4096))
			addFile(t, fsys, "cowd", append([]byte("COWD"), make([]byte, 2048)...))
			addFile(t, fsys, "a.vmdk", []byte(c.text))
			_, err := memTryOpen(fsys, "a.vmdk", vfs.ReadOnly)
			if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.message) || !strings.Contains(err.Error(), "a.vmdk") {
				t.Errorf("error %v, want %v that says %q", err, c.is, c.message)
			}
			for _, name := range []string{"flat", "a.vmdk"} {
				f, err := fsys.Open(name, vfs.ReadWrite)
				if err == nil {
					err = errors.Join(f.Lock(vfs.LockWrite), f.Close())
				}
				if err != nil {
					t.Errorf("%s is still open: %v", name, err)
				}
			}
		})
	}
}

func TestOpen_RefusesSparse(t *testing.T) {
	for name, c := range map[string]struct {
		change  func(t *testing.T, fsys vfs.FS)
		message string
		is      error
	}{
		"truncated": {func(t *testing.T, fsys vfs.FS) {
			f, err := fsys.Open("a.vmdk", vfs.ReadWrite)
			if err == nil {
				err = errors.Join(f.Truncate(600), f.Close())
			}
			if err != nil {
				t.Fatal(err)
			}
		}, "it was truncated", block.ErrCorrupt},
		"no descriptor": {func(t *testing.T, fsys vfs.FS) {
			poke(t, fsys, "a.vmdk", 28, 0)
		}, "an extent without a descriptor", block.ErrUnsupported},
		"text mode": {func(t *testing.T, fsys vfs.FS) {
			poke(t, fsys, "a.vmdk", 73, '\r')
		}, "line ends", block.ErrCorrupt},
		"footer that is none": {func(t *testing.T, fsys vfs.FS) {
			poke(t, fsys, "a.vmdk", 56, 255, 255, 255, 255, 255, 255, 255, 255)
		}, "does not end with a footer", block.ErrCorrupt},
		"two extents": {func(t *testing.T, fsys vfs.FS) {
			edit(t, fsys, "a.vmdk", "RW 8192 SPARSE", "RW 1 SPARSE \"b\"\nRW 8192 SPARSE")
		}, "with 2 extents, want one", block.ErrCorrupt},
		"flat extent": {func(t *testing.T, fsys vfs.FS) {
			edit(t, fsys, "a.vmdk", "SPARSE", "FLAT")
		}, `kind "FLAT", want SPARSE`, block.ErrCorrupt},
		"split": {func(t *testing.T, fsys vfs.FS) {
			edit(t, fsys, "a.vmdk", "monolithicSparse", "twoGbMaxExtentSparse")
		}, "want one of monolithicSparse, streamOptimized here", block.ErrUnsupported},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := newSmall(t)
			c.change(t, fsys)
			_, err := memTryOpen(fsys, "a.vmdk", vfs.ReadOnly)
			if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.message) {
				t.Errorf("error %v, want %v that says %q", err, c.is, c.message)
			}
		})
	}
}

// Images that can be read and must not be written.
func TestOpen_ReadOnly(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, fsys vfs.FS){
		"change tracking": func(t *testing.T, fsys vfs.FS) {
			edit(t, fsys, "a.vmdk", "ddb.adapterType", "changeTrackPath=\"a-ctk.vmdk\"\nddb.adapterType")
		},
		"I/O filters": func(t *testing.T, fsys vfs.FS) {
			edit(t, fsys, "a.vmdk", "ddb.adapterType", "ddb.iofilters=\"vendor_cache\"\nddb.adapterType")
		},
		"extent":        func(t *testing.T, fsys vfs.FS) { edit(t, fsys, "a.vmdk", "RW 8192", "RDONLY 8192") },
		"unknown flags": func(t *testing.T, fsys vfs.FS) { poke(t, fsys, "a.vmdk", 11, 0x80) },
	} {
		t.Run(name, func(t *testing.T) {
			fsys := newSmall(t)
			change(t, fsys)
			before := peek(t, fsys, "a.vmdk")
			image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
			if !bytes.HasPrefix(readGuest(t, image), smallData()) {
				t.Error("it reads as something else")
			}
			if _, err := image.WriteAt([]byte{1}, 0); !errors.Is(err, block.ErrReadOnly) {
				t.Errorf("write: error %v, want %v", err, block.ErrReadOnly)
			}
			if err := image.Close(); err != nil || !bytes.Equal(before, peek(t, fsys, "a.vmdk")) {
				t.Errorf("the image has changed (error %v)", err)
			}
		})
	}
}

// Version 3 without change tracking is like version 1.
func TestOpen_Version3(t *testing.T) {
	fsys := newSmall(t)
	poke(t, fsys, "a.vmdk", 4, 3)
	image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
	if _, err := image.WriteAt([]byte{'x'}, smallSize-1); err != nil {
		t.Error(err)
	}
}

// The name in an embedded descriptor does not matter, and a file of that name is left
// alone.
func TestOpen_RenamedSparse(t *testing.T) {
	for _, name := range []string{"", "../../etc/passwd", "/dev/sda", "other.vmdk"} {
		fsys := newSmall(t)
		edit(t, fsys, "a.vmdk", `"a.vmdk"`, `"`+name+`"`)
		image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
		if !bytes.HasPrefix(readGuest(t, image), smallData()) {
			t.Errorf("extent name %q: it reads as something else", name)
		}
	}
}

// newStream returns a streamOptimized image of two grains of 64 KiB, whose first is stored
// as given, marker and all.
func newStream(t testing.TB, stored []byte) *vfs.Mem {
	t.Helper()
	fsys := vfs.NewMem()
	req := formats.CreateRequest{FS: fsys, Name: "a.vmdk", SizeBytes: 100 << 10}
	if err := (vmdk.Format{}).Create(context.Background(), req); err != nil {
		t.Fatal(err)
	}
	edit(t, fsys, "a.vmdk", "monolithicSparse", "streamOptimized")
	p := peek(t, fsys, "a.vmdk")
	le := binary.LittleEndian
	le.PutUint32(p[4:], 3)                  // version
	le.PutUint32(p[8:], 1|1<<16|1<<17)      // flags
	le.PutUint16(p[77:], 1)                 // compressAlgorithm
	gd := int64(le.Uint64(p[56:])) * 512    // gdOffset
	gt := int64(le.Uint32(p[gd:])) * 512    // its first table
	grain := int64(le.Uint64(p[64:])) * 512 // overHead
	le.PutUint32(p[gt:], uint32(grain/512))
	poke(t, fsys, "a.vmdk", 0, p...)
	poke(t, fsys, "a.vmdk", grain, stored...)
	poke(t, fsys, "a.vmdk", grain+64<<10, 1) // something else follows
	return fsys
}

func storedGrain(lba uint64, size int, data []byte) []byte {
	p := binary.LittleEndian.AppendUint64(nil, lba)
	p = binary.LittleEndian.AppendUint32(p, uint32(size))
	return append(p, data...)
}

func deflate(p []byte) []byte {
	var b bytes.Buffer
	w := zlib.NewWriter(&b)
	_, err := w.Write(p)
	if err = errors.Join(err, w.Close()); err != nil {
		panic(err)
	}
	return b.Bytes()
}

func TestStream(t *testing.T) {
	const grain = 64 << 10
	good := deflate(bytes.Repeat([]byte("text"), grain/4))
	bomb := deflate(make([]byte, 60<<20))
	spoiled := bytes.Clone(good)
	spoiled[len(spoiled)-1]++
	for name, c := range map[string]struct {
		stored  []byte
		message string // "" reads
	}{
		"good":           {storedGrain(0, len(good), good), ""},
		"good and more":  {append(storedGrain(0, len(good), good), make([]byte, 4096)...), ""},
		"bomb":           {storedGrain(0, len(bomb), bomb), "inflates to more than 65536 bytes"},
		"too little":     {storedGrain(0, 100, deflate(make([]byte, 100))), "inflates to 100 bytes"},
		"other sector":   {storedGrain(128, len(good), good), "sector 128 of the guest, want 0"},
		"no length":      {storedGrain(0, 0, good), "0 bytes are stored"},
		"huge length":    {storedGrain(0, 1<<31, good), "2147483648 bytes are stored"},
		"length past":    {storedGrain(0, 128<<10, good), "131072 bytes are stored, want 1 to"},
		"checksum":       {storedGrain(0, len(good), spoiled), "checksum"},
		"not compressed": {storedGrain(0, 512, bytes.Repeat([]byte("x"), 512)), "inflate"},
		"cut off":        {storedGrain(0, len(good)/2, good[:len(good)/2]), "cut off"},
		"only a marker":  {storedGrain(0, 1, nil), "inflate"},
	} {
		t.Run(name, func(t *testing.T) {
			image := memOpen(t, newStream(t, c.stored), "a.vmdk", vfs.ReadWrite)
			p := make([]byte, 5)
			_, err := image.ReadAt(p, 4)
			switch {
			case c.message == "" && (err != nil || string(p) != "textt"):
				t.Errorf("read %q, error %v", p, err)
			case c.message != "" && (!errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), c.message)):
				t.Errorf("error %v, want %v that says %q", err, block.ErrCorrupt, c.message)
			}
			if _, err := image.ReadAt(p, 90<<10); err != nil || p[0] != 0 {
				t.Errorf("read of an absent grain: %q, error %v", p, err)
			}
			if _, err := image.WriteAt(p, 0); !errors.Is(err, block.ErrReadOnly) {
				t.Errorf("write: error %v, want %v", err, block.ErrReadOnly)
			}
		})
	}
}

func TestProbe(t *testing.T) {
	for head, want := range map[string]bool{
		"KDMV\x01\x00\x00\x00":               true,
		"COWD\x01\x00\x00\x00":               true,
		"\xbe\xba\xfe\xca\x00\x00\x00\x00":   true,
		"# Disk DescriptorFile\nversion=1\n": true,
		"\r\n  \n version = 3\r\n":           true,
		"":                                   false,
		"KDM":                                false,
		"QFI\xfb":                            false,
		"# only a comment\n":                 false,
		"versions=1\n":                       false,
		"hello\nversion=1\n":                 false,
	} {
		if got := (vmdk.Format{}).Probe([]byte(head), int64(len(head))); got != want {
			t.Errorf("%q: %v, want %v", head, got, want)
		}
	}
}

func TestCreate_Refuses(t *testing.T) {
	extra := func(name, value string) map[string]string { return map[string]string{name: value} }
	for name, c := range map[string]struct {
		req     formats.CreateRequest
		message string
	}{
		"no size":          {formats.CreateRequest{}, "size 0, want a multiple of 512"},
		"odd size":         {formats.CreateRequest{SizeBytes: 1000}, "size 1000"},
		"huge size":        {formats.CreateRequest{SizeBytes: 2 << 40}, "size 2199023255552"},
		"small clusters":   {formats.CreateRequest{SizeBytes: 1 << 20, ClusterBytes: 2048}, "cluster size 2048, want a power of two from 4096 to 1048576"},
		"odd clusters":     {formats.CreateRequest{SizeBytes: 1 << 20, ClusterBytes: 12288}, "cluster size 12288"},
		"flat clusters":    {formats.CreateRequest{SizeBytes: 1 << 20, Subformat: "monolithicFlat", ClusterBytes: 4096}, "has no clusters"},
		"subformat":        {formats.CreateRequest{SizeBytes: 1 << 20, Subformat: "round"}, `subformat "round", want one of monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat, streamOptimized, vmfs, vmfsSparse`},
		"preallocation":    {formats.CreateRequest{SizeBytes: 1 << 20, Preallocation: "some"}, `preallocation "some", want off`},
		"adapter":          {formats.CreateRequest{SizeBytes: 1 << 20, Extra: extra("adapter_type", "scsi")}, "want one of ide, lsilogic"},
		"hardware":         {formats.CreateRequest{SizeBytes: 1 << 20, Extra: extra("hwversion", "4\"\nx=\"")}, "want a number"},
		"zeroed grain":     {formats.CreateRequest{SizeBytes: 1 << 20, Extra: extra("zeroed_grain", "yes")}, "want on or off"},
		"flat zeroed":      {formats.CreateRequest{SizeBytes: 1 << 20, Subformat: "monolithicFlat", Extra: extra("zeroed_grain", "on")}, "zeroed_grain on with subformat"},
		"stream falloc":    {formats.CreateRequest{SizeBytes: 1 << 20, Subformat: "streamOptimized", Preallocation: formats.PreallocateFalloc}, "want off"},
		"COWD zeroed":      {formats.CreateRequest{SizeBytes: 1 << 20, Subformat: "vmfsSparse", Extra: extra("zeroed_grain", "on")}, "zeroed_grain on with subformat vmfsSparse, want one of monolithicSparse, twoGb"},
		"COWD clusters":    {formats.CreateRequest{SizeBytes: 1 << 20, Subformat: "vmfsSparse", ClusterBytes: 256}, "cluster size 256, want a power of two from 512"},
		"huge flat":        {formats.CreateRequest{SizeBytes: 63 << 40, Subformat: "vmfs"}, "to 68169720922112, where subformat vmfs ends"},
		"tools":            {formats.CreateRequest{SizeBytes: 1 << 20, Extra: extra("toolsversion", "new")}, "want a number"},
		"geometry":         {formats.CreateRequest{SizeBytes: 1 << 20, Extra: extra("geometry", "1024/16")}, "want three numbers"},
		"geometry heads":   {formats.CreateRequest{SizeBytes: 1 << 20, Extra: extra("geometry", "1024/256/63")}, "at most 255 heads"},
		"unknown option":   {formats.CreateRequest{SizeBytes: 1 << 20, Extra: extra("colour", "red")}, `option "colour"`},
		"name with quotes": {formats.CreateRequest{SizeBytes: 1 << 20, Name: `a"b.vmdk`}, "cannot hold a name with quotes"},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := vfs.NewMem()
			if c.req.Name == "" {
				c.req.Name = "a.vmdk"
			}
			c.req.FS = fsys
			err := vmdk.Format{}.Create(context.Background(), c.req)
			if !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), c.message) {
				t.Errorf("error %v, want %v that says %q", err, block.ErrInvalid, c.message)
			}
			if left, _ := fsys.ReadDir("."); len(left) > 0 {
				t.Errorf("left %v", left)
			}
		})
	}
}

func TestCreate_NamesTaken(t *testing.T) {
	for _, taken := range []string{"a.vmdk", "a-flat.vmdk"} {
		fsys := vfs.NewMem()
		addFile(t, fsys, taken, []byte("precious"))
		req := formats.CreateRequest{FS: fsys, Name: "a.vmdk", SizeBytes: 1 << 20, Subformat: "monolithicFlat"}
		if err := (vmdk.Format{}).Create(context.Background(), req); !errors.Is(err, fs.ErrExist) {
			t.Errorf("error %v, want %v", err, fs.ErrExist)
		}
		if left, _ := fsys.ReadDir("."); len(left) != 1 || string(peek(t, fsys, taken)) != "precious" {
			t.Errorf("left %v", left)
		}
	}
}

// Stretches without a file read as zeroes, whatever a parent holds; the image is not
// written.
func TestOpen_ZeroExtents(t *testing.T) {
	fsys := vfs.NewMem()
	addFile(t, fsys, "my disk.flat", bytes.Repeat([]byte("x"), 8192))
	text := "  # a comment\r\n\r\nversion = 1\r\nCID = 7\r\nparentCID=ffffffff\r\ncreateType = \"monolithicFlat\"\r\n" +
		"RW  8\tFLAT  \"my disk.flat\"  0 \r\nRW 16 ZERO\r\nRW 8 FLAT \"other\" 8\r\n# the end"
	addFile(t, fsys, "other", bytes.Repeat([]byte("y"), 8192))
	addFile(t, fsys, "a.vmdk", []byte(text))
	image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
	want := strings.Repeat("x", 4096) + strings.Repeat("\x00", 8192) + strings.Repeat("y", 4096)
	if got := readGuest(t, image); string(got) != want {
		t.Error("it reads as something else")
	}
	if !image.Info().ReadOnly {
		t.Error("it can be written")
	}
	checkClean(t, image)
	if e, err := image.Map(5000, 10000); err != nil || e.State != block.Zero || e.Len != 4096+8192-5000 {
		t.Errorf("Map is %+v, %v", e, err)
	}
	if d := image.Layers()[0].Codec.Describe().Details; len(d) != 5 || d[4].Value != "a ZERO extent has no file to write to" {
		t.Errorf("described as %+v", d)
	}
}

// Names in other encodings find their files.
func TestOpen_OtherEncoding(t *testing.T) {
	fsys := vfs.NewMem()
	addFile(t, fsys, "Größe-flat.vmdk", bytes.Repeat([]byte("x"), 4096))
	text := "version=1\nencoding=\"windows-1252\"\nCID=00000001\nparentCID=ffffffff\ncreateType=\"vmfs\"\nRW 8 VMFS \"Gr\xf6\xdfe-flat.vmdk\"\n"
	addFile(t, fsys, "a.vmdk", []byte(text))
	if got := readGuest(t, memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)); got[0] != 'x' {
		t.Error("it reads as something else")
	}
}

func TestMeasure(t *testing.T) {
	for name, c := range map[string]struct {
		req        formats.CreateRequest
		data, want int64
	}{
		"flat":       {formats.CreateRequest{SizeBytes: 1 << 30, Subformat: "vmfs", Preallocation: formats.PreallocateFull}, 0, 1 << 30},
		"sparse":     {formats.CreateRequest{SizeBytes: 1 << 30}, 1 << 20, 1 << 20},
		"full":       {formats.CreateRequest{SizeBytes: 1 << 30, Preallocation: formats.PreallocateFull}, 0, 1 << 30},
		"stream":     {formats.CreateRequest{SizeBytes: 1 << 30, Subformat: "streamOptimized"}, 1 << 30, 1 << 30},
		"split":      {formats.CreateRequest{SizeBytes: 5 << 30, Subformat: "twoGbMaxExtentSparse"}, 3 << 30, 3 << 30},
		"cowd":       {formats.CreateRequest{SizeBytes: 1 << 30, Subformat: "vmfsSparse"}, 1 << 30, 1 << 30},
		"split flat": {formats.CreateRequest{SizeBytes: 5 << 30, Subformat: "twoGbMaxExtentFlat"}, 3 << 30, 3 << 30},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := vmdk.Format{}.Measure(c.req, c.data)
			if err != nil || got < c.want || got > c.want+c.want/100+100<<10 {
				t.Errorf("%d, %v; want a little more than %d", got, err, c.want)
			}
		})
	}
	if _, err := (vmdk.Format{}).Measure(formats.CreateRequest{SizeBytes: 1}, 0); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("error %v, want %v", err, block.ErrInvalid)
	}
}

// What is measured is how long a full image is.
func TestMeasure_Full(t *testing.T) {
	for _, subformat := range vmdkSubformats() {
		fsys := vfs.NewMem()
		req := formats.CreateRequest{Name: "a.vmdk", SizeBytes: 3 << 20, Subformat: subformat}
		disk := make([]byte, req.SizeBytes)
		r := testenv.Rand(t)
		for i := range disk {
			disk[i] = byte(r.Uint32())
		}
		most, err := vmdk.Format{}.Measure(req, req.SizeBytes)
		if err != nil {
			t.Fatal(err)
		}
		if subformat == "streamOptimized" {
			convertToStream(t, fsys, disk, req)
		} else {
			memCreate(t, fsys, req)
			image := memOpen(t, fsys, "a.vmdk", vfs.ReadWrite)
			if _, err := image.WriteAt(disk, 0); err != nil {
				t.Fatal(err)
			}
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
		}
		entries, err := fsys.ReadDir(".")
		if err != nil {
			t.Fatal(err)
		}
		var have int64
		for _, e := range entries {
			if e.Name() != "disk.raw" {
				have += int64(len(peek(t, fsys, e.Name())))
			}
		}
		if slack := int64(70 << 10); have > most+slack || most > have+slack {
			t.Errorf("%s: measured %d bytes, and there are %d", subformat, most, have)
		}
	}
}

func vmdkSubformats() []string { return vmdk.Format{}.Options().Subformats }

// Directories are in memory, and many files could have large ones.
func TestOpen_BoundsDirectories(t *testing.T) {
	fsys := vfs.NewMem()
	text := header("twoGbMaxExtentSparse")
	for i := range 3 {
		name := fmt.Sprintf("e%d.vmdk", i)
		memCreate(t, fsys, formats.CreateRequest{Name: name, SizeBytes: 1 << 40, ClusterBytes: 4 << 10})
		text += fmt.Sprintf("RW %d SPARSE %q\n", 1<<40/512, name)
	}
	addFile(t, fsys, "a.vmdk", []byte(text))
	if _, err := memTryOpen(fsys, "a.vmdk", vfs.ReadOnly); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "1572864 grain tables, want at most 1048576") {
		t.Errorf("error %v, want %v", err, block.ErrCorrupt)
	}
}
