// Package install puts the driver into a test cluster as a user of the chart does: stores
// on the NFS server, a privileged namespace, helm install, and waiting until all is ready.
package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/cluster"
)

// Names of what is installed.
const (
	Namespace     = "csi-imgdisk"
	StorageClass  = "imgdisk"
	SnapshotClass = "imgdisk"
	Driver        = "csi.imgdisk.dev"
)

// The stores: one for nearly everything, one that is soon full, and one whose export the
// server does not have.
const (
	StoreMain   = "main"
	StoreSmall  = "small"
	StoreAbsent = "absent"
)

// SmallBytes is the size of the file system that StoreSmall is on.
const SmallBytes = 64 << 20

// MaxVolumes is how many volumes a node takes: half of what TestMany makes, and some.
const MaxVolumes = 40

// StorePath is a store's directory on the NFS server, and in its export.
func StorePath(store string) string { return cluster.ExportPath + "/" + store }

// Chart installs the chart of this repository, which is the working directory or above it,
// with driverImage; a release that is there is upgraded. It returns when everything is
// ready.
func Chart(ctx context.Context, c *cluster.Cluster, driverImage string) error {
	if err := PrepareServer(ctx, c); err != nil {
		return err
	}
	if err := namespace(ctx, c); err != nil {
		return err
	}
	text, err := yaml.Marshal(values(driverImage))
	if err != nil {
		return err
	}
	if err := os.WriteFile(valuesFile(c), text, 0o644); err != nil {
		return err
	}
	return helm(ctx, c)
}

// Upgrade upgrades the release with values changed, each KEY=VALUE, and returns when
// everything is ready.
func Upgrade(ctx context.Context, c *cluster.Cluster, changes ...string) error {
	var args []string
	for _, change := range changes {
		args = append(args, "-set-string", change)
	}
	return helm(ctx, c, args...)
}

// values are those of a user with an NFS server.
func values(driverImage string) map[string]any {
	repository, tag := driverImage, ""
	if i := strings.LastIndex(driverImage, ":"); i > strings.LastIndex(driverImage, "/") {
		repository, tag = driverImage[:i], driverImage[i+1:]
	}
	var stores []any
	for _, name := range []string{StoreMain, StoreSmall, StoreAbsent} {
		stores = append(stores, map[string]any{"name": name, "nfs": map[string]any{
			"server": cluster.NFSAddress, "path": StorePath(name),
		}})
	}
	return map[string]any{
		"image":  map[string]any{"repository": repository, "tag": tag, "pullPolicy": "Never"},
		"stores": stores,
		// What upstream's suite is told that the driver can, package suite.
		"csiDriver": map[string]any{"storageCapacity": true},
		"node":      map[string]any{"maxVolumes": MaxVolumes},
		"controller": map[string]any{"leaderElection": map[string]any{
			// A replica on a busy emulated processor is not to pass for gone.
			"leaseDuration": "40s", "renewDeadline": "30s", "retryPeriod": "8s",
		}},
		"storageClasses": []any{map[string]any{
			"name": StorageClass, "default": true, "parameters": map[string]any{"store": StoreMain},
		}},
		"volumeSnapshotClasses": []any{map[string]any{"name": SnapshotClass, "default": true}},
	}
}

func valuesFile(c *cluster.Cluster) string {
	return filepath.Join(filepath.Dir(c.Kubeconfig()), "values.yaml")
}

// PrepareServer makes what the stores lie on, on the NFS server; also after its restart.
func PrepareServer(ctx context.Context, c *cluster.Cluster) error {
	script := fmt.Sprintf(`set -e
mkdir -p %[1]s %[2]s
if ! mountpoint -q %[2]s; then
  test -e %[2]s.img || { truncate -s %[3]d %[2]s.img.new; mkfs.ext4 -q -m 0 %[2]s.img.new; mv %[2]s.img.new %[2]s.img; }
  mount -o loop %[2]s.img %[2]s
  rm -rf %[2]s/lost+found
fi
exportfs -o rw,sync,no_root_squash,no_subtree_check,fsid=77 '*:%[2]s'`,
		StorePath(StoreMain), StorePath(StoreSmall), SmallBytes)
	if out, err := c.Machine(cluster.NFS).Run(ctx, script); err != nil {
		return fmt.Errorf("make the stores' directories on the NFS server: %w\n%s", err, out)
	}
	return nil
}

// namespace makes the release's, in which privileged pods may run.
func namespace(ctx context.Context, c *cluster.Cluster) error {
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	_, err = client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name:   Namespace,
		Labels: map[string]string{"pod-security.kubernetes.io/enforce": "privileged"},
	}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("make namespace %s: %w", Namespace, err)
	}
	return nil
}

// helm runs this repository's program that does what helm does: a program of its own, because
// it has dependencies at other versions than the cluster's.
func helm(ctx context.Context, c *cluster.Cluster, args ...string) error {
	root, err := repository()
	if err != nil {
		return err
	}
	args = append([]string{
		"-kubeconfig", c.Kubeconfig(), "-namespace", Namespace,
		"-values", valuesFile(c), "-chart", filepath.Join(root, "charts", "csi-imgdisk"),
		"-timeout", "10m", // emulated machines are slow
	}, args...)
	cmd := exec.CommandContext(ctx, c.Program("release"), args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("install the chart: %w\n%s", err, out)
	}
	return nil
}

// repository finds this repository's root from a directory in it.
func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for at := dir; ; at = filepath.Dir(at) {
		if _, err := os.Stat(filepath.Join(at, "tools", "helm", "release")); err == nil {
			return at, nil
		}
		if at == filepath.Dir(at) {
			return "", errors.New(dir + " is not in a checkout of the repository")
		}
	}
}
