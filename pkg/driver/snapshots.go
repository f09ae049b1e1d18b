package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

func (c *controller) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	name, err := nameFor(req.GetName())
	if err != nil {
		return nil, err
	}
	if req.GetSourceVolumeId() == "" {
		return nil, missing("source volume id")
	}
	for key, value := range req.GetParameters() {
		return nil, invalid("snapshot parameter "+key, value, "none")
	}
	h, err := parseHandle(req.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	storeName, volume, err := c.resolve(h)
	if err != nil {
		return nil, err
	}
	unlock, err := c.busy.wait(ctx, "snapshot "+name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := c.unusedElsewhere(ctx, storeName, name); err != nil {
		return nil, err
	}
	snapshot, err := c.cfg.Stores[storeName].CreateSnapshot(ctx, volume, name)
	if err != nil {
		return nil, inStore(storeName, err)
	}
	return &csi.CreateSnapshotResponse{Snapshot: c.csiSnapshot(storeName, snapshot)}, nil
}

// unusedElsewhere returns block.ErrExists if another store has a snapshot of this name:
// names are unique in the driver, and a store knows only its own.
func (c *controller) unusedElsewhere(ctx context.Context, storeName, name string) error {
	for _, other := range slices.Sorted(maps.Keys(c.cfg.Stores)) {
		if other == storeName {
			continue
		}
		list, err := c.cfg.Stores[other].Snapshots(ctx)
		if err != nil {
			continue // a store that is away must not stop work in the others
		}
		for _, s := range list {
			if s.Name == name {
				return fmt.Errorf("snapshot %s of volume %s/%s: %w", name, other, s.Volume, block.ErrExists)
			}
		}
	}
	return nil
}

func (c *controller) DeleteSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	h, err := parseSnapshotHandle(req.GetSnapshotId())
	if errors.Is(err, block.ErrNotFound) {
		return &csi.DeleteSnapshotResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	store, err := c.configured(h.store, "snapshot "+h.String())
	if err != nil {
		return nil, err
	}
	unlock, err := c.busy.wait(ctx, "snapshot "+h.snapshot)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := store.DeleteSnapshot(ctx, h.volume, h.snapshot); err != nil && !errors.Is(err, block.ErrNotFound) {
		return nil, inStore(h.store, err)
	}
	return &csi.DeleteSnapshotResponse{}, nil
}

func (c *controller) GetSnapshot(ctx context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	h, err := parseSnapshotHandle(req.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	store, err := c.configured(h.store, "snapshot "+h.String())
	if err != nil {
		return nil, err
	}
	snapshot, err := store.Snapshot(ctx, h.volume, h.snapshot)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", h, err)
	}
	return &csi.GetSnapshotResponse{Snapshot: c.csiSnapshot(h.store, snapshot)}, nil
}

// csiSnapshot describes a snapshot to the caller.
func (c *controller) csiSnapshot(storeName string, s Snapshot) *csi.Snapshot {
	return &csi.Snapshot{
		SnapshotId:     snapshotHandle{storeName, s.Volume, s.Name}.String(),
		SourceVolumeId: volumeID(storeName, Volume{Name: s.Volume, Image: s.VolumeImage}),
		SizeBytes:      s.SizeBytes,
		CreationTime:   timestamppb.New(s.Taken),
		ReadyToUse:     s.Ready,
	}
}
