package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// runDir is the node's state: on tmpfs, because what is in it means nothing after a
// reboot.
//
//	redo/HASH/    a redo journal; HASH is the image's path's, or the volume's handle's
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

// journalDir makes the directory that holds the redo journal of what id identifies, and
// nothing else: its server is confined to it.
func (d runDir) journalDir(id string) (string, error) {
	if err := d.prepare(); err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(id))
	dir := filepath.Join(d.redo(), hex.EncodeToString(sum[:16]))
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("make the redo journal's directory: %w", err)
	}
	return dir, nil
}

// dropJournalDir removes a journal's directory, unless the journal is still needed.
func dropJournalDir(dir string) {
	if dir != "" {
		_ = os.Remove(dir)
	}
}

const journalName = "journal"

// openJournal opens the redo journal in a directory.
func openJournal(dir string) (*engine.JournalFile, error) {
	fsys, err := vfs.OpenDir(dir)
	if err != nil {
		return nil, err
	}
	return &engine.JournalFile{FS: fsys, Name: journalName}, nil
}
