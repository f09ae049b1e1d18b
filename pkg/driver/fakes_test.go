package driver

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/url"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// faults makes calls fail, or wait, for tests.
type faults struct {
	mu    sync.Mutex
	errs  map[string]error         // by method: what it returns
	gates map[string]chan struct{} // by method: it waits until this is closed
	calls map[string]int
	step  func() // called before every call takes effect
}

func (f *faults) fail(method string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.errs == nil {
		f.errs = map[string]error{}
	}
	f.errs[method] = err
}

// hold makes a method wait; the returned function lets it go on.
func (f *faults) hold(method string) (release func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gates == nil {
		f.gates = map[string]chan struct{}{}
	}
	gate := make(chan struct{})
	f.gates[method] = gate
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.gates[method] == gate {
			delete(f.gates, method)
			close(gate)
		}
	}
}

func (f *faults) enter(method string) error {
	f.mu.Lock()
	if f.calls == nil {
		f.calls = map[string]int{}
	}
	f.calls[method]++
	err, gate, step := f.errs[method], f.gates[method], f.step
	f.mu.Unlock()
	if step != nil {
		step()
	}
	if gate != nil {
		<-gate
	}
	return err
}

func (f *faults) count(method string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[method]
}

const fakeDefaultSize = 1 << 30

// fakeStore keeps volumes in memory.
type fakeStore struct {
	faults
	data      sync.Mutex
	volumes   map[string]*fakeVolume
	snapshots map[string]Snapshot // by "<volume>@<name>"
	images    map[string]int64    // sizes of files under images/
}

type fakeVolume struct {
	Volume
	spec         VolumeSpec
	epoch        int64
	publications map[string]Publication
}

func newFakeStore() *fakeStore {
	return &fakeStore{volumes: map[string]*fakeVolume{}, snapshots: map[string]Snapshot{}, images: map[string]int64{}}
}

func (s *fakeStore) CreateVolume(_ context.Context, spec VolumeSpec) (Volume, error) {
	if err := s.enter("CreateVolume"); err != nil {
		return Volume{}, err
	}
	s.data.Lock()
	defer s.data.Unlock()
	if old := s.volumes[spec.Name]; old != nil {
		if old.spec.Source != spec.Source || old.spec.Parameters != spec.Parameters {
			return Volume{}, fmt.Errorf("volume %s: %w", spec.Name, block.ErrExists)
		}
		return old.Volume, nil
	}
	size, err := s.sizeOf(spec)
	if err != nil {
		return Volume{}, err
	}
	v := &fakeVolume{
		Volume:       Volume{Name: spec.Name, SizeBytes: size, Source: spec.Source, Parameters: spec.Parameters},
		spec:         spec,
		publications: map[string]Publication{},
	}
	s.volumes[spec.Name] = v
	return v.Volume, nil
}

func (s *fakeStore) sizeOf(spec VolumeSpec) (int64, error) {
	var least int64
	switch {
	case spec.Source.Volume != "":
		source := s.volumes[spec.Source.Volume]
		if source == nil {
			return 0, fmt.Errorf("volume %s: %w", spec.Source.Volume, block.ErrNotFound)
		}
		least = source.SizeBytes
	case spec.Source.Snapshot != "":
		source, ok := s.snapshots[spec.Source.Snapshot]
		if !ok {
			return 0, fmt.Errorf("snapshot %s: %w", spec.Source.Snapshot, block.ErrNotFound)
		}
		least = source.SizeBytes
	case spec.Source.Image != "":
		size, ok := s.images[spec.Source.Image]
		if !ok {
			return 0, fmt.Errorf("image %s: %w", spec.Source.Image, block.ErrNotFound)
		}
		least = size
	case spec.SizeBytes == 0:
		least = fakeDefaultSize
	}
	if spec.SizeBytes > 0 && spec.SizeBytes < least || spec.LimitBytes > 0 && max(spec.SizeBytes, least) > spec.LimitBytes {
		return 0, fmt.Errorf("source of %d bytes: %w", least, block.ErrOutOfRange)
	}
	return max(spec.SizeBytes, least), nil
}

func (s *fakeStore) Volume(_ context.Context, name string) (Volume, error) {
	if err := s.enter("Volume"); err != nil {
		return Volume{}, err
	}
	s.data.Lock()
	defer s.data.Unlock()
	v := s.volumes[name]
	if v == nil {
		return Volume{}, fmt.Errorf("volume %s: %w", name, block.ErrNotFound)
	}
	return v.Volume, nil
}

