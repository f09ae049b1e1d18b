package driver

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

const (
	// resizePatience is how long a device may take to have a volume's new size: its
	// server sees within a second that the volume has grown.
	resizePatience = 20 * time.Second
	resizeInterval = 200 * time.Millisecond
)

func (n *node) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	resp := &csi.NodeGetCapabilitiesResponse{}
	for _, rpc := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csi.NodeServiceCapability_RPC_GET_VOLUME_HEALTH,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
		csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	} {
		resp.Capabilities = append(resp.Capabilities, &csi.NodeServiceCapability{
			Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: rpc}},
		})
	}
	return resp, nil
}

// transportTopology begins the topology keys that say which transports a node has: a
// volume whose StorageClass forces one can be kept to nodes that do.
const transportTopology = Name + "/transport-"

// NodeGetInfo tells of a transport that works, and nothing of one that doesn't: a node's
// labels may come, but never change.
func (n *node) NodeGetInfo(ctx context.Context, _ *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	names, err := n.cfg.Attacher.Transports(ctx)
	if err != nil {
		return nil, fmt.Errorf("node %s: which transports work: %w", n.cfg.ID, err)
	}
	resp := &csi.NodeGetInfoResponse{NodeId: n.cfg.ID, MaxVolumesPerNode: n.cfg.MaxVolumes}
	if len(names) > 0 {
		resp.AccessibleTopology = &csi.Topology{Segments: map[string]string{}}
	}
	for _, name := range names {
		resp.AccessibleTopology.Segments[transportTopology+name] = "true"
	}
	return resp, nil
}

func (n *node) NodeExpandVolume(ctx context.Context, req *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	id := req.GetVolumeId()
	if id == "" {
		return nil, missing("volume id")
	}
	if req.GetVolumePath() == "" {
		return nil, missing("volume path")
	}
	var size int64
	if req.GetCapacityRange() != nil {
		var err error
		if size, _, err = parseRange(req.GetCapacityRange()); err != nil {
			return nil, err
		}
	}
	unlock, err := n.lockToMount(ctx, id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	at, err := n.resize(ctx, id, size)
	if err != nil {
		return nil, fmt.Errorf("expand volume %s: %w", id, err)
	}
	if err := n.grow(at); err != nil {
		return nil, fmt.Errorf("expand volume %s: %w", id, err)
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: at.SizeBytes}, nil
}

// resize waits until the device has at least size bytes.
func (n *node) resize(ctx context.Context, volumeID string, size int64) (Attachment, error) {
	ctx, cancel := context.WithTimeout(ctx, resizePatience)
	defer cancel()
	for {
		at, err := n.cfg.Attacher.Resize(ctx, volumeID)
		switch {
		case err == nil && at.SizeBytes >= size:
			return at, nil
		case err == nil:
			err = fmt.Errorf("the device has %d bytes, not yet %d: %w", at.SizeBytes, size, ErrUnavailable)
		case errors.Is(err, block.ErrUnsupported): // the kernel can't, but when it is attached next the device is larger
			return Attachment{}, fmt.Errorf("%w: %w", errPrecondition, err)
		case !errors.Is(err, block.ErrBusy): // busy: its server is being restarted
			return Attachment{}, err
		}
		select {
		case <-ctx.Done():
			return Attachment{}, err
		case <-time.After(resizeInterval):
		}
	}
}

// grow makes the file system on a device as large as the device, if there is one of
// ours mounted writable.
func (n *node) grow(at Attachment) error {
	mounts, err := n.cfg.Mounter.Mounts()
	if err != nil {
		return fmt.Errorf("mount table: %w", err)
	}
	for _, m := range mounts {
		if m.Device == at.Device && !m.ReadOnly && minBytes(m.FSType) > 0 {
			return n.cfg.Mounter.Grow(at.Device, m.Path)
		}
	}
	return nil
}

func (n *node) NodeGetVolumeStats(ctx context.Context, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	id := req.GetVolumeId()
	if id == "" {
		return nil, missing("volume id")
	}
	if req.GetVolumePath() == "" {
		return nil, missing("volume path")
	}
	at, err := n.cfg.Attacher.Attachment(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", id, err)
	}
	m, err := n.mountedAt(req.GetVolumePath())
	if err != nil {
		return nil, err
	}
	if m == nil || m.Device != at.Device {
		return nil, fmt.Errorf("volume %s at %s: %w", id, req.GetVolumePath(), block.ErrNotFound)
	}
	if m.FSType == "" {
		return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{
			{Unit: csi.VolumeUsage_BYTES, Total: at.SizeBytes},
		}}, nil
	}
	u, err := n.usage(ctx, id, m.Path)
	if err != nil {
		return nil, err
	}
	return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{
		{Unit: csi.VolumeUsage_BYTES, Total: u.TotalBytes, Used: u.UsedBytes, Available: u.AvailableBytes},
		{Unit: csi.VolumeUsage_INODES, Total: u.TotalInodes, Used: u.UsedInodes, Available: u.AvailableInodes},
	}}, nil
}

// mountedAt is mountAt for a path that may be anything.
func (n *node) mountedAt(path string) (*Mount, error) {
	if !filepath.IsAbs(path) {
		return nil, nil
	}
	path, err := cleanPath("volume path", path)
	if err != nil {
		return nil, err
	}
	return n.mountAt(path)
}

// usage asks a file system how full it is, which hangs when its device does.
func (n *node) usage(ctx context.Context, volumeID, path string) (Usage, error) {
	answer, err := n.slow.do(ctx, flightKey{workUsage, volumeID, path}, func() (any, error) {
		return n.cfg.Mounter.Usage(path)
	})
	if err != nil {
		return Usage{}, err
	}
	return answer.(Usage), nil
}

func (n *node) NodeGetVolumeHealth(ctx context.Context, req *csi.NodeGetVolumeHealthRequest) (*csi.NodeGetVolumeHealthResponse, error) {
	id := req.GetVolumeId()
	if id == "" {
		return nil, missing("volume id")
	}
	at, err := n.cfg.Attacher.Attachment(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", id, err)
	}
	health := &csi.VolumeHealth{VolumeId: id}
	if at.Problem != "" || at.Lost {
		reason := "NotServed" // reads and writes wait
		if at.Lost {
			reason = "DeviceLost"
		}
		health.HealthStatuses = []*csi.VolumeHealth_VolumeHealthEntry{{
			Status: csi.VolumeHealthErrorType_INACCESSIBLE, Reason: reason, Message: at.Problem,
		}}
	}
	return &csi.NodeGetVolumeHealthResponse{VolumeHealth: health}, nil
}
