package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

const (
	singleWriter = csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	oneWriter    = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	oneReader    = csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
)

func TestNode_Invalid(t *testing.T) {
	b := newBench(t)
	s := b.publish(b.create("v"), ext4Writer)
	stage := func(change func(*csi.NodeStageVolumeRequest)) error {
		req := s.stageRequest()
		change(req)
		_, err := b.node.NodeStageVolume(t.Context(), req)
		return err
	}
	for name, test := range map[string]struct {
		err  error
		want codes.Code
	}{
		"no id":         {stage(func(r *csi.NodeStageVolumeRequest) { r.VolumeId = "" }), codes.InvalidArgument},
		"no such id":    {stage(func(r *csi.NodeStageVolumeRequest) { r.VolumeId = "v" }), codes.NotFound},
		"no path":       {stage(func(r *csi.NodeStageVolumeRequest) { r.StagingTargetPath = "" }), codes.InvalidArgument},
		"relative path": {stage(func(r *csi.NodeStageVolumeRequest) { r.StagingTargetPath = "staging" }), codes.InvalidArgument},
		"root":          {stage(func(r *csi.NodeStageVolumeRequest) { r.StagingTargetPath = "/x/.." }), codes.InvalidArgument},
		"no capability": {stage(func(r *csi.NodeStageVolumeRequest) { r.VolumeCapability = nil }), codes.InvalidArgument},
		"no epoch":      {stage(func(r *csi.NodeStageVolumeRequest) { r.PublishContext = nil }), codes.InvalidArgument},
		"bad epoch":     {stage(func(r *csi.NodeStageVolumeRequest) { r.PublishContext = map[string]string{"epoch": "0"} }), codes.InvalidArgument},
		"volume elsewhere": {stage(func(r *csi.NodeStageVolumeRequest) {
			r.PublishContext = map[string]string{"epoch": "1", "volume": "../v"}
		}), codes.InvalidArgument},
		"transport":         {stage(func(r *csi.NodeStageVolumeRequest) { r.VolumeContext = map[string]string{"transport": "iscsi"} }), codes.InvalidArgument},
		"limits":            {stage(func(r *csi.NodeStageVolumeRequest) { r.VolumeContext = map[string]string{"iops": "1"} }), codes.InvalidArgument},
		"publish unstaged":  {s.publishAt(b.path("target"), false), codes.FailedPrecondition},
		"publish to itself": {s.publishAt("target", false), codes.InvalidArgument},
	} {
		wantCode(t, name, test.err, test.want)
	}
	if len(b.attacher.devices) > 0 || len(b.mounter.mounts) > 0 {
		t.Errorf("left: %v, %v", b.attacher.devices, b.mounter.mounts)
	}
}

func TestNode_FileSystem(t *testing.T) {
	for name, test := range map[string]struct {
		fsType, want string
		options      []string
	}{
		"default": {"", "ext4", []string{"noatime"}},
		"ext4":    {"ext4", "ext4", []string{"noatime"}},
		"xfs":     {"xfs", "xfs", []string{"noatime", "nouuid"}},
		"btrfs":   {"btrfs", "btrfs", []string{"noatime"}},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			s := b.publish(b.create("v"), capability(test.fsType, oneWriter, "noatime"))
			target := b.path("pods/one/target")
			for range 2 {
				must(t, "stage", s.stage())
				must(t, "publish", s.publishAt(target, false))
			}
			want := []Mount{{Path: s.staging, Device: "/dev/fake1", FSType: test.want}, {Path: target, Device: "/dev/fake1", FSType: test.want}}
			if !slices.Equal(b.mounter.mounts, want) {
				t.Errorf("mounted %v", b.mounter.mounts)
			}
			if got := b.mounter.options[s.staging]; !slices.Equal(got, test.options) {
				t.Errorf("mounted with %v, want %v", got, test.options)
			}
			wantCode(t, "unstage while published", s.unstage(), codes.FailedPrecondition)
			for range 2 {
				must(t, "unpublish", s.unpublishAt(target))
			}
			for range 2 {
				must(t, "unstage", s.unstage())
			}
			if _, err := os.Lstat(target); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the target: %v", err)
			}
			if len(b.attacher.devices) > 0 || len(b.mounter.mounts) > 0 {
				t.Errorf("left: %v, %v", b.attacher.devices, b.mounter.mounts)
			}
		})
	}
}

