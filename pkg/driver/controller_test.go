package driver

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

func TestCreateVolume_Invalid(t *testing.T) {
	b := newBenchOfTwo(t)
	b.store.images["disk.vmdk"] = 1 << 30
	valid := func() *csi.CreateVolumeRequest {
		return &csi.CreateVolumeRequest{
			Name: "v", VolumeCapabilities: []*csi.VolumeCapability{ext4Writer},
			CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 30}, Parameters: map[string]string{"store": "main"},
		}
	}
	source := func(id string) *csi.VolumeContentSource {
		return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id}}}
	}
	snapshot := func(id string) *csi.VolumeContentSource {
		return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
	}
	with := func(fsType string, mode csi.VolumeCapability_AccessMode_Mode) func(*csi.CreateVolumeRequest) {
		return func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities = append(r.VolumeCapabilities, capability(fsType, mode))
		}
	}
	for name, test := range map[string]struct {
		change func(*csi.CreateVolumeRequest)
		want   codes.Code
	}{
		"no name":          {func(r *csi.CreateVolumeRequest) { r.Name = "" }, codes.InvalidArgument},
		"no capabilities":  {func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities = nil }, codes.InvalidArgument},
		"many nodes write": {with("ext4", csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER), codes.InvalidArgument},
		"many nodes, one":  {with("ext4", csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER), codes.InvalidArgument},
		"no mode":          {with("ext4", csi.VolumeCapability_AccessMode_UNKNOWN), codes.InvalidArgument},
		"file system":      {with("ntfs", csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER), codes.InvalidArgument},
		"no access type": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0] = &csi.VolumeCapability{AccessMode: ext4Writer.GetAccessMode()}
		}, codes.InvalidArgument},
		"negative size":     {func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = -1 }, codes.OutOfRange},
		"huge size":         {func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = 1<<63 - 1 }, codes.OutOfRange},
		"limit below size":  {func(r *csi.CreateVolumeRequest) { r.CapacityRange.LimitBytes = 1 << 20 }, codes.OutOfRange},
		"empty range":       {func(r *csi.CreateVolumeRequest) { r.CapacityRange = &csi.CapacityRange{} }, codes.InvalidArgument},
		"unknown parameter": {func(r *csi.CreateVolumeRequest) { r.Parameters["colour"] = "red" }, codes.InvalidArgument},
		"mutable parameter": {func(r *csi.CreateVolumeRequest) { r.MutableParameters = map[string]string{"iops": "1"} }, codes.InvalidArgument},
		"which store":       {func(r *csi.CreateVolumeRequest) { r.Parameters = nil }, codes.InvalidArgument},
		"unknown store":     {func(r *csi.CreateVolumeRequest) { r.Parameters["store"] = "third" }, codes.InvalidArgument},
		"source elsewhere":  {func(r *csi.CreateVolumeRequest) { r.VolumeContentSource = source("second/w") }, codes.InvalidArgument},
		"source and image": {func(r *csi.CreateVolumeRequest) {
			r.Parameters["image"] = "disk.vmdk"
			r.VolumeContentSource = source("main/w")
		}, codes.InvalidArgument},
		"empty source":     {func(r *csi.CreateVolumeRequest) { r.VolumeContentSource = &csi.VolumeContentSource{} }, codes.InvalidArgument},
		"no such volume":   {func(r *csi.CreateVolumeRequest) { r.VolumeContentSource = source("main/w") }, codes.NotFound},
		"no such handle":   {func(r *csi.CreateVolumeRequest) { r.VolumeContentSource = source("w") }, codes.NotFound},
		"no such snapshot": {func(r *csi.CreateVolumeRequest) { r.VolumeContentSource = snapshot("main/w@s") }, codes.NotFound},
		"no such image":    {func(r *csi.CreateVolumeRequest) { r.Parameters["image"] = "none.vmdk" }, codes.NotFound},
		"image is larger": {func(r *csi.CreateVolumeRequest) {
			r.Parameters["image"] = "disk.vmdk"
			r.CapacityRange.RequiredBytes = 1 << 20
		}, codes.OutOfRange},
		"store not connected": {func(r *csi.CreateVolumeRequest) { r.VolumeContentSource = source("third/w"); r.Parameters = nil }, codes.FailedPrecondition},
	} {
		t.Run(name, func(t *testing.T) {
			req := valid()
			test.change(req)
			_, err := b.controller.CreateVolume(t.Context(), req)
			wantCode(t, "CreateVolume", err, test.want)
		})
	}
	if len(b.store.volumes) > 0 {
		t.Errorf("volumes were made: %v", b.store.volumes)
	}
	_, err := b.controller.CreateVolume(t.Context(), valid())
	must(t, "the valid request", err)
}

