package vmdk

import (
	"strings"
	"unicode/utf8"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// resolve returns the name of the file that a link in the descriptor, which lies in the
// file base, points to. Names are in the encoding that the descriptor says.
func (d *descriptor) resolve(base, link string) (string, error) {
	name, err := d.decodeName(link)
	if err != nil {
		return "", err
	}
	return vfs.Resolve(base, name)
}

// encoding returns the name of the descriptor's encoding, in lower case; "" if it does not
// say, which means UTF-8 to all later than VMware Workstation 6.
func (d *descriptor) encoding() string {
	name, ok := d.lookup(keyEncoding)
	if !ok {
		name, _ = d.lookup(keyDDBEncoding)
	}
	return strings.ToLower(name)
}

// decodeName returns a file name in UTF-8.
func (d *descriptor) decodeName(name string) (string, error) {
	if isASCII(name) {
		return name, nil
	}
	switch enc := d.encoding(); enc {
	case "", "utf-8", "utf8":
		if !utf8.ValidString(name) {
			return "", corrupt("file name %q is not in UTF-8, as the descriptor's encoding %q says", shorten(name), enc)
		}
		return name, nil
	case "windows-1252", "cp1252", "iso-8859-1", "iso8859-1", "latin1":
		return decodeWindows1252(name)
	default:
		return "", unsupported("file name %q in encoding %q: want UTF-8, windows-1252, ISO-8859-1 or a name in ASCII", shorten(name), shorten(enc))
	}
}

// encodeName returns a file name as the descriptor can hold it.
func (d *descriptor) encodeName(name string) (string, error) {
	switch d.encoding() {
	case "", "utf-8", "utf8":
		return name, nil
	}
	if !isASCII(name) {
		return "", invalid("file name %q: the descriptor's encoding is %q, so want a name in ASCII", shorten(name), d.encoding())
	}
	return name, nil
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

// windows1252 are the characters of the bytes from 0x80 to 0x9f, 0 where there is none;
// the others are Latin-1's, which has control characters there that are in no file name.
var windows1252 = [32]rune{
	'€', 0, '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', 0, 'Ž', 0,
	0, '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', 0, 'ž', 'Ÿ',
}

func decodeWindows1252(name string) (string, error) {
	var b strings.Builder
	for i := range len(name) {
		r := rune(name[i])
		if r >= 0x80 && r < 0xa0 {
			if r = windows1252[r-0x80]; r == 0 {
				return "", corrupt("file name %q: byte %#x is no character of windows-1252", shorten(name), name[i])
			}
		}
		b.WriteRune(r)
	}
	return b.String(), nil
}
