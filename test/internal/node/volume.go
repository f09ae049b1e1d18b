package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Volume is a raw block volume of a node's.
type Volume struct {
	ID         string
	SizeBytes  int64
	node       *Node
	name       string
	context    map[string]string
	published  map[string]string
	parameters map[string]string
}

// final are codes after which a client gives up: its call was wrong.
var final = []codes.Code{
	codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.OutOfRange, codes.DataLoss, codes.Unimplemented, codes.ResourceExhausted,
}

// insist makes a call until it succeeds.
func (n *Node) insist(ctx context.Context, what string, call func(ctx context.Context) error) error {
	deadline := time.Now().Add(Patience)
	for {
		try, cancel := context.WithTimeout(ctx, callPatience)
		err := call(try)
		cancel()
		if err == nil {
			return nil
		}
		s := status.Convert(err)
		if ctx.Err() != nil || slices.Contains(final, s.Code()) || time.Now().After(deadline) {
			return fmt.Errorf("%s: %s (%s)", what, s.Message(), s.Code())
		}
		n.repeats.Add(1)
		time.Sleep(2 * pollInterval)
	}
}

var capability = &csi.VolumeCapability{
	AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
}

// Create makes an empty volume with parameters of a StorageClass.
func (n *Node) Create(ctx context.Context, name string, sizeBytes int64, parameters map[string]string) (*Volume, error) {
	return n.create(ctx, name, sizeBytes, parameters, nil)
}

// Restore makes a volume of a snapshot, whose id Snapshot returned, with the transport
// of the snapshot's volume.
func (v *Volume) Restore(ctx context.Context, name, snapshot string) (*Volume, error) {
	return v.node.create(ctx, name, 0, map[string]string{"transport": v.parameters["transport"]}, &csi.VolumeContentSource{
		Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}},
	})
}

func (n *Node) create(ctx context.Context, name string, sizeBytes int64, parameters map[string]string, source *csi.VolumeContentSource) (*Volume, error) {
	v := &Volume{node: n, name: name, parameters: parameters}
	req := &csi.CreateVolumeRequest{
		Name: name, Parameters: parameters, VolumeContentSource: source, VolumeCapabilities: []*csi.VolumeCapability{capability},
	}
	if sizeBytes > 0 {
		req.CapacityRange = &csi.CapacityRange{RequiredBytes: sizeBytes}
	}
	err := n.insist(ctx, "CreateVolume "+name, func(ctx context.Context) error {
		resp, err := n.controller.CreateVolume(ctx, req)
		if err == nil {
			v.ID, v.SizeBytes, v.context = resp.Volume.VolumeId, resp.Volume.CapacityBytes, resp.Volume.VolumeContext
		}
		return err
	})
	return v, err
}

func (v *Volume) staging() string { return filepath.Join(v.node.cfg.Dir, "staging", v.name) }

// Path is where the volume's device is, once it is attached.
func (v *Volume) Path() string { return filepath.Join(v.node.cfg.Dir, "pods", v.name) }

// Attach makes the volume's device.
func (v *Volume) Attach(ctx context.Context) error {
	for _, dir := range []string{v.staging(), filepath.Dir(v.Path())} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	n := v.node
	return v.steps(ctx, []step{
		{"ControllerPublishVolume", func(ctx context.Context) error {
			resp, err := n.controller.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{
				VolumeId: v.ID, NodeId: nodeID, VolumeCapability: capability, VolumeContext: v.context,
			})
			v.published = resp.GetPublishContext()
			return err
		}},
		{"NodeStageVolume", func(ctx context.Context) error {
			_, err := n.node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
				VolumeId: v.ID, StagingTargetPath: v.staging(), VolumeCapability: capability, VolumeContext: v.context, PublishContext: v.published,
			})
			return err
		}},
		{"NodePublishVolume", func(ctx context.Context) error {
			_, err := n.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
				VolumeId: v.ID, StagingTargetPath: v.staging(), TargetPath: v.Path(), VolumeCapability: capability,
				VolumeContext: v.context, PublishContext: v.published,
			})
			return err
		}},
	})
}

