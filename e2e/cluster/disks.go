package cluster

import (
	"archive/tar"
	"bytes"
	"context"
	"os"
)

// disk is one of a machine's.
type disk struct {
	file   string // below the machine's directory
	format string
	make   func(ctx context.Context, m *Machine, file string) error
}

// exportBytes is the size of the disk that the NFS server exports. Its file is sparse.
const exportBytes = 40 << 30

// disks are a machine's, in the order vda, vdb, …: guest/boot.sh and guest/init know them.
func (m *Machine) disks() []disk {
	list := []disk{
		{"root.qcow2", "qcow2", layerOn(m.c.state.Base.Root)},
		{"cluster.qcow2", "qcow2", layerOn(m.c.state.ClusterDisk)},
		{"settings.tar", "raw", makeSettings},
	}
	if !m.isNode() {
		list = append(list, disk{"export.img", "raw", makeExport})
	}
	return list
}

// layerOn makes a disk that begins as a cached one, which it does not change.
func layerOn(base string) func(context.Context, *Machine, string) error {
	return func(ctx context.Context, _ *Machine, file string) error {
		return command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", file)
	}
}

// makeSettings writes an archive with what is this machine's own.
func makeSettings(_ context.Context, m *Machine, file string) error {
	files := map[string][]byte{"settings": []byte(m.settings())}
	if m.isNode() {
		for name, path := range map[string]string{
			"kubeconfig": m.c.path(m.name + ".kubeconfig"), "ca.crt": m.c.path("pki", "ca.crt"),
		} {
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			files[name] = content
		}
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for name, content := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: int64(len(content))}); err != nil {
			return err
		}
		if _, err := w.Write(content); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return os.WriteFile(file, archive.Bytes(), 0o600)
}

func makeExport(ctx context.Context, _ *Machine, file string) error {
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(file, exportBytes); err != nil {
		return err
	}
	return command(ctx, "mkfs.ext4", "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0", file)
}
