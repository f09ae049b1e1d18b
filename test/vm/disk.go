package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/internal/vmkernel"
)

//go:embed run.sh
var runScript []byte

//go:embed boot.sh
var bootScript []byte

// wantedModules are those that the tests need; what they depend on comes along. One
// that a kernel doesn't have is built in, or the test that needs it says so.
var wantedModules = append([]string{"nbd", "ublk_drv", "loop", "fuse", "nfsd", "nfsv4", "md5"}, vmkernel.DiskModules...)

// guestPrograms are copied with the libraries they need.
var guestPrograms = []string{"fio", "mkfs.ext4"}

// diskSize is that of a machine's root file system. It lies in a sparse file, which
// machines share: what one writes goes to a file of its own, which qemu deletes.
const diskSize = "8g"

// disk is a root file system that is being put together.
type disk struct {
	dir string
}

func newDisk(dir string) (*disk, error) {
	d := &disk{dir}
	for _, name := range []string{"proc", "sys", "dev", "tmp", "run", "etc", "store", "var/lib/nfs/v4recovery"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			return nil, err
		}
	}
	return d, errors.Join(d.add("init", runScript), os.Symlink("bin", filepath.Join(dir, "sbin")))
}

// add adds a file, which may be run, and the directories above it.
func (d *disk) add(name string, content []byte) error {
	path := filepath.Join(d.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, content, 0o755)
}

func (d *disk) addFile(name, path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return d.add(name, b)
}

// addBusybox adds busybox under all of its names and returns it.
func (d *disk) addBusybox(ctx context.Context) ([]byte, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return nil, err
	}
	busybox, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if err := d.add("bin/busybox", busybox); err != nil {
		return nil, err
	}
	applets, err := exec.CommandContext(ctx, path, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("busybox --list: %w", err)
	}
	for applet := range strings.FieldsSeq(string(applets)) {
		if applet == "busybox" {
			continue
		}
		if err := os.Symlink("busybox", filepath.Join(d.dir, "bin", applet)); err != nil {
			return nil, err
		}
	}
	return busybox, nil
}

// addProgram adds a program and the libraries that ldd names, at their own places.
func (d *disk) addProgram(ctx context.Context, name string) error {
	path, err := exec.LookPath(name)
	if err != nil {
		return err
	}
	target := filepath.Join("bin", name)
	_ = os.Remove(filepath.Join(d.dir, target)) // busybox's
	if err := d.addFile(target, path); err != nil {
		return err
	}
	libraries, err := exec.CommandContext(ctx, "ldd", path).Output()
	if err != nil {
		return fmt.Errorf("ldd %s: %w", path, err)
	}
	for field := range strings.FieldsSeq(string(libraries)) {
		if strings.HasPrefix(field, "/") {
			if err := d.addFile(field, field); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *disk) addModules(m vmkernel.Modules) error {
	files := m.Files(m.Names())
	for name, content := range files {
		if err := d.add(name, content); err != nil {
			return err
		}
	}
	return nil
}

// write makes the file system, in a file.
func (d *disk) write(ctx context.Context, path string) error {
	// No journal: a machine that ends badly takes its disk with it.
	return command(ctx, "mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=1,root_owner=0:0", "-d", d.dir, path, diskSize)
}
