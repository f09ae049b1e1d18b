package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// runDir is the node's state: on tmpfs, because what is in it means nothing after a
// reboot.
//
//	redo/         redo journals, named for a hash of the image's path or volume's handle
//	supervisor/   the supervisor's state
type runDir string

const defaultRunDir = "/run/csi-imgdisk"

func addRunDirFlag(cmd *cobra.Command, dir *runDir) {
	cmd.Flags().StringVar((*string)(dir), "run-dir", defaultRunDir, "directory for the state of this machine's attached volumes, on tmpfs")
}

func (d runDir) redo() string       { return filepath.Join(string(d), "redo") }
func (d runDir) supervisor() string { return filepath.Join(string(d), "supervisor") }

// prepare makes the directory and those in it, readable by nobody else.
func (d runDir) prepare() error {
	if !filepath.IsAbs(string(d)) {
		return fmt.Errorf("--run-dir %s: want an absolute path", d)
	}
	for _, dir := range []string{string(d), d.redo(), d.supervisor()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make the directory for state, see --run-dir: %w", err)
		}
	}
	return nil
}

// journalName names the redo journal of what id identifies.
func journalName(id string) string {
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:16])
}

// journal returns where the redo journal of what id identifies is kept.
func (d runDir) journal(id string) (*engine.JournalFile, error) {
	if err := d.prepare(); err != nil {
		return nil, err
	}
	dir, err := vfs.OpenDir(d.redo())
	if err != nil {
		return nil, err
	}
	return &engine.JournalFile{FS: dir, Name: journalName(id)}, nil
}

// volumeJournal returns the path of the redo journal of a store's volume.
func (d runDir) volumeJournal(storeID, volume string) string {
	return filepath.Join(d.redo(), journalName(storeID+"/"+volume))
}
