package store

import (
	"fmt"
	"net/url"
	"path"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Names in a store.
const (
	identityFile = "store.json"
	storeLock    = "store.lock"
	volumesDir   = "volumes"
	imagesDir    = "images"
	spareDir     = "spare"
	recordFile   = "volume.json"
	recordNew    = "volume.json.new"
	volumeLock   = "volume.lock"
	mergeLock    = "merge.lock"
)

const (
	// layerDigits is how many digits a layer's number has at least. Extent files have
	// fewer, and are told apart by it.
	layerDigits  = 6
	maxNameBytes = 128
	// maxImageNameBytes leaves room in a file name for a layer's number and suffix.
	maxImageNameBytes = 200
	// imagePrefix starts the names of volumes for static provisioning: the escaped
	// form of "images/", which no name that CreateVolume accepts can start with.
	imagePrefix = imagesDir + "%2F"
	// pinPrefix starts the names of snapshots that hold a layer for a clone in the
	// making; no name that CreateSnapshot accepts can.
	pinPrefix = "clone:"
)

// checkName returns nil for a name people may give a volume or a snapshot.
func checkName(what, name string) error {
	ok := name != "" && len(name) <= maxNameBytes && isAlphanumeric(name[0])
	for i := 0; ok && i < len(name); i++ {
		c := name[i]
		ok = isAlphanumeric(c) || c == '.' || c == '_' || c == '-'
	}
	if !ok {
		return fmt.Errorf("%s name %.140q: %w: want 1 to %d letters, digits, '.', '_' and '-', the first a letter or digit",
			what, name, block.ErrInvalid, maxNameBytes)
	}
	return nil
}

func isAlphanumeric(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

// checkVolumeName accepts what CreateVolume and ImageVolumeName make.
func checkVolumeName(name string) error {
	file, ok := imageOfVolume(name)
	if !ok {
		return checkName("volume", name)
	}
	if back, err := ImageVolumeName(file); err != nil || back != name {
		return fmt.Errorf("volume name %.140q: %w: it names no image", name, block.ErrInvalid)
	}
	return nil
}

// ImageVolumeName returns the name of the volume that EnsureImageVolume makes for
// images/<file>. No volume made by CreateVolume can have such a name.
func ImageVolumeName(file string) (string, error) {
	if _, err := imagePath(file); err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString(imagePrefix)
	for i := 0; i < len(file); i++ {
		if c := file[i]; isAlphanumeric(c) || c == '.' || c == '_' || c == '-' {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	if b.Len() > maxImageNameBytes {
		return "", fmt.Errorf("image %.240q: %w: its name as a volume's would have %d bytes, want at most %d: give the file a shorter name",
			file, block.ErrInvalid, b.Len(), maxImageNameBytes)
	}
	return b.String(), nil
}

// imageOfVolume returns the image that a volume made by EnsureImageVolume stands for.
func imageOfVolume(name string) (file string, ok bool) {
	escaped, ok := strings.CutPrefix(name, imagePrefix)
	if !ok {
		return "", false
	}
	file, err := url.PathUnescape(escaped)
	return file, err == nil
}

// imagePath returns the name in the store of an image that a person named.
func imagePath(file string) (string, error) {
	name := imagesDir + "/" + file
	if err := vfs.CheckName(name); err != nil || file == "" {
		return "", fmt.Errorf("image %.240q: %w: want the name of a file under %s/, without \"..\"", file, block.ErrInvalid, imagesDir)
	}
	return name, nil
}

func volumeDir(name string) string { return path.Join(volumesDir, name) }

func volumeFile(name, file string) string { return path.Join(volumesDir, name, file) }

// layerFile names layer number n of a volume; 0 is the base.
func layerFile(volume string, n int, format string) string {
	stem := volume
	if n > 0 {
		stem = fmt.Sprintf("%s-%0*d", volume, layerDigits, n)
	}
	return volumeFile(volume, stem+"."+format)
}

// layerStem returns the part of a file's name that it shares with the other files of the
// same layer: extent files of VMDK are called <stem>-flat.vmdk or <stem>-s001.vmdk. ok
// is false for a file that is no layer's.
func layerStem(volume, file string) (stem string, ok bool) {
	rest, ok := strings.CutPrefix(file, volume)
	if !ok || rest == "" || rest[0] != '-' && rest[0] != '.' {
		return "", false
	}
	end := 1
	for end < len(rest) && rest[end] >= '0' && rest[end] <= '9' {
		end++
	}
	if rest[0] == '-' && end > layerDigits && end < len(rest) && (rest[end] == '-' || rest[end] == '.') {
		return volume + rest[:end], true
	}
	return volume, true
}

// ownerOf returns the volume in whose directory a layer lies; "" for images.
func ownerOf(file string) string {
	dir, _ := path.Split(file)
	dir, ok := strings.CutPrefix(path.Clean(dir), volumesDir+"/")
	if !ok {
		return ""
	}
	return dir
}

// SnapshotID returns the name of a snapshot in the store: "<volume>@<snapshot>".
func SnapshotID(volume, snapshot string) string { return volume + "@" + snapshot }

// SplitSnapshotID takes a SnapshotID apart; ErrInvalid says what would be accepted.
func SplitSnapshotID(id string) (volume, snapshot string, err error) {
	volume, snapshot, ok := strings.Cut(id, "@")
	if !ok {
		return "", "", fmt.Errorf("snapshot %.300q: %w: want <volume>@<snapshot>", id, block.ErrInvalid)
	}
	if err := checkVolumeName(volume); err != nil {
		return "", "", err
	}
	return volume, snapshot, checkName("snapshot", snapshot)
}
