package vmdk

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

const minimalDescriptor = "version=1\nCID=12ab34cd\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\nRW 2048 SPARSE \"a.vmdk\"\n"

func TestParseDescriptor(t *testing.T) {
	for name, c := range map[string]struct {
		text       string
		createType string
		cid        uint32
		extent     extentLine // without sectorsAt
	}{
		"minimal": {
			minimalDescriptor, "monolithicSparse", 0x12ab34cd,
			extentLine{access: "RW", sectors: 2048, kind: "SPARSE", file: "a.vmdk"},
		},
		"line ends of Windows, blanks, comments": {
			"# Disk DescriptorFile\r\n\r\n  version = 1 \r\nCID = 00000001\r\n\tparentCID=ffffffff\r\n" +
				"# RW 1 SPARSE \"comment\"\r\ncreateType = \"vmfs\"\r\n RW\t18435  VMFS\t\"my disk-flat.vmdk\" \r\n",
			"vmfs", 1, extentLine{access: "RW", sectors: 18435, kind: "VMFS", file: "my disk-flat.vmdk"},
		},
		"other case, other order, an offset": {
			"VERSION=2\nCREATETYPE=\"monolithicFlat\"\nRDONLY 10 FLAT \"x\" 128\nparentcid=ffffffff\ncid=ffFFfffe\n",
			"monolithicFlat", 0xfffffffe, extentLine{access: "RDONLY", sectors: 10, kind: "FLAT", file: "x", offset: 128},
		},
		"no file, no line end": {
			"version=1\nCID=1\ncreateType=\"custom\"\nNOACCESS 63 ZERO", "custom", 1,
			extentLine{access: "NOACCESS", sectors: 63, kind: "ZERO"},
		},
		"a key within another, values with = and without quotes": {
			"version=1\nddb.CID.note=\"CID=99\"\nCID=7\ncreateType=monolithicSparse\nRW 1 SPARSE \"\"\n",
			"monolithicSparse", 7, extentLine{access: "RW", sectors: 1, kind: "SPARSE"},
		},
		"padded with zeroes": {
			minimalDescriptor + "\x00\x00garbage that is no line", "monolithicSparse", 0x12ab34cd,
			extentLine{access: "RW", sectors: 2048, kind: "SPARSE", file: "a.vmdk"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := parseDescriptor([]byte(c.text))
			if err != nil {
				t.Fatal(err)
			}
			if d.createType() != c.createType {
				t.Errorf("createType %q, want %q", d.createType(), c.createType)
			}
			if cid, err := d.contentID(keyCID); err != nil || cid != c.cid {
				t.Errorf("CID %x and error %v, want %x", cid, err, c.cid)
			}
			if len(d.extents) != 1 {
				t.Fatalf("%d extents, want 1", len(d.extents))
			}
			got := d.extents[0]
			if number := got.sectorsAt.of(d.text); number != fmt.Sprint(c.extent.sectors) {
				t.Errorf("the extent's length is at %q", number)
			}
			got.sectorsAt, got.at = textRange{}, textRange{}
			if got != c.extent {
				t.Errorf("extent %+v, want %+v", got, c.extent)
			}
			if !looksLikeDescriptor([]byte(c.text)) {
				t.Error("it is not recognised")
			}
		})
	}
}

func TestParseDescriptor_Refuses(t *testing.T) {
	for name, c := range map[string]struct {
		text, message string
		is            error
	}{
		"no version":           {"CID=1\n", "no line version", block.ErrCorrupt},
		"version 4":            {"version=4\n", "want 1 to 3", block.ErrUnsupported},
		"a line of text":       {"version=1\nhello\n", "line 2", block.ErrCorrupt},
		"two CIDs":             {"version=1\nCID=1\ncid=2\n", "2 lines CID", block.ErrCorrupt},
		"two parents":          {"version=1\nparentFileNameHint=\"a\"\nparentFileNameHint=\"b\"\n", "2 lines parentFileNameHint", block.ErrCorrupt},
		"negative extent":      {"version=1\nRW -5 SPARSE \"a\"\n", `"-5" sectors`, block.ErrCorrupt},
		"empty extent":         {"version=1\nRW 0 SPARSE \"a\"\n", `"0" sectors`, block.ErrCorrupt},
		"huge extent":          {"version=1\nRW 99999999999999999999 FLAT \"a\" 0\n", "want a decimal number", block.ErrCorrupt},
		"name without quotes":  {"version=1\nRW 5 SPARSE a\n", "want a name in quotes", block.ErrCorrupt},
		"name without an end":  {"version=1\nRW 5 SPARSE \"a\n", "no closing quote", block.ErrCorrupt},
		"offset that is none":  {"version=1\nRW 5 FLAT \"a\" x\n", "want a decimal number of sectors", block.ErrCorrupt},
		"too many extents":     {"version=1\n" + strings.Repeat("RW 1 FLAT \"a\" 0\n", maxExtents+1), "more than 1024 extents", block.ErrCorrupt},
		"too many lines":       {"version=1\n" + strings.Repeat("a=b\n", maxFields), "more than 1024 lines", block.ErrCorrupt},
		"more than fits":       {"version=1\n" + strings.Repeat("#\n", maxDescriptorBytes), "want at most 524288", block.ErrCorrupt},
		"an extent of nothing": {"version=1\nRW\n", `"" sectors`, block.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseDescriptor([]byte(c.text))
			if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.message) {
				t.Errorf("error %v, want %v that says %q", err, c.is, c.message)
			}
		})
	}
}

