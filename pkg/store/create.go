package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// DefaultSizeBytes is the guest size of an empty volume for which nobody asked for one.
const DefaultSizeBytes = 1 << 30

// CreateVolumeRequest describes a volume to be made.
type CreateVolumeRequest struct {
	Name string
	// SizeBytes is the least guest size; 0 means the source's, or DefaultSizeBytes. It
	// is rounded up to what the format can do.
	SizeBytes int64
	// LimitBytes is the greatest acceptable size; 0: none.
	LimitBytes int64
	// Format of the volume's own layers; "" is the source's where that can carry
	// overlays, else DefaultFormat.
	Format     string
	Parameters Parameters
	Source     Source
	// Limits are the first ones. A volume that exists keeps those it has.
	Limits Limits
}

// How a volume is made, in steps that are each recorded, with the volume's lock held
// throughout: whoever gets the lock and finds a record that is not Ready knows that its
// maker is dead, and starts over.
//
//  1. the directory, the lock file, the record: not Ready, no layers
//  2. of a clone: the source gets a pin, a snapshot that holds its present top
//  3. the record names the layers, which keeps those that are others' alive
//  4. the volume's own layer is made
//  5. the record is Ready; of a clone, the pin is taken back

// CreateVolume makes a volume, or returns the one that the same request made before;
// ErrExists names what differs. On an error nothing of it is left, except where the
// store itself fails; then the same call again, DeleteVolume or GC cleans up.
func (s *Store) CreateVolume(ctx context.Context, req CreateVolumeRequest) (Record, error) {
	if err := checkName("volume", req.Name); err != nil {
		return Record{}, err
	}
	return s.createVolume(ctx, req)
}

// EnsureImageVolume returns the volume that stands for images/<file> in static
// provisioning, made on first use: an overlay, so that the image is never written.
func (s *Store) EnsureImageVolume(ctx context.Context, file string) (Record, error) {
	name, err := ImageVolumeName(file)
	if err != nil {
		return Record{}, err
	}
	if rec, err := s.Volume(ctx, name); err == nil {
		return rec, nil // grown or snapshotted meanwhile, perhaps, but the same
	}
	return s.createVolume(ctx, CreateVolumeRequest{Name: name, Source: Source{Image: file, Mode: ImageOverlay}})
}

func (s *Store) createVolume(ctx context.Context, req CreateVolumeRequest) (Record, error) {
	if err := errors.Join(s.writable(), req.normalise()); err != nil {
		return Record{}, fmt.Errorf("create volume %s: %w", req.Name, err)
	}
	rec, err := s.readRecord(req.Name)
	if err == nil && rec.Ready {
		return rec, s.comparable(rec, req)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Record{}, err
	}
	if s.opts.FinishCreations {
		return s.createInBackground(ctx, req)
	}
	return s.makeOnce(ctx, req)
}

// makeOnce makes a volume, unless somebody else has just done it.
func (s *Store) makeOnce(ctx context.Context, req CreateVolumeRequest) (Record, error) {
	lock, err := s.lockNewVolume(ctx, req.Name)
	if err != nil {
		return Record{}, fmt.Errorf("create volume %s: %w", req.Name, err)
	}
	defer lock.Unlock()
	rec, err := s.readRecord(req.Name)
	switch {
	case err == nil && rec.Ready:
		return rec, s.comparable(rec, req)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return Record{}, err
	}
	if err == nil { // a dead maker's pin holds contents of another time
		if err := s.unpin(ctx, rec); err != nil {
			return Record{}, fmt.Errorf("create volume %s: %w", req.Name, err)
		}
	}
	rec, err = s.makeVolume(ctx, req)
	if err != nil {
		err = fmt.Errorf("create volume %s: %w", req.Name, err)
		// The caller's context may have ended, and that is no reason to leave a mess.
		return Record{}, errors.Join(err, s.unmake(context.WithoutCancel(ctx), req.Name))
	}
	return rec, nil
}

// normalise checks a request and fills in what follows from it.
func (r *CreateVolumeRequest) normalise() error {
	if r.SizeBytes < 0 || r.LimitBytes < 0 {
		return fmt.Errorf("size %d, limit %d: %w: want neither negative", r.SizeBytes, r.LimitBytes, block.ErrInvalid)
	}
	if r.LimitBytes > 0 && r.SizeBytes > r.LimitBytes {
		return fmt.Errorf("size %d is beyond the limit of %d: %w", r.SizeBytes, r.LimitBytes, block.ErrInvalid)
	}
	if r.Format != "" {
		if _, err := formats.Lookup(r.Format); err != nil {
			return err
		}
	}
	return r.Source.normalise()
}

