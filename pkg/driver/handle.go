package driver

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// CSI bounds fields such as ids to 128 bytes. The greatest snapshot handle,
// "<store>/<volume>@<snapshot>", has just that, and a name such as
// "snapshot-<UUID>" fits without being shortened.
const (
	maxFieldBytes = 128
	maxStoreBytes = 32
	maxNameBytes  = 47
)

// names are what stores, and the volumes and snapshots made here, are called: they are
// names of files on any kind of share, so lower case only.
var names = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]*$`)

// handleNames are what volumes and snapshots in handles can be called: others than this
// driver make them too.
var handleNames = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._%-]*$`)

const nameRule = `a-z, 0-9, "-", "." and "_", beginning with a letter or digit`

const imagesPrefix = "images/"

// ValidateStoreName returns block.ErrInvalid for a name that no store can have.
func ValidateStoreName(name string) error {
	if len(name) > maxStoreBytes || !names.MatchString(name) {
		return invalid("store name", name, fmt.Sprintf("1 to %d of %s", maxStoreBytes, nameRule))
	}
	return nil
}

// handle is a volume's: "<store>/<volume>", or "<store>/images/<file>" for an image
// that is used as a volume itself.
type handle struct {
	store  string
	volume string // "" if image is set
	image  string // file under images/
}

func (h handle) String() string {
	if h.image != "" {
		return h.store + "/" + imagesPrefix + h.image
	}
	return h.store + "/" + h.volume
}

// snapshotHandle is a snapshot's: "<store>/<volume>@<snapshot>".
type snapshotHandle struct {
	store, volume, snapshot string
}

func (h snapshotHandle) String() string { return h.store + "/" + h.volume + "@" + h.snapshot }

// within names the snapshot inside its store.
func (h snapshotHandle) within() string { return h.volume + "@" + h.snapshot }

// parseHandle understands a volume's handle. One that cannot be a volume's is
// block.ErrNotFound: there is no such volume, whatever it means to others.
func parseHandle(s string) (handle, error) {
	if s == "" {
		return handle{}, missing("volume id")
	}
	noSuch := fmt.Errorf("volume %q: %w: ids are <store>/<volume> or <store>/images/<file>", s, block.ErrNotFound)
	store, rest, ok := strings.Cut(s, "/")
	if !ok || ValidateStoreName(store) != nil {
		return handle{}, noSuch
	}
	if image, ok := strings.CutPrefix(rest, imagesPrefix); ok {
		if validateImage(image) != nil {
			return handle{}, noSuch
		}
		return handle{store: store, image: image}, nil
	}
	if !handleNames.MatchString(rest) {
		return handle{}, noSuch
	}
	return handle{store: store, volume: rest}, nil
}

// parseSnapshotHandle is parseHandle for a snapshot's.
func parseSnapshotHandle(s string) (snapshotHandle, error) {
	if s == "" {
		return snapshotHandle{}, missing("snapshot id")
	}
	store, rest, ok := strings.Cut(s, "/")
	volume, snapshot, okAt := strings.Cut(rest, "@")
	if !ok || !okAt || ValidateStoreName(store) != nil || !handleNames.MatchString(volume) || !handleNames.MatchString(snapshot) {
		return snapshotHandle{}, fmt.Errorf("snapshot %q: %w: ids are <store>/<volume>@<snapshot>", s, block.ErrNotFound)
	}
	return snapshotHandle{store, volume, snapshot}, nil
}

// validateImage checks the name of a file under images/. The store resolves it inside
// its directory whatever it is; here bad names get a clear answer.
func validateImage(image string) error {
	bad := image == "" || strings.HasPrefix(image, "/") || strings.ContainsAny(image, "\x00\\")
	for part := range strings.SplitSeq(image, "/") {
		bad = bad || part == "" || part == "." || part == ".."
	}
	if bad {
		return invalid("parameter image", image, "the path of a file under the store's images/, relative to it")
	}
	return nil
}

// nameFor makes the name of a volume or snapshot from what the caller calls it: the
// same if it can be, else readable and unique.
func nameFor(name string) (string, error) {
	if name == "" {
		return "", missing("name")
	}
	if len(name) > maxFieldBytes {
		return "", invalid("name", name, fmt.Sprintf("at most %d bytes", maxFieldBytes))
	}
	if len(name) <= maxNameBytes && names.MatchString(name) && !strings.HasSuffix(name, ".") {
		return name, nil
	}
	sum := sha256.Sum256([]byte(name))
	suffix := "-" + hex.EncodeToString(sum[:8])
	readable := strings.TrimLeft(strings.Map(toNameRune, strings.ToLower(name)), "-._")
	if readable == "" {
		readable = "v"
	}
	return readable[:min(len(readable), maxNameBytes-len(suffix))] + suffix, nil
}

// toNameRune keeps what a name may have and makes the rest "-".
func toNameRune(r rune) rune {
	if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-' {
		return r
	}
	return '-'
}