func TestNode_Block(t *testing.T) {
	b := newBench(t)
	s := b.publish(b.create("v"), blockWriter)
	target := b.path("pods/one/device")
	must(t, "stage", s.stage())
	for range 2 {
		must(t, "publish", s.publishAt(target, false))
	}
	if want := []Mount{{Path: target, Device: "/dev/fake1"}}; !slices.Equal(b.mounter.mounts, want) {
		t.Errorf("mounted %v", b.mounter.mounts)
	}
	if info, err := os.Lstat(target); err != nil || !info.Mode().IsRegular() {
		t.Errorf("target %v, %v", info, err)
	}
	wantCode(t, "a read-only target of a writable device", s.publishAt(b.path("other"), true), codes.FailedPrecondition)
	resp, err := b.node.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: s.id, VolumePath: target})
	must(t, "NodeGetVolumeStats", err)
	if u := resp.GetUsage(); len(u) != 1 || u[0].GetTotal() != 1<<30 || u[0].GetUnit() != csi.VolumeUsage_BYTES {
		t.Errorf("got %v", u)
	}
	must(t, "unpublish", s.unpublishAt(target))
	must(t, "unstage", s.unstage())
}

func TestStage_WhatIsOnTheDevice(t *testing.T) {
	for name, test := range map[string]struct {
		found string
		cap   *csi.VolumeCapability
		want  codes.Code
		says  string
	}{
		"the same":              {"xfs", capability("xfs", oneWriter), codes.OK, ""},
		"any will do":           {"vfat", capability("", oneWriter), codes.OK, ""},
		"another":               {"xfs", ext4Writer, codes.FailedPrecondition, "xfs"},
		"partitions":            {PartitionTable, capability("", oneWriter), codes.FailedPrecondition, "volumeMode: Block"},
		"nothing, to be read":   {"", capability("", oneReader), codes.FailedPrecondition, "read-only"},
		"something, to be read": {"ext4", capability("", oneReader), codes.OK, ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.mounter.setFileSystem("/dev/fake1", test.found)
			err := b.publish(b.create("v"), test.cap).stage()
			wantCode(t, "stage", err, test.want)
			if err != nil && !strings.Contains(err.Error(), test.says) {
				t.Errorf("%v does not say %q", err, test.says)
			}
			if grown := b.mounter.grown["/dev/fake1"] > 0; grown != (err == nil && name == "the same") {
				t.Errorf("grown: %t", grown)
			}
		})
	}
}

// A PersistentVolume that somebody wrote has its limits among its attributes.
func TestStage_LimitsInVolumeContext(t *testing.T) {
	b := newBench(t)
	s := b.publish(b.create("v"), ext4Writer)
	req := s.stageRequest()
	req.VolumeContext = map[string]string{"iops": "100", "bandwidth": "5Mi"}
	_, err := b.node.NodeStageVolume(t.Context(), req)
	wantCode(t, "NodeStageVolume", err, codes.OK)
	for _, d := range b.attacher.devices {
		if want := (Limits{IOPS: 100, BytesPerSecond: 5 << 20}); d.spec.Limits != want {
			t.Errorf("attached with %+v, want %+v", d.spec.Limits, want)
		}
	}
	if len(b.attacher.devices) != 1 {
		t.Errorf("attached: %v", b.attacher.devices)
	}
}

func TestStage_TooSmall(t *testing.T) {
	b := newBench(t)
	resp, err := b.controller.CreateVolume(t.Context(), &csi.CreateVolumeRequest{
		Name: "small", VolumeCapabilities: []*csi.VolumeCapability{blockWriter}, CapacityRange: &csi.CapacityRange{RequiredBytes: 100 << 20},
	})
	must(t, "CreateVolume", err)
	err = b.publish(resp.GetVolume().GetVolumeId(), capability("xfs", oneWriter)).stage()
	wantCode(t, "xfs on 100 MiB", err, codes.OutOfRange)
	if err != nil && !strings.Contains(err.Error(), "300Mi") {
		t.Errorf("%v does not say what is enough", err)
	}
}

