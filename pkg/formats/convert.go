package formats

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Conversion says how to convert; the zero value is a plain, flat copy.
type Conversion struct {
	Copying
	// ParentFormats are as in [OpenOptions]: needed for a new image that stands on
	// another (req.Parent), in a format that does not name its parent's.
	ParentFormats map[string]string
}

// Convert makes a new image with src's contents: see [Conversion.Convert].
func Convert(ctx context.Context, src block.Device, to Format, req CreateRequest, progress Progress) error {
	return Conversion{}.Convert(ctx, src, to, req, progress)
}

// Convert makes a new image of a format with src's contents: it creates the image as req
// says (its SizeBytes 0 means src's, rounded up to what the format can have), copies into
// it, makes it durable and closes it. With req.Parent it holds only what differs from that,
// which Under must then be opened from. On an error nothing is left of it. While it is made
// it has its own name; see [Staging] for giving it one when it is complete.
func (v Conversion) Convert(ctx context.Context, src block.Device, to Format, req CreateRequest, progress Progress) error {
	if req.SizeBytes == 0 {
		req.SizeBytes = RoundSize(to, src.Info().SizeBytes)
	}
	made := &madeFiles{FS: req.FS}
	create := req
	create.FS = made
	if err := to.Create(ctx, create); err != nil {
		return err
	}
	if err := v.fill(ctx, src, to, req, progress); err != nil {
		return removeFailed(err, req.FS, append(made.names, req.Name)) // it may have been renamed
	}
	return nil
}

// madeFiles notes which files are made through it: those of an image that has just been
// created and cannot be opened to be asked.
type madeFiles struct {
	vfs.FS
	names []string
}

func (m *madeFiles) Create(name string) (vfs.File, error) {
	f, err := m.FS.Create(name)
	if err == nil {
		m.names = append(m.names, name)
	}
	return f, err
}

// RoundSize returns the smallest guest size that an image of a format can have and n bytes
// fit into.
func RoundSize(f Format, n int64) int64 {
	m := cmp.Or(f.Options().SizeMultiple, 1)
	return (n + m - 1) / m * m
}

// fill copies src into a new image and makes it durable.
func (v Conversion) fill(ctx context.Context, src block.Device, to Format, req CreateRequest, progress Progress) error {
	dst, err := Open(ctx, req.FS, req.Name, OpenOptions{
		Format: to.Name(), Mode: vfs.ReadWrite, Secret: req.Secret, ParentFormats: v.ParentFormats,
	})
	if err != nil {
		return err
	}
	err = v.Copy(ctx, dst, src, progress)
	if err == nil && v.Under != nil {
		err = clearTail(dst, src)
	}
	return errors.Join(err, dst.Close())
}

// clearTail zeroes what a disk has past the end of another: a parent may have data there.
func clearTail(dst, src block.Device) error {
	end, size := src.Info().SizeBytes, dst.Info().SizeBytes
	if err := dst.WriteZeroes(end, size-end, 0); err != nil {
		return fmt.Errorf("zero %d bytes at guest offset %d: %w", size-end, end, err)
	}
	return nil
}

// removeFailed removes what a failed conversion made, and returns why it failed.
func removeFailed(err error, fsys vfs.FS, made []string) error {
	for _, name := range made {
		if e := fsys.Remove(name); e != nil && !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, fmt.Errorf("remove the unfinished %s: %w", name, e))
		}
	}
	return err
}
