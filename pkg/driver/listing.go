package driver

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// A list's entries are sorted by id, and a page's token says after which id the next
// page begins: entries that come and go between pages neither repeat nor hide others.
const tokenPrefix = "after:"

func newToken(lastID string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(tokenPrefix + lastID))
}

func parseToken(token string) (lastID string, err error) {
	if token == "" {
		return "", nil
	}
	text, err := base64.RawURLEncoding.DecodeString(token)
	lastID, ok := strings.CutPrefix(string(text), tokenPrefix)
	if err != nil || !ok || lastID == "" {
		return "", fmt.Errorf("starting token %.200q: %w: want a next token, or none to begin anew", token, errBadToken)
	}
	return lastID, nil
}

// page cuts what a request asks for out of a list of entries with ids, and returns the
// token of the next page; "" after the last.
func page[T any](entries []T, id func(T) string, startingToken string, maxEntries int32) ([]T, string, error) {
	if maxEntries < 0 {
		return nil, "", invalid("max entries", maxEntries, "0 or more")
	}
	last, err := parseToken(startingToken)
	if err != nil {
		return nil, "", err
	}
	slices.SortFunc(entries, func(a, b T) int { return cmp.Compare(id(a), id(b)) })
	if last != "" {
		first, found := slices.BinarySearchFunc(entries, last, func(e T, last string) int { return cmp.Compare(id(e), last) })
		if found {
			first++
		}
		entries = entries[first:]
	}
	if maxEntries == 0 || len(entries) <= int(maxEntries) {
		return entries, "", nil
	}
	entries = entries[:maxEntries]
	return entries, newToken(id(entries[maxEntries-1])), nil
}

// located is a volume and the store it is in.
type located struct {
	store  string
	volume Volume
}

func (l located) id() string { return volumeID(l.store, l.volume) }

func (c *controller) volumes(ctx context.Context) ([]located, error) {
	var all []located
	for _, name := range slices.Sorted(maps.Keys(c.cfg.Stores)) {
		list, err := c.cfg.Stores[name].Volumes(ctx)
		if err != nil {
			return nil, fmt.Errorf("volumes of store %s: %w", name, err)
		}
		for _, vol := range list {
			all = append(all, located{name, vol})
		}
	}
	return all, nil
}

func (c *controller) ListVolumes(ctx context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	all, err := c.volumes(ctx)
	if err != nil {
		return nil, err
	}
	part, next, err := page(all, located.id, req.GetStartingToken(), req.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	resp := &csi.ListVolumesResponse{NextToken: next}
	for _, l := range part {
		resp.Entries = append(resp.Entries, &csi.ListVolumesResponse_Entry{
			Volume: csiVolume(l.store, l.volume),
			Status: &csi.ListVolumesResponse_VolumeStatus{PublishedNodeIds: l.volume.Nodes},
		})
	}
	return resp, nil
}

func (c *controller) ControllerListVolumeHealth(ctx context.Context, req *csi.ControllerListVolumeHealthRequest) (*csi.ControllerListVolumeHealthResponse, error) {
	all, err := c.volumes(ctx)
	if err != nil {
		return nil, err
	}
	part, next, err := page(all, located.id, req.GetStartingToken(), req.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	resp := &csi.ControllerListVolumeHealthResponse{NextToken: next}
	for _, l := range part {
		resp.Entries = append(resp.Entries, storeHealth(l.store, l.volume))
	}
	return resp, nil
}

func (c *controller) ListSnapshots(ctx context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	all, err := c.snapshots(ctx, req.GetSnapshotId(), req.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	part, next, err := page(all, (*csi.Snapshot).GetSnapshotId, req.GetStartingToken(), req.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	resp := &csi.ListSnapshotsResponse{NextToken: next}
	for _, s := range part {
		resp.Entries = append(resp.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: s})
	}
	return resp, nil
}

// snapshots returns all snapshots, or those with an id and of a source, if said.
func (c *controller) snapshots(ctx context.Context, id, source string) ([]*csi.Snapshot, error) {
	if id != "" {
		resp, err := c.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: id})
		if errors.Is(err, block.ErrNotFound) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		if source != "" && resp.GetSnapshot().GetSourceVolumeId() != source {
			return nil, nil
		}
		return []*csi.Snapshot{resp.GetSnapshot()}, nil
	}
	var all []*csi.Snapshot
	for _, name := range slices.Sorted(maps.Keys(c.cfg.Stores)) {
		list, err := c.cfg.Stores[name].Snapshots(ctx)
		if err != nil {
			return nil, fmt.Errorf("snapshots of store %s: %w", name, err)
		}
		for _, s := range list {
			if converted := c.csiSnapshot(name, s); source == "" || converted.GetSourceVolumeId() == source {
				all = append(all, converted)
			}
		}
	}
	return all, nil
}
