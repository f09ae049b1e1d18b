package vhd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vhd"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Where things lie in an image of 10 blocks of 4 KiB.
const (
	smallSize  = 9*4096 + 512
	smallBlock = 4096
	headerOff  = 512
	tableOff   = 1536
	firstSlot  = 3584 // its bitmap; the data is aligned
	slotPitch  = 8192

	creatorAt   = 28
	timestampAt = 24
	sizeAt      = 48
	cylindersAt = 56
	kindAt      = 60
	uuidAt      = 68

	tableAt           = headerOff + 16
	entriesAt         = headerOff + 28
	blockSizeAt       = headerOff + 32
	parentUUIDAt      = headerOff + 40
	parentTimestampAt = headerOff + 56
	parentNameAt      = headerOff + 64
	locatorsAt        = headerOff + 576
)

// newSmall returns a file system with that image in a.vhd, with the first three places of
// the file holding blocks 2, 0 and 1.
func newSmall(t testing.TB) *vfs.Mem {
	t.Helper()
	fsys := vfs.NewMem()
	memCreate(t, fsys, formats.CreateRequest{Name: "a.vhd", SizeBytes: smallSize, ClusterBytes: smallBlock})
	image := memOpen(t, fsys, "a.vhd", vfs.ReadWrite)
	for _, at := range []int64{2, 0, 1} {
		if _, err := image.WriteAt(smallData()[at*smallBlock:][:smallBlock], at*smallBlock); err != nil {
			t.Fatal(err)
		}
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	return fsys
}

// smallData is what is in the guest blocks 0 to 2.
func smallData() []byte {
	return bytes.Join([][]byte{
		bytes.Repeat([]byte{'a'}, smallBlock), bytes.Repeat([]byte{'b'}, smallBlock), bytes.Repeat([]byte{'c'}, smallBlock),
	}, nil)
}

func memTryOpen(fsys vfs.FS, name string, mode vfs.Mode) (*formats.Image, error) {
	return formats.Open(context.Background(), fsys, name, formats.OpenOptions{Format: "vpc", Mode: mode})
}

func memOpen(t testing.TB, fsys vfs.FS, name string, mode vfs.Mode) *formats.Image {
	t.Helper()
	image, err := memTryOpen(fsys, name, mode)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

func memCreate(t testing.TB, fsys vfs.FS, req formats.CreateRequest) {
	t.Helper()
	req.FS = fsys
	if err := (vhd.Format{}).Create(context.Background(), req); err != nil {
		t.Fatal(err)
	}
}

func memCreateOverlay(t testing.TB, fsys vfs.FS, parent, name string) {
	t.Helper()
	base := memOpen(t, fsys, parent, vfs.ReadOnly)
	defer base.Close()
	memCreate(t, fsys, formats.CreateRequest{
		Name: name, ClusterBytes: smallBlock, Parent: &formats.Parent{Name: parent, Layer: base.Layers()[0]},
	})
}

// poke overwrites bytes of a file.
func poke(t testing.TB, fsys vfs.FS, name string, off int64, p ...byte) {
	t.Helper()
	f, err := fsys.Open(name, vfs.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

func poke32(t testing.TB, fsys vfs.FS, name string, off int64, v uint32) {
	t.Helper()
	poke(t, fsys, name, off, binary.BigEndian.AppendUint32(nil, v)...)
}

func peek(t testing.TB, fsys vfs.FS, name string) []byte {
	t.Helper()
	f, err := fsys.Open(name, vfs.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, size)
	if _, err := f.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func truncate(t testing.TB, fsys vfs.FS, name string, size int64) {
	t.Helper()
	f, err := fsys.Open(name, vfs.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// reseal makes the checksums of all footers and headers in a file right.
func reseal(_ string, file []byte) {
	seal := func(p []byte, field int) {
		clear(p[field : field+4])
		var sum uint32
		for _, b := range p {
			sum += uint32(b)
		}
		binary.BigEndian.PutUint32(p[field:], ^sum)
	}
	for off := 0; off+512 <= len(file); off += 512 {
		if bytes.HasPrefix(file[off:], []byte("conectix")) {
			seal(file[off:off+512], 64)
		}
		if bytes.HasPrefix(file[off:], []byte("cxsparse")) && off+1024 <= len(file) {
			seal(file[off:off+1024], 36)
		}
	}
}

// edit changes 32 bits of the footer, in all copies, or of the header, and the checksums.
func edit(t testing.TB, fsys vfs.FS, name string, off int64, values ...uint32) {
	t.Helper()
	p := peek(t, fsys, name)
	for i, v := range values {
		binary.BigEndian.PutUint32(p[off+4*int64(i):], v)
	}
	if off < headerOff && bytes.HasPrefix(p[len(p)-512:], []byte("conectix")) {
		copy(p[len(p)-512:], p[:512])
	}
	reseal(name, p)
	poke(t, fsys, name, 0, p...)
}

func TestOpen_Refuses(t *testing.T) {
	for name, c := range map[string]struct {
		field int64
		value uint32
		want  error
		text  string
	}{
		"version 2":        {12, 0x00020000, block.ErrCorrupt, "footer"},
		"type 5":           {kindAt, 5, block.ErrUnsupported, "disk type 5"},
		"no size":          {sizeAt + 4, 0, block.ErrCorrupt, "current size 0"},
		"huge":             {sizeAt, 1 << 20, block.ErrCorrupt, "current size"},
		"header nowhere":   {20, 1 << 30, block.ErrCorrupt, "dynamic disk header at"},
		"header elsewhere": {20, 1024, block.ErrCorrupt, "cxsparse"},
		"header version":   {headerOff + 24, 0x00020000, block.ErrUnsupported, "version"},
		"block size":       {blockSizeAt, 5000, block.ErrUnsupported, "block size 5000"},
		"huge blocks":      {blockSizeAt, 1 << 31, block.ErrUnsupported, "block size"},
		"too few entries":  {entriesAt, 9, block.ErrCorrupt, "9 blocks of 4096"},
		"too many entries": {entriesAt, 1 << 25, block.ErrUnsupported, "blocks"},
		"table cut off":    {entriesAt, 1 << 20, block.ErrCorrupt, "truncated"},
		"table nowhere":    {tableAt, 1, block.ErrCorrupt, "block allocation table at"},
		"table off":        {tableAt + 4, 1537, block.ErrCorrupt, "block allocation table at"},
		"child of nobody":  {kindAt, 4, block.ErrCorrupt, "no link leads to it"},
	} {
		t.Run(name, func(t *testing.T) {
			fsys := newSmall(t)
			edit(t, fsys, "a.vhd", c.field, c.value)
			_, err := memTryOpen(fsys, "a.vhd", vfs.ReadOnly)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), "a.vhd") {
				t.Errorf("opened with error %v, want %v and %q", err, c.want, c.text)
			}
		})
	}
}

func TestOpen_HeaderChecksum(t *testing.T) {
	fsys := newSmall(t)
	poke(t, fsys, "a.vhd", headerOff+1000, 1)
	if _, err := memTryOpen(fsys, "a.vhd", vfs.ReadOnly); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "checksum") {
		t.Errorf("a damaged header: %v", err)
	}
}

// One of two footers is enough, and without any there is no image.
func TestOpen_LostFooter(t *testing.T) {
	for name, damage := range map[string]func(fsys *vfs.Mem, size int64){
		"head":    func(fsys *vfs.Mem, _ int64) { poke(t, fsys, "a.vhd", 100, 1) },
		"tail":    func(fsys *vfs.Mem, size int64) { poke(t, fsys, "a.vhd", size-400, 1) },
		"cut":     func(fsys *vfs.Mem, size int64) { truncate(t, fsys, "a.vhd", size-512) },
		"zeroes":  func(fsys *vfs.Mem, size int64) { truncate(t, fsys, "a.vhd", size+100<<10) },
		"differs": func(fsys *vfs.Mem, size int64) { poke(t, fsys, "a.vhd", size-512, otherFooter(t, fsys)...) },
	} {
		t.Run(name, func(t *testing.T) {
			fsys := newSmall(t)
			damage(fsys, int64(len(peek(t, fsys, "a.vhd"))))
			expectRepaired(t, fsys, 0, "footer", smallData())
			p := peek(t, fsys, "a.vhd")
			if !bytes.Equal(p[:512], p[len(p)-512:]) {
				t.Error("the footers differ after the repair and a write")
			}
		})
	}
	fsys := newSmall(t)
	poke(t, fsys, "a.vhd", 100, 1)
	poke(t, fsys, "a.vhd", int64(len(peek(t, fsys, "a.vhd")))-400, 1)
	if _, err := memTryOpen(fsys, "a.vhd", vfs.ReadOnly); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "footer") {
		t.Errorf("without a footer: %v", err)
	}
}

// otherFooter returns a good footer that is not the image's present one.
func otherFooter(t *testing.T, fsys vfs.FS) []byte {
	p := peek(t, fsys, "a.vhd")[:512]
	binary.BigEndian.PutUint32(p[timestampAt:], 1)
	reseal("", p)
	return p
}

// Virtual PC's disks are as large as their geometry says, others as their footer does.
func TestOpen_Size(t *testing.T) {
	const cylinders = 90<<16 | 4<<8 | 17
	for creator, want := range map[string]int64{
		"vpc ": 90 * 4 * 17 * 512, "vs  ": 90 * 4 * 17 * 512, "qemu": 90 * 4 * 17 * 512,
		"win ": 3 << 20, "qem2": 3 << 20, "d2v ": 3 << 20, "vbox": 3 << 20, "tap\x00": 3 << 20, "wa\x00\x00": 3 << 20, "????": 3 << 20,
	} {
		for _, subformat := range []string{"dynamic", "fixed"} {
			fsys := vfs.NewMem()
			memCreate(t, fsys, formats.CreateRequest{Name: "a.vhd", SizeBytes: 3 << 20, Subformat: subformat})
			p := peek(t, fsys, "a.vhd")
			for _, off := range []int{0, len(p) - 512} {
				if f := p[off : off+512]; bytes.HasPrefix(f, []byte("conectix")) {
					copy(f[creatorAt:], creator)
					binary.BigEndian.PutUint32(f[cylindersAt:], cylinders)
				}
			}
			reseal("", p)
			poke(t, fsys, "a.vhd", 0, p...)
			image := memOpen(t, fsys, "a.vhd", vfs.ReadWrite)
			if got := image.Info().SizeBytes; got != want {
				t.Errorf("%s by %q has %d bytes, want %d", subformat, creator, got, want)
			}
			if err := image.Resize(4 << 20); err != nil {
				t.Fatal(err)
			}
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			image = memOpen(t, fsys, "a.vhd", vfs.ReadOnly)
			if got := image.Info().SizeBytes; got != 4<<20 {
				t.Errorf("%s by %q has %d bytes after it was resized to %d", subformat, creator, got, 4<<20)
			}
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// Old programs wrote footers of 511 bytes.
func TestOpen_ShortFooter(t *testing.T) {
	fsys := vfs.NewMem()
	memCreate(t, fsys, formats.CreateRequest{Name: "a.vhd", SizeBytes: smallSize, Subformat: "fixed"})
	truncate(t, fsys, "a.vhd", smallSize+511)
	image := memOpen(t, fsys, "a.vhd", vfs.ReadWrite)
	if _, err := image.WriteAt(smallData(), 0); err != nil {
		t.Fatal(err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	p := peek(t, fsys, "a.vhd")
	if len(p) != smallSize+512 || !bytes.HasPrefix(p, smallData()) || !bytes.HasPrefix(p[smallSize:], []byte("conectix")) {
		t.Errorf("%d bytes after a write, want %d with a footer", len(p), smallSize+512)
	}
}

// A guest cannot make a fixed image into something else.
func TestOpen_FixedWithGuestsFooter(t *testing.T) {
	fsys := newSmall(t)
	dynamic := peek(t, fsys, "a.vhd")
	memCreate(t, fsys, formats.CreateRequest{Name: "f.vhd", SizeBytes: 1 << 20, Subformat: "fixed"})
	image := memOpen(t, fsys, "f.vhd", vfs.ReadWrite)
	if _, err := image.WriteAt(dynamic, 0); err != nil {
		t.Fatal(err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	image = memOpen(t, fsys, "f.vhd", vfs.ReadOnly)
	defer image.Close()
	got := make([]byte, len(dynamic))
	if _, err := image.ReadAt(got, 0); err != nil || !bytes.Equal(got, dynamic) || image.Info().SizeBytes != 1<<20 {
		t.Errorf("other bytes are read than the guest wrote, error %v", err)
	}
}

// A fixed image is recognised by its end, if that says how long the file is.
func TestProbeTail(t *testing.T) {
	fsys := vfs.NewMem()
	memCreate(t, fsys, formats.CreateRequest{Name: "f.vhd", SizeBytes: 1 << 20, Subformat: "fixed"})
	p := peek(t, fsys, "f.vhd")
	tail, size := p[len(p)-512:], int64(len(p))
	if (vhd.Format{}).Probe(p[:2048], size) || !(vhd.Format{}).ProbeTail(tail, size) || (vhd.Format{}).ProbeTail(tail, size+512) {
		t.Error("a fixed image is not told by its end")
	}
	p = peek(t, newSmall(t), "a.vhd")
	if !(vhd.Format{}).Probe(p[:2048], int64(len(p))) || (vhd.Format{}).ProbeTail(p[len(p)-512:], int64(len(p))) {
		t.Error("a dynamic image is not told by its start")
	}
}

// In blocks that another program left partly present, the rest is zeroes, and what is
// written becomes present; no bit is ever cleared, because QEMU does not look.
func TestDynamic_PartlyPresent(t *testing.T) {
	fsys := newSmall(t)
	slot := int64(firstSlot + slotPitch) // block 0's
	want := make([]byte, smallBlock)
	copy(want[512:1536], bytes.Repeat([]byte{'a'}, 1024))
	read := func(image *formats.Image) []byte {
		t.Helper()
		p := make([]byte, smallBlock)
		if _, err := image.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
		return p
	}
	poke(t, fsys, "a.vhd", slot, 0b01100000) // sectors 1 and 2 are present
	image := memOpen(t, fsys, "a.vhd", vfs.ReadWrite)
	if !bytes.Equal(read(image), want) {
		t.Error("sectors that are not present do not read as zeroes")
	}
	copy(want[2000:], "new")
	if _, err := image.WriteAt([]byte("new"), 2000); err != nil {
		t.Fatal(err)
	}
	clear(want[512:1024])
	if err := image.WriteZeroes(512, 512, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(read(image), want) {
		t.Error("other bytes are read than were written")
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	p := peek(t, fsys, "a.vhd")
	if got := p[slot]; got != 0b01110000 {
		t.Errorf("the bitmap is %08b, want sectors 1, 2 and 3", got)
	}
	if got := p[slot+512+512 : slot+512+1024]; !bytes.Equal(got, want[512:1024]) {
		t.Error("what was zeroed is not zero for those who do not look at the bitmap")
	}
}

// A child knows which sectors it has.
func TestDifferencing_Bitmap(t *testing.T) {
	fsys := newSmall(t)
	memCreateOverlay(t, fsys, "a.vhd", "b.vhd")
	image := memOpen(t, fsys, "b.vhd", vfs.ReadWrite)
	if _, err := image.WriteAt([]byte("two sectors"), 1530); err != nil { // sectors 2 and 3
		t.Fatal(err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	p := peek(t, fsys, "b.vhd")
	slot := int64(binary.BigEndian.Uint32(p[binary.BigEndian.Uint32(p[tableAt+4:]):])) * 512
	if got := p[slot]; got != 0b00110000 {
		t.Errorf("the bitmap is %08b, want sectors 2 and 3", got)
	}
	if got := string(p[slot+512+1024 : slot+512+1024+512]); got[:506] != strings.Repeat("a", 506) || got[506:] != "two se" {
		t.Error("the rest of a sector is not the parent's")
	}
}

// setLocators gives b.vhd other links to its parent, at the end of the file, before the
// footer; name is in the header.
func setLocators(t *testing.T, fsys vfs.FS, name string, links ...[2]string) {
	t.Helper()
	p := peek(t, fsys, "b.vhd")
	footer := bytes.Clone(p[len(p)-512:])
	p = p[:len(p)-512]
	clear(p[locatorsAt : locatorsAt+8*24])
	clear(p[parentNameAt : parentNameAt+512])
	for i, unit := range utf16.Encode([]rune(name)) {
		binary.BigEndian.PutUint16(p[parentNameAt+2*i:], unit)
	}
	for i, l := range links {
		text := []byte(l[1])
		if strings.HasPrefix(l[0], "W2") {
			text = nil
			for _, unit := range utf16.Encode([]rune(l[1])) {
				text = binary.LittleEndian.AppendUint16(text, unit)
			}
		}
		entry := p[locatorsAt+i*24:]
		copy(entry, l[0])
		binary.BigEndian.PutUint32(entry[4:], 512)
		binary.BigEndian.PutUint32(entry[8:], uint32(len(text)))
		binary.BigEndian.PutUint64(entry[16:], uint64(len(p)))
		p = append(p, text...)
		p = append(p, make([]byte, 512-len(text))...)
	}
	p = append(p, footer...)
	reseal("", p)
	poke(t, fsys, "b.vhd", 0, p...)
}

// Links of all kinds lead to the parent, but never out of the store.
func TestParent_Links(t *testing.T) {
	for _, c := range []struct {
		name  string
		links [][2]string
		found bool
	}{
		{"", [][2]string{{"W2ru", `.\a.vhd`}}, true},
		{"", [][2]string{{"W2ru", `a.vhd`}}, true},
		{"", [][2]string{{"W2ru", `..\volume\a.vhd`}}, true},
		{"", [][2]string{{"W2ku", `C:\Virtual Machines\a.vhd`}}, true},
		{"", [][2]string{{"W2ku", `\\server\share\a.vhd`}}, true},
		{"", [][2]string{{"W2ru", `.\gone.vhd`}, {"W2ku", `D:\x\a.vhd`}}, true},
		{"", [][2]string{{"MacX", "file://localhost/Users/x/a.vhd"}}, true},
		{"", [][2]string{{"MacX", "file://./a.vhd"}}, true},
		{"a.vhd", nil, true},
		{`C:\x\a.vhd`, [][2]string{{"Mac ", "alias"}}, true},
		{"", nil, false},
		{"", [][2]string{{"W2ru", `..\..\etc\passwd`}}, false},
		{"", [][2]string{{"W2ru", `\etc\passwd`}}, false},
		{"", [][2]string{{"W2ru", `.\b.vhd`}}, false},
		{"", [][2]string{{"W2ru", ``}}, false},
		{"b.vhd", [][2]string{{"W2ru", `json:{}`}}, false},
	} {
		fsys := newSmall(t)
		memCreateOverlay(t, fsys, "a.vhd", "b.vhd")
		setLocators(t, fsys, c.name, c.links...)
		if err := fsys.Mkdir("volume"); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"a.vhd", "b.vhd"} {
			if err := fsys.Rename(name, "volume/"+name); err != nil {
				t.Fatal(err)
			}
		}
		image, err := memTryOpen(fsys, "volume/b.vhd", vfs.ReadWrite)
		if !c.found {
			if !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "UUID") {
				t.Errorf("%q, %q: %v", c.name, c.links, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q, %q: %v", c.name, c.links, err)
			continue
		}
		if got := image.Layers()[1].Name; got != "volume/a.vhd" {
			t.Errorf("%q, %q: the parent is %s", c.name, c.links, got)
		}
		if _, err := image.WriteAt([]byte("over the parent's"), 100); err != nil {
			t.Error(err)
		}
		if err := image.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A parent that was written to after its child was made is refused; so is another image in
// its place. What the child notes may be the time of the parent's file, which is later.
func TestParent_Verified(t *testing.T) {
	for name, c := range map[string]struct {
		change func(fsys *vfs.Mem)
		text   string
	}{
		"untouched":   {func(*vfs.Mem) {}, ""},
		"noted later": {func(fsys *vfs.Mem) { edit(t, fsys, "b.vhd", parentTimestampAt, 1<<31) }, ""},
		"not noted":   {func(fsys *vfs.Mem) { edit(t, fsys, "b.vhd", parentTimestampAt, 0) }, ""},
		"written": {func(fsys *vfs.Mem) {
			image := memOpen(t, fsys, "a.vhd", vfs.ReadWrite)
			if _, err := image.WriteAt([]byte{1}, 0); err != nil {
				t.Fatal(err)
			}
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
		}, "written to"},
		"another": {func(fsys *vfs.Mem) { edit(t, fsys, "a.vhd", uuidAt, 77) }, "UUID"},
	} {
		fsys := newSmall(t)
		memCreateOverlay(t, fsys, "a.vhd", "b.vhd")
		c.change(fsys)
		image, err := memTryOpen(fsys, "b.vhd", vfs.ReadOnly)
		if err == nil {
			err = image.Close()
		} else if !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
		if (err == nil) != (c.text == "") || err != nil && !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want %q", name, err, c.text)
		}
	}
}

func TestCreate_Refuses(t *testing.T) {
	fsys := newSmall(t)
	base := memOpen(t, fsys, "a.vhd", vfs.ReadOnly)
	defer base.Close()
	parent := &formats.Parent{Name: "a.vhd", Layer: base.Layers()[0]}
	for name, req := range map[string]formats.CreateRequest{
		"no size":             {},
		"odd size":            {SizeBytes: 1000},
		"over 2040 GiB":       {SizeBytes: 2040<<30 + 512},
		"over, fixed":         {SizeBytes: 2040<<30 + 512, Subformat: "fixed"},
		"many small blocks":   {SizeBytes: 1 << 40, ClusterBytes: 4096},
		"subformat":           {SizeBytes: 512, Subformat: "static"},
		"cluster size":        {SizeBytes: 512, ClusterBytes: 5000},
		"fixed with clusters": {SizeBytes: 512, ClusterBytes: 4096, Subformat: "fixed"},
		"preallocation":       {SizeBytes: 512, Preallocation: "some"},
		"fixed child":         {Subformat: "fixed", Parent: parent},
		"preallocated child":  {Preallocation: formats.PreallocateFull, Parent: parent},
		"an option":           {SizeBytes: 512, Extra: map[string]string{"x": "y"}},
		"name that is in use": {SizeBytes: 512, Name: "a.vhd"},
	} {
		if req.Name == "" {
			req.Name = "new.vhd"
		}
		req.FS = fsys
		err := (vhd.Format{}).Create(context.Background(), req)
		if err == nil || !errors.Is(err, block.ErrInvalid) && !errors.Is(err, fs.ErrExist) {
			t.Errorf("%s: %v", name, err)
		}
		if strings.HasPrefix(name, "over") && !strings.Contains(err.Error(), "2040 GiB") {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := fsys.Stat("new.vhd"); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("%s: a failed create has left a file: %v", name, err)
		}
	}
}

// The largest image can be made, and written at its end.
func TestCreate_Largest(t *testing.T) {
	const size = 2040 << 30
	fsys := vfs.NewMem()
	memCreate(t, fsys, formats.CreateRequest{Name: "a.vhd", SizeBytes: size})
	image := memOpen(t, fsys, "a.vhd", vfs.ReadWrite)
	if _, err := image.WriteAt([]byte("end"), size-3); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 3)
	if _, err := image.ReadAt(p, size-3); err != nil || string(p) != "end" {
		t.Errorf("read %q, %v", p, err)
	}
	if err := image.Resize(size + 512); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("grow past the limit: %v", err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
}

// What Measure says is how long a file becomes.
func TestMeasure(t *testing.T) {
	for name, req := range map[string]formats.CreateRequest{
		"dynamic":  {ClusterBytes: 8192},
		"default":  {},
		"fixed":    {Subformat: "fixed"},
		"metadata": {Preallocation: formats.PreallocateMetadata, ClusterBytes: 64 << 10},
	} {
		const size, data = 8 << 20, 4 << 20
		fsys := vfs.NewMem()
		req.Name, req.SizeBytes = "a.vhd", size
		memCreate(t, fsys, req)
		image := memOpen(t, fsys, "a.vhd", vfs.ReadWrite)
		if _, err := image.WriteAt(make([]byte, data), size-data); err != nil {
			t.Fatal(err)
		}
		if err := image.Close(); err != nil {
			t.Fatal(err)
		}
		want, err := vhd.Format{}.Measure(req, data)
		if got := int64(len(peek(t, fsys, "a.vhd"))); err != nil || got != want {
			t.Errorf("%s: %d bytes, measured were %d, %v", name, got, want, err)
		}
	}
}

// check checks an image, and repairs it if it is opened for writing.
func check(t testing.TB, fsys vfs.FS, mode vfs.Mode) engine.CheckResult {
	t.Helper()
	layer, err := vhd.Format{}.Open(formats.OpenRequest{FS: fsys, Name: "a.vhd", Mode: mode})
	if err != nil {
		t.Fatal(err)
	}
	defer layer.Close()
	result, err := engine.Check(context.Background(), layer, mode == vfs.ReadWrite, func(done, total int64) {
		if done > total {
			t.Errorf("%d of %d done", done, total)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// expectRepaired checks what is wrong with an image, repairs it, and expects nothing to be
// wrong then, and the guest's contents to be want.
func expectRepaired(t *testing.T, fsys vfs.FS, corruptions int64, problem string, want []byte) {
	t.Helper()
	found := check(t, fsys, vfs.ReadOnly)
	if found.Corruptions != corruptions || len(found.Problems) == 0 || !strings.Contains(found.Problems[0].Text, problem) {
		t.Errorf("a check finds %+v, want %d corruptions, and %q", found, corruptions, problem)
	}
	if repaired := check(t, fsys, vfs.ReadWrite); repaired.Corruptions != 0 || repaired.Leaks != 0 || repaired.FixedProblems+repaired.FixedLeaks == 0 {
		t.Errorf("a repair says %+v", repaired)
	}
	if after := check(t, fsys, vfs.ReadOnly); len(after.Problems) > 0 || after.Leaks > 0 {
		t.Errorf("after the repair: %+v", after)
	}
	image := memOpen(t, fsys, "a.vhd", vfs.ReadWrite)
	got := make([]byte, len(want))
	if _, err := image.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("after the repair, other bytes are read, error %v", err)
	}
	if _, err := image.WriteAt([]byte("w"), smallSize-1); err != nil {
		t.Errorf("write after the repair: %v", err)
	}
	if err := image.Close(); err != nil {
		t.Error(err)
	}
}

func TestCheck_SharedBlock(t *testing.T) {
	for _, shift := range []uint32{0, 1, 8} { // as a whole, or in part
		t.Run(fmt.Sprint(shift), func(t *testing.T) {
			fsys := newSmall(t)
			place := uint32(firstSlot + slotPitch)
			poke32(t, fsys, "a.vhd", tableOff+4*5, place/512+shift)
			image := memOpen(t, fsys, "a.vhd", vfs.ReadWrite)
			if _, err := image.WriteAt([]byte{1}, 0); !errors.Is(err, block.ErrCorrupt) {
				t.Errorf("write to a damaged image: %v", err)
			}
			if err := image.Close(); err != nil {
				t.Fatal(err)
			}
			expectRepaired(t, fsys, 1, "overlaps", smallData())
		})
	}
}

// Blocks that nothing refers to go, at the end of the file or before others.
func TestCheck_Leaks(t *testing.T) {
	for _, number := range []int64{1, 2, 0} { // the last block of the file, the first, the one between
		fsys := newSmall(t)
		poke32(t, fsys, "a.vhd", tableOff+4*number, 1<<32-1)
		length := len(peek(t, fsys, "a.vhd"))
		want := smallData()
		clear(want[number*smallBlock : (number+1)*smallBlock])
		expectRepaired(t, fsys, 0, "nothing refers to space for 1 blocks", want)
		if got := len(peek(t, fsys, "a.vhd")); got != length {
			t.Errorf("%d bytes after the repair and another block, want %d", got, length)
		}
	}
}

// Without a repair, they are found when the image is written.
func TestBegin_FindsFreeBlocks(t *testing.T) {
	fsys := newSmall(t)
	length := len(peek(t, fsys, "a.vhd"))
	poke32(t, fsys, "a.vhd", tableOff+4*2, 1<<32-1) // the first block of the file
	image := memOpen(t, fsys, "a.vhd", vfs.ReadWrite)
	if _, err := image.WriteAt([]byte("reused"), 7*smallBlock); err != nil {
		t.Fatal(err)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	if got := len(peek(t, fsys, "a.vhd")); got != length {
		t.Errorf("the file has %d bytes after a block was added, want %d as before", got, length)
	}
	if found := check(t, fsys, vfs.ReadOnly); found.Leaks != 0 || len(found.Problems) > 0 {
		t.Errorf("check: %+v", found)
	}
}

// What is lost cannot be repaired; what is there is left where it is.
func TestCheck_EntryOutside(t *testing.T) {
	for _, entry := range []uint32{1, 3, 7777, 1<<32 - 2} {
		fsys := newSmall(t)
		poke32(t, fsys, "a.vhd", tableOff+4*5, entry)
		before := peek(t, fsys, "a.vhd")
		for _, mode := range []vfs.Mode{vfs.ReadOnly, vfs.ReadWrite} {
			result := check(t, fsys, mode)
			if result.Corruptions != 1 || !strings.Contains(result.Problems[0].Text, fmt.Sprintf("sector %d", entry)) {
				t.Errorf("check: %+v", result)
			}
		}
		if !bytes.Equal(before, peek(t, fsys, "a.vhd")) {
			t.Errorf("sector %d: the repair has changed something", entry)
		}
		image := memOpen(t, fsys, "a.vhd", vfs.ReadWrite)
		p := make([]byte, smallBlock)
		if _, err := image.ReadAt(p, 5*smallBlock); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("sector %d: read: %v", entry, err)
		}
		if _, err := image.WriteAt(p, 8*smallBlock); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("sector %d: write: %v", entry, err)
		}
		if err := image.Close(); err != nil {
			t.Error(err)
		}
	}
}