func TestStage_Incompatible(t *testing.T) {
	b := newBench(t)
	s := b.publish(b.create("v"), ext4Writer)
	must(t, "stage", s.stage())
	s.capability = capability("xfs", oneWriter)
	wantCode(t, "as another file system", s.stage(), codes.AlreadyExists)
	s.capability = capability("ext4", oneReader)
	wantCode(t, "read-only", s.stage(), codes.AlreadyExists)
	s.capability = ext4Writer
	must(t, "as before", s.stage())

	other := b.publish(b.create("w"), ext4Writer)
	wantCode(t, "another volume at the same path", other.stage(), codes.FailedPrecondition)
}

// TestStage_EarlierPublication has a device of an earlier epoch left, as when a node was
// away while its volume was published anew.
func TestStage_EarlierPublication(t *testing.T) {
	b := newBench(t)
	s := b.publish(b.create("v"), ext4Writer)
	must(t, "stage", s.stage())
	republish := func() {
		_, err := b.controller.ControllerUnpublishVolume(t.Context(), &csi.ControllerUnpublishVolumeRequest{VolumeId: s.id, NodeId: "node-1"})
		must(t, "ControllerUnpublishVolume", err)
		s.publishContext = b.publish(s.id, ext4Writer).publishContext
	}
	republish()
	wantCode(t, "while the old device is mounted", s.stage(), codes.AlreadyExists)
	must(t, "unmount", b.mounter.Unmount(s.staging))
	must(t, "when it is not", s.stage())
	if d := b.attacher.devices[s.id]; d.Device != "/dev/fake2" || d.spec.Epoch != 2 {
		t.Errorf("attached %+v", d)
	}
}

func TestPublish_ReadOnly(t *testing.T) {
	b := newBench(t)
	s := b.publish(b.create("v"), ext4Writer)
	must(t, "stage", s.stage())
	one, two := b.path("one"), b.path("two")
	must(t, "writable", s.publishAt(one, false))
	for range 2 {
		must(t, "read-only", s.publishAt(two, true))
	}
	wantCode(t, "writable where it is read-only", s.publishAt(two, false), codes.AlreadyExists)
	// The first step of a read-only bind, and then the driver was killed.
	three := b.path("three")
	must(t, "mkdir", os.Mkdir(three, 0o755))
	must(t, "bind", b.mounter.Bind(s.staging, three, false))
	must(t, "read-only after a kill", s.publishAt(three, true))
	for _, m := range b.mounter.mounts {
		if want := m.Path == two || m.Path == three; m.ReadOnly != want {
			t.Errorf("%s: read-only %t", m.Path, m.ReadOnly)
		}
	}
	read := b.publish(b.create("w"), capability("", oneReader))
	read.staging = b.path("staging of w")
	b.mounter.setFileSystem("/dev/fake2", "ext4")
	must(t, "stage read-only", read.stage())
	must(t, "publish what is staged read-only", read.publishAt(b.path("four"), false))
}

func TestPublish_Occupied(t *testing.T) {
	b := newBench(t)
	s := b.publish(b.create("v"), ext4Writer)
	other := b.publish(b.create("w"), ext4Writer)
	other.staging = b.path("staging of w")
	must(t, "stage", s.stage())
	must(t, "stage the other", other.stage())
	must(t, "publish the other", other.publishAt(b.path("taken"), false))
	wantCode(t, "where another volume is", s.publishAt(b.path("taken"), false), codes.AlreadyExists)
	must(t, "write", os.WriteFile(b.path("file"), []byte("precious"), 0o600))
	wantCode(t, "where a file is", s.publishAt(b.path("file"), false), codes.AlreadyExists)
	wrong := *s
	wrong.staging = b.path("not staged here")
	wantCode(t, "from where it is not staged", wrong.publishAt(b.path("target"), false), codes.FailedPrecondition)
	b.mounter.fail("Bind", errors.New("no"))
	wantCode(t, "when binding fails", s.publishAt(b.path("target"), false), codes.Internal)
	if _, err := os.Lstat(b.path("target")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the target of a bind that failed is there: %v", err)
	}
}

