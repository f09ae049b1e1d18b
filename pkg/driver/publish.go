package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// publication is a request to publish a staged volume, understood.
type publication struct {
	volumeID, staging, target string
	use                       usage
	readOnly                  bool
}

func parsePublication(req *csi.NodePublishVolumeRequest) (p publication, err error) {
	if p.volumeID = req.GetVolumeId(); p.volumeID == "" {
		return p, missing("volume id")
	}
	if p.target, err = cleanPath("target path", req.GetTargetPath()); err != nil {
		return p, err
	}
	if p.use, err = parseCapability(req.GetVolumeCapability()); err != nil {
		return p, err
	}
	if req.GetStagingTargetPath() == "" {
		return p, fmt.Errorf("staging target path is missing: %w: stage the volume first", errPrecondition)
	}
	if p.staging, err = cleanPath("staging target path", req.GetStagingTargetPath()); err != nil {
		return p, err
	}
	p.readOnly = req.GetReadonly() || p.use.readOnly
	return p, nil
}

func (n *node) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	p, err := parsePublication(req)
	if err != nil {
		return nil, err
	}
	unlock, err := n.lockToMount(ctx, p.volumeID)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := n.publish(ctx, p); err != nil {
		return nil, fmt.Errorf("publish volume %s at %s: %w", p.volumeID, p.target, err)
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

func (n *node) publish(ctx context.Context, p publication) error {
	at, err := n.cfg.Attacher.Attachment(ctx, p.volumeID)
	if errors.Is(err, block.ErrNotFound) {
		return fmt.Errorf("it is not staged: %w", errPrecondition)
	}
	if err != nil {
		return err
	}
	if at.Lost {
		return fmt.Errorf("its device is gone (%s): %w: unstage it", at.Problem, errPrecondition)
	}
	mounts, err := n.cfg.Mounter.Mounts()
	if err != nil {
		return fmt.Errorf("mount table: %w", err)
	}
	if p.use.singleWriter {
		if err := soleTarget(mounts, at, p); err != nil {
			return err
		}
	}
	if p.use.block {
		return n.publishBlock(at, p)
	}
	return n.publishFileSystem(at, p)
}

// soleTarget refuses a second target.
func soleTarget(mounts []Mount, at Attachment, p publication) error {
	for _, m := range mounts {
		if m.Device == at.Device && m.Path != p.target && m.Path != p.staging {
			return fmt.Errorf("access mode SINGLE_NODE_SINGLE_WRITER, and it is published at %s: %w", m.Path, errPrecondition)
		}
	}
	return nil
}

func (n *node) publishBlock(at Attachment, p publication) error {
	if p.readOnly && !at.ReadOnly {
		return fmt.Errorf("raw block is read-only for all of a node or not at all, and it is staged writable: %w: use a read-only access mode", errPrecondition)
	}
	there, err := n.mountAt(p.target)
	if err != nil {
		return err
	}
	if there != nil {
		if there.Device != at.Device || there.FSType != "" {
			return occupied(*there)
		}
		return nil
	}
	made, err := makeFile(p.target)
	if err != nil {
		return err
	}
	return undoUnless(n.cfg.Mounter.Bind(at.Device, p.target, false), made, p.target)
}

func (n *node) publishFileSystem(at Attachment, p publication) error {
	staged, err := n.mountAt(p.staging)
	if err != nil {
		return err
	}
	if staged == nil || staged.Device != at.Device || staged.FSType == "" {
		return fmt.Errorf("it is not staged at %s: %w", p.staging, errPrecondition)
	}
	readOnly := p.readOnly || staged.ReadOnly
	there, err := n.mountAt(p.target)
	switch {
	case err != nil:
		return err
	case there == nil:
		made, err := makeDirectory(p.target)
		if err != nil {
			return err
		}
		return undoUnless(n.cfg.Mounter.Bind(p.staging, p.target, readOnly), made, p.target)
	case there.Device != at.Device || there.FSType == "":
		return occupied(*there)
	case there.ReadOnly && !readOnly:
		return fmt.Errorf("it is published there read-only: %w", block.ErrExists)
	case readOnly && !there.ReadOnly:
		// A call was killed between the two steps of a read-only bind.
		return n.cfg.Mounter.RemountReadOnly(p.target)
	}
	return nil
}

func occupied(m Mount) error {
	return fmt.Errorf("%s is mounted there: %w", m.Device, block.ErrExists)
}

// makeFile makes the file that a device's node is bound to.
func makeFile(path string) (made bool, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return false, fmt.Errorf("make the target's directory: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o640)
	if errors.Is(err, fs.ErrExist) {
		info, err := os.Lstat(path)
		if err != nil || !info.Mode().IsRegular() {
			return false, fmt.Errorf("the target is there and no file: %w", block.ErrExists)
		}
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("make the target: %w", err)
	}
	return true, f.Close()
}

// makeDirectory makes the directory that a file system is bound to.
func makeDirectory(path string) (made bool, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return false, fmt.Errorf("make the target's directory: %w", err)
	}
	err = os.Mkdir(path, 0o750)
	if errors.Is(err, fs.ErrExist) {
		info, err := os.Lstat(path)
		if err != nil || !info.IsDir() {
			return false, fmt.Errorf("the target is there and no directory: %w", block.ErrExists)
		}
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("make the target: %w", err)
	}
	return true, nil
}

// undoUnless removes a target that was made for a mount that failed.
func undoUnless(err error, made bool, target string) error {
	if err != nil && made {
		return errors.Join(err, os.Remove(target))
	}
	return err
}

func (n *node) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	id := req.GetVolumeId()
	if id == "" {
		return nil, missing("volume id")
	}
	target, err := cleanPath("target path", req.GetTargetPath())
	if err != nil {
		return nil, err
	}
	unlock, err := n.busy.wait(ctx, id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := n.unmountAll(ctx, id, target); err != nil {
		return nil, fmt.Errorf("unpublish volume %s: %w", id, err)
	}
	// Not what may be in it: a file there is not the volume's.
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("unpublish volume %s: remove the target: %w", id, err)
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}
