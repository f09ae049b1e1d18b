package vmdk

import (
	"errors"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

func TestDecodeName(t *testing.T) {
	for name, c := range map[string]struct {
		encoding, text, want string
		is                   error
	}{
		"ASCII":                    {"encoding=\"GBK\"\n", "disk 1.vmdk", "disk 1.vmdk", nil},
		"UTF-8":                    {"encoding=\"UTF-8\"\n", "Größe.vmdk", "Größe.vmdk", nil},
		"none said":                {"", "Größe.vmdk", "Größe.vmdk", nil},
		"not UTF-8":                {"encoding=\"utf-8\"\n", "Gr\xf6\xdfe.vmdk", "", block.ErrCorrupt},
		"windows-1252":             {"encoding=\"windows-1252\"\n", "Gr\xf6\xdfe \x80.vmdk", "Größe €.vmdk", nil},
		"of the disk data base":    {"ddb.encoding = \"windows-1252\"\n", "\xe9t\xe9", "été", nil},
		"Latin-1":                  {"encoding=\"ISO-8859-1\"\n", "\xe9t\xe9", "été", nil},
		"no character":             {"encoding=\"windows-1252\"\n", "\x81", "", block.ErrCorrupt},
		"one that is not known":    {"encoding=\"Shift_JIS\"\n", "\x83f\x83B\x83X\x83N", "", block.ErrUnsupported},
		"the first is the one":     {"encoding=\"UTF-8\"\nddb.encoding=\"windows-1252\"\n", "é", "é", nil},
		"other case":               {"ENCODING = \"Windows-1252\" \n", "\xe9", "é", nil},
		"line end of Windows":      {"encoding=\"windows-1252\"\r\n", "\xe9", "é", nil},
		"slash from a byte":        {"encoding=\"windows-1252\"\n", "\x2f\x2e\x2e\xe9", "/..é", nil},
		"half a character, at end": {"", "abc\xc3", "", block.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := parseDescriptor([]byte("version=1\n" + c.encoding))
			if err != nil {
				t.Fatal(err)
			}
			got, err := d.decodeName(c.text)
			if got != c.want || !errors.Is(err, c.is) {
				t.Errorf("%q, error %v; want %q, %v", got, err, c.want, c.is)
			}
		})
	}
}

// A name that cannot be written in the descriptor's encoding is not.
func TestEncodeName(t *testing.T) {
	d, err := parseDescriptor([]byte("version=1\nencoding=\"windows-1252\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.encodeName("Größe"); !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), "ASCII") {
		t.Errorf("error %v, want %v", err, block.ErrInvalid)
	}
	if got, err := d.encodeName("size"); got != "size" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}
