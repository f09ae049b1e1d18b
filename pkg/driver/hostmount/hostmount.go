// Package hostmount is the host's mount table and file-system tools, for the driver. It
// runs mount, umount, blkid, fsck, mkfs.*, resize2fs, xfs_growfs and btrfs.
package hostmount

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	mount "k8s.io/mount-utils"
	utilexec "k8s.io/utils/exec"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver"
)

const mountInfo = "/proc/self/mountinfo"

// Host implements driver.Mounter.
type Host struct {
	mounter *mount.SafeFormatAndMount
	resizer *mount.ResizeFs
}

// New returns the host this process runs on: its mount namespace is the one that counts.
func New() *Host {
	exec := programs{utilexec.New()}
	return &Host{
		mounter: mount.NewSafeFormatAndMount(mount.NewWithoutSystemd(""), exec),
		resizer: mount.NewResizeFs(exec),
	}
}

// Mounts implements driver.Mounter.
func (h *Host) Mounts() ([]driver.Mount, error) {
	infos, err := mount.ParseMountInfo(mountInfo)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", mountInfo, err)
	}
	var mounts []driver.Mount
	for _, info := range infos {
		if m, ok := ofBlockDevice(info); ok {
			mounts = append(mounts, m)
		}
	}
	return mounts, nil
}

// ofBlockDevice returns the mount if it is of a block device.
func ofBlockDevice(info mount.MountInfo) (driver.Mount, bool) {
	m := driver.Mount{
		Path:     unescape(info.MountPoint),
		ReadOnly: slices.Contains(info.MountOptions, "ro") || slices.Contains(info.SuperOptions, "ro"),
	}
	if isNode(info) {
		var st unix.Stat_t
		if err := unix.Lstat(m.Path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
			return driver.Mount{}, false
		}
		m.Device = devicePath(unix.Major(st.Rdev), unix.Minor(st.Rdev), "")
		m.ReadOnly = false // says nothing about a device
		return m, true
	}
	m.FSType = info.FsType
	switch {
	case info.Major != 0:
		m.Device = devicePath(uint32(info.Major), uint32(info.Minor), unescape(info.Source))
	case strings.HasPrefix(info.Source, "/dev/"): // btrfs has device numbers of its own
		m.Device = realPath(unescape(info.Source))
	default:
		return driver.Mount{}, false
	}
	return m, true
}

// isNode reports whether a mount may be of a single file in /dev.
func isNode(info mount.MountInfo) bool {
	return info.Root != "/" && (info.FsType == "devtmpfs" || info.FsType == "tmpfs")
}

// devicePath returns the path in /dev of a device number; fallback if the kernel has no
// such device any more.
func devicePath(major, minor uint32, fallback string) string {
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", major, minor))
	if err == nil {
		// "!" stands for "/" in sysfs.
		return "/dev/" + strings.ReplaceAll(filepath.Base(link), "!", "/")
	}
	if fallback != "" {
		return realPath(fallback)
	}
	return fmt.Sprintf("%d:%d", major, minor)
}

func realPath(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real
	}
	return path
}

// unescape undoes the kernel's way to write blanks and backslashes: octal numbers.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// Bind implements driver.Mounter.
func (h *Host) Bind(source, path string, readOnly bool) error {
	options := []string{"bind"}
	if readOnly {
		options = append(options, "ro")
	}
	return h.mounter.Mount(source, path, "", options)
}

// statToMount are the mount's own flags as statfs tells them and as mount takes them.
var statToMount = map[int64]uintptr{
	unix.ST_NOSUID: unix.MS_NOSUID, unix.ST_NODEV: unix.MS_NODEV, unix.ST_NOEXEC: unix.MS_NOEXEC,
	unix.ST_NOATIME: unix.MS_NOATIME, unix.ST_NODIRATIME: unix.MS_NODIRATIME, unix.ST_RELATIME: unix.MS_RELATIME,
}

// RemountReadOnly implements driver.Mounter.
func (h *Host) RemountReadOnly(path string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return fmt.Errorf("flags of the mount at %s: %w", path, err)
	}
	flags := uintptr(unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY)
	for stat, flag := range statToMount {
		if st.Flags&stat != 0 {
			flags |= flag // a remount forgets what it is not told
		}
	}
	if err := unix.Mount("", path, "", flags, ""); err != nil {
		return fmt.Errorf("make the mount at %s read-only: %w", path, err)
	}
	return nil
}

// Unmount implements driver.Mounter.
func (h *Host) Unmount(path string) error { return h.mounter.Unmount(path) }

// Usage implements driver.Mounter.
func (h *Host) Usage(path string) (driver.Usage, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return driver.Usage{}, fmt.Errorf("usage of %s: %w", path, err)
	}
	block := st.Bsize
	return driver.Usage{
		TotalBytes:      int64(st.Blocks) * block,
		UsedBytes:       int64(st.Blocks-st.Bfree) * block,
		AvailableBytes:  int64(st.Bavail) * block,
		TotalInodes:     int64(st.Files),
		UsedInodes:      int64(st.Files - st.Ffree),
		AvailableInodes: int64(st.Ffree),
	}, nil
}
