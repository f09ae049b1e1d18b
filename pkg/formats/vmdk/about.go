package vmdk

import (
	"fmt"
	"math/rand/v2"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// about is what the descriptor of a new image says beside its extents.
type about struct {
	createType string
	embedded   bool // the descriptor lies in the extent
	cid        uint32
	link       link
	adapter    string
	hardware   string
	tools      string // "" says nothing
	geometry   geometry
}

func newAbout(k *kind) about {
	return about{createType: k.name, embedded: k.embedded, cid: nextCID(0, 8), link: noLink(), adapter: "ide", hardware: "4"}
}

// link is what an image says about the image it stands on: VMware and QEMU look at the
// content identifier and the file name, VirtualBox at the UUIDs.
type link struct {
	cid          uint32
	hint         string // "" for a base
	uuid         string // of the parent, and of its contents
	modification string
}

const nilUUID = "00000000-0000-0000-0000-000000000000"

func noLink() link { return link{cid: noParentCID, uuid: nilUUID, modification: nilUUID} }

// linkTo returns the link from the image in the file name to a parent.
func linkTo(name, parentName string, parent *image) (link, error) {
	l := link{cid: parent.cid, hint: vfs.RelativeLink(name, parentName), uuid: nilUUID, modification: nilUUID}
	if uuid, _ := parent.descriptor.lookup(keyUUIDImage); isUUID(uuid) {
		l.uuid = uuid
	}
	if uuid, _ := parent.descriptor.lookup(keyUUIDModification); isUUID(uuid) {
		l.modification = uuid
	}
	return l, checkQuotable("parent", l.hint)
}

// setParent makes the image an overlay.
func (a *about) setParent(name, parentName string, parent *image) (err error) {
	a.link, err = linkTo(name, parentName, parent)
	return err
}

// descriptorText returns the descriptor, with lines for the extents. The order of the
// lines matters to some readers: CID before anything else that contains these letters. In
// an embedded descriptor everything that names the parent lies in the first sector, if
// that is long enough, so that one write can change it.
func (a *about) descriptorText(extents []string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=%08x\nparentCID=%08x\ncreateType=%q\n",
		a.cid, a.link.cid, a.createType)
	if a.link.hint != "" {
		fmt.Fprintf(&b, "parentFileNameHint=\"%s\"\n", a.link.hint)
	}
	fmt.Fprintf(&b, "\n# Extent description\n%s\n\n# The Disk Data Base\n#DDB\n\n", strings.Join(extents, "\n"))
	writeDDB(&b, [][2]string{{"uuid.parent", a.link.uuid}, {"uuid.parentmodification", a.link.modification}})
	if a.embedded && b.Len() < sectorBytes {
		b.WriteString(filler(sectorBytes - b.Len()))
	}
	writeDDB(&b, [][2]string{
		{"adapterType", a.adapter},
		{"geometry.cylinders", fmt.Sprint(a.geometry.cylinders)},
		{"geometry.heads", fmt.Sprint(a.geometry.heads)},
		{"geometry.sectors", fmt.Sprint(a.geometry.sectors)},
		{"longContentID", fmt.Sprintf("%016x%08x%08x", rand.Uint64(), rand.Uint32(), a.cid)},
	})
	if a.tools != "" {
		writeDDB(&b, [][2]string{{"toolsVersion", a.tools}})
	}
	writeDDB(&b, [][2]string{
		{"uuid.image", newUUID()},
		{"uuid.modification", newUUID()},
		{"virtualHWVersion", a.hardware},
	})
	return b.String()
}

func writeDDB(b *strings.Builder, values [][2]string) {
	for _, v := range values {
		fmt.Fprintf(b, "ddb.%s = \"%s\"\n", v[0], v[1])
	}
}

// filler returns n bytes of lines that say nothing.
func filler(n int) string {
	switch {
	case n <= 0:
		return ""
	case n == 1:
		return "\n"
	}
	return "#" + strings.Repeat(" ", n-2) + "\n"
}

// isFiller reports whether a line, without its end, says nothing.
func isFiller(line string) bool {
	return strings.Trim(strings.TrimPrefix(line, "#"), " \t\r") == ""
}

// newUUID returns a random UUID (RFC 9562, version 4).
func newUUID() string {
	high, low := rand.Uint64(), rand.Uint64()
	high = high&^0xf000 | 0x4000
	low = low&^(3<<62) | 2<<62
	return fmt.Sprintf("%08x-%04x-%04x-%04x-%012x", high>>32, high>>16&0xffff, high&0xffff, low>>48, low&(1<<48-1))
}

// isUUID reports whether a text is a UUID as VirtualBox writes it.
func isUUID(text string) bool {
	if len(text) != len(nilUUID) {
		return false
	}
	for i := range len(text) {
		if (nilUUID[i] == '-') != (text[i] == '-') || text[i] != '-' && !isHex(text[i]) {
			return false
		}
	}
	return true
}

func isHex(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}