func (s *Source) normalise() error {
	sources := 0
	for _, v := range []string{s.Image, s.Snapshot, s.Volume} {
		if v != "" {
			sources++
		}
	}
	if sources > 1 {
		return fmt.Errorf("source: %w: want at most one of image, snapshot and volume", block.ErrInvalid)
	}
	switch {
	case s.Image != "":
		if s.Mode == "" {
			s.Mode = ImageOverlay
		}
		if s.Mode != ImageOverlay && s.Mode != ImageCopy {
			return fmt.Errorf("imageMode %q: %w: want %s or %s", s.Mode, block.ErrInvalid, ImageOverlay, ImageCopy)
		}
		_, err := imagePath(s.Image)
		return err
	case s.Mode != "":
		return fmt.Errorf("imageMode %q: %w: there is no image", s.Mode, block.ErrInvalid)
	case s.Snapshot != "":
		_, _, err := SplitSnapshotID(s.Snapshot)
		return err
	case s.Volume != "":
		return checkVolumeName(s.Volume)
	}
	return nil
}

// comparable returns nil when a volume that exists is what the request asks for.
func (s *Store) comparable(rec Record, req CreateVolumeRequest) error {
	differs := func(what string, have, want any) error {
		return fmt.Errorf("create volume %s: %w with %s %v; asked for is %v", rec.Name, block.ErrExists, what, have, want)
	}
	switch {
	case rec.Deleted:
		return fmt.Errorf("create volume %s: %w: a deleted volume of that name still holds what snapshots or clones need", rec.Name, block.ErrExists)
	case rec.SizeBytes < req.SizeBytes:
		return differs("size", rec.SizeBytes, req.SizeBytes)
	case req.LimitBytes > 0 && rec.SizeBytes > req.LimitBytes:
		return differs("size", rec.SizeBytes, fmt.Sprintf("at most %d", req.LimitBytes))
	case rec.Source != req.Source:
		return differs("source", rec.Source, req.Source)
	case rec.Parameters != req.Parameters:
		return differs("parameters", rec.Parameters, req.Parameters)
	case req.Format != "" && rec.Format != req.Format:
		return differs("format", rec.Format, req.Format)
	case req.Format == "" && req.Source == Source{} && rec.Format != DefaultFormat:
		return differs("format", rec.Format, DefaultFormat)
	}
	return nil
}

// String names the source, for messages.
func (s Source) String() string {
	switch {
	case s.Image != "":
		return fmt.Sprintf("image %s (%s)", s.Image, s.Mode)
	case s.Snapshot != "":
		return "snapshot " + s.Snapshot
	case s.Volume != "":
		return "volume " + s.Volume
	}
	return "nothing"
}