func TestCreateVolume_TooSmallForFileSystem(t *testing.T) {
	b := newBench(t)
	for fsType, size := range map[string]int64{"xfs": 300 << 20, "btrfs": 109 << 20} {
		req := &csi.CreateVolumeRequest{
			Name: "small-" + fsType, CapacityRange: &csi.CapacityRange{RequiredBytes: size - 4096},
			VolumeCapabilities: []*csi.VolumeCapability{capability(fsType, csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER)},
		}
		_, err := b.controller.CreateVolume(t.Context(), req)
		wantCode(t, fsType, err, codes.OutOfRange)
		if !strings.Contains(err.Error(), formatSize(size)) {
			t.Errorf("%v does not say what is enough", err)
		}
		req.CapacityRange.RequiredBytes = size
		_, err = b.controller.CreateVolume(t.Context(), req)
		must(t, fsType, err)
	}
}

func TestCreateVolume_Idempotent(t *testing.T) {
	b := newBench(t)
	req := &csi.CreateVolumeRequest{
		Name: "v", VolumeCapabilities: []*csi.VolumeCapability{ext4Writer},
		CapacityRange: &csi.CapacityRange{RequiredBytes: 1<<30 - 1}, Parameters: map[string]string{"transport": "fuse"},
	}
	first, err := b.controller.CreateVolume(t.Context(), req)
	must(t, "CreateVolume", err)
	if v := first.GetVolume(); v.GetVolumeId() != "main/v" || v.GetCapacityBytes() != 1<<30 || v.GetVolumeContext()["transport"] != "fuse" {
		t.Errorf("got %v", v)
	}
	again, err := b.controller.CreateVolume(t.Context(), req)
	must(t, "CreateVolume again", err)
	if again.GetVolume().GetVolumeId() != first.GetVolume().GetVolumeId() {
		t.Errorf("got %v, then %v", first, again)
	}
	for name, change := range map[string]func(){
		"larger":    func() { req.CapacityRange = &csi.CapacityRange{RequiredBytes: 2 << 30} },
		"smaller":   func() { req.CapacityRange = &csi.CapacityRange{RequiredBytes: 1 << 20, LimitBytes: 1 << 29} },
		"different": func() { req.CapacityRange, req.Parameters = nil, nil },
	} {
		change()
		_, err := b.controller.CreateVolume(t.Context(), req)
		wantCode(t, name, err, codes.AlreadyExists)
	}
}

