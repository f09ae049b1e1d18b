package demo

import (
	"bytes"
	"context"
	_ "embed" // the sample
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

//go:embed sample/sample.vmdk
var sample []byte

const sampleName = "sample.vmdk"

// imageName is what the imported image is called under images/.
func (d *demo) imageName() string {
	if d.options.Image == "" {
		return sampleName
	}
	return filepath.Base(d.options.Image)
}

// placeImage puts the image to import under images/, with the files it consists of.
func (d *demo) placeImage(ctx context.Context) (string, error) {
	if d.options.Image == "" {
		return describeSample(), os.WriteFile(filepath.Join(d.images(), sampleName), sample, 0o600)
	}
	dir, name := filepath.Split(d.options.Image)
	tree, err := vfs.OpenDir(filepath.Join(dir, "."))
	if err != nil {
		return "", err
	}
	defer tree.Close()
	img, err := formats.Open(ctx, tree, name, formats.OpenOptions{Mode: vfs.ReadOnly})
	if err != nil {
		return "", err
	}
	defer func() { _ = img.Close() }() // it was only read
	layers := img.Layers()
	for _, layer := range layers {
		for _, f := range layer.Files {
			if err := placeFile(filepath.Join(dir, f.Name()), filepath.Join(d.images(), f.Name())); err != nil {
				return "", err
			}
		}
	}
	return fmt.Sprintf("%s (%s), %s", layers[0].Format, layers[0].Codec.Describe().Subformat, size(img.Info().SizeBytes)), nil
}

func describeSample() string {
	return fmt.Sprintf("vmdk (streamOptimized), %s, made by qemu-img", size(int64(len(sample))))
}

// placeFile makes a second name for a file, or a copy where that cannot be.
func placeFile(from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return err
	}
	if err := os.Link(from, to); err == nil || errors.Is(err, fs.ErrExist) {
		return nil // a file may be named by several layers
	}
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// withStore looks into the store for the time of a call.
func (d *demo) withStore(ctx context.Context, use func(*store.Store) error) error {
	dir, err := vfs.OpenDir(d.store())
	if err != nil {
		return err
	}
	defer dir.Close()
	s, err := store.Open(ctx, d.storeName(), dir, store.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	return errors.Join(use(s), s.Close())
}

// tree draws the store.
func (d *demo) tree(ctx context.Context) (string, error) {
	var out bytes.Buffer
	err := d.withStore(ctx, func(s *store.Store) error {
		tree, err := s.Tree(ctx)
		if err != nil {
			return err
		}
		return tree.Draw(&out)
	})
	return out.String(), err
}

// layers returns the host paths of a volume's layers, the top one last.
func (d *demo) layers(ctx context.Context, v *volume) (paths []string, err error) {
	err = d.withStore(ctx, func(s *store.Store) error {
		record, err := s.Volume(ctx, v.name)
		for _, layer := range record.Layers {
			paths = append(paths, filepath.Join(d.store(), filepath.FromSlash(layer.File)))
		}
		return err
	})
	if err == nil && len(paths) == 0 {
		err = fmt.Errorf("volume %s has no layers", v.name)
	}
	return paths, err
}

// qemuImg runs qemu-img, which says what is wrong in its output.
func qemuImg(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, "qemu-img", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("qemu-img %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

func haveQEMU() bool {
	_, err := exec.LookPath("qemu-img")
	return err == nil
}

// checkAll has qemu-img check all images in the store, and returns how many there are.
func (d *demo) checkAll(ctx context.Context) (images int, err error) {
	err = filepath.WalkDir(d.store(), func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() || filepath.Ext(path) != ".vmdk" {
			return err
		}
		images++
		return qemuImg(ctx, "check", "-f", "vmdk", path)
	})
	return images, err
}
