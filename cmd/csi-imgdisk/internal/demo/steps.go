package demo

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const (
	emptyBytes    = 1 << 30  // of the volume that is made empty
	expandedBytes = 2 << 30  // and what it is expanded to
	ledgerBytes   = 32 << 20 // of the file that is overwritten
	ledgerFile    = "ledger"
	recordsFile   = "records"
	// writerHeadStart is how long the application writes before the snapshot is taken.
	writerHeadStart = 300 * time.Millisecond
)

// run shows everything, one part after the other. It stops at the first failure, and
// when ctx ends.
func (d *demo) run(ctx context.Context) error {
	d.console.title("csi-imgdisk: from a VMware disk to a mounted, snapshotted volume")
	if err := d.begin(ctx); err != nil {
		return err
	}
	var volumes snapshotVolumes
	parts := []struct {
		title string
		show  func(context.Context) error
	}{
		{"A VMware disk becomes a volume", d.importDisk},
		{"An empty volume: format, write, snapshot while it is written", volumes.within(d.makeVolume)},
		{"Back in time", volumes.within(d.restore)},
		{"A clone, and more room, while it is written", volumes.within(d.cloneAndExpand)},
		{"What lies on the store", d.showStore},
		{"Put away", d.putAway},
	}
	for _, part := range parts {
		d.console.title("%s", part.title)
		if err := part.show(ctx); err != nil {
			return err
		}
	}
	return nil
}

// step runs one step unless ctx has ended.
func (d *demo) step(ctx context.Context, name string, do func() (string, error)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return d.console.step(name, do)
}

// quiet makes a step that has nothing to tell.
func quiet(do func() error) func() (string, error) {
	return func() (string, error) { return "", do() }
}

func (d *demo) begin(ctx context.Context) error {
	if err := d.step(ctx, "make a store, a directory like any NFS or SMB share", func() (string, error) {
		return d.store(), d.initStore()
	}); err != nil {
		return err
	}
	return d.step(ctx, "start csi-imgdisk standalone; what follows are CSI calls to it", func() (string, error) {
		if err := d.startDriver(ctx); err != nil {
			return "", err
		}
		info, err := d.driver.identity.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
		if err != nil {
			return "", plainError(err)
		}
		return info.Name + " " + info.VendorVersion, nil
	})
}

func (d *demo) initStore() error {
	if err := os.Mkdir(d.store(), 0o700); err != nil {
		return err
	}
	dir, err := vfs.OpenDir(d.store())
	if err != nil {
		return err
	}
	defer dir.Close()
	if _, err := store.Init(dir); err != nil {
		return err
	}
	return os.MkdirAll(d.images(), 0o700)
}

// importDisk makes a volume of a VMware disk and reads a file from it.
func (d *demo) importDisk(ctx context.Context) error {
	name := d.imageName()
	if err := d.step(ctx, "put "+name+" under images/", func() (string, error) { return d.placeImage(ctx) }); err != nil {
		return err
	}
	var v *volume
	if err := d.step(ctx, "provision a volume from it, without copying it", func() (_ string, err error) {
		v, err = d.create(ctx, "imported", 0, map[string]string{"image": name}, nil)
		return "", err
	}); err != nil {
		return err
	}
	if d.options.Image != "" {
		return d.readForeignDisk(ctx, v)
	}
	if err := d.attachStep(ctx, "attach it as a block device and mount that", v); err != nil {
		return err
	}
	if err := d.step(ctx, "read a file out of it, check sums of all", func() (string, error) {
		return readSample(d.target(v.name))
	}); err != nil {
		return err
	}
	return d.convertSample(ctx)
}

// attachStep attaches a volume and tells where.
func (d *demo) attachStep(ctx context.Context, name string, v *volume) error {
	return d.step(ctx, name, func() (string, error) {
		if err := d.attach(ctx, v); err != nil {
			return "", err
		}
		return d.whereabouts(ctx, v)
	})
}

