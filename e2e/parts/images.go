package parts

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/image/archive"
)

// Names of images that are not the chart's.
const (
	// PodImage is for the tests' own pods: Debian's tools, /bin/busybox and /bin/writer.
	PodImage = "imgdisk.test/pod:1"

	pauseImage = "registry.k8s.io/pause:3.10.2"
)

// Images that the upstream suite's pods name. Those whose originals have other tools have
// Debian's, as its tests only need a shell; the last, of which its test needs only that it
// runs, is pause.
const (
	agnhostImage   = "registry.k8s.io/e2e-test-images/agnhost:2.63.0"
	busyboxImage   = "registry.k8s.io/e2e-test-images/busybox:1.37.0-1"
	glibcImage     = "registry.k8s.io/e2e-test-images/glibc-dns-testing:2.0.0"
	nginxImage     = "registry.k8s.io/e2e-test-images/nginx:1.15-4"
	populatorImage = "registry.k8s.io/sig-storage/hello-populator:v1.0.1"
	validatorImage = "registry.k8s.io/sig-storage/volume-data-source-validator:v1.0.0"
)

// created is when images say that they were made: it is the same for all builds.
var created = time.Unix(0, 0)

// writeImage returns an archive with one image or several. The key says what they are made of;
// build has a directory for layers, which are not kept.
func (b *builder) writeImages(ctx context.Context, name string, k *key, build func(dir string) ([]archive.Image, error)) (string, error) {
	k.sources(filepath.Join(b.root, "image/archive"))
	dir, err := b.cache.get(ctx, "image-"+name, k, func(_ context.Context, dir string) error {
		layers, err := os.MkdirTemp(dir, "layers-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(layers)
		images, err := build(layers)
		if err != nil {
			return err
		}
		return archive.Write(filepath.Join(dir, "image.tar"), created, images...)
	})
	return filepath.Join(dir, "image.tar"), err
}

// programImage is an archive with an image that has nothing but one static program.
func (b *builder) programImage(ctx context.Context, program string, names ...string) (string, error) {
	base := filepath.Base(program)
	return b.writeImages(ctx, base, newKey().text(program).text(names...), func(dir string) ([]archive.Image, error) {
		layer, err := archive.WriteLayer(filepath.Join(dir, "layer"), archive.Content{Files: []archive.File{executable(base, program)}})
		return []archive.Image{{Names: names, Layers: []archive.Layer{layer}, Entrypoint: []string{"/" + base}}}, err
	})
}

// debianImage is an image that has more files than the driver's root file system.
type debianImage struct {
	image archive.Image // but for the layers
	files []archive.File
}

// debianImages is an archive of images that share the root file system.
func (b *builder) debianImages(ctx context.Context, name string, images ...debianImage) (string, error) {
	rootfs, err := b.rootfs(ctx)
	if err != nil {
		return "", err
	}
	k := newKey().text(rootfs)
	for _, i := range images {
		k.text(fmt.Sprintf("%+v", i)) // programs are named by what they are made of
	}
	return b.writeImages(ctx, name, k, func(dir string) ([]archive.Image, error) {
		base, err := archive.KeptLayer(rootfs+".tar.gz", archive.Content{Root: rootfs})
		if err != nil {
			return nil, err
		}
		var list []archive.Image
		for n, i := range images {
			i.image.Layers = []archive.Layer{base}
			if len(i.files) > 0 {
				top, err := archive.WriteLayer(filepath.Join(dir, fmt.Sprint(n)), archive.Content{Files: i.files})
				if err != nil {
					return nil, err
				}
				i.image.Layers = append(i.image.Layers, top)
			}
			list = append(list, i.image)
		}
		return list, nil
	})
}

// rootfs returns the directory with the root file system of the driver's image, made as for
// a release.
func (b *builder) rootfs(ctx context.Context) (string, error) {
	b.rootfsOnce.Do(func() {
		b.rootfsDir, b.rootfsErr = output(ctx, b.root, b.cache.log, filepath.Join(b.root, "image/base.sh"))
	})
	return b.rootfsDir, b.rootfsErr
}

// executable is a file of an image that has a program.
func executable(name, from string) archive.File {
	return archive.File{Name: name, Mode: 0o755, From: from}
}

// testImages is an archive with what the tests' pods and upstream's are made of.
func (b *builder) testImages(ctx context.Context, stand, kube string) (string, error) {
	busybox, err := debianPackage(ctx, b, "busybox-static")
	if err != nil {
		return "", err
	}
	tmp := archive.File{Name: "tmp", Mode: fs.ModeDir | fs.ModeSticky | 0o777}
	return b.debianImages(ctx, "tests",
		debianImage{
			archive.Image{Names: []string{PodImage}, Env: []string{archive.DefaultPath}, Cmd: []string{"sleep", "infinity"}},
			[]archive.File{
				executable("usr/bin/busybox", filepath.Join(busybox, "bin/busybox")),
				executable("usr/bin/writer", filepath.Join(stand, "writer")),
				tmp,
			},
		},
		debianImage{
			archive.Image{Names: []string{agnhostImage}, Env: []string{archive.DefaultPath}, Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}},
			[]archive.File{executable("agnhost", filepath.Join(kube, "agnhost")), tmp},
		},
		debianImage{
			archive.Image{Names: []string{busyboxImage, glibcImage, nginxImage}, Env: []string{archive.DefaultPath}, Cmd: []string{"sh"}},
			[]archive.File{executable("usr/bin/busybox", filepath.Join(busybox, "bin/busybox")), tmp},
		},
	)
}

// driverImages is an archive with the driver as the chart names it, and as it would be
// after an upgrade.
func (b *builder) driverImages(ctx context.Context, name, next string) (string, error) {
	var images []debianImage
	for _, name := range []string{name, next} {
		program := driver
		program.version = name[strings.LastIndexByte(name, ':')+1:]
		program.name += "-" + program.version
		dir, err := program.build(ctx, b)
		if err != nil {
			return "", err
		}
		images = append(images, debianImage{
			archive.Driver(name), []archive.File{executable(archive.DriverProgram, filepath.Join(dir, "csi-imgdisk"))},
		})
	}
	return b.debianImages(ctx, "csi-imgdisk", images...)
}
