package tests

import (
	"context"
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/cluster"
)

// snapshotUnderLoad: volumes that are being written to are snapshotted, cloned and grown.
// What was flushed before is in the snapshot and the clone; the writers see nothing.
func snapshotUnderLoad(e *env) {
	e.claim(claim{name: "files"})
	e.claim(claim{name: "disk", block: true})
	writers := e.write(pod{name: "load", node: cluster.NodeB, files: []string{"files"}, blocks: []string{"disk"},
		script: "trap 'exit 0' TERM; while :; do stat -f -c 'files %b %S' /files; echo disk $(blockdev --getsize64 /dev/disk); sleep 2; done"}, 1)
	dirs := e.bound("files", "disk")

	atSnapshot := flushedOf(writers)
	e.snapshot("snap-files", "files", "")
	e.snapshot("snap-disk", "disk", "")
	e.ready("snap-files", "snap-disk")
	atClone := flushedOf(writers)
	e.claim(claim{name: "clone-files", clone: "files"})
	e.claim(claim{name: "clone-disk", block: true, clone: "disk"})
	e.claim(claim{name: "restored-files", snapshot: "snap-files"})
	e.claim(claim{name: "restored-disk", block: true, snapshot: "snap-disk"})
	// A clone that is made later has to ask for the grown size.
	dirs = append(dirs, e.bound("clone-files", "clone-disk", "restored-files", "restored-disk")...)
	e.expand("files", "160Mi")
	e.expand("disk", "160Mi")
	e.says("load", "disk 167772160")
	e.grown("load", 140<<20)

	for _, w := range writers {
		w.mark()
		w.advances()
	}
	atEnd := e.stop(writers)
	e.verify(pod{
		name: "look", node: cluster.NodeA,
		files:  []string{"files", "restored-files", "clone-files"},
		blocks: []string{"disk", "restored-disk", "clone-disk"},
	}, 50, atEnd[0], atSnapshot[0], atClone[0], atEnd[1], atSnapshot[1], atClone[1])
	e.check(dirs...)

	// Volumes before their clones, snapshots before what was restored from them: what stands
	// on them is whole.
	e.deleteClaim("files")
	e.deleteClaim("disk")
	e.gone("files", "disk")
	e.deleteSnapshot("snap-files")
	e.deleteSnapshot("snap-disk")
	e.gone("snap-files", "snap-disk")
	e.verify(pod{
		name: "look-orphans", node: cluster.NodeB,
		files: []string{"restored-files", "clone-files"}, blocks: []string{"restored-disk", "clone-disk"},
	}, 51, atSnapshot[0], atClone[0], atSnapshot[1], atClone[1])
}

func flushedOf(writers []*writer) (flushed []int) {
	for _, w := range writers {
		flushed = append(flushed, w.flushed())
	}
	return flushed
}

// grow asks for a larger claim.
func (e *env) grow(name, size string) {
	e.Helper()
	patch := fmt.Sprintf(`{"spec":{"resources":{"requests":{"storage":%q}}}}`, size)
	_, err := world.client.CoreV1().PersistentVolumeClaims(e.ns).Patch(e.Context(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	e.ok(err)
}

// expand asks for a larger claim, and waits until it is.
func (e *env) expand(name, size string) {
	e.Helper()
	e.grow(name, size)
	e.eventually(longer, "claim "+name+" has "+size, func(ctx context.Context) (string, error) {
		pvc, err := world.client.CoreV1().PersistentVolumeClaims(e.ns).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return "", err
		}
		if has := pvc.Status.Capacity.Storage().String(); has != size {
			return fmt.Sprintf("it has %s, %v", has, pvc.Status.Conditions), nil
		}
		return "", nil
	})
}

// grown waits until a pod's script says that its file system has this many bytes.
func (e *env) grown(pod string, atLeast int64) {
	e.Helper()
	node, logs := e.where(pod)
	e.eventually(soon, "the file system grows", func(ctx context.Context) (string, error) {
		out, err := world.cluster.Machine(node).Run(ctx, "grep files "+logs+"/script/0.log | tail -n 1")
		if err != nil {
			return "", err
		}
		var blocks, size int64
		_, last, _ := strings.Cut(out, "files ")
		if _, err := fmt.Sscanf(last, "%d %d", &blocks, &size); err != nil || blocks*size < atLeast {
			return "it is " + out, nil
		}
		return "", nil
	})
}

// deleteInEveryOrder: a volume, a snapshot of it and what was made from one of them are deleted
// one after another, in each order there is, all at once; nothing stays behind.
func deleteInEveryOrder(e *env) {
	const volume, snapshot, restored, clone = "volume", "snapshot", "restored", "clone"
	all := append(orders(volume, snapshot, restored), orders(volume, snapshot, clone)...)
	name := func(i int, kind string) string { return fmt.Sprintf("%s-%d", kind, i) }
	makes := map[string]func(i int){
		volume:   func(i int) { e.claim(claim{name: name(i, volume), size: "16Mi"}) },
		snapshot: func(i int) { e.snapshot(name(i, snapshot), name(i, volume), "") },
		restored: func(i int) { e.claim(claim{name: name(i, restored), size: "16Mi", snapshot: name(i, snapshot)}) },
		clone:    func(i int) { e.claim(claim{name: name(i, clone), size: "16Mi", clone: name(i, volume)}) },
	}
	for _, kind := range []string{volume, snapshot, restored, clone} {
		var made []string
		for i, order := range all {
			if slices.Contains(order, kind) {
				makes[kind](i)
				made = append(made, name(i, kind))
			}
		}
		if kind == snapshot {
			e.ready(made...)
		} else {
			e.bound(made...)
		}
	}
	for step := range all[0] {
		var deleted []string
		for i, order := range all {
			if order[step] == snapshot {
				e.deleteSnapshot(name(i, snapshot))
			} else {
				e.deleteClaim(name(i, order[step]))
			}
			deleted = append(deleted, name(i, order[step]))
		}
		e.gone(deleted...)
	}
}
