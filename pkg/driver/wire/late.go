package wire

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
)

// LateStore is a store of the driver's that may not be there yet: until Set it answers
// with an error that wraps driver.ErrUnavailable and says why. So a server that is down
// costs the volumes on it, not those in other stores.
type LateStore struct {
	mu      sync.Mutex
	store   driver.Store
	problem error
}

var errOpening = errors.New("it is being opened")

// Set lets the store be there.
func (l *LateStore) Set(s driver.Store) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.store, l.problem = s, nil
}

// SetProblem says why the store is not there.
func (l *LateStore) SetProblem(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.problem = err
}

// Problem returns why the store is not there; nil if it is.
func (l *LateStore) Problem() error {
	_, err := l.now()
	return err
}

func (l *LateStore) now() (driver.Store, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.store != nil {
		return l.store, nil
	}
	problem := l.problem
	if problem == nil {
		problem = errOpening
	}
	// What the problem wraps, such as block.ErrNotFound, would be taken for the volume's.
	return nil, fmt.Errorf("the store is %w: %v", driver.ErrUnavailable, problem)
}

// with calls a method of the store, if it is there.
func with[T any](l *LateStore, call func(driver.Store) (T, error)) (T, error) {
	s, err := l.now()
	if err != nil {
		var none T
		return none, err
	}
	return call(s)
}

// do is with for methods that return nothing but an error.
func (l *LateStore) do(call func(driver.Store) error) error {
	s, err := l.now()
	if err != nil {
		return err
	}
	return call(s)
}

// CreateVolume implements driver.Store.
func (l *LateStore) CreateVolume(ctx context.Context, spec driver.VolumeSpec) (driver.Volume, error) {
	return with(l, func(s driver.Store) (driver.Volume, error) { return s.CreateVolume(ctx, spec) })
}

// Volume implements driver.Store.
func (l *LateStore) Volume(ctx context.Context, name string) (driver.Volume, error) {
	return with(l, func(s driver.Store) (driver.Volume, error) { return s.Volume(ctx, name) })
}

// Volumes implements driver.Store.
func (l *LateStore) Volumes(ctx context.Context) ([]driver.Volume, error) {
	return with(l, func(s driver.Store) ([]driver.Volume, error) { return s.Volumes(ctx) })
}

// DeleteVolume implements driver.Store.
func (l *LateStore) DeleteVolume(ctx context.Context, name string) error {
	return l.do(func(s driver.Store) error { return s.DeleteVolume(ctx, name) })
}

// EnsureImageVolume implements driver.Store.
func (l *LateStore) EnsureImageVolume(ctx context.Context, image string) (driver.Volume, error) {
	return with(l, func(s driver.Store) (driver.Volume, error) { return s.EnsureImageVolume(ctx, image) })
}

// ImageVolumeName implements driver.Store; it is known without the store.
func (l *LateStore) ImageVolumeName(image string) (string, error) {
	return store.ImageVolumeName(image)
}

// Publish implements driver.Store.
func (l *LateStore) Publish(ctx context.Context, p driver.Publication) (int64, error) {
	return with(l, func(s driver.Store) (int64, error) { return s.Publish(ctx, p) })
}

// Unpublish implements driver.Store.
func (l *LateStore) Unpublish(ctx context.Context, name, node string) error {
	return l.do(func(s driver.Store) error { return s.Unpublish(ctx, name, node) })
}

// Expand implements driver.Store.
func (l *LateStore) Expand(ctx context.Context, name string, sizeBytes, limitBytes int64) (driver.Volume, error) {
	return with(l, func(s driver.Store) (driver.Volume, error) { return s.Expand(ctx, name, sizeBytes, limitBytes) })
}

// ChangeLimits implements driver.Store.
func (l *LateStore) ChangeLimits(ctx context.Context, name string, change driver.LimitsChange) error {
	return l.do(func(s driver.Store) error { return s.ChangeLimits(ctx, name, change) })
}

// CreateSnapshot implements driver.Store.
func (l *LateStore) CreateSnapshot(ctx context.Context, volume, snapshot string) (driver.Snapshot, error) {
	return with(l, func(s driver.Store) (driver.Snapshot, error) { return s.CreateSnapshot(ctx, volume, snapshot) })
}

// Snapshot implements driver.Store.
func (l *LateStore) Snapshot(ctx context.Context, volume, snapshot string) (driver.Snapshot, error) {
	return with(l, func(s driver.Store) (driver.Snapshot, error) { return s.Snapshot(ctx, volume, snapshot) })
}

// Snapshots implements driver.Store.
func (l *LateStore) Snapshots(ctx context.Context) ([]driver.Snapshot, error) {
	return with(l, func(s driver.Store) ([]driver.Snapshot, error) { return s.Snapshots(ctx) })
}

// DeleteSnapshot implements driver.Store.
func (l *LateStore) DeleteSnapshot(ctx context.Context, volume, snapshot string) error {
	return l.do(func(s driver.Store) error { return s.DeleteSnapshot(ctx, volume, snapshot) })
}

// AvailableBytes implements driver.Store.
func (l *LateStore) AvailableBytes(ctx context.Context) (int64, error) {
	return with(l, func(s driver.Store) (int64, error) { return s.AvailableBytes(ctx) })
}
