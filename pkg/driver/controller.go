package driver

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Keys of a publish context, from ControllerPublishVolume to NodeStageVolume.
const (
	contextEpoch    = "epoch"
	contextVolume   = "volume" // name in the store, which a handle of an image does not say
	contextReadOnly = "readOnly"
)

// sizeMultiple is what sizes are rounded up to: whole blocks of any device.
const sizeMultiple = 4096

type controller struct {
	csi.UnimplementedControllerServer
	cfg  ControllerConfig
	busy inflight
}

func newController(cfg ControllerConfig) *controller { return &controller{cfg: cfg} }

func (c *controller) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	resp := &csi.ControllerGetCapabilitiesResponse{}
	for _, rpc := range []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME,
		csi.ControllerServiceCapability_RPC_PUBLISH_READONLY,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES_PUBLISHED_NODES,
		csi.ControllerServiceCapability_RPC_GET_VOLUME,
		csi.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH,
		csi.ControllerServiceCapability_RPC_LIST_VOLUME_HEALTH,
		csi.ControllerServiceCapability_RPC_GET_CAPACITY,
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
		csi.ControllerServiceCapability_RPC_GET_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
		csi.ControllerServiceCapability_RPC_MODIFY_VOLUME,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	} {
		resp.Capabilities = append(resp.Capabilities, &csi.ControllerServiceCapability{
			Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: rpc}},
		})
	}
	return resp, nil
}

// inStore adds the store's name to an error that says already what was being done there.
func inStore(name string, err error) error { return fmt.Errorf("store %s: %w", name, err) }

func (c *controller) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	storeName, spec, err := c.volumeSpec(req)
	if err != nil {
		return nil, err
	}
	unlock, err := c.busy.wait(ctx, storeName+"/"+spec.Name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	vol, err := c.cfg.Stores[storeName].CreateVolume(ctx, spec)
	if err != nil {
		return nil, inStore(storeName, err)
	}
	if vol.SizeBytes < spec.SizeBytes || spec.LimitBytes > 0 && vol.SizeBytes > spec.LimitBytes {
		return nil, fmt.Errorf("create volume %s: one of %d bytes %w", req.GetName(), vol.SizeBytes, block.ErrExists)
	}
	answer := csiVolume(storeName, vol)
	answer.ContentSource = req.GetVolumeContentSource()
	return &csi.CreateVolumeResponse{Volume: answer}, nil
}

// volumeSpec understands a request to create a volume.
func (c *controller) volumeSpec(req *csi.CreateVolumeRequest) (storeName string, spec VolumeSpec, err error) {
	if spec.Name, err = nameFor(req.GetName()); err != nil {
		return "", spec, err
	}
	usages, err := parseCapabilities(req.GetVolumeCapabilities())
	if err != nil {
		return "", spec, err
	}
	if spec.SizeBytes, spec.LimitBytes, err = parseRange(req.GetCapacityRange()); err != nil {
		return "", spec, err
	}
	if spec.SizeBytes > 0 {
		if err := checkSize(usages, spec.SizeBytes); err != nil {
			return "", spec, err
		}
	}
	asked, err := parseParameters(req.GetParameters(), c.cfg.Formats)
	if err != nil {
		return "", spec, err
	}
	mutable, err := parseMutable(req.GetMutableParameters())
	if err != nil {
		return "", spec, err
	}
	spec.Parameters, spec.Source = asked.parameters, asked.source
	asked.limits.Apply(&spec.Limits)
	mutable.Apply(&spec.Limits) // the VolumeAttributesClass is the more particular
	storeName, err = c.contentSource(req.GetVolumeContentSource(), asked.store, &spec.Source)
	if err != nil {
		return "", spec, err
	}
	if req.GetVolumeContentSource() != nil {
		// What is restored or cloned is an overlay, and thin. Its StorageClass may say
		// otherwise for the empty volumes it is for as well.
		spec.Parameters.Preallocation = ""
	}
	storeName, err = c.pickStore(storeName)
	return storeName, spec, err
}

