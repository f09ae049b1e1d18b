package vmdk

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
)

const (
	// maxDescriptorBytes bounds a descriptor, embedded or in its own file.
	maxDescriptorBytes = 512 << 10
	// maxExtents bounds how many files one image can make us open.
	maxExtents = 1024
	// maxFields bounds the other lines: real descriptors have some dozens.
	maxFields = 1024

	noParentCID = 0xffffffff
)

// Keys of the descriptor ("Virtual Disk Format 1.1", section "The Descriptor File"). They
// are compared without regard to case, and as a whole.
const (
	keyVersion     = "version"
	keyCID         = "CID"
	keyParentCID   = "parentCID"
	keyCreateType  = "createType"
	keyParentHint  = "parentFileNameHint"
	keyChangeTrack = "changeTrackPath"
	keyLongContent = "ddb.longContentID"
	keyEncoding    = "encoding"
	keyDDBEncoding = "ddb.encoding"
	keyUUIDImage   = "ddb.uuid.image"
	keyUUIDParent  = "ddb.uuid.parent"
	// What the two contain changes with the first write after opening, like the CID.
	keyUUIDModification       = "ddb.uuid.modification"
	keyUUIDParentModification = "ddb.uuid.parentmodification"

	keyFilters   = "ddb.iofilters" // of vSphere, among them the one that encrypts
	keyCylinders = "ddb.geometry.cylinders"
	keyHeads     = "ddb.geometry.heads"
	keySectors   = "ddb.geometry.sectors"
)

// descriptor is the text that describes an image: what it is made of, and on what it
// stands.
type descriptor struct {
	text    []byte // as it is in the file, without what follows a NUL
	fields  []field
	extents []extentLine
}

// textRange is a stretch of a descriptor's text.
type textRange struct{ start, end int }

func (r textRange) of(text []byte) string { return string(text[r.start:r.end]) }

// field is a line "key = value".
type field struct {
	key   string
	value string    // without its quotes
	at    textRange // of the value
	line  textRange // without its end
}

// extentLine is a line `RW 20480 SPARSE "name.vmdk" 0`.
type extentLine struct {
	access  string // RW, RDONLY or NOACCESS
	sectors int64
	kind    string // SPARSE, FLAT, VMFS, ...
	file    string // as it is written: untrusted
	offset  int64  // FLAT, VMFS: where the extent starts in its file, in sectors

	sectorsAt textRange
	at        textRange // the line without its end
}

// parseDescriptor reads a descriptor. It bounds what it accepts and judges only the text's
// form.
func parseDescriptor(text []byte) (*descriptor, error) {
	if nul := bytes.IndexByte(text, 0); nul >= 0 {
		text = text[:nul]
	}
	if len(text) > maxDescriptorBytes {
		return nil, corrupt("the descriptor has %d bytes, want at most %d", len(text), maxDescriptorBytes)
	}
	d := &descriptor{text: text}
	for start, number := 0, 1; start < len(text); number++ {
		end := start + len(text[start:])
		if i := bytes.IndexByte(text[start:], '\n'); i >= 0 {
			end = start + i
		}
		if err := d.parseLine(start, end); err != nil {
			return nil, fmt.Errorf("line %d of the descriptor: %w", number, err)
		}
		start = end + 1
	}
	return d, d.check()
}

// check finds what would make the descriptor mean different things to different readers.
func (d *descriptor) check() error {
	version, ok := d.lookup(keyVersion)
	if !ok {
		return corrupt("the descriptor has no line version=1")
	}
	if n, err := strconv.Atoi(version); err != nil || n < 1 || n > 3 {
		return unsupported("descriptor version %q, want 1 to 3", version)
	}
	for _, key := range []string{keyCID, keyParentCID, keyCreateType, keyParentHint} {
		n := 0
		for _, f := range d.fields {
			if strings.EqualFold(f.key, key) {
				n++
			}
		}
		if n > 1 {
			return corrupt("the descriptor has %d lines %s=..., want one", n, key)
		}
	}
	return nil
}

func (d *descriptor) parseLine(start, end int) error {
	at := trimSpace(d.text, textRange{start, end})
	line := at.of(d.text)
	if line == "" || line[0] == '#' {
		return nil
	}
	word, _ := nextWord(line, 0)
	switch word.of(d.text[at.start:]) {
	case "RW", "RDONLY", "NOACCESS":
		return d.parseExtent(at)
	}
	eq := strings.IndexByte(line, '=')
	if eq < 0 {
		return corrupt("%q is neither a comment, key=value nor an extent", shorten(line))
	}
	key := trimSpace(d.text, textRange{at.start, at.start + eq})
	value := trimSpace(d.text, textRange{at.start + eq + 1, at.end})
	if value.end-value.start >= 2 && d.text[value.start] == '"' && d.text[value.end-1] == '"' {
		value.start++
		value.end--
	}
	if len(d.fields) == maxFields {
		return corrupt("more than %d lines key=value", maxFields)
	}
	d.fields = append(d.fields, field{key: key.of(d.text), value: value.of(d.text), at: value, line: at})
	return nil
}

