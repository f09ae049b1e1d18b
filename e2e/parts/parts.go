package parts

import "context"

// KubernetesVersion is what the programs in Parts.Bin say they are.
const KubernetesVersion = "v1.36.3"

// Parts is what a cluster consists of. All paths are absolute; what is there stays as it is
// while the process that called Build lives, and is not to be changed.
type Parts struct {
	// Bin is a directory of static programs for this machine's processor: etcd,
	// kube-apiserver, kube-controller-manager, kube-scheduler, kubelet, kubectl,
	// snapshot-controller, and release, which installs charts as helm does. Etcd alone may be
	// a link to a program that is not static.
	Bin string

	// Images are archives, each of one image or several, which `ctr images import` takes.
	Images []string

	// ImageNames are the names of all images in Images, as pods call them.
	ImageNames []string

	// PauseImage is the one among them that containerd is to make pods of.
	PauseImage string

	// DriverImage is the one among them that has the driver, as built from this repository.
	DriverImage string

	// NextDriverImage is the same driver with another name and version, for upgrades.
	NextDriverImage string

	// SnapshotCRDs are files with the custom resources that snapshots need.
	SnapshotCRDs []string
}

// Build makes what is missing below cacheDir, and returns all parts. It prints what takes
// long, with times, to standard error. Two processes may call it with one directory at once:
// one of them waits.
func Build(ctx context.Context, cacheDir string) (*Parts, error) {
	return build(ctx, cacheDir)
}
