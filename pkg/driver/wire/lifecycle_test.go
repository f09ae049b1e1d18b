package wire_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

const mib = 1 << 20

// volume is a volume on its way from CreateVolume to a pod and back.
type volume struct {
	*world
	id             string
	capability     *csi.VolumeCapability
	context        map[string]string
	publishContext map[string]string
	staging        string
	target         string
}

// capabilityFor makes a capability: of raw block for fsType "block".
func capabilityFor(fsType string, mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode}}
	if fsType == "block" {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fsType}}
	}
	return c
}

// volume describes one that does not exist yet.
func (w *world) volume(name, fsType string) *volume {
	return &volume{
		world: w, id: storeName + "/" + name,
		capability: capabilityFor(fsType, csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER),
		staging:    w.path("staging-" + name), target: w.path("pods/" + name),
	}
}

func (v *volume) name() string { return strings.TrimPrefix(v.id, storeName+"/") }

func (v *volume) create(sizeBytes int64, source *csi.VolumeContentSource, params map[string]string) error {
	resp, err := v.controller.CreateVolume(v.t.Context(), &csi.CreateVolumeRequest{
		Name: v.name(), VolumeCapabilities: []*csi.VolumeCapability{v.capability},
		CapacityRange: &csi.CapacityRange{RequiredBytes: sizeBytes}, VolumeContentSource: source, Parameters: params,
	})
	v.context = resp.GetVolume().GetVolumeContext()
	return err
}

func (v *volume) controllerPublish() error {
	resp, err := v.controller.ControllerPublishVolume(v.t.Context(), &csi.ControllerPublishVolumeRequest{VolumeId: v.id, NodeId: nodeID, VolumeCapability: v.capability})
	v.publishContext = resp.GetPublishContext()
	return err
}

func (v *volume) stage() error {
	_, err := v.node.NodeStageVolume(v.t.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.staging, VolumeCapability: v.capability, PublishContext: v.publishContext, VolumeContext: v.context,
	})
	return err
}

func (v *volume) publishAt(target string, readOnly bool) error {
	_, err := v.node.NodePublishVolume(v.t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.staging, TargetPath: target, VolumeCapability: v.capability, PublishContext: v.publishContext, Readonly: readOnly,
	})
	return err
}

func (v *volume) publish() error { return v.publishAt(v.target, false) }

func (v *volume) unpublishAt(target string) error {
	_, err := v.node.NodeUnpublishVolume(v.t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: target})
	return err
}

func (v *volume) unpublish() error { return v.unpublishAt(v.target) }

func (v *volume) unstage() error {
	_, err := v.node.NodeUnstageVolume(v.t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging})
	return err
}

func (v *volume) controllerUnpublish() error {
	_, err := v.controller.ControllerUnpublishVolume(v.t.Context(), &csi.ControllerUnpublishVolumeRequest{VolumeId: v.id, NodeId: nodeID})
	return err
}

func (v *volume) remove() error {
	_, err := v.controller.DeleteVolume(v.t.Context(), &csi.DeleteVolumeRequest{VolumeId: v.id})
	return err
}

func (v *volume) snapshot(name string) error {
	_, err := v.controller.CreateSnapshot(v.t.Context(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: v.id})
	return err
}

func (v *volume) removeSnapshot(name string) error {
	_, err := v.controller.DeleteSnapshot(v.t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: v.id + "@" + name})
	return err
}

func (v *volume) expand(sizeBytes int64) error {
	_, err := v.controller.ControllerExpandVolume(v.t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: v.id, CapacityRange: &csi.CapacityRange{RequiredBytes: sizeBytes}})
	return err
}

func (v *volume) nodeExpand(sizeBytes int64) error {
	_, err := v.node.NodeExpandVolume(v.t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: v.target, CapacityRange: &csi.CapacityRange{RequiredBytes: sizeBytes}})
	return err
}

// up brings a volume that exists to its target, and down takes it away again.
func (v *volume) up() {
	v.t.Helper()
	v.must("controller publish", v.controllerPublish())
	v.must("stage", v.stage())
	v.must("publish", v.publish())
}