// readForeignDisk reads a file from a disk of the user's, which may be partitioned.
func (d *demo) readForeignDisk(ctx context.Context, v *volume) error {
	v.block = true
	if err := d.attachStep(ctx, "attach it as a block device", v); err != nil {
		return err
	}
	if _, err := partitions(ctx, d.target(v.name)); err == nil {
		dir := d.path("partition")
		return d.step(ctx, "mount its largest partition, read a file out of it", func() (string, error) {
			if err := d.mountPartition(ctx, d.target(v.name), dir); err != nil {
				return d.readFirstBytes(v, err)
			}
			return readSomeFile(dir)
		})
	}
	if !hasFileSystem(ctx, d.target(v.name)) { // to mount it would be to format it
		return d.step(ctx, "read from it", func() (string, error) {
			return d.readFirstBytes(v, errNoFileSystem)
		})
	}
	if err := d.step(ctx, "detach it, to mount it", quiet(func() error { return d.detach(ctx, v) })); err != nil {
		return err
	}
	v.block = false
	if err := d.attachStep(ctx, "attach it and mount it", v); err != nil {
		return err
	}
	return d.step(ctx, "read a file out of it", func() (string, error) { return readSomeFile(d.target(v.name)) })
}

// readFirstBytes reads a device of which nothing can be mounted, and says why.
func (d *demo) readFirstBytes(v *volume, why error) (string, error) {
	f, err := os.Open(d.target(v.name))
	if err != nil {
		return "", err
	}
	defer f.Close()
	if _, err := io.CopyN(io.Discard, f, 1<<20); err != nil && err != io.EOF {
		return "", err
	}
	return fmt.Sprintf("%v\nread the beginning of the device instead", why), nil
}

// convertSample makes a second volume by copying the image, for qemu-img to compare.
func (d *demo) convertSample(ctx context.Context) error {
	var v *volume
	if err := d.step(ctx, "provision another one as a copy (imageMode=copy)", func() (_ string, err error) {
		v, err = d.create(ctx, "copied", 0, map[string]string{"image": sampleName, "imageMode": "copy"}, nil)
		return "", err
	}); err != nil || !haveQEMU() {
		return err
	}
	return d.step(ctx, "qemu-img compare: the copy is the original", quiet(func() error {
		layers, err := d.layers(ctx, v)
		if err != nil {
			return err
		}
		return qemuImg(ctx, "compare", filepath.Join(d.images(), sampleName), layers[len(layers)-1])
	}))
}

// snapshotVolumes are what the later parts work with.
type snapshotVolumes struct {
	original *volume
	snapshot string // its id
	layer    string // the image that holds it
	frozen   string // sum of the ledger when the snapshot was taken
	now      string // and after it was overwritten
	records  int64  // durable before the snapshot
}

// within binds a part to the volumes.
func (s *snapshotVolumes) within(part func(context.Context, *snapshotVolumes) error) func(context.Context) error {
	return func(ctx context.Context) error { return part(ctx, s) }
}

// makeVolume provisions an empty volume and takes a snapshot while it is written.
func (d *demo) makeVolume(ctx context.Context, s *snapshotVolumes) error {
	if err := d.step(ctx, "provision an empty volume of "+size(emptyBytes)+" as VMDK", func() (_ string, err error) {
		s.original, err = d.create(ctx, "data", emptyBytes, map[string]string{"format": "vmdk"}, nil)
		return "", err
	}); err != nil {
		return err
	}
	s.original.fsType = growableFileSystem()
	if err := d.attachStep(ctx, "attach it, make an "+s.original.fsType+" file system, mount it", s.original); err != nil {
		return err
	}
	target := d.target(s.original.name)
	if err := d.step(ctx, "write "+size(ledgerBytes)+" to "+ledgerFile+" and sync", func() (_ string, err error) {
		s.frozen, err = writeRandom(filepath.Join(target, ledgerFile), ledgerBytes)
		return "sha256 " + s.frozen, err
	}); err != nil {
		return err
	}
	if err := d.step(ctx, "start an application that writes and syncs all the time", func() (_ string, err error) {
		d.writer, err = startWriter(filepath.Join(target, recordsFile))
		return "", pauseFor(ctx, writerHeadStart, err)
	}); err != nil {
		return err
	}
	if err := d.snapshotStep(ctx, s); err != nil {
		return err
	}
	return d.step(ctx, "overwrite "+ledgerFile, func() (_ string, err error) {
		s.now, err = writeRandom(filepath.Join(target, ledgerFile), ledgerBytes)
		return "sha256 " + s.now, err
	})
}