func (s *fakeStore) Volumes(context.Context) ([]Volume, error) {
	if err := s.enter("Volumes"); err != nil {
		return nil, err
	}
	s.data.Lock()
	defer s.data.Unlock()
	var list []Volume
	for _, name := range slices.Sorted(maps.Keys(s.volumes)) {
		list = append(list, s.volumes[name].Volume)
	}
	return list, nil
}

func (s *fakeStore) DeleteVolume(_ context.Context, name string) error {
	if err := s.enter("DeleteVolume"); err != nil {
		return err
	}
	s.data.Lock()
	defer s.data.Unlock()
	if v := s.volumes[name]; v != nil && len(v.publications) > 0 {
		return fmt.Errorf("volume %s is published: %w", name, block.ErrBusy)
	}
	delete(s.volumes, name)
	return nil
}

func (s *fakeStore) EnsureImageVolume(ctx context.Context, image string) (Volume, error) {
	name, err := s.ImageVolumeName(image)
	if err != nil {
		return Volume{}, err
	}
	if _, err := s.CreateVolume(ctx, VolumeSpec{Name: name, Source: Source{Image: image, ImageMode: ImageOverlay}}); err != nil {
		return Volume{}, err
	}
	s.data.Lock()
	defer s.data.Unlock()
	s.volumes[name].Image = image
	return s.volumes[name].Volume, nil
}

func (s *fakeStore) ImageVolumeName(image string) (string, error) {
	return "images%2F" + url.PathEscape(image), nil
}

func (s *fakeStore) Publish(_ context.Context, p Publication) (int64, error) {
	if err := s.enter("Publish"); err != nil {
		return 0, err
	}
	s.data.Lock()
	defer s.data.Unlock()
	v := s.volumes[p.Volume]
	if v == nil {
		return 0, fmt.Errorf("volume %s: %w", p.Volume, block.ErrNotFound)
	}
	if have, ok := v.publications[p.Node]; ok {
		if have != p {
			return 0, fmt.Errorf("published otherwise: %w", block.ErrExists)
		}
		return v.epoch, nil
	}
	for node, have := range v.publications {
		if !have.Shared || !p.Shared {
			return 0, fmt.Errorf("published to node %s: %w", node, block.ErrBusy)
		}
	}
	v.epoch++
	v.publications[p.Node] = p
	v.Nodes = slices.Sorted(maps.Keys(v.publications))
	return v.epoch, nil
}

func (s *fakeStore) Unpublish(_ context.Context, name, node string) error {
	if err := s.enter("Unpublish"); err != nil {
		return err
	}
	s.data.Lock()
	defer s.data.Unlock()
	if v := s.volumes[name]; v != nil {
		maps.DeleteFunc(v.publications, func(have string, _ Publication) bool { return node == "" || have == node })
		v.Nodes = slices.Sorted(maps.Keys(v.publications))
	}
	return nil
}

func (s *fakeStore) Expand(_ context.Context, name string, size, limit int64) (Volume, error) {
	if err := s.enter("Expand"); err != nil {
		return Volume{}, err
	}
	s.data.Lock()
	defer s.data.Unlock()
	v := s.volumes[name]
	if v == nil {
		return Volume{}, fmt.Errorf("volume %s: %w", name, block.ErrNotFound)
	}
	v.SizeBytes = max(v.SizeBytes, size)
	return v.Volume, nil
}

func (s *fakeStore) ChangeLimits(_ context.Context, name string, change LimitsChange) error {
	if err := s.enter("ChangeLimits"); err != nil {
		return err
	}
	s.data.Lock()
	defer s.data.Unlock()
	v := s.volumes[name]
	if v == nil {
		return fmt.Errorf("volume %s: %w", name, block.ErrNotFound)
	}
	change.Apply(&v.spec.Limits)
	return nil
}

func (s *fakeStore) CreateSnapshot(_ context.Context, volume, name string) (Snapshot, error) {
	if err := s.enter("CreateSnapshot"); err != nil {
		return Snapshot{}, err
	}
	s.data.Lock()
	defer s.data.Unlock()
	for _, have := range s.snapshots {
		if have.Name == name && have.Volume != volume {
			return Snapshot{}, fmt.Errorf("snapshot %s of volume %s: %w", name, have.Volume, block.ErrExists)
		}
	}
	v := s.volumes[volume]
	if v == nil {
		return Snapshot{}, fmt.Errorf("volume %s: %w", volume, block.ErrNotFound)
	}
	key := volume + "@" + name
	if _, ok := s.snapshots[key]; !ok {
		s.snapshots[key] = Snapshot{Volume: volume, VolumeImage: v.Image, Name: name, Taken: time.Now(), SizeBytes: v.SizeBytes, Ready: true}
	}
	return s.snapshots[key], nil
}