func TestCreateVolume_Sources(t *testing.T) {
	b := newBenchOfTwo(t)
	b.store.images["disk.vmdk"] = 3 << 30
	id := b.create("origin")
	_, err := b.controller.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "snap", SourceVolumeId: id})
	must(t, "CreateSnapshot", err)
	for name, test := range map[string]struct {
		params map[string]string
		source *csi.VolumeContentSource
		want   Source
		size   int64
	}{
		"image":    {map[string]string{"store": "main", "image": "disk.vmdk"}, nil, Source{Image: "disk.vmdk", ImageMode: ImageOverlay}, 3 << 30},
		"copy":     {map[string]string{"store": "main", "image": "disk.vmdk", "imageMode": "copy"}, nil, Source{Image: "disk.vmdk", ImageMode: ImageCopy}, 3 << 30},
		"snapshot": {map[string]string{"preallocation": "full"}, &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: "main/origin@snap"}}}, Source{Snapshot: "origin@snap"}, 1 << 30},
		"volume":   {nil, &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: "main/origin"}}}, Source{Volume: "origin"}, 1 << 30},
	} {
		t.Run(name, func(t *testing.T) {
			resp, err := b.controller.CreateVolume(t.Context(), &csi.CreateVolumeRequest{
				Name: "from-" + name, VolumeCapabilities: []*csi.VolumeCapability{blockWriter}, Parameters: test.params, VolumeContentSource: test.source,
			})
			must(t, "CreateVolume", err)
			v := b.store.volumes["from-"+name]
			if v == nil || v.Source != test.want || v.SizeBytes != test.size || v.Parameters.Preallocation != "" {
				t.Errorf("got %+v", v)
			}
			if got := resp.GetVolume().GetContentSource(); fmt.Sprint(got) != fmt.Sprint(test.source) {
				t.Errorf("content source %v, want %v", got, test.source)
			}
		})
	}
}

func TestDeleteVolume(t *testing.T) {
	b := newBench(t)
	id := b.create("v")
	b.publish(id, ext4Writer)
	remove := func(id string) error {
		_, err := b.controller.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
		return err
	}
	wantCode(t, "a published one", remove(id), codes.FailedPrecondition)
	_, err := b.controller.ControllerUnpublishVolume(t.Context(), &csi.ControllerUnpublishVolumeRequest{VolumeId: id})
	must(t, "unpublish from all", err)
	must(t, "delete", remove(id))
	must(t, "delete again", remove(id))
	must(t, "what is no handle", remove("what is this"))
	wantCode(t, "no id", remove(""), codes.InvalidArgument)
	// Its volume may well exist: success would make the caller forget it.
	wantCode(t, "a store that is not configured", remove("other/v"), codes.FailedPrecondition)
}

func TestControllerPublish(t *testing.T) {
	b := newBench(t)
	id := b.create("v")
	publish := func(node string, c *csi.VolumeCapability, readOnly bool) (map[string]string, error) {
		resp, err := b.controller.ControllerPublishVolume(t.Context(), &csi.ControllerPublishVolumeRequest{VolumeId: id, NodeId: node, VolumeCapability: c, Readonly: readOnly})
		return resp.GetPublishContext(), err
	}
	first, err := publish("node-1", ext4Writer, false)
	must(t, "publish", err)
	again, err := publish("node-1", ext4Writer, false)
	must(t, "publish again", err)
	if fmt.Sprint(first) != fmt.Sprint(again) || first[contextEpoch] != "1" || first[contextVolume] != "v" {
		t.Errorf("got %v, then %v", first, again)
	}
	_, err = publish("node-2", ext4Writer, false)
	wantCode(t, "to another node", err, codes.FailedPrecondition)
	if !strings.Contains(err.Error(), "node-1") {
		t.Errorf("%v does not name the node", err)
	}
	_, err = publish("node-1", ext4Writer, true)
	wantCode(t, "in another way", err, codes.AlreadyExists)
	_, err = publish("node-3", ext4Writer, false)
	wantCode(t, "to an unknown node", err, codes.NotFound)

	for _, node := range []string{"node-2", "node-1", "node-1"} {
		_, err := b.controller.ControllerUnpublishVolume(t.Context(), &csi.ControllerUnpublishVolumeRequest{VolumeId: id, NodeId: node})
		must(t, "unpublish from "+node, err)
	}
	readers := capability("ext4", csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY)
	for _, node := range []string{"node-1", "node-2"} {
		shared, err := publish(node, readers, false)
		must(t, "read on "+node, err)
		if shared[contextReadOnly] != "true" {
			t.Errorf("got %v, want it read-only", shared)
		}
	}
	_, err = b.controller.ControllerUnpublishVolume(t.Context(), &csi.ControllerUnpublishVolumeRequest{VolumeId: "main/none", NodeId: "node-1"})
	must(t, "unpublish what does not exist", err)
}