func TestPublish_SingleWriter(t *testing.T) {
	b := newBench(t)
	s := b.publish(b.create("v"), capability("ext4", singleWriter))
	must(t, "stage", s.stage())
	for range 2 {
		must(t, "publish", s.publishAt(b.path("one"), false))
	}
	wantCode(t, "a second target", s.publishAt(b.path("two"), false), codes.FailedPrecondition)
	must(t, "unpublish", s.unpublishAt(b.path("one")))
	must(t, "then another", s.publishAt(b.path("two"), false))
}

// TestUnpublish_KeepsForeignFiles finds files where the mount should be.
func TestUnpublish_KeepsForeignFiles(t *testing.T) {
	b := newBench(t)
	s := b.publish(b.create("v"), ext4Writer)
	file := filepath.Join(b.path("target"), "precious")
	must(t, "mkdir", os.Mkdir(filepath.Dir(file), 0o755))
	must(t, "write", os.WriteFile(file, nil, 0o600))
	wantCode(t, "unpublish", s.unpublishAt(filepath.Dir(file)), codes.Internal)
	if _, err := os.Lstat(file); err != nil {
		t.Errorf("the file: %v", err)
	}
}

func TestNode_SymlinkedPaths(t *testing.T) {
	b := newBench(t)
	must(t, "mkdir", os.Mkdir(b.path("real"), 0o755))
	must(t, "symlink", os.Symlink(b.path("real"), b.path("link")))
	s := b.publish(b.create("v"), ext4Writer)
	s.staging = b.path("link/staging")
	for range 2 {
		must(t, "stage", s.stage())
		must(t, "publish", s.publishAt(b.path("link/target"), false))
	}
	if len(b.mounter.mounts) != 2 || b.mounter.mounts[1].Path != b.path("real/target") {
		t.Errorf("mounted %v", b.mounter.mounts)
	}
	must(t, "unpublish", s.unpublishAt(b.path("link/target")))
	must(t, "unstage", s.unstage())
}

// TestUnmountHangs has an unmount that does not end, as when the store does not answer.
func TestUnmountHangs(t *testing.T) {
	b := newBench(t)
	s := b.publish(b.create("v"), ext4Writer)
	must(t, "stage", s.stage())
	release := b.mounter.hold("Unmount")
	defer release()
	unstage := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, err := b.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: s.id, StagingTargetPath: s.staging})
		return err
	}
	for range 3 {
		wantCode(t, "unstage", unstage(), codes.DeadlineExceeded)
		// The handler ends a moment after its caller has given up.
		waitUntil(t, "the lock is given up", func() bool { return !strings.Contains(fmt.Sprint(s.stage()), s.id+": an operation") })
	}
	if n := b.mounter.count("Unmount"); n != 1 {
		t.Errorf("%d unmounts were begun, want 1", n)
	}
	wantCode(t, "stage meanwhile", s.stage(), codes.Aborted)
	wantCode(t, "publish meanwhile", s.publishAt(b.path("target"), false), codes.Aborted)
	other := b.publish(b.create("w"), ext4Writer)
	other.staging = b.path("staging of w")
	must(t, "another volume", other.stage())
	release()
	must(t, "unstage when it has ended", s.unstage())
	must(t, "stage again", s.stage())
}