func (s *fakeStore) Snapshot(_ context.Context, volume, name string) (Snapshot, error) {
	if err := s.enter("Snapshot"); err != nil {
		return Snapshot{}, err
	}
	s.data.Lock()
	defer s.data.Unlock()
	have, ok := s.snapshots[volume+"@"+name]
	if !ok {
		return Snapshot{}, fmt.Errorf("snapshot %s: %w", name, block.ErrNotFound)
	}
	return have, nil
}

func (s *fakeStore) Snapshots(context.Context) ([]Snapshot, error) {
	if err := s.enter("Snapshots"); err != nil {
		return nil, err
	}
	s.data.Lock()
	defer s.data.Unlock()
	list := slices.Collect(maps.Values(s.snapshots))
	slices.SortFunc(list, func(a, b Snapshot) int {
		return cmp.Or(cmp.Compare(a.Volume, b.Volume), cmp.Compare(a.Name, b.Name))
	})
	return list, nil
}

func (s *fakeStore) DeleteSnapshot(_ context.Context, volume, name string) error {
	if err := s.enter("DeleteSnapshot"); err != nil {
		return err
	}
	s.data.Lock()
	defer s.data.Unlock()
	delete(s.snapshots, volume+"@"+name)
	return nil
}

func (s *fakeStore) AvailableBytes(context.Context) (int64, error) {
	return 1 << 40, s.enter("AvailableBytes")
}

// fakeAttacher has devices that are names, of the sizes that the store's volumes have.
type fakeAttacher struct {
	faults
	store   *fakeStore
	mounter *fakeMounter // knows which devices are in use
	data    sync.Mutex
	devices map[string]*fakeDevice // by handle
	next    int
}

type fakeDevice struct {
	Attachment
	spec AttachSpec
}

func newFakeAttacher(store *fakeStore, mounter *fakeMounter) *fakeAttacher {
	return &fakeAttacher{store: store, mounter: mounter, devices: map[string]*fakeDevice{}}
}

func (a *fakeAttacher) Attach(ctx context.Context, spec AttachSpec) (Attachment, error) {
	if err := a.enter("Attach"); err != nil {
		return Attachment{}, err
	}
	vol, err := a.store.Volume(ctx, spec.Volume)
	if err != nil {
		return Attachment{}, err
	}
	a.data.Lock()
	defer a.data.Unlock()
	if d := a.devices[spec.Handle]; d != nil && !d.Lost {
		if d.spec != spec {
			return Attachment{}, fmt.Errorf("attached otherwise: %w", block.ErrExists)
		}
		return d.Attachment, nil
	}
	a.next++
	d := &fakeDevice{spec: spec, Attachment: Attachment{
		Device: fmt.Sprintf("/dev/fake%d", a.next), SizeBytes: vol.SizeBytes, ReadOnly: spec.ReadOnly,
	}}
	a.devices[spec.Handle] = d
	return d.Attachment, nil
}

func (a *fakeAttacher) Attachment(_ context.Context, handle string) (Attachment, error) {
	if err := a.enter("Attachment"); err != nil {
		return Attachment{}, err
	}
	a.data.Lock()
	defer a.data.Unlock()
	d := a.devices[handle]
	if d == nil {
		return Attachment{}, fmt.Errorf("attachment %s: %w", handle, block.ErrNotFound)
	}
	return d.Attachment, nil
}

func (a *fakeAttacher) Resize(_ context.Context, handle string) (Attachment, error) {
	if err := a.enter("Resize"); err != nil {
		return Attachment{}, err
	}
	a.data.Lock()
	defer a.data.Unlock()
	d := a.devices[handle]
	if d == nil {
		return Attachment{}, fmt.Errorf("attachment %s: %w", handle, block.ErrNotFound)
	}
	a.store.data.Lock()
	defer a.store.data.Unlock()
	if vol := a.store.volumes[d.spec.Volume]; vol != nil {
		d.SizeBytes = vol.SizeBytes
	}
	return d.Attachment, nil
}

func (a *fakeAttacher) Transports(context.Context) ([]string, error) {
	if err := a.enter("Transports"); err != nil {
		return nil, err
	}
	return []string{"nbd", "fuse"}, nil
}

