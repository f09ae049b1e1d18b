package driver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// life is a driver that dies at a step: what the driver does through its interfaces is
// counted, and from step diesAt on nothing of it happens.
type life struct {
	controller *controller
	node       *node

	mu     sync.Mutex
	steps  int
	diesAt int
	dead   chan struct{}
}

func newLife(b *bench, diesAt int) *life {
	l := &life{
		controller: newController(ControllerConfig{Stores: map[string]Store{"main": b.store}, Formats: testFormats}),
		node:       newNode(NodeConfig{ID: "node-1", Attacher: b.attacher, Mounter: b.mounter}),
		diesAt:     diesAt,
		dead:       make(chan struct{}),
	}
	for _, f := range []*faults{&b.store.faults, &b.attacher.faults, &b.mounter.faults} {
		f.mu.Lock()
		f.step = l.step
		f.mu.Unlock()
	}
	return l
}

// step lets a step happen, or, when the driver is dead, never returns.
func (l *life) step() {
	l.mu.Lock()
	died := l.steps == l.diesAt
	if !died {
		l.steps++
	}
	l.mu.Unlock()
	if died {
		close(l.dead)
		select {}
	}
}

// outlives runs a call and reports whether the driver lived to answer it.
func (l *life) outlives(call func(*life) error) (bool, error) {
	answer := make(chan error, 1)
	go func() { answer <- call(l) }()
	select {
	case err := <-answer:
		return true, err
	case <-l.dead:
		return false, nil
	}
}

// calls is a volume's life as a CO sees it. Each is repeated until it is answered.
func calls(b *bench, c *csi.VolumeCapability) []func(*life) error {
	ctx := context.Background()
	const id = "main/v"
	staging, target, second := b.path("staging"), b.path("pods/target"), b.path("pods/second")
	var published map[string]string
	publish := func(target string, readOnly bool) func(*life) error {
		return func(l *life) error {
			_, err := l.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: id, StagingTargetPath: staging, TargetPath: target, VolumeCapability: c, Readonly: readOnly})
			return err
		}
	}
	unpublish := func(target string) func(*life) error {
		return func(l *life) error {
			_, err := l.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target})
			return err
		}
	}
	return []func(*life) error{
		func(l *life) error {
			_, err := l.controller.CreateVolume(ctx, &csi.CreateVolumeRequest{Name: "v", VolumeCapabilities: []*csi.VolumeCapability{c}})
			return err
		},
		func(l *life) error {
			resp, err := l.controller.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{VolumeId: id, NodeId: "node-1", VolumeCapability: c})
			if published != nil && err == nil && fmt.Sprint(published) != fmt.Sprint(resp.GetPublishContext()) {
				return fmt.Errorf("published as %v, then as %v", published, resp.GetPublishContext())
			}
			published = resp.GetPublishContext()
			return err
		},
		func(l *life) error {
			_, err := l.node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: staging, VolumeCapability: c, PublishContext: published})
			return err
		},
		publish(target, false),
		publish(second, c.GetBlock() == nil),
		func(l *life) error {
			_, err := l.controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
			return err
		},
		func(l *life) error {
			_, err := l.controller.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: 2 << 30}})
			return err
		},
		func(l *life) error {
			_, err := l.node.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: target, CapacityRange: &csi.CapacityRange{RequiredBytes: 2 << 30}})
			return err
		},
		unpublish(second),
		unpublish(target),
		func(l *life) error {
			_, err := l.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: staging})
			return err
		},
		func(l *life) error {
			_, err := l.controller.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: id, NodeId: "node-1"})
			return err
		},
		func(l *life) error {
			_, err := l.controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: "main/v@s"})
			return err
		},
		func(l *life) error {
			_, err := l.controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
			return err
		},
	}
}

// TestKilledBetweenAnyTwoSteps lets the driver die before each of its steps in turn. Its
// successor is asked again for what was not answered, and all must succeed and leave
// nothing.
func TestKilledBetweenAnyTwoSteps(t *testing.T) {
	for name, c := range map[string]*csi.VolumeCapability{"block": blockWriter, "mount": ext4Writer} {
		t.Run(name, func(t *testing.T) {
			kills := 0
			for diesAt := 0; ; diesAt++ {
				if !liveAndDie(t, c, diesAt) {
					break
				}
				kills++
			}
			t.Logf("killed at %d steps", kills)
			if kills < 25 {
				t.Errorf("only %d steps were seen", kills)
			}
		})
	}
}

// liveAndDie reports whether the driver died.
func liveAndDie(t *testing.T, c *csi.VolumeCapability, diesAt int) (died bool) {
	t.Helper()
	b := &bench{t: t, store: newFakeStore(), mounter: newFakeMounter(), dir: t.TempDir()}
	b.attacher = newFakeAttacher(b.store, b.mounter)
	current := newLife(b, diesAt)
	for i, call := range calls(b, c) {
		answered, err := current.outlives(call)
		if !answered {
			died = true
			current = newLife(b, -1)
			_, err = current.outlives(call)
		}
		if err != nil {
			t.Fatalf("killed at step %d: call %d: %v", diesAt, i, err)
		}
	}
	if len(b.store.volumes)+len(b.store.snapshots)+len(b.attacher.devices)+len(b.mounter.mounts) > 0 {
		t.Errorf("killed at step %d: left %v, %v, %v, %v", diesAt, b.store.volumes, b.store.snapshots, b.attacher.devices, b.mounter.mounts)
	}
	if err := checkPaths(b.dir); err != nil {
		t.Errorf("killed at step %d: %v", diesAt, err)
	}
	return died
}

// checkPaths returns an error if targets are left.
func checkPaths(dir string) error {
	left, err := filepath.Glob(filepath.Join(dir, "pods", "*"))
	if err != nil || len(left) > 0 {
		return fmt.Errorf("left: %s (%w)", strings.Join(left, ", "), err)
	}
	if entries, err := os.ReadDir(filepath.Join(dir, "staging")); err == nil && len(entries) > 0 {
		return fmt.Errorf("files in the staging directory: %v", entries)
	}
	return nil
}