func (v *volume) down() {
	v.t.Helper()
	v.must("unpublish", v.unpublish())
	v.must("unstage", v.unstage())
	v.must("controller unpublish", v.controllerUnpublish())
}

func (v *volume) must(what string, err error) {
	v.t.Helper()
	if err != nil {
		v.t.Fatalf("%s %s: %v", what, v.id, err)
	}
}

// usage returns the volume's total and used bytes, by NodeGetVolumeStats.
func (v *volume) usage() *csi.VolumeUsage {
	v.t.Helper()
	resp, err := v.node.NodeGetVolumeStats(v.t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: v.id, VolumePath: v.target})
	v.must("stats", err)
	return resp.GetUsage()[0]
}

// write writes and syncs a file in the volume.
func (v *volume) write(name string, data []byte) {
	v.t.Helper()
	f, err := os.Create(filepath.Join(v.target, name))
	v.must("write", err)
	_, err = f.Write(data)
	v.must("write", err)
	v.must("sync", errors.Join(f.Sync(), f.Close()))
}

func (v *volume) want(name string, data []byte) {
	v.t.Helper()
	got, err := os.ReadFile(filepath.Join(v.target, name))
	if err != nil || !bytes.Equal(got, data) {
		v.t.Errorf("%s of %s: %d bytes, %v: not the %d that were written", name, v.id, len(got), err, len(data))
	}
}

func randomBytes(r *rand.Rand, n int) []byte {
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	return data
}

func fromSnapshot(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}

func fromVolume(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id}}}
}

// TestFileSystems takes a volume of each file system through its life: written, frozen
// while it is mounted, expanded while it is mounted, restored and cloned beside itself.
func TestFileSystems(t *testing.T) {
	w := newWorld(t)
	r := testenv.Rand(t)
	for _, fsType := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			defer w.in(t)()
			grown := int64(640 * mib)
			if fsType == "ext4" && !canGrowExt4(t) {
				t.Log("without CAP_SYS_RESOURCE the kernel does not grow ext4: not tested")
				grown = 320 * mib
			}
			v := w.volume("origin-"+fsType, fsType)
			v.must("create", v.create(320*mib, nil, nil))
			v.up()
			if got := fileSystemAt(t, v.target); got != fsType {
				t.Errorf("mounted as %s", got)
			}
			old, fresh := randomBytes(r, 3*mib+17), randomBytes(r, mib)
			v.write("file", old)
			v.must("snapshot", v.snapshot("snap-"+fsType))
			v.write("file", fresh)

			before := v.usage().GetTotal()
			v.must("expand", v.expand(grown))
			v.must("node expand", v.nodeExpand(grown))
			if after := v.usage().GetTotal(); after < before+(grown-320*mib)*9/10 {
				t.Errorf("expanded from %d to %d bytes", before, after)
			}
			v.want("file", fresh)

			restored := w.volume("restored-"+fsType, fsType)
			restored.must("create", restored.create(max(320*mib, grown-200*mib), fromSnapshot(v.id+"@snap-"+fsType), nil))
			restored.beside(v, fsType, "file", old)
			clone := w.volume("clone-"+fsType, fsType)
			clone.must("create", clone.create(grown, fromVolume(v.id), nil))
			clone.beside(v, fsType, "file", fresh)

			v.must("publish read-only", v.publishAt(w.path("pods/reader"), true))
			err := os.WriteFile(w.path("pods/reader/file"), nil, 0o600)
			if !errors.Is(err, syscall.EROFS) {
				t.Errorf("write through a read-only target: %v", err)
			}
			v.must("unpublish", v.unpublishAt(w.path("pods/reader")))
			v.down()
			v.must("delete snapshot", v.removeSnapshot("snap-"+fsType))
			for _, each := range []*volume{v, restored, clone} {
				each.must("delete", each.remove())
			}
		})
	}
	w.wantEmptyStore()
}

// canGrowExt4 reports whether this process may do what resize2fs asks of the kernel.
func canGrowExt4(t *testing.T) bool {
	t.Helper()
	header, data := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, [2]unix.CapUserData{}
	if err := unix.Capget(&header, &data[0]); err != nil {
		t.Fatal(err)
	}
	return data[unix.CAP_SYS_RESOURCE/32].Effective&(1<<(unix.CAP_SYS_RESOURCE%32)) != 0
}

