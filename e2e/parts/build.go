package parts

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sync/errgroup"
)

// builder is one call of Build.
type builder struct {
	root  string // the repository's
	cache *cache

	rootfsOnce sync.Once
	rootfsDir  string
	rootfsErr  error
}

func build(ctx context.Context, cacheDir string) (_ *Parts, err error) {
	b, err := newBuilder(ctx, cacheDir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.cache.close()) }()
	names, err := readChart(filepath.Join(b.root, "charts/csi-imgdisk"))
	if err != nil {
		return nil, err
	}
	p := &Parts{PauseImage: pauseImage, DriverImage: names.driver, NextDriverImage: names.driver + "-next"}
	var made struct{ kubernetes, provisioner, sidecars, ours, installer, etcd, driverImages string }
	// What takes longest first. More at a time would only take turns: Go's compiler uses all processors.
	steps, sctx := errgroup.WithContext(ctx)
	steps.SetLimit(3)
	for _, step := range []struct {
		to   *string
		make func(ctx context.Context) (string, error)
	}{
		{&made.driverImages, func(ctx context.Context) (string, error) {
			return b.driverImages(ctx, p.DriverImage, p.NextDriverImage)
		}},
		{&made.kubernetes, func(ctx context.Context) (string, error) { return kubernetes.build(ctx, b) }},
		{&made.sidecars, func(ctx context.Context) (string, error) { return sidecars.build(ctx, b) }},
		{&made.provisioner, func(ctx context.Context) (string, error) { return provisioner.build(ctx, b) }},
		{&made.ours, func(ctx context.Context) (string, error) { return ours.build(ctx, b) }},
		{&made.installer, func(ctx context.Context) (string, error) { return chartInstaller.build(ctx, b) }},
		{&made.etcd, func(ctx context.Context) (string, error) { return debianPackage(ctx, b, "etcd-server") }},
	} {
		steps.Go(func() (err error) {
			*step.to, err = step.make(sctx)
			return err
		})
	}
	if err := steps.Wait(); err != nil {
		return nil, err
	}
	p.Images = []string{made.driverImages}
	p.ImageNames = []string{p.DriverImage, p.NextDriverImage, PodImage, agnhostImage, busyboxImage, glibcImage, nginxImage}
	if err := b.addProgramImages(ctx, p, names.sidecars, made.ours, made.provisioner, made.sidecars); err != nil {
		return nil, err
	}
	tests, err := b.testImages(ctx, made.ours, made.kubernetes)
	if err != nil {
		return nil, err
	}
	p.Images = append(p.Images, tests)
	if p.Bin, err = b.bin(ctx, made.kubernetes,
		filepath.Join(made.etcd, "usr/bin/etcd"), filepath.Join(made.sidecars, "snapshot-controller"),
		filepath.Join(made.installer, "release")); err != nil {
		return nil, err
	}
	p.SnapshotCRDs, err = b.snapshotCRDs(ctx)
	return p, err
}

// newBuilder finds the repository and opens the cache.
func newBuilder(ctx context.Context, cacheDir string) (*builder, error) {
	root, err := repository()
	if err != nil {
		return nil, err
	}
	cacheDir, err = filepath.Abs(cacheDir)
	if err != nil {
		return nil, err
	}
	c, err := openCache(ctx, filepath.Join(cacheDir, "parts"), os.Stderr)
	if err != nil {
		return nil, err
	}
	return &builder{root: root, cache: c}, nil
}

// repository returns the root of the repository that the working directory is in.
func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		_, err := os.Stat(filepath.Join(dir, "charts/csi-imgdisk/Chart.yaml"))
		if err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("the working directory is not in csi-imgdisk's repository")
		}
	}
}

// addProgramImages adds the sidecars, pause and what is alone in an image of upstream's tests.
// Their programs are in some of the directories.
func (b *builder) addProgramImages(ctx context.Context, p *Parts, sidecars []string, dirs ...string) error {
	for _, image := range append(sidecars, pauseImage, populatorImage) {
		program, err := find(programOf(image), dirs)
		if err != nil {
			return fmt.Errorf("image %s: %w", image, err)
		}
		names := []string{image}
		if image == pauseImage {
			names = append(names, validatorImage)
		}
		path, err := b.programImage(ctx, program, names...)
		if err != nil {
			return err
		}
		p.Images = append(p.Images, path)
		p.ImageNames = append(p.ImageNames, names...)
	}
	return nil
}

// find returns the path of a file that is in one of several directories.
func find(name string, dirs []string) (string, error) {
	for _, dir := range dirs {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return "", fmt.Errorf("no program %s was built", name)
}

// bin makes one directory of Kubernetes' programs and others.
func (b *builder) bin(ctx context.Context, kubernetes string, others ...string) (string, error) {
	k := newKey().text(kubernetes).text(others...)
	return b.cache.get(ctx, "bin", k, func(_ context.Context, dir string) error {
		programs, err := filepath.Glob(filepath.Join(kubernetes, "kube*"))
		for _, path := range append(programs, others...) {
			err = errors.Join(err, link(path, filepath.Join(dir, filepath.Base(path))))
		}
		return err
	})
}

// link gives a file a second name, where that can be, or copies it.
func link(from, to string) error {
	if err := os.Link(from, to); err == nil {
		return nil
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// snapshotCRDs returns the files that the snapshotter's client module brings. Those of group
// snapshots are among them: the controllers look whether they are there.
func (b *builder) snapshotCRDs(ctx context.Context) ([]string, error) {
	const module = "github.com/kubernetes-csi/external-snapshotter/client/v8"
	sums := filepath.Join(b.root, "e2e/sidecars/go.sum")
	dir, err := b.cache.get(ctx, "snapshot-crds", newKey().files(sums), func(ctx context.Context, dir string) error {
		source, err := output(ctx, filepath.Dir(sums), b.cache.log, "go", "list", "-m", "-f", "{{.Dir}}", module)
		if err != nil {
			return err
		}
		files, err := filepath.Glob(filepath.Join(source, "config/crd/*snapshot.storage*.yaml"))
		if err != nil || len(files) == 0 {
			return fmt.Errorf("%s has no CRDs in config/crd: %w", source, err)
		}
		for _, path := range files {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, filepath.Base(path)), data, 0o644); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return filepath.Glob(filepath.Join(dir, "*.yaml"))
}