// contentSource adds what a volume is to be made from, and returns the store that has
// to be in.
func (c *controller) contentSource(from *csi.VolumeContentSource, storeName string, source *Source) (string, error) {
	if from == nil {
		return storeName, nil
	}
	if source.Image != "" {
		return "", invalid("parameter "+paramImage, source.Image, "none for a volume made from a snapshot or volume")
	}
	var sourceStore, sourceID string
	switch {
	case from.GetSnapshot() != nil:
		sourceID = from.GetSnapshot().GetSnapshotId()
		h, err := parseSnapshotHandle(sourceID)
		if err != nil {
			return "", err
		}
		sourceStore, source.Snapshot = h.store, h.within()
	case from.GetVolume() != nil:
		sourceID = from.GetVolume().GetVolumeId()
		h, err := parseHandle(sourceID)
		if err != nil {
			return "", err
		}
		store, name, err := c.resolve(h)
		if err != nil {
			return "", err
		}
		sourceStore, source.Volume = store, name
	default:
		return "", missing("the snapshot or volume of volume content source")
	}
	if storeName != "" && storeName != sourceStore {
		return "", invalid("parameter "+paramStore, storeName, sourceStore+", which "+sourceID+" is in")
	}
	return sourceStore, nil
}

// pickStore returns the store with a name, or the only one there is.
func (c *controller) pickStore(name string) (string, error) {
	if name == "" && len(c.cfg.Stores) == 1 {
		for only := range c.cfg.Stores {
			return only, nil
		}
	}
	if c.cfg.Stores[name] == nil {
		return "", invalid("parameter "+paramStore, name, "one of "+storeNames(c.cfg.Stores))
	}
	return name, nil
}

// resolve returns the store and the name in it of a volume. A store that is not
// configured may have the volume all the same: that is not block.ErrNotFound, after
// which a caller would forget it.
func (c *controller) resolve(h handle) (storeName, name string, err error) {
	store, err := c.configured(h.store, h.String())
	if err != nil {
		return "", "", err
	}
	if h.image == "" {
		return h.store, h.volume, nil
	}
	name, err = store.ImageVolumeName(h.image)
	return h.store, name, err
}

func (c *controller) configured(name, of string) (Store, error) {
	if store := c.cfg.Stores[name]; store != nil {
		return store, nil
	}
	return nil, fmt.Errorf("%s: store %q is not configured, only %s: %w", of, name, storeNames(c.cfg.Stores), errPrecondition)
}

// open parses a volume's handle, takes the volume's lock and finds its store.
func (c *controller) open(ctx context.Context, volumeID string) (h handle, store Store, name string, unlock func(), err error) {
	if h, err = parseHandle(volumeID); err != nil {
		return h, nil, "", nil, err
	}
	storeName, name, err := c.resolve(h)
	if err != nil {
		return h, nil, "", nil, err
	}
	unlock, err = c.busy.wait(ctx, storeName+"/"+name)
	return h, c.cfg.Stores[storeName], name, unlock, err
}

func (c *controller) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	h, store, name, unlock, err := c.open(ctx, req.GetVolumeId())
	if errors.Is(err, block.ErrNotFound) {
		return &csi.DeleteVolumeResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := store.DeleteVolume(ctx, name); err != nil && !errors.Is(err, block.ErrNotFound) {
		return nil, inStore(h.store, err)
	}
	return &csi.DeleteVolumeResponse{}, nil
}