// beside mounts a volume with the UUID of one that is mounted, if the kernel can.
func (v *volume) beside(origin *volume, fsType, file string, data []byte) {
	v.t.Helper()
	v.must("controller publish", v.controllerPublish())
	if err := v.stage(); err != nil {
		if fsType != "btrfs" {
			v.t.Fatalf("stage %s beside %s: %v", v.id, origin.id, err)
		}
		// Linux before 6.7 can't; then it is another node's, or has to wait.
		v.t.Logf("not beside its origin: %v", err)
		origin.down()
		defer origin.up()
		v.must("stage", v.stage())
	}
	v.must("publish", v.publish())
	v.want(file, data)
	v.write("own", data)
	v.down()
}

// fileSystemAt returns the type of the file system that is mounted at a path.
func fileSystemAt(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); fields[1] == path {
			return fields[2]
		}
	}
	return "nothing"
}

// wantEmptyStore checks that deleted volumes have left no images.
func (w *world) wantEmptyStore() {
	w.t.Helper()
	err := filepath.WalkDir(w.path("store/volumes")+"/", func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			w.t.Errorf("left in the store: %s", path)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		w.t.Error(err)
	}
}

// TestBlock uses a volume as a raw device, read-only too, and one of an image in place.
func TestBlock(t *testing.T) {
	w := newWorld(t)
	r := testenv.Rand(t)
	v := w.volume("raw", "block")
	v.must("create", v.create(64*mib, nil, map[string]string{"format": "vmdk", "clusterSize": "64Ki", "transport": "fuse", "csi.storage.k8s.io/pvc/name": "claim"}))
	v.up()
	data := randomBytes(r, 5*mib)
	writeDevice(t, v.target, data)
	v.must("expand", v.expand(128*mib))
	v.must("node expand", v.nodeExpand(128*mib))
	if total := v.usage().GetTotal(); total != 128*mib {
		t.Errorf("the device has %d bytes", total)
	}
	wantDevice(t, v.target, data)
	if err := v.publishAt(w.path("pods/reader"), true); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("read-only beside writable: %v", err)
	}
	v.down()

	v.capability = capabilityFor("block", csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY)
	v.up()
	wantDevice(t, v.target, data)
	if f, err := os.OpenFile(v.target, os.O_WRONLY, 0); err == nil {
		_, err = f.Write(make([]byte, 4096))
		if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
			t.Error("a read-only device was written")
		}
	}
	v.down()
	v.must("delete", v.remove())
	w.wantEmptyStore()
}

// TestImages makes volumes from a VMDK as qemu-img makes it, and uses it in place.
func TestImages(t *testing.T) {
	qemuImg := testenv.Oracle(t, "qemu-img")
	w := newWorld(t)
	r := testenv.Rand(t)
	data := randomBytes(r, 7*mib)
	raw := w.path("disk.raw")
	if err := os.WriteFile(raw, append(data, make([]byte, 9*mib)...), 0o600); err != nil {
		t.Fatal(err)
	}
	image := w.path("store/images/disk.vmdk")
	if err := os.MkdirAll(filepath.Dir(image), 0o755); err != nil {
		t.Fatal(err)
	}
	convert := exec.Command(qemuImg, "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, image)
	if out, err := convert.CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v: %s", err, out)
	}
	original, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	for name, params := range map[string]map[string]string{
		"overlay": {"image": "disk.vmdk"},
		"copy":    {"image": "disk.vmdk", "imageMode": "copy"},
		"static":  nil,
	} {
		t.Run(name, func(t *testing.T) {
			defer w.in(t)()
			v := w.volume("from-"+name, "block")
			if params == nil {
				v.id = storeName + "/images/disk.vmdk"
			} else {
				v.must("create", v.create(32*mib, nil, params))
			}
			v.up()
			wantDevice(t, v.target, data)
			changed := randomBytes(r, mib)
			writeDevice(t, v.target, changed)
			v.down()
			v.up()
			wantDevice(t, v.target, append(changed, data[mib:]...))
			v.down()
			v.must("delete", v.remove())
		})
	}
	if now, err := os.ReadFile(image); err != nil || !bytes.Equal(now, original) {
		t.Errorf("the image has changed: %v", err)
	}
	w.wantEmptyStore()
	small := w.volume("small", "block")
	if err := small.create(mib, nil, map[string]string{"image": "disk.vmdk"}); status.Code(err) != codes.OutOfRange {
		t.Errorf("smaller than the image: %v", err)
	}
	if err := small.create(32*mib, nil, map[string]string{"image": "none.vmdk"}); status.Code(err) != codes.NotFound {
		t.Errorf("from no image: %v", err)
	}
}

