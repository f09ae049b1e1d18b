package hostmount

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver"
)

// partitions is how mount-utils calls what blkid finds a partition table on.
const partitions = "unknown data, probably partitions"

// FileSystem implements driver.Mounter.
func (h *Host) FileSystem(device string) (string, error) {
	if err := readable(device); err != nil {
		return "", err
	}
	found, err := h.mounter.GetDiskFormat(device)
	if err != nil {
		return "", fmt.Errorf("what is on %s: %w", device, err)
	}
	if found == partitions {
		return driver.PartitionTable, nil
	}
	if found == "xfs" {
		unfinished, err := unfinishedXFS(device)
		if err != nil || unfinished {
			return "", err
		}
	}
	return found, nil
}

// headBytes is where superblocks and partition tables lie.
const headBytes = 1 << 20

// readable returns an error if a device cannot be read where superblocks lie. For blkid
// such a device is an empty one, and an empty one is formatted.
func readable(device string) error {
	f, err := os.Open(device)
	if err != nil {
		return fmt.Errorf("what is on the device: %w", err)
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("size of %s: %w", device, err)
	}
	if size == 0 {
		return fmt.Errorf("device %s has no size: %w", device, block.ErrInvalid)
	}
	buf := make([]byte, min(size, headBytes))
	for _, at := range []int64{0, size - int64(len(buf))} {
		if _, err := f.ReadAt(buf, at); err != nil {
			return fmt.Errorf("what is on %s: %w", device, err)
		}
	}
	return nil
}

// The superblock of XFS begins with a magic number and says at another place whether
// mkfs is still at work; mkfs clears that last.
const (
	xfsMagic            = "XFSB"
	xfsSuperblockBytes  = 512
	xfsInProgressOffset = 126
)

// unfinishedXFS reports whether mkfs.xfs was killed on a device with XFS on it. The
// other file systems' mkfs write what blkid looks for last.
func unfinishedXFS(device string) (bool, error) {
	f, err := os.Open(device)
	if err != nil {
		return false, fmt.Errorf("superblock: %w", err)
	}
	defer f.Close()
	sb := make([]byte, xfsSuperblockBytes)
	if _, err := f.ReadAt(sb, 0); err != nil {
		return false, fmt.Errorf("superblock of %s: %w", device, err)
	}
	return string(sb[:len(xfsMagic)]) == xfsMagic && sb[xfsInProgressOffset] != 0, nil
}

// eraseUnfinished makes a device empty whose mkfs.xfs was killed.
func eraseUnfinished(device string) (err error) {
	unfinished, err := unfinishedXFS(device)
	if err != nil || !unfinished {
		return err
	}
	f, err := openExclusive(device, os.O_WRONLY|os.O_SYNC)
	if err != nil {
		return fmt.Errorf("erase an unfinished file system: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.WriteAt(make([]byte, xfsSuperblockBytes), 0); err != nil {
		return fmt.Errorf("erase an unfinished file system on %s: %w", device, err)
	}
	return nil
}

// unclean is what mount says when a file system needs its journal replayed on a device that
// cannot be written to. Leaving the journal out would show files as they were before the
// last syncs.
const unclean = "cannot mount"

// FormatAndMount implements driver.Mounter.
func (h *Host) FormatAndMount(device, path, fsType string, options []string) error {
	if !slices.Contains(options, "ro") {
		if err := idle(device); err != nil {
			return fmt.Errorf("use %s: %w", device, err)
		}
		if err := eraseUnfinished(device); err != nil {
			return err
		}
	}
	err := h.mounter.FormatAndMount(device, path, fsType, options)
	if err == nil {
		return nil
	}
	err = oneLine(err)
	switch said := err.Error(); {
	case fsType == "btrfs" && strings.Contains(said, "File exists"):
		err = fmt.Errorf("a clone or its origin is mounted on this node, and only Linux 6.7 and later can mount both: %w: %w", block.ErrBusy, err)
	case slices.Contains(options, "ro") && strings.Contains(said, unclean):
		err = fmt.Errorf("it was mounted when it was snapshotted or copied, and its journal has to be written back before it can be used read-only: use the volume writable once, or take the snapshot while no pod uses its volume: %w: %w", block.ErrReadOnly, err)
	}
	return fmt.Errorf("mount %s of %s: %w", fsType, device, err)
}

// oneLine makes tools' output fit into a message.
func oneLine(err error) error {
	return errors.New(strings.Join(strings.Fields(err.Error()), " "))
}

// Grow implements driver.Mounter.
func (h *Host) Grow(device, path string) error {
	need, err := h.resizer.NeedResize(device, path)
	if err == nil && need {
		_, err = h.resizer.Resize(device, path)
	}
	if err == nil {
		return nil
	}
	if strings.Contains(err.Error(), "Permission denied to resize") {
		err = fmt.Errorf("the kernel grows a mounted ext4 only for who has CAP_SYS_RESOURCE: %w", err)
	}
	return fmt.Errorf("grow the file system of %s at %s: %w", device, path, oneLine(err))
}