func TestNode_OneOperationPerVolume(t *testing.T) {
	b := newBench(t)
	s := b.publish(b.create("v"), ext4Writer)
	other := b.publish(b.create("w"), ext4Writer)
	other.staging = b.path("staging of w")
	release := b.attacher.hold("Attach")
	defer release()
	first := make(chan error, 1)
	go func() { first <- s.stage() }()
	waitUntil(t, "it is under way", func() bool { return b.attacher.count("Attach") == 1 })
	target := b.path("target")
	for what, call := range map[string]func(ctx context.Context) error{
		"unstage": func(ctx context.Context) error {
			_, err := b.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: s.id, StagingTargetPath: s.staging})
			return err
		},
		"unpublish": func(ctx context.Context) error {
			_, err := b.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: s.id, TargetPath: target})
			return err
		},
		"expand": func(ctx context.Context) error {
			_, err := b.node.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: s.id, VolumePath: target})
			return err
		},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		wantCode(t, what+" for as long as its caller has time", call(ctx), codes.DeadlineExceeded)
		cancel()
	}
	again, publish := make(chan error, 1), make(chan error, 1)
	go func() { again <- s.stage() }()
	stillWaits(t, "stage", again)
	go func() { publish <- s.publishAt(target, false) }()
	stillWaits(t, "publish", publish)
	release()
	must(t, "the first", <-first)
	must(t, "the second", <-again)
	<-publish // in which order they come, nobody has said
	must(t, "unpublish", s.unpublishAt(target))
	must(t, "another volume", other.stage())
}

func TestNodeExpandVolume(t *testing.T) {
	b := newBench(t)
	s := b.publish(b.create("v"), ext4Writer)
	target := b.path("target")
	must(t, "stage", s.stage())
	must(t, "publish", s.publishAt(target, false))
	grown := b.mounter.grown["/dev/fake1"]
	_, err := b.controller.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: s.id, CapacityRange: &csi.CapacityRange{RequiredBytes: 2 << 30}})
	must(t, "ControllerExpandVolume", err)
	for range 2 {
		resp, err := b.node.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: s.id, VolumePath: target, CapacityRange: &csi.CapacityRange{RequiredBytes: 2 << 30}})
		must(t, "NodeExpandVolume", err)
		if resp.GetCapacityBytes() != 2<<30 {
			t.Errorf("got %v", resp)
		}
	}
	if n := b.mounter.grown["/dev/fake1"] - grown; n != 2 {
		t.Errorf("grown %d times, want 2", n)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err = b.node.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: s.id, VolumePath: target, CapacityRange: &csi.CapacityRange{RequiredBytes: 3 << 30}})
	if err == nil {
		t.Error("a device that has not grown was reported as grown")
	}
	_, err = b.node.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: "main/none", VolumePath: target})
	wantCode(t, "no such volume", err, codes.NotFound)
}

// A kernel that cannot grow a device in use is no fault of the caller's: the device is
// larger when it is attached next, which is what this code has a kubelet wait for.
func TestNodeExpandVolume_KernelCannot(t *testing.T) {
	b := newBench(t)
	s := b.publish(b.create("v"), ext4Writer)
	target := b.path("target")
	must(t, "stage", s.stage())
	must(t, "publish", s.publishAt(target, false))
	b.attacher.fail("Resize", fmt.Errorf("this kernel can't resize a device in use: %w", block.ErrUnsupported))
	_, err := b.node.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: s.id, VolumePath: target})
	wantCode(t, "expand", err, codes.FailedPrecondition)
}

func TestNodeGetVolumeStats(t *testing.T) {
	b := newBench(t)
	s := b.publish(b.create("v"), ext4Writer)
	target := b.path("target")
	must(t, "stage", s.stage())
	must(t, "publish", s.publishAt(target, false))
	stats := func(id, path string) (*csi.NodeGetVolumeStatsResponse, error) {
		return b.node.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: path})
	}
	resp, err := stats(s.id, target)
	must(t, "NodeGetVolumeStats", err)
	want := "[available:60 total:100 used:40 unit:BYTES available:6 total:10 used:4 unit:INODES]"
	if got := strings.ReplaceAll(fmt.Sprint(resp.GetUsage()), "  ", " "); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	_, err = stats("main/none", target)
	wantCode(t, "no such volume", err, codes.NotFound)
	for _, path := range []string{b.path("elsewhere"), "relative", "/"} {
		if _, err = stats(s.id, path); err == nil {
			t.Errorf("%s: no error", path)
		}
	}
	release := b.mounter.hold("Usage")
	defer release()
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		_, err := b.node.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: s.id, VolumePath: target})
		cancel()
		wantCode(t, "a file system that does not answer", err, codes.DeadlineExceeded)
	}
	if n := b.mounter.count("Usage"); n != 2 {
		t.Errorf("it was asked %d times, want once, and once before", n)
	}
}