// parseExtent reads an extent line: access, length in sectors, kind, and for most kinds a
// file name in quotes and for some an offset in sectors.
func (d *descriptor) parseExtent(at textRange) error {
	if len(d.extents) == maxExtents {
		return corrupt("more than %d extents", maxExtents)
	}
	line := at.of(d.text)
	e := extentLine{at: at}
	access, rest := nextWord(line, 0)
	sectors, rest := nextWord(line, rest)
	kind, rest := nextWord(line, rest)
	e.access, e.kind = access.of(d.text[at.start:]), kind.of(d.text[at.start:])
	number := sectors.of(d.text[at.start:])
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n <= 0 || n > 1<<53 {
		return corrupt("extent of %q sectors, want a decimal number from 1", shorten(number))
	}
	e.sectors = n
	e.sectorsAt = textRange{at.start + sectors.start, at.start + sectors.end}
	if err := e.parseFile(strings.TrimSpace(line[rest:])); err != nil {
		return err
	}
	d.extents = append(d.extents, e)
	return nil
}

// parseFile reads the rest of an extent line: "name" offset.
func (e *extentLine) parseFile(rest string) error {
	if rest == "" {
		return nil
	}
	if rest[0] != '"' {
		return corrupt("extent file %q, want a name in quotes", shorten(rest))
	}
	name, after, ok := strings.Cut(rest[1:], `"`)
	if !ok {
		return corrupt("extent file %q has no closing quote", shorten(rest))
	}
	e.file = name
	number, _, _ := strings.Cut(strings.TrimSpace(after), " ") // partitions say more after it
	if number == "" {
		return nil
	}
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n < 0 || n > 1<<53 {
		return corrupt("extent offset %q, want a decimal number of sectors", shorten(number))
	}
	e.offset = n
	return nil
}

// nextWord returns the word of s at or after from, and where the rest starts.
func nextWord(s string, from int) (textRange, int) {
	for from < len(s) && isSpace(s[from]) {
		from++
	}
	end := from
	for end < len(s) && !isSpace(s[end]) {
		end++
	}
	return textRange{from, end}, end
}

func trimSpace(text []byte, r textRange) textRange {
	for r.start < r.end && isSpace(text[r.start]) {
		r.start++
	}
	for r.end > r.start && isSpace(text[r.end-1]) {
		r.end--
	}
	return r
}

func isSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\r' }

// shorten makes untrusted text fit for an error.
func shorten(s string) string {
	const limit = 80
	if len(s) > limit {
		return s[:limit] + "..."
	}
	return s
}

// lookup returns the value of the first line with a key.
func (d *descriptor) lookup(key string) (string, bool) {
	f := d.field(key)
	if f == nil {
		return "", false
	}
	return f.value, true
}

func (d *descriptor) field(key string) *field {
	for i := range d.fields {
		if strings.EqualFold(d.fields[i].key, key) {
			return &d.fields[i]
		}
	}
	return nil
}

// contentID returns a CID line's value: up to 8 hexadecimal digits.
func (d *descriptor) contentID(key string) (uint32, error) {
	value, ok := d.lookup(key)
	if !ok {
		return 0, corrupt("the descriptor has no line %s=...", key)
	}
	n, err := strconv.ParseUint(value, 16, 32)
	if err != nil {
		return 0, corrupt("%s is %q, want up to 8 hexadecimal digits", key, shorten(value))
	}
	return uint32(n), nil
}

// createType returns what the descriptor says the image is.
func (d *descriptor) createType() string {
	value, _ := d.lookup(keyCreateType)
	return value
}

// hasKeyPrefix reports whether some key starts with prefix.
func (d *descriptor) hasKeyPrefix(prefix string) bool {
	for _, f := range d.fields {
		if len(f.key) >= len(prefix) && strings.EqualFold(f.key[:len(prefix)], prefix) {
			return true
		}
	}
	return false
}

// sectors returns the length of all extents.
func (d *descriptor) sectors() int64 {
	var n int64
	for _, e := range d.extents {
		n += e.sectors
	}
	return n
}

// looksLikeDescriptor reports whether head, a file's beginning, can be that of a
// descriptor file: comments and blank lines, then version=.
func looksLikeDescriptor(head []byte) bool {
	for len(head) > 0 {
		line, rest, _ := bytes.Cut(head, []byte("\n"))
		head = rest
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		key, value, ok := bytes.Cut(line, []byte("="))
		return ok && strings.EqualFold(string(bytes.TrimSpace(key)), keyVersion) &&
			len(bytes.TrimSpace(value)) > 0 && len(bytes.TrimSpace(value)) <= 3
	}
	return false
}