func TestControllerPublish_Image(t *testing.T) {
	b := newBench(t)
	b.store.images["dir/disk.vmdk"] = 5 << 20
	const id = "main/images/dir/disk.vmdk"
	published := b.publish(id, blockWriter)
	if len(b.store.volumes) != 1 {
		t.Fatalf("there are volumes %v", b.store.volumes)
	}
	must(t, "stage", published.stage())
	must(t, "publish", published.publishAt(b.path("target"), false))
	must(t, "unpublish", published.unpublishAt(b.path("target")))
	must(t, "unstage", published.unstage())
	list, err := b.controller.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	must(t, "list", err)
	if len(list.GetEntries()) != 1 || list.GetEntries()[0].GetVolume().GetVolumeId() != id {
		t.Errorf("listed as %v", list)
	}
	_, err = b.controller.ControllerPublishVolume(t.Context(), &csi.ControllerPublishVolumeRequest{VolumeId: "main/images/none", NodeId: "node-1", VolumeCapability: blockWriter})
	wantCode(t, "no such image", err, codes.NotFound)
}

func TestValidateVolumeCapabilities(t *testing.T) {
	b := newBench(t)
	id := b.create("v")
	validate := func(c *csi.VolumeCapability, params map[string]string) *csi.ValidateVolumeCapabilitiesResponse {
		t.Helper()
		resp, err := b.controller.ValidateVolumeCapabilities(t.Context(), &csi.ValidateVolumeCapabilitiesRequest{VolumeId: id, VolumeCapabilities: []*csi.VolumeCapability{c}, Parameters: params})
		must(t, "ValidateVolumeCapabilities", err)
		return resp
	}
	if resp := validate(ext4Writer, nil); resp.GetConfirmed() == nil {
		t.Errorf("got %v", resp)
	}
	for name, resp := range map[string]*csi.ValidateVolumeCapabilitiesResponse{
		"mode":      validate(capability("ext4", csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER), nil),
		"parameter": validate(ext4Writer, map[string]string{"colour": "red"}),
	} {
		if resp.GetConfirmed() != nil || resp.GetMessage() == "" {
			t.Errorf("%s: got %v, want a message", name, resp)
		}
	}
	_, err := b.controller.ValidateVolumeCapabilities(t.Context(), &csi.ValidateVolumeCapabilitiesRequest{VolumeId: "main/none", VolumeCapabilities: []*csi.VolumeCapability{ext4Writer}})
	wantCode(t, "no such volume", err, codes.NotFound)
}

func TestControllerExpandVolume(t *testing.T) {
	b := newBench(t)
	id := b.create("v")
	expand := func(id string, r *csi.CapacityRange) (*csi.ControllerExpandVolumeResponse, error) {
		return b.controller.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: r})
	}
	for range 2 {
		resp, err := expand(id, &csi.CapacityRange{RequiredBytes: 2<<30 + 1})
		must(t, "expand", err)
		if resp.GetCapacityBytes() != 2<<30+sizeMultiple || !resp.GetNodeExpansionRequired() {
			t.Errorf("got %v", resp)
		}
	}
	_, err := expand(id, nil)
	wantCode(t, "no range", err, codes.InvalidArgument)
	_, err = expand("main/none", &csi.CapacityRange{RequiredBytes: 1})
	wantCode(t, "no such volume", err, codes.NotFound)
	b.store.fail("Expand", fmt.Errorf("the store is full: %w", block.ErrNoSpace))
	_, err = expand(id, &csi.CapacityRange{RequiredBytes: 4 << 30})
	wantCode(t, "a full store", err, codes.ResourceExhausted)
}