func TestNodeGetVolumeHealth(t *testing.T) {
	b := newBench(t)
	s := b.publish(b.create("v"), ext4Writer)
	health := func() (*csi.NodeGetVolumeHealthResponse, error) {
		return b.node.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: s.id})
	}
	_, err := health()
	wantCode(t, "before it is staged", err, codes.NotFound)
	must(t, "stage", s.stage())
	for problem, want := range map[string]string{"": "", "the store does not answer": "NotServed"} {
		b.attacher.devices[s.id].Problem = problem
		resp, err := health()
		must(t, "NodeGetVolumeHealth", err)
		var got string
		for _, e := range resp.GetVolumeHealth().GetHealthStatuses() {
			got = e.GetReason()
			if e.GetStatus() != csi.VolumeHealthErrorType_INACCESSIBLE || e.GetMessage() != problem {
				t.Errorf("got %v", e)
			}
		}
		if got != want {
			t.Errorf("%q: got %q, want %q", problem, got, want)
		}
	}
	b.attacher.devices[s.id].Lost = true
	wantCode(t, "publish what is lost", s.publishAt(b.path("target"), false), codes.FailedPrecondition)
	resp, err := health()
	must(t, "NodeGetVolumeHealth", err)
	if e := resp.GetVolumeHealth().GetHealthStatuses(); len(e) != 1 || e[0].GetReason() != "DeviceLost" {
		t.Errorf("got %v", e)
	}
}

func TestNode_SupervisorAway(t *testing.T) {
	b := newBench(t)
	s := b.publish(b.create("v"), ext4Writer)
	away := fmt.Errorf("%w: no supervisor", ErrUnavailable)
	for _, method := range []string{"Attach", "Attachment", "Detach"} {
		b.attacher.fail(method, away)
	}
	wantCode(t, "stage", s.stage(), codes.Unavailable)
	wantCode(t, "publish", s.publishAt(b.path("target"), false), codes.Unavailable)
	wantCode(t, "unstage", s.unstage(), codes.Unavailable)
	for _, method := range []string{"Attach", "Attachment", "Detach"} {
		b.attacher.fail(method, nil)
	}
	must(t, "stage", s.stage())
	b.attacher.fail("Detach", fmt.Errorf("flush: %w", block.ErrNoSpace))
	wantCode(t, "a full store", s.unstage(), codes.ResourceExhausted)
	b.attacher.fail("Detach", nil)
	must(t, "unstage", s.unstage())
}

// TestUnstage_BusyForAMoment has somebody look at the device after the unmount.
func TestUnstage_BusyForAMoment(t *testing.T) {
	b := newBench(t)
	s := b.publish(b.create("v"), ext4Writer)
	must(t, "stage", s.stage())
	b.attacher.fail("Detach", fmt.Errorf("open: %w", block.ErrBusy))
	unstaged := make(chan error, 1)
	go func() { unstaged <- s.unstage() }()
	waitUntil(t, "it is tried again", func() bool { return b.attacher.count("Detach") > 2 })
	b.attacher.fail("Detach", nil)
	must(t, "unstage", <-unstaged)
}

func TestNodeGetInfo(t *testing.T) {
	b := newBench(t)
	resp, err := b.node.NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	must(t, "NodeGetInfo", err)
	want := map[string]string{Name + "/transport-nbd": "true", Name + "/transport-fuse": "true"}
	if resp.GetNodeId() != "node-1" || resp.GetMaxVolumesPerNode() != 7 || !maps.Equal(resp.GetAccessibleTopology().GetSegments(), want) {
		t.Errorf("got %v", resp)
	}
	// Better no answer than one that tells of no transports: it is asked again.
	b.attacher.fail("Transports", ErrUnavailable)
	_, err = b.node.NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	wantCode(t, "NodeGetInfo without a supervisor", err, codes.Unavailable)
}
