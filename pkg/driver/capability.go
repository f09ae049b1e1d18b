package driver

import (
	"fmt"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

const defaultFileSystem = "ext4"

// fileSystems are what volumes can be formatted with, and the least bytes that takes.
var fileSystems = []struct {
	name     string
	minBytes int64
}{
	{"ext4", 1 << 20},
	{"xfs", 300 << 20},
	{"btrfs", 109 << 20},
}

// accessModes are what a volume can be used as: one node at a time may write.
var accessModes = map[csi.VolumeCapability_AccessMode_Mode]bool{
	csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER:        true,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY:   true,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER: true,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER:  true,
	csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY:    true,
}

// usage is what a volume capability asks for.
type usage struct {
	block        bool
	fsType       string // as asked for; "" if not said
	mountFlags   []string
	readOnly     bool // the access mode's
	shared       bool // several nodes read
	singleWriter bool // at most one target on the node
}

// parseCapability checks one capability.
func parseCapability(c *csi.VolumeCapability) (usage, error) {
	if c == nil {
		return usage{}, missing("volume capability")
	}
	mode := c.GetAccessMode().GetMode()
	if !accessModes[mode] {
		return usage{}, invalid("access mode", mode,
			"one of SINGLE_NODE_WRITER, SINGLE_NODE_READER_ONLY, SINGLE_NODE_SINGLE_WRITER, SINGLE_NODE_MULTI_WRITER and MULTI_NODE_READER_ONLY: only one node at a time can write a volume")
	}
	u := usage{
		shared:       mode == csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY,
		singleWriter: mode == csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER,
	}
	u.readOnly = u.shared || mode == csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
	switch {
	case c.GetBlock() != nil:
		u.block = true
	case c.GetMount() != nil:
		u.fsType = c.GetMount().GetFsType()
		u.mountFlags = c.GetMount().GetMountFlags()
		if group := c.GetMount().GetVolumeMountGroup(); group != "" {
			return usage{}, invalid("volume mount group", group, "none: the kubelet sets the owner of files")
		}
		if u.fsType != "" && minBytes(u.fsType) == 0 {
			return usage{}, invalid("file system", u.fsType, "one of "+fileSystemNames())
		}
	default:
		return usage{}, invalid("access type", "", "block or mount")
	}
	return u, nil
}

// parseCapabilities checks all that a volume is to be used as.
func parseCapabilities(caps []*csi.VolumeCapability) ([]usage, error) {
	if len(caps) == 0 {
		return nil, missing("volume capabilities")
	}
	var usages []usage
	for _, c := range caps {
		u, err := parseCapability(c)
		if err != nil {
			return nil, err
		}
		usages = append(usages, u)
	}
	return usages, nil
}

// checkSize refuses a file system that does not fit.
func checkSize(usages []usage, sizeBytes int64) error {
	for _, u := range usages {
		if least := minBytes(u.fsType); !u.block && sizeBytes < least {
			return tooSmall(u.fsType, sizeBytes, least)
		}
	}
	return nil
}

func tooSmall(fsType string, sizeBytes, least int64) error {
	return fmt.Errorf("a volume of %s is too small for file system %s: %w: want %s or more",
		formatSize(sizeBytes), fsType, block.ErrOutOfRange, formatSize(least))
}

// minBytes is the least size for a file system; 0 if it is none of ours.
func minBytes(fsType string) int64 {
	for _, fs := range fileSystems {
		if fs.name == fsType {
			return fs.minBytes
		}
	}
	return 0
}

func fileSystemNames() string {
	var list []string
	for _, fs := range fileSystems {
		list = append(list, fs.name)
	}
	return strings.Join(list, ", ")
}