func TestControllerModifyVolume(t *testing.T) {
	b := newBench(t)
	req := &csi.CreateVolumeRequest{
		Name: "v", VolumeCapabilities: []*csi.VolumeCapability{ext4Writer},
		CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 30},
		Parameters:    map[string]string{"iops": "500", "bandwidth": "10Mi"}, MutableParameters: map[string]string{"iops": "700"},
	}
	resp, err := b.controller.CreateVolume(t.Context(), req)
	wantCode(t, "CreateVolume", err, codes.OK)
	id := resp.GetVolume().GetVolumeId()
	limits := func() Limits { return b.store.volumes[req.GetName()].spec.Limits }
	if want := (Limits{IOPS: 700, BytesPerSecond: 10 << 20}); limits() != want {
		t.Errorf("created with %+v, want %+v", limits(), want)
	}
	modify := func(params map[string]string) error {
		_, err := b.controller.ControllerModifyVolume(t.Context(), &csi.ControllerModifyVolumeRequest{VolumeId: id, MutableParameters: params})
		return err
	}
	wantCode(t, "one limit", modify(map[string]string{"bandwidth": "20Mi"}), codes.OK)
	wantCode(t, "the other", modify(map[string]string{"iops": "0"}), codes.OK)
	wantCode(t, "nothing", modify(nil), codes.OK)
	if want := (Limits{BytesPerSecond: 20 << 20}); limits() != want {
		t.Errorf("modified to %+v, want %+v", limits(), want)
	}
	_, err = b.controller.CreateVolume(t.Context(), req)
	wantCode(t, "CreateVolume of a volume whose limits were changed", err, codes.OK)
	wantCode(t, "what cannot be changed", modify(map[string]string{"format": "raw"}), codes.InvalidArgument)
	wantCode(t, "a bad value", modify(map[string]string{"iops": "1"}), codes.InvalidArgument)
	id = "main/none"
	wantCode(t, "no such volume", modify(map[string]string{"iops": "100"}), codes.NotFound)
	id = ""
	wantCode(t, "no volume", modify(nil), codes.InvalidArgument)
}

func TestControllerGetVolume(t *testing.T) {
	b := newBench(t)
	id := b.create("v")
	b.publish(id, ext4Writer)
	resp, err := b.controller.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: id})
	must(t, "ControllerGetVolume", err)
	if v := resp.GetVolume(); v.GetVolumeId() != id || v.GetCapacityBytes() != 1<<30 || !slices.Equal(resp.GetStatus().GetPublishedNodeIds(), []string{"node-1"}) {
		t.Errorf("got %v", resp)
	}
	health := func() []*csi.VolumeHealth_VolumeHealthEntry {
		t.Helper()
		one, err := b.controller.ControllerGetVolumeHealth(t.Context(), &csi.ControllerGetVolumeHealthRequest{VolumeId: id})
		must(t, "ControllerGetVolumeHealth", err)
		all, err := b.controller.ControllerListVolumeHealth(t.Context(), &csi.ControllerListVolumeHealthRequest{})
		must(t, "ControllerListVolumeHealth", err)
		if len(all.GetEntries()) != 1 || fmt.Sprint(all.GetEntries()[0]) != fmt.Sprint(one.GetVolumeHealth()) {
			t.Errorf("listed as %v, got as %v", all, one)
		}
		return one.GetVolumeHealth().GetHealthStatuses()
	}
	if got := health(); len(got) > 0 {
		t.Errorf("a sound volume has %v", got)
	}
	b.store.volumes["v"].Problem = "snapshot s: no space"
	if got := health(); len(got) != 1 || got[0].GetMessage() != "snapshot s: no space" || got[0].GetReason() == "" {
		t.Errorf("got %v", got)
	}
}

func TestGetCapacity(t *testing.T) {
	b := newBenchOfTwo(t)
	capacity := func(params map[string]string, caps ...*csi.VolumeCapability) int64 {
		t.Helper()
		resp, err := b.controller.GetCapacity(t.Context(), &csi.GetCapacityRequest{Parameters: params, VolumeCapabilities: caps})
		must(t, "GetCapacity", err)
		return resp.GetAvailableCapacity()
	}
	if got := capacity(nil); got != 2<<40 {
		t.Errorf("of both stores: %d", got)
	}
	if got := capacity(map[string]string{"store": "main"}, ext4Writer); got != 1<<40 {
		t.Errorf("of one store: %d", got)
	}
	if got := capacity(nil, capability("", csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER)); got != 0 {
		t.Errorf("for volumes that cannot be had: %d", got)
	}
	_, err := b.controller.GetCapacity(t.Context(), &csi.GetCapacityRequest{Parameters: map[string]string{"store": "third"}})
	wantCode(t, "unknown store", err, codes.InvalidArgument)
}

