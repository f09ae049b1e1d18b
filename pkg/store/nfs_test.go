package store_test

import (
	"errors"
	"io/fs"
	"path"
	"strconv"
	"sync"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// nfsLike removes files as an NFS client does: one that is open is renamed, and removed
// when it is closed.
type nfsLike struct {
	vfs.FS
	mu   sync.Mutex
	open map[string]int // by name
	gone map[string]string
	next int
}

type nfsFile struct {
	vfs.File
	of   *nfsLike
	name string
}

func (n *nfsLike) opened(f vfs.File, err error, name string) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.open[name]++
	return &nfsFile{f, n, name}, nil
}

func (n *nfsLike) Open(name string, mode vfs.Mode) (vfs.File, error) {
	f, err := n.FS.Open(name, mode)
	return n.opened(f, err, name)
}

func (n *nfsLike) Create(name string) (vfs.File, error) {
	f, err := n.FS.Create(name)
	return n.opened(f, err, name)
}

func (n *nfsLike) Remove(name string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.open[name] == 0 {
		return n.FS.Remove(name)
	}
	n.next++
	n.gone[name] = path.Join(path.Dir(name), ".nfs"+strconv.Itoa(n.next))
	return n.FS.Rename(name, n.gone[name])
}

func (f *nfsFile) Close() error {
	n := f.of
	n.mu.Lock()
	defer n.mu.Unlock()
	err := f.File.Close()
	n.open[f.name]--
	if left := n.gone[f.name]; left != "" && n.open[f.name] == 0 {
		delete(n.gone, f.name)
		err = errors.Join(err, n.FS.Remove(left))
	}
	return err
}

// A volume's directory goes with it although its lock's file is open while it is removed.
func TestDelete_OnNFS_NoDirectoryIsLeft(t *testing.T) {
	n := &nfsLike{FS: vfs.NewMem(), open: map[string]int{}, gone: map[string]string{}}
	s := openStore(t, n)
	_, err := s.CreateVolume(t.Context(), store.CreateVolumeRequest{Name: "v", Format: "qcow2", SizeBytes: mib})
	must(t, err)
	must(t, s.DeleteVolume(t.Context(), "v"))
	missing := store.CreateVolumeRequest{Name: "w", Source: store.Source{Image: "none.vmdk", Mode: store.ImageOverlay}}
	if _, err := s.CreateVolume(t.Context(), missing); !errors.Is(err, block.ErrNotFound) {
		t.Errorf("a volume on an image that is missing: %v", err)
	}
	for _, name := range []string{"v", "w"} {
		if _, err := n.Stat("volumes/" + name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("what is left of volume %s: %v", name, err)
		}
	}
}
