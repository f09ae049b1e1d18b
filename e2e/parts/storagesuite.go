package parts

import (
	"context"
	"errors"
	"path/filepath"
)

// StorageSuite is Kubernetes' own storage suite for drivers outside of its tree, as two
// programs: see e2e/upstream/storage.
type StorageSuite struct {
	Ginkgo string // runs it
	Suite  string
}

// BuildStorageSuite makes it below cacheDir, if it is not there, as Build makes the other parts,
// which a cluster needs earlier.
func BuildStorageSuite(ctx context.Context, cacheDir string) (_ *StorageSuite, err error) {
	b, err := newBuilder(ctx, cacheDir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.cache.close()) }()
	runner := kubernetes
	runner.name, runner.packages = "ginkgo", []string{"github.com/onsi/ginkgo/v2/ginkgo"}
	ginkgo, err := runner.build(ctx, b)
	if err != nil {
		return nil, err
	}
	module := filepath.Join(b.root, kubernetes.dir)
	k := kubernetes.key(b).files(filepath.Join(module, "storage/storage_test.go"))
	dir, err := b.cache.get(ctx, "storage-suite", k, func(ctx context.Context, dir string) error {
		// Without vet, which would look at all of Kubernetes, too.
		args := append([]string{"test", "-c", "-vet=off", "-trimpath", "-o", filepath.Join(dir, "storage.test")}, kubernetes.flags()...)
		return run(ctx, module, "go", append(args, "./storage")...)
	})
	return &StorageSuite{filepath.Join(ginkgo, "ginkgo"), filepath.Join(dir, "storage.test")}, err
}