func TestSnapshots(t *testing.T) {
	b := newBenchOfTwo(t)
	id := b.create("v")
	other := b.create("w")
	_, err := b.controller.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: "x", VolumeCapabilities: []*csi.VolumeCapability{blockWriter}, Parameters: map[string]string{"store": "second"}})
	must(t, "CreateVolume", err)
	snap := func(name, source string) (*csi.CreateSnapshotResponse, error) {
		return b.controller.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: source})
	}
	first, err := snap("s", id)
	must(t, "CreateSnapshot", err)
	again, err := snap("s", id)
	must(t, "CreateSnapshot again", err)
	if s := first.GetSnapshot(); s.GetSnapshotId() != "main/v@s" || s.GetSourceVolumeId() != id || s.GetSizeBytes() != 1<<30 || !s.GetReadyToUse() || s.GetCreationTime() == nil {
		t.Errorf("got %v", s)
	}
	if fmt.Sprint(first) != fmt.Sprint(again) {
		t.Errorf("got %v, then %v", first, again)
	}
	for source, want := range map[string]codes.Code{
		other: codes.AlreadyExists, "second/x": codes.AlreadyExists, "": codes.InvalidArgument, "third/v": codes.FailedPrecondition,
	} {
		_, err := snap("s", source)
		wantCode(t, "s of "+source, err, want)
	}
	_, err = snap("t", "main/none")
	wantCode(t, "no such volume", err, codes.NotFound)
	_, err = b.controller.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "t", SourceVolumeId: id, Parameters: map[string]string{"a": "b"}})
	wantCode(t, "a parameter", err, codes.InvalidArgument)
	b.second.fail("Snapshots", errors.New("the other store is away"))
	_, err = snap("t", id)
	must(t, "with the other store away", err)

	got, err := b.controller.GetSnapshot(t.Context(), &csi.GetSnapshotRequest{SnapshotId: "main/v@s"})
	must(t, "GetSnapshot", err)
	if fmt.Sprint(got.GetSnapshot()) != fmt.Sprint(first.GetSnapshot()) {
		t.Errorf("got %v", got)
	}
	for range 2 {
		_, err := b.controller.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: "main/v@s"})
		must(t, "DeleteSnapshot", err)
	}
	_, err = b.controller.GetSnapshot(t.Context(), &csi.GetSnapshotRequest{SnapshotId: "main/v@s"})
	wantCode(t, "a deleted one", err, codes.NotFound)
	b.store.fail("DeleteSnapshot", fmt.Errorf("needed: %w", block.ErrBusy))
	_, err = b.controller.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: "main/v@t"})
	wantCode(t, "one in use", err, codes.FailedPrecondition)
}