func (c *controller) ControllerPublishVolume(ctx context.Context, req *csi.ControllerPublishVolumeRequest) (*csi.ControllerPublishVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, missing("volume id")
	}
	if req.GetNodeId() == "" {
		return nil, missing("node id")
	}
	use, err := parseCapability(req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	h, store, name, unlock, err := c.open(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := ensureVolume(ctx, store, h); err != nil {
		return nil, err
	}
	if c.cfg.Nodes != nil && !slices.Contains(c.cfg.Nodes, req.GetNodeId()) {
		return nil, fmt.Errorf("node %q: %w: there are %q", req.GetNodeId(), block.ErrNotFound, c.cfg.Nodes)
	}
	pub := Publication{Volume: name, Node: req.GetNodeId(), ReadOnly: req.GetReadonly() || use.readOnly, Shared: use.shared}
	epoch, err := store.Publish(ctx, pub)
	if err != nil {
		return nil, fmt.Errorf("publish volume %s to node %s: %w", h, req.GetNodeId(), err)
	}
	return &csi.ControllerPublishVolumeResponse{PublishContext: map[string]string{
		contextEpoch:    strconv.FormatInt(epoch, 10),
		contextVolume:   name,
		contextReadOnly: strconv.FormatBool(pub.ReadOnly),
	}}, nil
}

// ensureVolume returns nil if a volume exists; one that stands for an image is made.
func ensureVolume(ctx context.Context, store Store, h handle) error {
	var err error
	if h.image != "" {
		_, err = store.EnsureImageVolume(ctx, h.image)
	} else {
		_, err = store.Volume(ctx, h.volume)
	}
	if err != nil {
		return fmt.Errorf("volume %s: %w", h, err)
	}
	return nil
}

func (c *controller) ControllerUnpublishVolume(ctx context.Context, req *csi.ControllerUnpublishVolumeRequest) (*csi.ControllerUnpublishVolumeResponse, error) {
	h, store, name, unlock, err := c.open(ctx, req.GetVolumeId())
	if errors.Is(err, block.ErrNotFound) {
		return &csi.ControllerUnpublishVolumeResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := store.Unpublish(ctx, name, req.GetNodeId()); err != nil && !errors.Is(err, block.ErrNotFound) {
		return nil, fmt.Errorf("unpublish volume %s from node %s: %w", h, req.GetNodeId(), err)
	}
	return &csi.ControllerUnpublishVolumeResponse{}, nil
}

func (c *controller) ValidateVolumeCapabilities(ctx context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, missing("volume id")
	}
	if len(req.GetVolumeCapabilities()) == 0 {
		return nil, missing("volume capabilities")
	}
	vol, _, err := c.volume(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	unfit := func(err error) (*csi.ValidateVolumeCapabilitiesResponse, error) {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil
	}
	usages, err := parseCapabilities(req.GetVolumeCapabilities())
	if err != nil {
		return unfit(err)
	}
	if err := checkSize(usages, vol.SizeBytes); err != nil {
		return unfit(err)
	}
	if _, err := parseParameters(req.GetParameters(), c.cfg.Formats); err != nil {
		return unfit(err)
	}
	return &csi.ValidateVolumeCapabilitiesResponse{
		Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
			VolumeContext:      req.GetVolumeContext(),
			VolumeCapabilities: req.GetVolumeCapabilities(),
			Parameters:         req.GetParameters(),
		},
	}, nil
}

// volume looks a volume up by its handle.
func (c *controller) volume(ctx context.Context, volumeID string) (Volume, handle, error) {
	h, err := parseHandle(volumeID)
	if err != nil {
		return Volume{}, h, err
	}
	storeName, name, err := c.resolve(h)
	if err != nil {
		return Volume{}, h, err
	}
	vol, err := c.cfg.Stores[storeName].Volume(ctx, name)
	if err != nil {
		return Volume{}, h, fmt.Errorf("volume %s: %w", h, err)
	}
	return vol, h, nil
}

func (c *controller) ControllerExpandVolume(ctx context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, missing("volume id")
	}
	if req.GetCapacityRange() == nil {
		return nil, missing("capacity range")
	}
	size, limit, err := parseRange(req.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	h, store, name, unlock, err := c.open(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	vol, err := store.Expand(ctx, name, size, limit)
	if err != nil {
		return nil, fmt.Errorf("expand volume %s to %s: %w", h, formatSize(size), err)
	}
	// Also for raw block: the device on the node has to be told.
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: vol.SizeBytes, NodeExpansionRequired: true}, nil
}

func (c *controller) ControllerModifyVolume(ctx context.Context, req *csi.ControllerModifyVolumeRequest) (*csi.ControllerModifyVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, missing("volume id")
	}
	change, err := parseMutable(req.GetMutableParameters())
	if err != nil {
		return nil, err
	}
	h, store, name, unlock, err := c.open(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := ensureVolume(ctx, store, h); err != nil {
		return nil, err
	}
	if err := store.ChangeLimits(ctx, name, change); err != nil {
		return nil, fmt.Errorf("modify volume %s: %w", h, err)
	}
	return &csi.ControllerModifyVolumeResponse{}, nil
}

func (c *controller) ControllerGetVolume(ctx context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	vol, h, err := c.volume(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{
		Volume: csiVolume(h.store, vol),
		Status: &csi.ControllerGetVolumeResponse_VolumeStatus{PublishedNodeIds: vol.Nodes},
	}, nil
}

func (c *controller) ControllerGetVolumeHealth(ctx context.Context, req *csi.ControllerGetVolumeHealthRequest) (*csi.ControllerGetVolumeHealthResponse, error) {
	vol, h, err := c.volume(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeHealthResponse{VolumeHealth: storeHealth(h.store, vol)}, nil
}

// storeHealth is what the store knows of a volume's health.
func storeHealth(storeName string, vol Volume) *csi.VolumeHealth {
	health := &csi.VolumeHealth{VolumeId: volumeID(storeName, vol)}
	if vol.Problem != "" {
		health.HealthStatuses = []*csi.VolumeHealth_VolumeHealthEntry{{
			Status: csi.VolumeHealthErrorType_DEGRADED, Reason: "StoreProblem", Message: vol.Problem,
		}}
	}
	return health
}

func (c *controller) GetCapacity(ctx context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	asked, err := parseParameters(req.GetParameters(), c.cfg.Formats)
	if err != nil {
		return nil, err
	}
	if len(req.GetVolumeCapabilities()) > 0 {
		if _, err := parseCapabilities(req.GetVolumeCapabilities()); err != nil {
			return &csi.GetCapacityResponse{}, nil // such volumes cannot be had
		}
	}
	stores := c.cfg.Stores
	if asked.store != "" {
		name, err := c.pickStore(asked.store)
		if err != nil {
			return nil, err
		}
		stores = map[string]Store{name: c.cfg.Stores[name]}
	}
	var total int64
	for name, store := range stores {
		available, err := store.AvailableBytes(ctx)
		if err != nil {
			return nil, fmt.Errorf("capacity of store %s: %w", name, err)
		}
		total += min(available, math.MaxInt64-total)
	}
	return &csi.GetCapacityResponse{AvailableCapacity: total}, nil
}

// parseRange returns the least size, rounded up to whole blocks, and the greatest; 0:
// not said.
func parseRange(r *csi.CapacityRange) (size, limit int64, err error) {
	size, limit = r.GetRequiredBytes(), r.GetLimitBytes()
	outOfRange := func(why string) error {
		return fmt.Errorf("capacity range from %d to %d: %s: %w", size, limit, why, block.ErrOutOfRange)
	}
	switch {
	case size < 0 || limit < 0:
		return 0, 0, outOfRange("a size is not negative")
	case r != nil && size == 0 && limit == 0:
		return 0, 0, invalid("capacity range", "", "required bytes, limit bytes or both")
	case size > math.MaxInt64-sizeMultiple:
		return 0, 0, outOfRange("that is more than any image has")
	}
	size = (size + sizeMultiple - 1) / sizeMultiple * sizeMultiple
	if limit > 0 && size > limit {
		return 0, 0, outOfRange(fmt.Sprintf("sizes are multiples of %d", sizeMultiple))
	}
	return size, limit, nil
}

// volumeID returns the handle of a volume.
func volumeID(storeName string, vol Volume) string {
	if vol.Image != "" {
		return handle{store: storeName, image: vol.Image}.String()
	}
	return handle{store: storeName, volume: vol.Name}.String()
}

// csiVolume describes a volume to the caller.
func csiVolume(storeName string, vol Volume) *csi.Volume {
	v := &csi.Volume{VolumeId: volumeID(storeName, vol), CapacityBytes: vol.SizeBytes}
	if vol.Parameters.Transport != "" {
		v.VolumeContext = map[string]string{paramTransport: vol.Parameters.Transport}
	}
	if vol.Source.Snapshot != "" {
		v.ContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: storeName + "/" + vol.Source.Snapshot},
		}}
	}
	if vol.Source.Volume != "" {
		v.ContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
			Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: storeName + "/" + vol.Source.Volume},
		}}
	}
	return v
}
