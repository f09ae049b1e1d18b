package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Work that may hang as long as the store does: see flights.
const (
	workUnmount = "unmounting"
	workUsage   = "asking for the usage of"
)

const (
	// unmountPatience is how long a call waits for an unmount, whatever its own
	// deadline.
	unmountPatience = time.Minute
	// busyPatience is how long a device that nobody has mounted may be busy.
	busyPatience = 3 * time.Second
	busyInterval = 50 * time.Millisecond
)

type node struct {
	csi.UnimplementedNodeServer
	cfg  NodeConfig
	busy inflight
	slow flights
}

func newNode(cfg NodeConfig) *node { return &node{cfg: cfg} }

func (n *node) NodeStageVolume(ctx context.Context, req *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, missing("volume id")
	}
	staging, err := cleanPath("staging target path", req.GetStagingTargetPath())
	if err != nil {
		return nil, err
	}
	use, err := parseCapability(req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	spec, err := n.attachSpec(req, use)
	if err != nil {
		return nil, err
	}
	unlock, err := n.lockToMount(ctx, spec.Handle)
	if err != nil {
		return nil, err
	}
	defer unlock()
	at, err := n.attach(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("stage volume %s: attach: %w", spec.Handle, err)
	}
	if use.block {
		return &csi.NodeStageVolumeResponse{}, nil // published from the device itself
	}
	if err := n.stageFileSystem(at, staging, use); err != nil {
		return nil, fmt.Errorf("stage volume %s at %s: %w", spec.Handle, staging, err)
	}
	return &csi.NodeStageVolumeResponse{}, nil
}

// lockToMount is for work that must not meet an unmount that hangs.
func (n *node) lockToMount(ctx context.Context, volumeID string) (unlock func(), err error) {
	unlock, err = n.busy.wait(ctx, volumeID)
	if err != nil {
		return nil, err
	}
	if err := n.slow.underWay(workUnmount, volumeID); err != nil {
		unlock()
		return nil, err
	}
	return unlock, nil
}

// attachSpec understands what ControllerPublishVolume told about a volume.
func (n *node) attachSpec(req *csi.NodeStageVolumeRequest, use usage) (AttachSpec, error) {
	h, err := parseHandle(req.GetVolumeId())
	if err != nil {
		return AttachSpec{}, err
	}
	spec := AttachSpec{
		Handle: h.String(), Store: h.store, Volume: h.volume, Node: n.cfg.ID,
		ReadOnly:  use.readOnly || req.GetPublishContext()[contextReadOnly] == "true",
		Transport: req.GetVolumeContext()[paramTransport],
	}
	if name := req.GetPublishContext()[contextVolume]; name != "" {
		spec.Volume = name
	}
	if spec.Volume == "" || spec.Volume == "." || spec.Volume == ".." || filepath.Base(spec.Volume) != spec.Volume {
		return AttachSpec{}, invalid("publish context "+contextVolume, spec.Volume, "what ControllerPublishVolume returned")
	}
	epoch := req.GetPublishContext()[contextEpoch]
	spec.Epoch, err = strconv.ParseInt(epoch, 10, 64)
	if err != nil || spec.Epoch < 1 {
		return AttachSpec{}, invalid("publish context "+contextEpoch, epoch, "what ControllerPublishVolume returned")
	}
	if spec.Limits, err = limitsOf(req.GetVolumeContext()); err != nil {
		return AttachSpec{}, err
	}
	return spec, oneOf(paramTransport, spec.Transport, transports)
}

// limitsOf returns the limits in a volume context, where those of a PersistentVolume that
// somebody wrote are; a volume that was provisioned has them in the store.
func limitsOf(volumeContext map[string]string) (limits Limits, err error) {
	change, err := parseLimits("volume attribute", volumeContext)
	change.Apply(&limits)
	return limits, err
}