func TestPaging(t *testing.T) {
	b := newBenchOfTwo(t)
	var all []string
	for i := range 7 {
		all = append(all, b.create(fmt.Sprintf("v%d", i)))
		_, err := b.controller.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: fmt.Sprintf("s%d", i), SourceVolumeId: all[i]})
		must(t, "CreateSnapshot", err)
	}
	next := func(token string, n int32) (ids []string, following string) {
		t.Helper()
		resp, err := b.controller.ListVolumes(t.Context(), &csi.ListVolumesRequest{StartingToken: token, MaxEntries: n})
		must(t, "ListVolumes", err)
		for _, e := range resp.GetEntries() {
			ids = append(ids, e.GetVolume().GetVolumeId())
		}
		return ids, resp.GetNextToken()
	}
	var got []string
	token := ""
	for {
		var ids []string
		ids, token = next(token, 2)
		got = append(got, ids...)
		if token == "" {
			break
		}
	}
	if !slices.Equal(got, all) {
		t.Errorf("in pages: %v", got)
	}
	// The last of a page goes, and one is added before and one after it.
	_, token = next("", 3)
	_, err := b.controller.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: all[2]})
	must(t, "DeleteVolume", err)
	b.create("v0-early")
	b.create("v3-late")
	rest, token := next(token, 0)
	if want := []string{all[3], "main/v3-late", all[4], all[5], all[6]}; !slices.Equal(rest, want) || token != "" {
		t.Errorf("got %v and token %q, want %v", rest, token, want)
	}
	for _, bad := range []string{"invalid-token", "4", "YWZ0ZXI6", "Zm9v"} {
		_, err := b.controller.ListVolumes(t.Context(), &csi.ListVolumesRequest{StartingToken: bad})
		wantCode(t, "ListVolumes from "+bad, err, codes.Aborted)
		_, err = b.controller.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{StartingToken: bad})
		wantCode(t, "ListSnapshots from "+bad, err, codes.Aborted)
	}
	_, err = b.controller.ListVolumes(t.Context(), &csi.ListVolumesRequest{MaxEntries: -1})
	wantCode(t, "max entries", err, codes.InvalidArgument)
	snaps, err := b.controller.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{SourceVolumeId: all[4]})
	must(t, "ListSnapshots", err)
	if len(snaps.GetEntries()) != 1 || snaps.GetEntries()[0].GetSnapshot().GetSourceVolumeId() != all[4] {
		t.Errorf("of one volume: %v", snaps)
	}
	snaps, err = b.controller.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{SourceVolumeId: all[4], SnapshotId: "main/v5@s5"})
	must(t, "ListSnapshots", err)
	if len(snaps.GetEntries()) != 0 {
		t.Errorf("of one volume, with the id of another's: %v", snaps)
	}
}

// TestController_OneOperationPerVolume holds each operation and asks for it again.
// stillWaits looks for a moment whether a call returns that must not.
func stillWaits(t *testing.T, what string, done <-chan error) {
	t.Helper()
	select {
	case err := <-done:
		t.Fatalf("%s returned, with %v, while another was under way", what, err)
	case <-time.After(50 * time.Millisecond):
	}
}

func TestController_OneOperationPerVolume(t *testing.T) {
	b := newBench(t)
	id := b.create("v")
	for method, call := range map[string]func() error{
		"CreateVolume": func() error {
			_, err := b.controller.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: "new", VolumeCapabilities: []*csi.VolumeCapability{blockWriter}})
			return err
		},
		"DeleteVolume": func() error {
			_, err := b.controller.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: "main/gone"})
			return err
		},
		"Publish": func() error {
			_, err := b.controller.ControllerPublishVolume(t.Context(), &csi.ControllerPublishVolumeRequest{VolumeId: id, NodeId: "node-1", VolumeCapability: ext4Writer})
			return err
		},
		"Unpublish": func() error {
			_, err := b.controller.ControllerUnpublishVolume(t.Context(), &csi.ControllerUnpublishVolumeRequest{VolumeId: id, NodeId: "node-2"})
			return err
		},
		"Expand": func() error {
			_, err := b.controller.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: 2 << 30}})
			return err
		},
		"CreateSnapshot": func() error {
			_, err := b.controller.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
			return err
		},
		"DeleteSnapshot": func() error {
			_, err := b.controller.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: "main/v@none"})
			return err
		},
	} {
		t.Run(method, func(t *testing.T) {
			release := b.store.hold(method)
			defer release()
			before := b.store.count(method)
			first := make(chan error, 1)
			go func() { first <- call() }()
			waitUntil(t, method+" is under way", func() bool { return b.store.count(method) > before })
			second := make(chan error, 1)
			go func() { second <- call() }()
			stillWaits(t, "a second call", second)
			if n := b.store.count(method) - before; n != 1 {
				t.Errorf("%d calls came to the store, want 1 at a time", n)
			}
			release()
			must(t, "the first call", <-first)
			must(t, "the second call", <-second)
		})
	}
}
