package vmkernel

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// DiskModules are those without which a machine doesn't see its disk of type virtio and a
// file system of ext4 on it.
var DiskModules = []string{"virtio_pci", "virtio_blk", "ext4", "crc32c_generic"}

// WriteInitramfs writes what a kernel needs to get at the disk that everything else is
// on: DiskModules, busybox as sh and modprobe, and the first process, a script. It is small,
// because a machine's memory may be.
func WriteInitramfs(path string, modules Modules, busybox, script []byte) error {
	a := newArchive()
	a.add("init", 0o755, script)
	for _, dir := range []string{"proc", "sys", "dev", "disk"} {
		a.mkdir(dir)
	}
	a.add("bin/busybox", 0o755, busybox)
	a.symlink("bin/sh", "busybox")
	a.symlink("sbin", "bin") // where the kernel looks for modprobe
	for name, content := range modules.Files(DiskModules) {
		a.add(name, 0o644, content)
	}
	return os.WriteFile(path, a.bytes(), 0o600)
}

// archive is a cpio archive in the "newc" format, which the kernel unpacks.
type archive struct {
	buf   bytes.Buffer
	known map[string]bool
}

func newArchive() *archive { return &archive{known: map[string]bool{}} }

func (a *archive) add(name string, mode fs.FileMode, data []byte) {
	a.entry(name, 0o100000|uint32(mode.Perm()), data)
}

func (a *archive) symlink(name, target string) { a.entry(name, 0o120777, []byte(target)) }

func (a *archive) mkdir(name string) { a.entry(name, 0o040755, nil) }

// entry adds an object once, and the directories above it.
func (a *archive) entry(name string, mode uint32, data []byte) {
	if a.known[name] {
		return
	}
	if dir := filepath.Dir(name); dir != "." {
		a.mkdir(dir)
	}
	a.known[name] = true
	a.record(name, mode, data)
}

func (a *archive) record(name string, mode uint32, data []byte) {
	// magic, inode, mode, uid, gid, links, mtime, size, device and rdevice numbers,
	// length of the name with its NUL, checksum
	fmt.Fprintf(&a.buf, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		len(a.known), mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	a.buf.WriteString(name)
	a.buf.WriteByte(0)
	a.pad()
	a.buf.Write(data)
	a.pad()
}

func (a *archive) pad() {
	for a.buf.Len()%4 != 0 {
		a.buf.WriteByte(0)
	}
}

// bytes ends the archive and returns it.
func (a *archive) bytes() []byte {
	a.record("TRAILER!!!", 0, nil)
	return a.buf.Bytes()
}
