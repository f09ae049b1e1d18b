package supervisor

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
)

// recordVersion 2 has seats; a record of version 1 is one of seat 0.
const recordVersion = 2

// record is what is persisted of an attachment. It changes before what it allows is
// done: a record says what may exist, never less.
type record struct {
	Version int           `json:"version"`
	BootID  string        `json:"bootID"` // the kernel's objects are gone with their boot
	Request AttachRequest `json:"request"`
	Phase   Phase         `json:"phase"`
	Since   time.Time     `json:"since"`
	// Kernel is what the transport persisted of the kernel's objects; nil before
	// it did and once they are gone.
	Kernel *attach.State `json:"kernel,omitempty"`
	// Seat is the server's. Who runs in the other one waits for a turn that has not
	// come.
	Seat seat `json:"seat,omitempty"`
	// Binary is the program that servers are started from; "" is the supervisor's own.
	Binary string `json:"binary,omitempty"`
	// PID and PIDStart name the last server started, for people and for killing one
	// that does not answer. What says whether one runs is its lock.
	PID      int    `json:"pid,omitempty"`
	PIDStart uint64 `json:"pidStart,omitempty"`
	// Lost says why the device was lost.
	Lost string `json:"lost,omitempty"`
	// Fenced: another node owns the volume, so that its image is not to be opened
	// any more, not even to close it.
	Fenced bool `json:"fenced,omitempty"`
}

func (r *record) save(dir string) error {
	return writeFileAtomically(filepath.Join(dir, recordFile), marshal(r))
}

// loadRecord returns fs.ErrNotExist when dir has no record.
func loadRecord(dir string) (record, error) {
	path := filepath.Join(dir, recordFile)
	content, err := os.ReadFile(path)
	if err != nil {
		return record{}, fmt.Errorf("read attachment record: %w", err)
	}
	var r record
	if err := json.Unmarshal(content, &r); err != nil {
		return record{}, fmt.Errorf("attachment record %s: %w: %w", path, err, block.ErrCorrupt)
	}
	if r.Version < 1 || r.Version > recordVersion {
		return record{}, fmt.Errorf("attachment record %s has version %d, want 1 to %d: %w", path, r.Version, recordVersion, block.ErrUnsupported)
	}
	r.Version = recordVersion
	if r.Seat != 0 && r.Seat != 1 {
		return record{}, fmt.Errorf("attachment record %s names seat %d, want 0 or 1: %w", path, r.Seat, block.ErrCorrupt)
	}
	if filepath.Base(dir) != dirName(r.Request.ID) {
		return record{}, fmt.Errorf("attachment record %s is of %q, which has another directory: %w", path, r.Request.ID, block.ErrCorrupt)
	}
	if (r.Phase == Serving || r.Phase == Recovering) && r.Kernel == nil {
		return record{}, fmt.Errorf("attachment record %s is in phase %s and has no device: %w", path, r.Phase, block.ErrCorrupt)
	}
	return r, nil
}

// dirName is the name of an attachment's directory: of fixed length and free of
// slashes, whatever the ID, because the path of a socket in it is limited.
func dirName(id string) string {
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:16])
}

// removeDir removes an attachment's directory, whose server lock the caller holds:
// the record first, since a directory without one means nothing to anybody.
func removeDir(dir string) error {
	err := os.Remove(filepath.Join(dir, recordFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove attachment record: %w", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove attachment's directory: %w", err)
	}
	return nil
}

// bootID identifies the running kernel's life.
func bootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(id)), nil
}