// attach returns the volume's device. One that was attached for an earlier publication,
// or as something else, is replaced if nobody uses it.
func (n *node) attach(ctx context.Context, spec AttachSpec) (Attachment, error) {
	at, err := n.cfg.Attacher.Attach(ctx, spec)
	if !errors.Is(err, block.ErrExists) {
		return at, err
	}
	users, listErr := n.usersOf(ctx, spec.Handle)
	if listErr != nil {
		return Attachment{}, listErr
	}
	if len(users) > 0 {
		return Attachment{}, fmt.Errorf("%w, and mounted at %q", err, users)
	}
	if err := n.detach(ctx, spec.Handle); err != nil {
		return Attachment{}, fmt.Errorf("replace an earlier attachment: %w", err)
	}
	return n.cfg.Attacher.Attach(ctx, spec)
}

// detach removes a device; one that is gone is fine. One that is busy though nothing of
// it is mounted is waited for: whoever watches devices looks at each after an unmount.
func (n *node) detach(ctx context.Context, volumeID string) error {
	deadline := time.Now().Add(busyPatience)
	for {
		err := n.cfg.Attacher.Detach(ctx, volumeID)
		if err == nil || errors.Is(err, block.ErrNotFound) {
			return nil
		}
		err = fmt.Errorf("detach: %w", err)
		if !errors.Is(err, block.ErrBusy) || time.Now().After(deadline) {
			return err
		}
		users, listErr := n.usersOf(ctx, volumeID)
		if listErr != nil {
			return errors.Join(err, listErr)
		}
		if len(users) > 0 {
			return fmt.Errorf("%w; it is mounted at %q", err, users)
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(busyInterval):
		}
	}
}

