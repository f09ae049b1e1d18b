// Package wire connects the driver to the real store and supervisor: it translates
// between their types and the driver's, and decides nothing.
package wire

import (
	"cmp"
	"context"
	"slices"
	"strconv"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
)

// DefaultFormat is what an empty volume is made as unless asked otherwise.
const DefaultFormat = store.DefaultFormat

// Formats returns what volumes can be made as, from the registered formats; the
// default first.
func Formats() []driver.Format {
	var list []driver.Format
	for _, f := range formats.All() {
		o := f.Options()
		format := driver.Format{
			Name: f.Name(), Subformats: o.Subformats,
			MinClusterSize: o.MinClusterBytes, MaxClusterSize: o.MaxClusterBytes,
		}
		for _, p := range o.Preallocations {
			format.Preallocations = append(format.Preallocations, string(p))
		}
		list = append(list, format)
	}
	slices.SortStableFunc(list, func(a, b driver.Format) int {
		return cmp.Compare(rank(a.Name), rank(b.Name))
	})
	return list
}

func rank(format string) int {
	if format == DefaultFormat {
		return 0
	}
	return 1
}

// ServerArgs returns what makes the arguments with which the supervisor runs a volume's
// server: csi-imgdisk server --store NAME=PATH --volume NAME --epoch N --node ID
// [--read-only]. Roots are the stores' absolute paths by name.
func ServerArgs(roots map[string]string) func(driver.AttachSpec) ([]string, error) {
	return func(spec driver.AttachSpec) ([]string, error) {
		root, ok := roots[spec.Store]
		if !ok {
			return nil, unknownStore(spec.Store)
		}
		args := []string{
			"server", "--store", spec.Store + "=" + root, "--volume", spec.Volume,
			"--epoch", strconv.FormatInt(spec.Epoch, 10), "--node", spec.Node,
		}
		if spec.ReadOnly {
			args = append(args, "--read-only")
		}
		return args, nil
	}
}

// Store makes a store the driver's.
func Store(s *store.Store) driver.Store { return volumes{s} }

type volumes struct{ store *store.Store }

func (v volumes) CreateVolume(ctx context.Context, spec driver.VolumeSpec) (driver.Volume, error) {
	rec, err := v.store.CreateVolume(ctx, store.CreateVolumeRequest{
		Name: spec.Name, SizeBytes: spec.SizeBytes, LimitBytes: spec.LimitBytes,
		Format: spec.Parameters.Format,
		Parameters: store.Parameters{
			Subformat:     spec.Parameters.Subformat,
			ClusterBytes:  spec.Parameters.ClusterBytes,
			Preallocation: spec.Parameters.Preallocation,
			Transport:     spec.Parameters.Transport,
		},
		Limits: store.Limits(spec.Limits),
		Source: store.Source{
			Image: spec.Source.Image, Mode: store.ImageMode(spec.Source.ImageMode),
			Snapshot: spec.Source.Snapshot, Volume: spec.Source.Volume,
		},
	})
	return fromRecord(rec), err
}

func (v volumes) Volume(ctx context.Context, name string) (driver.Volume, error) {
	rec, err := v.store.Volume(ctx, name)
	return fromRecord(rec), err
}

func (v volumes) Volumes(ctx context.Context) ([]driver.Volume, error) {
	entries, err := v.store.Volumes(ctx)
	if err != nil {
		return nil, err
	}
	var list []driver.Volume
	for _, e := range entries {
		if e.Err != nil {
			list = append(list, driver.Volume{Name: e.Name, Problem: e.Err.Error()})
			continue
		}
		list = append(list, fromRecord(e.Record))
	}
	return list, nil
}

func (v volumes) DeleteVolume(ctx context.Context, name string) error {
	return v.store.DeleteVolume(ctx, name)
}

func (v volumes) EnsureImageVolume(ctx context.Context, image string) (driver.Volume, error) {
	rec, err := v.store.EnsureImageVolume(ctx, image)
	return fromRecord(rec), err
}