func (a *fakeAttacher) Detach(_ context.Context, handle string) error {
	if err := a.enter("Detach"); err != nil {
		return err
	}
	a.data.Lock()
	defer a.data.Unlock()
	d := a.devices[handle]
	if d == nil {
		return fmt.Errorf("attachment %s: %w", handle, block.ErrNotFound)
	}
	if paths := a.mounter.of(d.Device); len(paths) > 0 {
		return fmt.Errorf("%s is in use: %w", d.Device, block.ErrBusy)
	}
	a.mounter.forget(d.Device)
	delete(a.devices, handle)
	return nil
}

// fakeMounter is a mount table in memory.
type fakeMounter struct {
	faults
	data    sync.Mutex
	mounts  []Mount
	formats map[string]string // by device
	options map[string][]string
	grown   map[string]int
}

func newFakeMounter() *fakeMounter {
	return &fakeMounter{formats: map[string]string{}, options: map[string][]string{}, grown: map[string]int{}}
}

func (m *fakeMounter) of(device string) []string {
	m.data.Lock()
	defer m.data.Unlock()
	var paths []string
	for _, mount := range m.mounts {
		if mount.Device == device {
			paths = append(paths, mount.Path)
		}
	}
	return paths
}

func (m *fakeMounter) forget(device string) {
	m.data.Lock()
	defer m.data.Unlock()
	delete(m.formats, device)
}

func (m *fakeMounter) setFileSystem(device, fsType string) {
	m.data.Lock()
	defer m.data.Unlock()
	m.formats[device] = fsType
}

func (m *fakeMounter) Mounts() ([]Mount, error) {
	if err := m.enter("Mounts"); err != nil {
		return nil, err
	}
	m.data.Lock()
	defer m.data.Unlock()
	return slices.Clone(m.mounts), nil
}

func (m *fakeMounter) FileSystem(device string) (string, error) {
	if err := m.enter("FileSystem"); err != nil {
		return "", err
	}
	m.data.Lock()
	defer m.data.Unlock()
	return m.formats[device], nil
}

func (m *fakeMounter) FormatAndMount(device, path, fsType string, options []string) error {
	if err := m.enter("FormatAndMount"); err != nil {
		return err
	}
	if info, err := os.Stat(path); err != nil || !info.IsDir() {
		return fmt.Errorf("mount point %s: %w", path, block.ErrNotFound)
	}
	m.data.Lock()
	defer m.data.Unlock()
	m.formats[device] = fsType
	m.options[path] = options
	m.mounts = append(m.mounts, Mount{Path: path, Device: device, FSType: fsType, ReadOnly: slices.Contains(options, "ro")})
	return nil
}

func (m *fakeMounter) Bind(source, path string, readOnly bool) error {
	if err := m.enter("Bind"); err != nil {
		return err
	}
	if _, err := os.Stat(path); err != nil {
		return fmt.Errorf("mount point: %w", err)
	}
	m.data.Lock()
	defer m.data.Unlock()
	made := Mount{Path: path, Device: source}
	for _, mount := range m.mounts {
		if mount.Path == source {
			made = Mount{Path: path, Device: mount.Device, FSType: mount.FSType, ReadOnly: mount.ReadOnly || readOnly}
		}
	}
	m.mounts = append(m.mounts, made)
	return nil
}

func (m *fakeMounter) RemountReadOnly(path string) error {
	if err := m.enter("RemountReadOnly"); err != nil {
		return err
	}
	m.data.Lock()
	defer m.data.Unlock()
	for i := range m.mounts {
		if m.mounts[i].Path == path {
			m.mounts[i].ReadOnly = true
		}
	}
	return nil
}

func (m *fakeMounter) Unmount(path string) error {
	if err := m.enter("Unmount"); err != nil {
		return err
	}
	m.data.Lock()
	defer m.data.Unlock()
	for i, mount := range slices.Backward(m.mounts) {
		if mount.Path == path {
			m.mounts = slices.Delete(m.mounts, i, i+1)
			return nil
		}
	}
	return fmt.Errorf("%s: %w", path, block.ErrNotFound)
}

func (m *fakeMounter) Grow(device, _ string) error {
	if err := m.enter("Grow"); err != nil {
		return err
	}
	m.data.Lock()
	defer m.data.Unlock()
	m.grown[device]++
	return nil
}

func (m *fakeMounter) Usage(string) (Usage, error) {
	return Usage{TotalBytes: 100, UsedBytes: 40, AvailableBytes: 60, TotalInodes: 10, UsedInodes: 4, AvailableInodes: 6}, m.enter("Usage")
}