// pauseFor waits unless there is an error already.
func pauseFor(ctx context.Context, d time.Duration, err error) error {
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// snapshotStep takes a snapshot under load.
func (d *demo) snapshotStep(ctx context.Context, s *snapshotVolumes) error {
	return d.step(ctx, "take a snapshot, mounted and being written", func() (_ string, err error) {
		var usual, pause time.Duration
		s.records, usual = d.writer.progress()
		if s.snapshot, err = d.snapshot(ctx, s.original, "before"); err != nil {
			return "", err
		}
		after, pause := d.writer.progress()
		layers, err := d.layers(ctx, s.original)
		if err != nil {
			return "", err
		}
		if len(layers) < 2 {
			return "", fmt.Errorf("the snapshot made no layer: %v", layers)
		}
		s.layer = layers[len(layers)-2]
		return fmt.Sprintf("the application wrote %d records meanwhile; the slowest took %s (before: %s)",
			after-s.records, strings.TrimSpace(duration(pause)), strings.TrimSpace(duration(usual))), nil
	})
}

// restore makes a volume of the snapshot.
func (d *demo) restore(ctx context.Context, s *snapshotVolumes) error {
	var v *volume
	if err := d.step(ctx, "restore the snapshot as a new volume", func() (_ string, err error) {
		v, err = d.create(ctx, "restored", 0, nil, fromSnapshot(s.snapshot))
		return "", err
	}); err != nil {
		return err
	}
	if err := d.compareRestored(ctx, v, s.layer); err != nil {
		return err
	}
	v.fsType = s.original.fsType
	if err := d.attachStep(ctx, "attach and mount it", v); err != nil {
		return err
	}
	return d.step(ctx, "it has the old "+ledgerFile+", and all records synced by then", func() (string, error) {
		return d.verify(v, s.frozen, s.records)
	})
}

// cloneAndExpand makes a volume of the volume, which it then expands.
func (d *demo) cloneAndExpand(ctx context.Context, s *snapshotVolumes) error {
	var v *volume
	if err := d.step(ctx, "clone the volume that is being written", func() (_ string, err error) {
		v, err = d.create(ctx, "clone", 0, nil, fromVolume(s.original))
		return "", err
	}); err != nil {
		return err
	}
	v.fsType = s.original.fsType
	if err := d.attachStep(ctx, "attach and mount the clone", v); err != nil {
		return err
	}
	if err := d.step(ctx, "it has the new "+ledgerFile, func() (string, error) {
		return d.verify(v, s.now, s.records)
	}); err != nil {
		return err
	}
	if err := d.expandStep(ctx, s.original); err != nil {
		return err
	}
	return d.step(ctx, "stop the application: every record it had synced is there", func() (string, error) {
		w := d.writer
		d.writer = nil
		records, err := w.end()
		if err != nil {
			return "", err
		}
		return d.verify(s.original, s.now, records)
	})
}

// compareRestored has qemu-img compare a new volume with the snapshot it stands on.
func (d *demo) compareRestored(ctx context.Context, v *volume, snapshotLayer string) error {
	if !haveQEMU() {
		return nil
	}
	return d.step(ctx, "qemu-img compare: it is the snapshot", quiet(func() error {
		layers, err := d.layers(ctx, v)
		if err != nil {
			return err
		}
		return qemuImg(ctx, "compare", layers[len(layers)-1], snapshotLayer)
	}))
}

// verify checks that a volume's ledger has a sum, and how many records it has.
func (d *demo) verify(v *volume, sum string, atLeast int64) (string, error) {
	got, err := sumFile(filepath.Join(d.target(v.name), ledgerFile))
	if err != nil {
		return "", err
	}
	if got != sum {
		return "", fmt.Errorf("%s of volume %s has sha256 %s, not %s", ledgerFile, v.name, got, sum)
	}
	records, err := verifyRecords(filepath.Join(d.target(v.name), recordsFile), atLeast)
	return fmt.Sprintf("sha256 %s…, %d records", got[:16], records), err
}

// expandStep expands a volume that is in use.
func (d *demo) expandStep(ctx context.Context, v *volume) error {
	return d.step(ctx, "expand the first one to "+size(expandedBytes)+", in use", func() (string, error) {
		total, free, err := df(d.target(v.name))
		if err != nil {
			return "", err
		}
		if err := d.expand(ctx, v, expandedBytes); err != nil {
			return "", err
		}
		newTotal, newFree, err := df(d.target(v.name))
		if err == nil && newTotal <= total {
			err = fmt.Errorf("the file system has %d bytes, as before", newTotal)
		}
		return fmt.Sprintf("df before: %s, %s free\ndf after:  %s, %s free", size(total), size(free), size(newTotal), size(newFree)), err
	})
}

// showStore draws the store.
func (d *demo) showStore(ctx context.Context) error {
	return d.step(ctx, "draw it as a tree: what is indented stands on what is above", func() (string, error) {
		return d.tree(ctx)
	})
}

// putAway detaches everything, has qemu-img check it, and deletes it.
func (d *demo) putAway(ctx context.Context) error {
	if err := d.step(ctx, "unmount and detach everything", quiet(func() error { return d.detachVolumes(ctx) })); err != nil {
		return err
	}
	if haveQEMU() {
		if err := d.step(ctx, "qemu-img check: every image on the store is good", func() (string, error) {
			n, err := d.checkAll(ctx)
			return fmt.Sprintf("%d images", n), err
		}); err != nil {
			return err
		}
	}
	if err := d.step(ctx, "delete the volumes and the snapshot", quiet(func() error { return d.deleteAll(ctx) })); err != nil {
		return err
	}
	return d.step(ctx, "stop the driver and its supervisor, remove the store", func() (string, error) {
		if err := d.cleanUp(ctx); err != nil {
			return "", err
		}
		return "no device, mount, process or file is left", nil
	})
}

func (d *demo) detachVolumes(ctx context.Context) error {
	if err := d.unmountOwn(); err != nil {
		return err
	}
	for _, v := range d.volumes {
		if err := d.detach(ctx, v); err != nil {
			return err
		}
	}
	return nil
}

// deleteAll deletes snapshots and volumes, and looks whether the store is empty then.
func (d *demo) deleteAll(ctx context.Context) error {
	list, err := d.driver.controller.ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
	if err != nil {
		return plainError(err)
	}
	for _, entry := range list.Entries {
		if err := call(ctx, func() error {
			_, err := d.driver.controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: entry.Snapshot.SnapshotId})
			return err
		}); err != nil {
			return fmt.Errorf("DeleteSnapshot: %w", err)
		}
	}
	for _, v := range d.volumes {
		if err := call(ctx, func() error {
			_, err := d.driver.controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id})
			return err
		}); err != nil {
			return fmt.Errorf("DeleteVolume %s: %w", v.name, err)
		}
	}
	d.volumes = nil
	left, err := filepath.Glob(filepath.Join(d.store(), "volumes", "*", "*"))
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("deleting everything left %s", strings.Join(left, ", "))
	}
	return err
}