// usersOf returns where a volume's device is mounted.
func (n *node) usersOf(ctx context.Context, volumeID string) ([]string, error) {
	at, err := n.cfg.Attacher.Attachment(ctx, volumeID)
	if errors.Is(err, block.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	mounts, err := n.cfg.Mounter.Mounts()
	if err != nil {
		return nil, err
	}
	var paths []string
	for _, m := range mounts {
		if m.Device == at.Device {
			paths = append(paths, m.Path)
		}
	}
	return paths, nil
}

// stageFileSystem mounts a device's file system at the staging path, making it if the
// device is empty. Killed at any point, the next call does what is missing.
func (n *node) stageFileSystem(at Attachment, staging string, use usage) error {
	readOnly := use.readOnly || at.ReadOnly
	mounted, err := n.mountAt(staging)
	if err != nil {
		return err
	}
	if mounted == nil {
		mounted, err = n.mountStaged(at, staging, use, readOnly)
		if err != nil {
			return err
		}
	} else if err := matches(*mounted, at, use, readOnly); err != nil {
		return err
	}
	if readOnly || minBytes(mounted.FSType) == 0 {
		return nil
	}
	// A volume restored or cloned to a larger size, or expanded while detached.
	return n.cfg.Mounter.Grow(at.Device, staging)
}

// matches says whether what is mounted at a staging path is what is asked for.
func matches(m Mount, at Attachment, use usage, readOnly bool) error {
	switch {
	case m.Device != at.Device:
		return fmt.Errorf("%s is mounted there, not %s: %w: unstage it first", m.Device, at.Device, errPrecondition)
	case m.ReadOnly != readOnly:
		return fmt.Errorf("it is mounted there with read-only %t, not %t: %w", m.ReadOnly, readOnly, block.ErrExists)
	case use.fsType != "" && use.fsType != m.FSType:
		return fmt.Errorf("it is mounted there as %s, not %s: %w", m.FSType, use.fsType, block.ErrExists)
	}
	return nil
}

func (n *node) mountStaged(at Attachment, staging string, use usage, readOnly bool) (*Mount, error) {
	fsType, err := n.fileSystemFor(at, use, readOnly)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(staging, 0o750); err != nil {
		return nil, fmt.Errorf("make the mount point: %w", err)
	}
	if err := n.cfg.Mounter.FormatAndMount(at.Device, staging, fsType, mountOptions(fsType, use.mountFlags, readOnly)); err != nil {
		return nil, err
	}
	return &Mount{Path: staging, Device: at.Device, FSType: fsType, ReadOnly: readOnly}, nil
}

// fileSystemFor returns the type of the file system that a device has or, if it is
// empty, is to get.
func (n *node) fileSystemFor(at Attachment, use usage, readOnly bool) (fsType string, err error) {
	found, err := n.cfg.Mounter.FileSystem(at.Device)
	switch {
	case err != nil:
		return "", err
	case found == PartitionTable:
		return "", fmt.Errorf("the volume has a partition table, not a file system: %w: use it as raw block (volumeMode: Block)", errPrecondition)
	case found != "" && use.fsType != "" && use.fsType != found:
		return "", fmt.Errorf("the volume has file system %s, not %s: %w: ask for %s, or for none in particular", found, use.fsType, errPrecondition, found)
	case found != "":
		return found, nil
	case readOnly:
		return "", fmt.Errorf("the volume has no file system and is read-only: %w", errPrecondition)
	}
	fsType = use.fsType
	if fsType == "" {
		fsType = defaultFileSystem
	}
	if least := minBytes(fsType); at.SizeBytes < least {
		return "", tooSmall(fsType, at.SizeBytes, least)
	}
	return fsType, nil
}

func mountOptions(fsType string, flags []string, readOnly bool) []string {
	options := slices.Clone(flags)
	if readOnly && !slices.Contains(options, "ro") {
		options = append(options, "ro")
	}
	if fsType == "xfs" && !slices.Contains(options, "nouuid") {
		// A clone has its origin's UUID, and both may be mounted on this node.
		options = append(options, "nouuid")
	}
	return options
}

func (n *node) NodeUnstageVolume(ctx context.Context, req *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	id := req.GetVolumeId()
	if id == "" {
		return nil, missing("volume id")
	}
	staging, err := cleanPath("staging target path", req.GetStagingTargetPath())
	if err != nil {
		return nil, err
	}
	unlock, err := n.busy.wait(ctx, id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := n.unmountAll(ctx, id, staging); err != nil {
		return nil, fmt.Errorf("unstage volume %s: %w", id, err)
	}
	if err := n.slow.underWay(workUnmount, id); err != nil {
		return nil, fmt.Errorf("unstage volume %s: %w", id, err)
	}
	if err := n.detach(ctx, id); err != nil {
		return nil, fmt.Errorf("unstage volume %s: %w", id, err)
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

// unmountAll unmounts whatever is mounted at a path. It gives up waiting, not
// unmounting, when ctx ends or it has taken long.
func (n *node) unmountAll(ctx context.Context, volumeID, path string) error {
	ctx, cancel := context.WithTimeout(ctx, unmountPatience)
	defer cancel()
	key := flightKey{workUnmount, volumeID, path}
	// What an earlier call began: the mount table may no longer have it while the
	// file system still writes what it has.
	if err := n.slow.join(ctx, key); err != nil {
		return err
	}
	for {
		m, err := n.mountAt(path)
		if err != nil || m == nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
		_, err = n.slow.do(ctx, key, func() (any, error) { return nil, n.cfg.Mounter.Unmount(path) })
		if err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
}

// mountAt returns the last mount at a path; nil if there is none.
func (n *node) mountAt(path string) (*Mount, error) {
	mounts, err := n.cfg.Mounter.Mounts()
	if err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	for _, m := range slices.Backward(mounts) {
		if m.Path == path {
			return &m, nil
		}
	}
	return nil, nil
}

// cleanPath checks a path in a request and returns it as the mount table has it: with
// symbolic links followed, other than in its last part.
func cleanPath(field, path string) (string, error) {
	if path == "" {
		return "", missing(field)
	}
	if !filepath.IsAbs(path) {
		return "", invalid(field, path, "an absolute path")
	}
	path = filepath.Clean(path)
	if path == "/" {
		return "", invalid(field, path, "a path below the root")
	}
	if parent, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
		path = filepath.Join(parent, filepath.Base(path))
	}
	return path, nil
}