func (v volumes) ImageVolumeName(image string) (string, error) { return store.ImageVolumeName(image) }

func (v volumes) Publish(ctx context.Context, p driver.Publication) (int64, error) {
	return v.store.Publish(ctx, store.PublishRequest{Volume: p.Volume, Node: p.Node, ReadOnly: p.ReadOnly, Shared: p.Shared})
}

func (v volumes) Unpublish(ctx context.Context, name, node string) error {
	return v.store.Unpublish(ctx, name, node)
}

func (v volumes) Expand(ctx context.Context, name string, sizeBytes, limitBytes int64) (driver.Volume, error) {
	rec, err := v.store.Expand(ctx, name, sizeBytes, limitBytes)
	return fromRecord(rec), err
}

func (v volumes) ChangeLimits(ctx context.Context, name string, change driver.LimitsChange) error {
	_, err := v.store.ChangeLimits(ctx, name, func(l *store.Limits) {
		limits := driver.Limits(*l)
		change.Apply(&limits)
		*l = store.Limits(limits)
	})
	return err
}

func (v volumes) CreateSnapshot(ctx context.Context, volume, snapshot string) (driver.Snapshot, error) {
	rec, err := v.store.CreateSnapshot(ctx, volume, snapshot)
	return fromSnapshot(volume, rec), err
}

func (v volumes) Snapshot(ctx context.Context, volume, snapshot string) (driver.Snapshot, error) {
	rec, err := v.store.Snapshot(ctx, volume, snapshot)
	return fromSnapshot(volume, rec), err
}

func (v volumes) Snapshots(ctx context.Context) ([]driver.Snapshot, error) {
	entries, err := v.store.Snapshots(ctx)
	if err != nil {
		return nil, err
	}
	var list []driver.Snapshot
	for _, e := range entries {
		list = append(list, fromSnapshot(e.Volume, e.SnapshotRecord))
	}
	return list, nil
}

func (v volumes) DeleteSnapshot(ctx context.Context, volume, snapshot string) error {
	return v.store.DeleteSnapshot(ctx, volume, snapshot)
}

func (v volumes) AvailableBytes(context.Context) (int64, error) {
	usage, err := v.store.Usage()
	return usage.FreeBytes, err
}

func fromRecord(rec store.Record) driver.Volume {
	vol := driver.Volume{
		Name: rec.Name, SizeBytes: rec.SizeBytes,
		Source: driver.Source{
			Image: rec.Source.Image, ImageMode: string(rec.Source.Mode),
			Snapshot: rec.Source.Snapshot, Volume: rec.Source.Volume,
		},
		Parameters: driver.Parameters{
			Format:        rec.Format,
			Subformat:     rec.Parameters.Subformat,
			ClusterBytes:  rec.Parameters.ClusterBytes,
			Preallocation: rec.Parameters.Preallocation,
			Transport:     rec.Parameters.Transport,
		},
		Problem: problemOf(rec),
	}
	if name, err := store.ImageVolumeName(rec.Source.Image); err == nil && name == rec.Name {
		vol.Image = rec.Source.Image
	}
	for _, a := range rec.Attachments {
		vol.Nodes = append(vol.Nodes, a.Node)
	}
	return vol
}

// problemOf returns why the last wish of somebody's was not carried out.
func problemOf(rec store.Record) string {
	if rec.GrowProblem != nil {
		return "expansion: " + rec.GrowProblem.Text
	}
	for _, s := range rec.Snapshots {
		if s.Problem != nil {
			return "snapshot " + s.Name + ": " + s.Problem.Text
		}
	}
	return ""
}

func fromSnapshot(volume string, rec store.SnapshotRecord) driver.Snapshot {
	s := driver.Snapshot{Volume: volume, Name: rec.Name, Taken: rec.Taken, SizeBytes: rec.SizeBytes, Ready: rec.Ready}
	if s.Taken.IsZero() {
		s.Taken = rec.Requested
	}
	return s
}