// Detach removes the volume's device, which nobody uses any more.
func (v *Volume) Detach(ctx context.Context) error {
	n := v.node
	return v.steps(ctx, []step{
		{"NodeUnpublishVolume", func(ctx context.Context) error {
			_, err := n.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.ID, TargetPath: v.Path()})
			return err
		}},
		{"NodeUnstageVolume", func(ctx context.Context) error {
			_, err := n.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.ID, StagingTargetPath: v.staging()})
			return err
		}},
		{"ControllerUnpublishVolume", func(ctx context.Context) error {
			_, err := n.controller.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: v.ID, NodeId: nodeID})
			return err
		}},
	})
}

// Grow makes the volume, which is attached, and its device larger.
func (v *Volume) Grow(ctx context.Context, sizeBytes int64) error {
	grown, err := v.expand(ctx, sizeBytes)
	if err != nil {
		return err
	}
	err = v.steps(ctx, []step{{"NodeExpandVolume", func(ctx context.Context) error {
		_, err := v.node.node.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
			VolumeId: v.ID, VolumePath: v.Path(), StagingTargetPath: v.staging(), VolumeCapability: capability,
			CapacityRange: &csi.CapacityRange{RequiredBytes: sizeBytes},
		})
		return err
	}}})
	if err == nil {
		v.SizeBytes = grown
	}
	return err
}

// GrowDetached makes the volume larger, which is not attached.
func (v *Volume) GrowDetached(ctx context.Context, sizeBytes int64) error {
	grown, err := v.expand(ctx, sizeBytes)
	if err == nil {
		v.SizeBytes = grown
	}
	return err
}

// expand makes the image larger and returns the volume's size then.
func (v *Volume) expand(ctx context.Context, sizeBytes int64) (int64, error) {
	grown := sizeBytes
	err := v.steps(ctx, []step{{"ControllerExpandVolume", func(ctx context.Context) error {
		resp, err := v.node.controller.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{
			VolumeId: v.ID, CapacityRange: &csi.CapacityRange{RequiredBytes: sizeBytes}, VolumeCapability: capability,
		})
		grown = max(sizeBytes, resp.GetCapacityBytes())
		return err
	}}})
	return grown, err
}

// Snapshot takes a snapshot and returns its id once it is ready.
func (v *Volume) Snapshot(ctx context.Context, name string) (id string, err error) {
	err = v.steps(ctx, []step{{"CreateSnapshot", func(ctx context.Context) error {
		resp, err := v.node.controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{SourceVolumeId: v.ID, Name: name})
		if err == nil && !resp.Snapshot.ReadyToUse {
			err = status.Error(codes.Aborted, "the snapshot is not ready")
		}
		id = resp.GetSnapshot().GetSnapshotId()
		return err
	}}})
	return id, err
}

// DeleteSnapshot deletes a snapshot by its id.
func (v *Volume) DeleteSnapshot(ctx context.Context, id string) error {
	return v.steps(ctx, []step{{"DeleteSnapshot", func(ctx context.Context) error {
		_, err := v.node.controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id})
		return err
	}}})
}

// Delete deletes the volume.
func (v *Volume) Delete(ctx context.Context) error {
	return v.steps(ctx, []step{{"DeleteVolume", func(ctx context.Context) error {
		_, err := v.node.controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.ID})
		return err
	}}})
}

type step struct {
	call string
	do   func(ctx context.Context) error
}

func (v *Volume) steps(ctx context.Context, steps []step) error {
	for _, s := range steps {
		if err := v.node.insist(ctx, strings.Join([]string{s.call, v.ID}, " "), s.do); err != nil {
			return err
		}
	}
	return nil
}
