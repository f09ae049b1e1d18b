package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// probePrefix starts the names of the files that probeLocks makes and removes.
const probePrefix = ".lock-probe-"

// probeLocks makes sure that the store can be written and that a lock taken by one open
// file keeps another out: all safety between nodes rests on it. What no probe on one
// node can show, locks that never leave the node, is read from the mount's options.
func probeLocks(ctx context.Context, fsys vfs.FS) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if dir, ok := fsys.(interface{ Path(string) string }); ok {
		if err := checkMount(dir.Path(".")); err != nil {
			return err
		}
	}
	name := probePrefix + rand.Text()
	first, err := fsys.Create(name)
	switch {
	case errors.Is(err, syscall.EROFS), errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return fmt.Errorf("the store cannot be written: %w: %w", block.ErrReadOnly, err)
	case err != nil:
		return fmt.Errorf("the store cannot be written: %w", err)
	}
	defer first.Close()
	err = probeLockFile(fsys, first)
	return errors.Join(err, fsys.Remove(name))
}

func probeLockFile(fsys vfs.FS, first vfs.File) error {
	broken := func(why string, err error) error {
		return fmt.Errorf("file locks do not work in this store, so that nothing would keep two nodes from writing one volume: %s: %w: %w",
			why, block.ErrUnsupported, err)
	}
	second, err := fsys.Open(first.Name(), vfs.ReadWrite)
	if err != nil {
		return fmt.Errorf("open a file of the store twice: %w", err)
	}
	defer second.Close()
	if err := first.Lock(vfs.LockWrite); err != nil {
		return broken("a new file cannot be locked", err)
	}
	err = second.Lock(vfs.LockWrite)
	if err == nil {
		return broken("a file can be locked twice", errNotExcluded)
	}
	if !errors.Is(err, block.ErrLocked) {
		return broken("a locked file does not say so", err)
	}
	if err := first.Unlock(); err != nil {
		return broken("a lock cannot be given up", err)
	}
	if err := second.Lock(vfs.LockWrite); err != nil {
		return broken("a lock that was given up stays", err)
	}
	return nil
}

var errNotExcluded = errors.New("the second lock was granted")

// mountInfo is where the kernel lists mounts; see proc_pid_mountinfo(5).
const mountInfo = "/proc/self/mountinfo"

// checkMount refuses mounts whose locks stay on this node.
func checkMount(dir string) error {
	data, err := os.ReadFile(mountInfo)
	if err != nil {
		return nil // no such kernel interface: the probe has to do
	}
	m, ok := findMount(string(data), dir)
	if !ok {
		return nil
	}
	if option := m.localLockOption(); option != "" {
		return fmt.Errorf("the store's %s mount at %s has the option %s: locks stay on this node and would not keep another node from writing the same volume: %w: mount it without that option",
			m.fsType, m.point, option, block.ErrUnsupported)
	}
	return nil
}

// mount is one line of mountinfo.
type mount struct {
	point, fsType string
	options       []string // of the file system, not of this mount of it
}

// findMount returns the mount that dir, an absolute path, lies on.
func findMount(info, dir string) (found mount, ok bool) {
	for line := range strings.Lines(info) {
		before, after, hasBoth := strings.Cut(line, " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !hasBoth || len(left) < 6 || len(right) < 3 {
			continue
		}
		point := unescapeMount(left[4])
		// Later lines are mounted over earlier ones of the same place.
		if isWithin(dir, point) && len(point) >= len(found.point) {
			found = mount{point: point, fsType: right[0], options: strings.Split(right[2], ",")}
			ok = true
		}
	}
	return found, ok
}

func isWithin(dir, point string) bool {
	dir = path.Clean(dir)
	return point == "/" || dir == point || strings.HasPrefix(dir, point+"/")
}

// unescapeMount undoes the octal escapes of blanks and backslashes.
func unescapeMount(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// localLockOption returns the option that keeps our kind of locks (open file description,
// which file systems treat as POSIX locks) from reaching the file server.
func (m mount) localLockOption() string {
	local := map[string][]string{
		"nfs":  {"nolock", "local_lock=all", "local_lock=posix"},
		"nfs4": {"nolock", "local_lock=all", "local_lock=posix"},
		"cifs": {"nobrl"},
		"smb3": {"nobrl"},
	}[m.fsType]
	for _, option := range m.options {
		for _, l := range local {
			if option == l {
				return l
			}
		}
	}
	return ""
}
