package demo

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// nodeID is what the driver calls this machine.
const nodeID = "this-machine"

// retryInterval is between two tries of a call that found another one under way.
const retryInterval = 100 * time.Millisecond

// volume is a CSI volume, and how far it has been brought towards a pod.
type volume struct {
	name     string
	id       string
	context  map[string]string
	size     int64
	block    bool
	fsType   string // "": what is on it, or the driver's choice
	attached bool   // ControllerPublish was called, and perhaps more
}

func (v *volume) capability() *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{
		Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER,
	}}
	if v.block {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: v.fsType}}
	}
	return c
}

// call calls until there is an answer other than "try again".
func call(ctx context.Context, do func() error) error {
	for {
		err := do()
		if code := status.Code(err); code != codes.Aborted && code != codes.Unavailable {
			return plainError(err)
		}
		select {
		case <-ctx.Done():
			return plainError(err)
		case <-time.After(retryInterval):
		}
	}
}

// plainError makes a sentence of a gRPC status.
func plainError(err error) error {
	if err == nil {
		return nil
	}
	s := status.Convert(err)
	return fmt.Errorf("%s (%s)", s.Message(), s.Code())
}

// create calls CreateVolume. A size of 0 is the source's.
func (d *demo) create(ctx context.Context, name string, size int64, params map[string]string, source *csi.VolumeContentSource) (*volume, error) {
	v := &volume{name: name}
	req := &csi.CreateVolumeRequest{
		Name: name, Parameters: params, VolumeContentSource: source,
		VolumeCapabilities: []*csi.VolumeCapability{v.capability(), {
			AccessMode: v.capability().AccessMode,
			AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		}},
	}
	if size > 0 {
		req.CapacityRange = &csi.CapacityRange{RequiredBytes: size}
	}
	err := call(ctx, func() error {
		resp, err := d.driver.controller.CreateVolume(ctx, req)
		if err == nil {
			v.id, v.size, v.context = resp.Volume.VolumeId, resp.Volume.CapacityBytes, resp.Volume.VolumeContext
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("CreateVolume: %w", err)
	}
	d.volumes = append(d.volumes, v)
	return v, nil
}

// attach calls ControllerPublishVolume, NodeStageVolume and NodePublishVolume: then the
// volume is at its target, mounted or as a block device.
func (d *demo) attach(ctx context.Context, v *volume) error {
	v.attached = true
	var published *csi.ControllerPublishVolumeResponse
	err := call(ctx, func() (err error) {
		published, err = d.driver.controller.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{
			VolumeId: v.id, NodeId: nodeID, VolumeCapability: v.capability(), VolumeContext: v.context,
		})
		return err
	})
	if err != nil {
		return fmt.Errorf("ControllerPublishVolume: %w", err)
	}
	for _, dir := range []string{d.staging(v), filepath.Dir(d.target(v.name))} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	err = call(ctx, func() error {
		_, err := d.driver.node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
			VolumeId: v.id, StagingTargetPath: d.staging(v), VolumeCapability: v.capability(),
			VolumeContext: v.context, PublishContext: published.PublishContext,
		})
		return err
	})
	if err != nil {
		return fmt.Errorf("NodeStageVolume: %w", err)
	}
	err = call(ctx, func() error {
		_, err := d.driver.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
			VolumeId: v.id, StagingTargetPath: d.staging(v), TargetPath: d.target(v.name),
			VolumeCapability: v.capability(), VolumeContext: v.context, PublishContext: published.PublishContext,
		})
		return err
	})
	if err != nil {
		return fmt.Errorf("NodePublishVolume: %w", err)
	}
	return nil
}

func (d *demo) staging(v *volume) string { return filepath.Join(d.dir, "staging", v.name) }

// detach undoes attach, however far that got.
func (d *demo) detach(ctx context.Context, v *volume) error {
	if !v.attached {
		return nil
	}
	steps := []struct {
		name string
		call func() error
	}{
		{"NodeUnpublishVolume", func() error {
			_, err := d.driver.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: d.target(v.name)})
			return err
		}},
		{"NodeUnstageVolume", func() error {
			_, err := d.driver.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: d.staging(v)})
			return err
		}},
		{"ControllerUnpublishVolume", func() error {
			_, err := d.driver.controller.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: v.id, NodeId: nodeID})
			return err
		}},
	}
	for _, step := range steps {
		if err := call(ctx, step.call); err != nil {
			return fmt.Errorf("%s %s: %w", step.name, v.name, err)
		}
	}
	v.attached = false
	return nil
}

// snapshot calls CreateSnapshot until the snapshot is ready, and returns its id.
func (d *demo) snapshot(ctx context.Context, v *volume, name string) (string, error) {
	for {
		var resp *csi.CreateSnapshotResponse
		err := call(ctx, func() (err error) {
			resp, err = d.driver.controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{SourceVolumeId: v.id, Name: name})
			return err
		})
		if err != nil {
			return "", fmt.Errorf("CreateSnapshot: %w", err)
		}
		if resp.Snapshot.ReadyToUse {
			return resp.Snapshot.SnapshotId, nil
		}
	}
}

// expand calls ControllerExpandVolume and NodeExpandVolume.
func (d *demo) expand(ctx context.Context, v *volume, size int64) error {
	capacity := &csi.CapacityRange{RequiredBytes: size}
	err := call(ctx, func() error {
		_, err := d.driver.controller.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{
			VolumeId: v.id, CapacityRange: capacity, VolumeCapability: v.capability(),
		})
		return err
	})
	if err != nil {
		return fmt.Errorf("ControllerExpandVolume: %w", err)
	}
	err = call(ctx, func() error {
		_, err := d.driver.node.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
			VolumeId: v.id, VolumePath: d.target(v.name), StagingTargetPath: d.staging(v),
			CapacityRange: capacity, VolumeCapability: v.capability(),
		})
		return err
	})
	if err != nil {
		return fmt.Errorf("NodeExpandVolume: %w", err)
	}
	return nil
}

// fromSnapshot and fromVolume are sources of new volumes.
func fromSnapshot(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id},
	}}
}

func fromVolume(v *volume) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: v.id},
	}}
}