func TestContentID_Refuses(t *testing.T) {
	for _, value := range []string{"", "xyz", "123456789", "-1", "0x12"} {
		d, err := parseDescriptor([]byte("version=1\nCID=" + value + "\n"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.contentID(keyCID); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("CID %q: error %v, want %v", value, err, block.ErrCorrupt)
		}
	}
}

func TestNextCID(t *testing.T) {
	for digits := 1; digits <= 8; digits++ {
		for range 1000 {
			cid := nextCID(5, digits)
			if cid == 0 || cid == 5 || cid >= noParentCID-1 || len(fmt.Sprintf("%x", cid)) > digits {
				t.Fatalf("%x after 5 in %d digits", cid, digits)
			}
		}
	}
}

func TestResized(t *testing.T) {
	d, err := parseDescriptor([]byte("version=1\nRW 999 SPARSE \"a\"\n" +
		"ddb.geometry.heads=\"16\"\nddb.geometry.sectors = \"63\"\nddb.geometry.cylinders=\"0\" \n"))
	if err != nil {
		t.Fatal(err)
	}
	want := "version=1\nRW 10080 SPARSE \"a\"\n" +
		"ddb.geometry.heads=\"16\"\nddb.geometry.sectors = \"63\"\nddb.geometry.cylinders=\"10\" \n"
	if got := string(d.edited(append(d.reshaped(10080), d.resized(0, 10080))...)); got != want {
		t.Errorf("with geometry:\n%s\nwant\n%s", got, want)
	}
	if got := string(d.edited(d.resized(0, 10080))); got != strings.Replace(want, `"10"`, `"0"`, 1) {
		t.Errorf("without geometry:\n%s", got)
	}
}

func FuzzDescriptor(f *testing.F) {
	f.Add([]byte(minimalDescriptor))
	f.Add([]byte("# c\r\nversion = 1\r\nCID=0\r\nRW 5 FLAT \"a b\" 7 x\r\nRDONLY 1 ZERO\nddb.x = \"=\"\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		looksLikeDescriptor(text)
		d, err := parseDescriptor(text)
		if err != nil {
			return
		}
		if len(d.extents) > maxExtents || len(d.text) > maxDescriptorBytes {
			t.Fatal("what was accepted is not bounded")
		}
		for _, field := range d.fields {
			if field.at.of(d.text) != field.value {
				t.Fatalf("value %q is not where it is said to be: %q", field.value, field.at.of(d.text))
			}
		}
		d.decodeName(string(text[:min(len(text), 100)]))
		if d.field(keyCID) == nil || len(d.text) > 4<<10 {
			return
		}
		edits, err := d.relinked(link{cid: 7, hint: "a parent.vmdk", uuid: newUUID(), modification: newUUID()})
		if err != nil {
			return
		}
		if len(d.extents) > 0 {
			edits = append(edits, d.resized(len(d.extents)-1, 12345678))
		}
		checkEdited(t, d, d.edited(edits...))
	})
}

// checkEdited fails the test unless an edited descriptor says what it should, and a change
// of one sector, if there is one, makes it of the old one.
func checkEdited(t *testing.T, d *descriptor, text []byte) {
	again, err := parseDescriptor(text)
	if err != nil {
		t.Fatalf("edited to %q: %v", text, err)
	}
	hint, _ := again.lookup(keyParentHint)
	if cid, err := again.contentID(keyParentCID); err != nil || cid != 7 || hint != "a parent.vmdk" {
		t.Fatalf("%s is %x (%v), %s %q in %q", keyParentCID, cid, err, keyParentHint, hint, text)
	}
	if n := len(d.extents); n > 0 && again.extents[n-1].sectors != 12345678 {
		t.Fatalf("the last extent has %d sectors", again.extents[n-1].sectors)
	}
	change, ok := d.fit(text, len(d.text)+100)
	if !ok || len(change.data) == 0 {
		return
	}
	written := append(bytes.Clone(d.text), make([]byte, max(0, change.at+len(change.data)-len(d.text)))...)
	copy(written[change.at:], change.data)
	if change.at%sectorBytes != 0 || len(change.data) > sectorBytes || !bytes.Equal(written, change.text) || !sameMeaning(written, text) {
		t.Fatalf("%d bytes at %d make %q, want what %q means", len(change.data), change.at, written, text)
	}
}
