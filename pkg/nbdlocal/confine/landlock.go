package confine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Landlock is described in the kernel's Documentation/userspace-api/landlock.rst. Its
// structures are declared here, because their size tells the kernel how much of them a
// program knows.

type landlockRuleset struct {
	handledFS  uint64
	handledNet uint64
	scoped     uint64
}

// landlockBeneath is struct landlock_path_beneath_attr, which is packed: 12 bytes.
type landlockBeneath struct {
	allowed  uint64
	parentFD int32
}

// landlockBeneath has 4 bytes of padding at its end that the kernel does not read.
var _ [16]byte = [unsafe.Sizeof(landlockBeneath{})]byte{}

const (
	accessRead = unix.LANDLOCK_ACCESS_FS_READ_FILE
	accessList = unix.LANDLOCK_ACCESS_FS_READ_DIR

	accessWrite = accessRead | accessList | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE |
		unix.LANDLOCK_ACCESS_FS_REMOVE_FILE | unix.LANDLOCK_ACCESS_FS_REMOVE_DIR |
		unix.LANDLOCK_ACCESS_FS_MAKE_REG | unix.LANDLOCK_ACCESS_FS_MAKE_DIR | unix.LANDLOCK_ACCESS_FS_REFER
	// accessOfFiles are the rights that a rule for a file, not a directory, may have.
	accessOfFiles = accessRead | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE |
		unix.LANDLOCK_ACCESS_FS_EXECUTE
)

// handledSince lists the rights that each version of Landlock added: what is handled is
// denied wherever no rule allows it.
var handledSince = []struct {
	abi             int
	fs, net, scoped uint64
}{
	{abi: 1, fs: unix.LANDLOCK_ACCESS_FS_MAKE_SYM<<1 - 1}, // execute … make symbolic links
	{abi: 2, fs: unix.LANDLOCK_ACCESS_FS_REFER},
	{abi: 3, fs: unix.LANDLOCK_ACCESS_FS_TRUNCATE},
	{abi: 4, net: unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP},
	{abi: 5, fs: unix.LANDLOCK_ACCESS_FS_IOCTL_DEV},
	{abi: 6, scoped: unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL},
}

// restrictFiles applies the rules and returns the kernel's version of Landlock, 0 if it has
// none or it is switched off.
func restrictFiles(rules Rules) (abi int, err error) {
	version, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno == unix.ENOSYS || errno == unix.EOPNOTSUPP {
		return 0, nil
	}
	if errno != 0 {
		return 0, fmt.Errorf("confine: ask for Landlock's version: %w", errno)
	}
	abi = int(version)
	var set landlockRuleset
	for _, added := range handledSince {
		if added.abi <= abi {
			set.handledFS |= added.fs
			set.handledNet |= added.net
			set.scoped |= added.scoped
		}
	}
	// The kernel refuses what it does not know unless it is zero, and that is so here.
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&set)), unsafe.Sizeof(set), 0)
	if errno != 0 {
		return abi, fmt.Errorf("confine: make a Landlock ruleset: %w", errno)
	}
	defer unix.Close(int(fd))
	for _, r := range []struct {
		paths   []string
		allowed uint64
	}{
		{rules.Read, accessRead | accessList},
		{rules.List, accessList},
		{rules.Write, accessWrite},
		{rules.Remove, accessList | unix.LANDLOCK_ACCESS_FS_REMOVE_DIR},
	} {
		for _, path := range r.paths {
			if err := allow(int(fd), path, r.allowed&set.handledFS); err != nil {
				return abi, fmt.Errorf("confine: allow %s: %w", path, err)
			}
		}
	}
	return abi, onAllThreads("restrict files (Landlock)", unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0)
}

// allow adds a rule for what is at a path, if there is anything.
func allow(ruleset int, path string, access uint64) error {
	f, err := os.OpenFile(path, unix.O_PATH, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.IsDir() {
		access &= accessOfFiles
	}
	if access == 0 {
		return nil
	}
	rule := landlockBeneath{allowed: access, parentFD: int32(f.Fd())}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(ruleset), unix.LANDLOCK_RULE_PATH_BENEATH,
		uintptr(unsafe.Pointer(&rule)), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
