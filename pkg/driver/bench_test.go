package driver

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// testFormats are what the tests' StorageClasses may name.
var testFormats = []Format{
	{Name: "vmdk", Subformats: []string{"monolithicSparse", "monolithicFlat"}, MinClusterSize: 4 << 10, MaxClusterSize: 2 << 20, Preallocations: []string{"off", "full"}},
	{Name: "raw", Preallocations: []string{"off", "falloc"}},
}

// bench is a driver on fakes, behind a real gRPC connection.
type bench struct {
	t             *testing.T
	store, second *fakeStore
	attacher      *fakeAttacher
	mounter       *fakeMounter
	socket        string
	dir           string // for staging and target paths
	identity      csi.IdentityClient
	controller    csi.ControllerClient
	node          csi.NodeClient
}

// newBench starts a driver with one store, "main".
func newBench(t *testing.T) *bench { return startBench(t, false) }

// newBenchOfTwo starts a driver with two stores, "main" and "second".
func newBenchOfTwo(t *testing.T) *bench { return startBench(t, true) }

func startBench(t *testing.T, two bool) *bench {
	t.Helper()
	dir, err := os.MkdirTemp("", "drv")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b := &bench{t: t, store: newFakeStore(), second: newFakeStore(), mounter: newFakeMounter(), dir: dir, socket: filepath.Join(dir, "csi.sock")}
	b.attacher = newFakeAttacher(b.store, b.mounter)
	stores := map[string]Store{"main": b.store}
	if two {
		stores["second"] = b.second
	}
	d, err := New(Config{
		Version:    "test",
		Controller: &ControllerConfig{Stores: stores, Formats: testFormats, Nodes: []string{"node-1", "node-2"}},
		Node:       &NodeConfig{ID: "node-1", MaxVolumes: 7, Attacher: b.attacher, Mounter: b.mounter},
	})
	if err != nil {
		t.Fatal(err)
	}
	b.connect(runDriver(t, d, b.socket))
	return b
}

// runDriver runs a driver until the test ends and returns a connection to it.
func runDriver(t *testing.T, d *Driver, socket string) *grpc.ClientConn {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx, "unix://"+socket) }()
	conn := dial(t, socket)
	t.Cleanup(func() {
		conn.Close()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	probe, cancelProbe := context.WithTimeout(ctx, 30*time.Second)
	defer cancelProbe()
	if _, err := csi.NewIdentityClient(conn).Probe(probe, &csi.ProbeRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatalf("Probe: %v", err)
	}
	return conn
}

// dial returns a connection that is closed when the test ends.
func dial(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func (b *bench) connect(conn *grpc.ClientConn) {
	b.identity = csi.NewIdentityClient(conn)
	b.controller = csi.NewControllerClient(conn)
	b.node = csi.NewNodeClient(conn)
}

// path returns an absolute path for a mount point, which does not exist.
func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

// capability makes volume capabilities: of raw block for fsType "block".
func capability(fsType string, mode csi.VolumeCapability_AccessMode_Mode, flags ...string) *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode}}
	if fsType == "block" {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fsType, MountFlags: flags}}
	}
	return c
}

var (
	ext4Writer  = capability("ext4", csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER)
	blockWriter = capability("block", csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER)
)

// create makes a volume of a GiB and returns its id.
func (b *bench) create(name string) string {
	b.t.Helper()
	resp, err := b.controller.CreateVolume(b.t.Context(), &csi.CreateVolumeRequest{
		Name: name, VolumeCapabilities: []*csi.VolumeCapability{ext4Writer},
		CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 30}, Parameters: map[string]string{"store": "main"},
	})
	if err != nil {
		b.t.Fatalf("CreateVolume: %v", err)
	}
	return resp.GetVolume().GetVolumeId()
}

// staged is a volume on its way to a pod.
type staged struct {
	*bench
	id             string
	capability     *csi.VolumeCapability
	publishContext map[string]string
	staging        string
}

// publish publishes a volume to node-1, for the node calls to use.
func (b *bench) publish(id string, c *csi.VolumeCapability) *staged {
	b.t.Helper()
	resp, err := b.controller.ControllerPublishVolume(b.t.Context(), &csi.ControllerPublishVolumeRequest{VolumeId: id, NodeId: "node-1", VolumeCapability: c})
	if err != nil {
		b.t.Fatalf("ControllerPublishVolume: %v", err)
	}
	return &staged{bench: b, id: id, capability: c, publishContext: resp.GetPublishContext(), staging: b.path("staging")}
}

func (s *staged) stageRequest() *csi.NodeStageVolumeRequest {
	return &csi.NodeStageVolumeRequest{VolumeId: s.id, StagingTargetPath: s.staging, VolumeCapability: s.capability, PublishContext: s.publishContext}
}

func (s *staged) stage() error {
	_, err := s.node.NodeStageVolume(s.t.Context(), s.stageRequest())
	return err
}

func (s *staged) publishAt(target string, readOnly bool) error {
	_, err := s.node.NodePublishVolume(s.t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: s.id, StagingTargetPath: s.staging, TargetPath: target, VolumeCapability: s.capability, Readonly: readOnly, PublishContext: s.publishContext,
	})
	return err
}

func (s *staged) unpublishAt(target string) error {
	_, err := s.node.NodeUnpublishVolume(s.t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: s.id, TargetPath: target})
	return err
}

func (s *staged) unstage() error {
	_, err := s.node.NodeUnstageVolume(s.t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: s.id, StagingTargetPath: s.staging})
	return err
}

// wantCode fails the test unless err is of a code.
func wantCode(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: got %v (%v), want %v", what, got, err, want)
	}
}

// must fails the test at once on an error.
func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// waitUntil polls for a condition.
func waitUntil(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}