func writeDevice(t *testing.T, path string, data []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func wantDevice(t *testing.T, path string, data []byte) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, len(data))
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the device has not what was written (%v)", err)
	}
}

// TestPartitions mounts a volume that holds a partition table.
func TestPartitions(t *testing.T) {
	w := newWorld(t)
	v := w.volume("disk", "block")
	v.must("create", v.create(64*mib, nil, nil))
	v.up()
	mbr := make([]byte, 512)
	copy(mbr[446:], []byte{0, 0, 2, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0x10, 0, 0}) // one Linux partition at sector 2048
	mbr[510], mbr[511] = 0x55, 0xaa
	writeDevice(t, v.target, mbr)
	v.down()
	v.capability = capabilityFor("", csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER)
	v.must("controller publish", v.controllerPublish())
	err := v.stage()
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(fmt.Sprint(err), "partition table") {
		t.Errorf("stage: %v", err)
	}
	v.must("unstage", v.unstage())
	v.must("controller unpublish", v.controllerUnpublish())
	v.must("delete", v.remove())
}

// TestFormats takes a volume of each format and shape through its life.
func TestFormats(t *testing.T) {
	w := newWorld(t)
	r := testenv.Rand(t)
	for name, params := range map[string]map[string]string{
		"default":   nil,
		"raw":       {"format": "raw"},
		"falloc":    {"format": "raw", "preallocation": "falloc"},
		"vmdk":      {"format": "vmdk", "subformat": "monolithicSparse", "clusterSize": "16K"},
		"flat":      {"format": "vmdk", "subformat": "monolithicFlat"},
		"full-flat": {"format": "vmdk", "subformat": "monolithicFlat", "preallocation": "full"},
		"vhdx":      {"format": "vhdx"},
		"vdi":       {"format": "vdi"},
		"vpc":       {"format": "vpc"},
		"qcow":      {"format": "qcow"},
		"qcow2":     {"format": "qcow2", "clusterSize": "4K", "preallocation": "metadata"},
	} {
		t.Run(name, func(t *testing.T) {
			defer w.in(t)()
			v := w.volume(name, "block")
			v.must("create", v.create(16*mib, nil, params))
			v.must("create again", v.create(16*mib, nil, params))
			v.up()
			old, fresh := randomBytes(r, 2*mib), randomBytes(r, mib)
			v.put(old)
			v.must("snapshot", v.snapshot("snap-"+name))
			v.put(fresh)
			v.must("expand", v.expand(32*mib))
			v.must("node expand", v.nodeExpand(32*mib))
			v.check(append(fresh, old[mib:]...))
			restored := w.volume("restored-"+name, "block")
			restored.must("create", restored.create(24*mib, fromSnapshot(v.id+"@snap-"+name), params))
			restored.up()
			restored.check(old)
			clone := w.volume("clone-"+name, "block")
			clone.must("create", clone.create(32*mib, fromVolume(v.id), nil))
			clone.up()
			clone.check(append(fresh, old[mib:]...))
			for _, each := range []*volume{v, clone, restored} {
				each.down()
			}
			v.must("delete the origin first", v.remove())
			clone.up()
			clone.check(append(fresh, old[mib:]...))
			clone.down()
			clone.must("delete", clone.remove())
			restored.must("delete", restored.remove())
			v.must("delete snapshot", v.removeSnapshot("snap-"+name))
		})
	}
	w.wantEmptyStore()
}