// lockNewVolume makes a volume's directory, if it is not there, and waits for its lock.
func (s *Store) lockNewVolume(ctx context.Context, name string) (*heldLock, error) {
	for {
		err := s.fs.Mkdir(volumeDir(name))
		if err == nil {
			err = syncDir(s.fs, volumesDir)
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		lock, err := s.locks.lock(ctx, volumeFile(name, volumeLock))
		if isFull(err) {
			// Nothing was made, unless somebody else is at it: then it is not empty.
			_ = s.fs.Remove(volumeDir(name))
		}
		if !errors.Is(err, fs.ErrNotExist) || ctx.Err() != nil {
			return lock, err
		}
		// Somebody removed the directory in between.
	}
}

// makeVolume makes a volume of which nothing useful exists yet.
func (s *Store) makeVolume(ctx context.Context, req CreateVolumeRequest) (Record, error) {
	rec := Record{
		Layout: layoutVersion, Name: req.Name, Created: now(),
		Format: req.Format, Source: req.Source, Parameters: req.Parameters, Limits: req.Limits,
		NextLayer: 1,
	}
	if err := s.clearLayers(req.Name); err != nil {
		return rec, err
	}
	if err := s.writeRecord(rec); err != nil {
		return rec, err
	}
	base, err := s.resolve(ctx, req)
	if err != nil {
		return rec, err
	}
	defer base.close()
	if rec.SizeBytes, err = base.chooseSize(req); err != nil {
		return rec, err
	}
	rec.Format = base.format.Name()
	own := LayerRecord{File: layerFile(req.Name, 0, rec.Format), Format: rec.Format}
	rec.Layers = append(slices.Clone(base.layers), own)
	if len(rec.Layers) > s.opts.MaxChain {
		return rec, fmt.Errorf("%w: the source stands on %d layers, and the new volume would stand on %d, beyond the limit of %d",
			block.ErrUnsupported, len(base.layers), len(rec.Layers), s.opts.MaxChain)
	}
	if err := s.referTo(ctx, rec); err != nil {
		return rec, err
	}
	if err := base.fill(ctx, s.fs, own, rec); err != nil {
		return rec, err
	}
	rec.Ready = true
	if err := s.writeRecord(rec); err != nil {
		return rec, err
	}
	return rec, s.unpin(ctx, rec)
}

// clearLayers removes layers that a dead maker left.
func (s *Store) clearLayers(name string) error {
	unneeded, _, err := s.unneededFiles(name, nil)
	for _, file := range unneeded {
		err = errors.Join(err, removeIfThere(s.fs, file))
	}
	return err
}

// unmake removes what an unsuccessful creation left. The volume's lock is held.
func (s *Store) unmake(ctx context.Context, name string) error {
	rec, err := s.readRecord(name)
	if errors.Is(err, fs.ErrNotExist) {
		return s.removeVolumeDir(name)
	}
	if err != nil {
		return err
	}
	if rec.Ready {
		return nil // the last step of all is what failed
	}
	if err := s.clearLayers(name); err != nil {
		return err
	}
	if err := s.unpin(ctx, rec); err != nil {
		return err
	}
	return s.removeVolumeDir(name)
}

// referTo writes a record that refers to others' layers, and makes sure that they are
// still there. The store's lock keeps a sweep from coming in between.
func (s *Store) referTo(ctx context.Context, rec Record) error {
	lock, err := s.locks.lock(ctx, storeLock)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	for _, l := range rec.Layers[:len(rec.Layers)-1] {
		if _, err := s.fs.Stat(l.File); err != nil {
			return fmt.Errorf("%w: the source has just been removed, or its layers merged: %w", block.ErrBusy, err)
		}
	}
	return s.writeRecord(rec)
}

// pinOf names the snapshot that holds a layer of the source for a clone in the making.
func pinOf(clone string) string { return pinPrefix + clone }

// unpin takes a clone's pin back, if there is one.
func (s *Store) unpin(ctx context.Context, rec Record) error {
	if rec.Source.Volume == "" {
		return nil
	}
	return s.dropSnapshot(ctx, rec.Source.Volume, pinOf(rec.Name))
}

// base is what a new volume's own layer is made from.
type base struct {
	format  formats.Format // of the own layer
	layers  []LayerRecord  // that it stands on; nil if on nothing
	content *formats.Image // to be copied; nil: nothing
	parent  *openParent    // the top of layers, open; nil without
}

// sizeBytes returns the source's guest size, 0 if there is none.
func (b *base) sizeBytes() int64 {
	switch {
	case b.content != nil:
		return b.content.Info().SizeBytes
	case b.parent != nil:
		return b.parent.sizeBytes
	}
	return 0
}

// chooseSize returns the guest size of the new volume.
func (b *base) chooseSize(req CreateVolumeRequest) (int64, error) {
	source := b.sizeBytes()
	size := req.SizeBytes
	if size == 0 {
		size = source
	}
	if size == 0 {
		size = DefaultSizeBytes
		if req.LimitBytes > 0 {
			size = min(size, req.LimitBytes)
		}
	}
	if size < source {
		return 0, fmt.Errorf("size %d: %w: the source %v has %d bytes, and a volume made from it cannot be smaller", size, block.ErrOutOfRange, req.Source, source)
	}
	return roundSize(b.format, size, req.LimitBytes)
}

// roundSize rounds a guest size up to what a format can do.
func roundSize(format formats.Format, size, limit int64) (int64, error) {
	o := format.Options()
	if m := o.SizeMultiple; m > 1 {
		if size > math.MaxInt64-m {
			return 0, fmt.Errorf("size %d: %w", size, block.ErrOutOfRange)
		}
		size = (size + m - 1) / m * m
	}
	if limit > 0 && size > limit {
		return 0, fmt.Errorf("size %d: %w: the limit is %d, and a %s image's size is a multiple of %d", size, block.ErrOutOfRange, limit, format.Name(), o.SizeMultiple)
	}
	if o.MaxSizeBytes > 0 && size > o.MaxSizeBytes {
		return 0, fmt.Errorf("size %d: %w: a %s image has at most %d bytes", size, block.ErrOutOfRange, format.Name(), o.MaxSizeBytes)
	}
	return size, nil
}

// fill makes the volume's own layer.
func (b *base) fill(ctx context.Context, fsys vfs.FS, own LayerRecord, rec Record) error {
	if b.parent != nil {
		return createOverlay(ctx, fsys, own, rec.SizeBytes, rec.Parameters, b.parent.layer)
	}
	if b.content != nil {
		return formats.Convert(ctx, b.content, b.format, baseRequest(fsys, own, rec.SizeBytes, rec.Parameters), nil)
	}
	return createBase(ctx, fsys, own, rec.SizeBytes, rec.Parameters)
}

func baseRequest(fsys vfs.FS, own LayerRecord, size int64, params Parameters) formats.CreateRequest {
	return formats.CreateRequest{
		FS: fsys, Name: own.File, SizeBytes: size,
		Subformat: params.Subformat, ClusterBytes: params.ClusterBytes,
		Preallocation: formats.Preallocation(params.Preallocation),
	}
}

// createBase makes an empty image that stands on nothing.
func createBase(ctx context.Context, fsys vfs.FS, own LayerRecord, size int64, params Parameters) error {
	format, err := formats.Lookup(own.Format)
	if err != nil {
		return err
	}
	return format.Create(ctx, baseRequest(fsys, own, size, params))
}

func (b *base) close() {
	if b.content != nil {
		_ = b.content.Close() // it was only read
	}
	if b.parent != nil {
		_ = b.parent.layer.Close()
	}
}
