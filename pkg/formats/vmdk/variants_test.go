package vmdk_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/vmdk"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// lazyTables creates images without grain tables: each is made when it is needed.
type lazyTables struct{ vmdk.Format }

func (l lazyTables) Create(ctx context.Context, req formats.CreateRequest) error {
	if err := l.Format.Create(ctx, req); err != nil {
		return err
	}
	return changeFile(req.FS, req.Name, func(f vfs.File) error {
		head := make([]byte, 512)
		if _, err := f.ReadAt(head, 0); err != nil {
			return err
		}
		tables := (req.SizeBytes-1)/(req.ClusterBytes*512) + 1
		if req.SizeBytes == 0 {
			tables = 1 // an overlay on something small
		}
		for _, field := range []int{48, 56} {
			at := int64(binary.LittleEndian.Uint64(head[field:])) * 512
			if _, err := f.WriteAt(make([]byte, 4*tables), at); err != nil {
				return err
			}
		}
		return nil
	})
}

func changeFile(fsys vfs.FS, name string, change func(vfs.File) error) error {
	f, err := fsys.Open(name, vfs.ReadWrite)
	if err == nil {
		err = errors.Join(change(f), f.Sync(), f.Close())
	}
	if err != nil {
		return errors.Join(err, fsys.Remove(name))
	}
	return nil
}

// split creates images of several extents, the first of which ends within a grain.
type split struct{ vmdk.Format }

func (s split) Create(ctx context.Context, req formats.CreateRequest) (err error) {
	if req.Parent != nil {
		return s.Format.Create(ctx, req)
	}
	var made []string
	defer func() {
		for _, name := range made {
			if err != nil {
				err = errors.Join(err, req.FS.Remove(name))
			}
		}
	}()
	sectors := req.SizeBytes / 512
	first, second := sectors/3/8*8+5, sectors/3
	text := "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentSparse\"\n"
	for i, length := range []int64{first, second, sectors - first - second} {
		name := fmt.Sprintf("extent-%d.vmdk", i)
		text += fmt.Sprintf("RW %d SPARSE \"%s\"\n", length, name)
		extent := req
		extent.Name, extent.SizeBytes = name, length*512
		if err := s.Format.Create(ctx, extent); err != nil {
			return err
		}
		made = append(made, name)
	}
	f, err := req.FS.Create(req.Name)
	if err != nil {
		return err
	}
	made = append(made, req.Name)
	_, err = f.WriteAt([]byte(text), 0)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return req.FS.SyncDir(".")
}

// seSparse creates seSparse images, of which there are otherwise only ESXi's: a COWD image
// whose extent is replaced, and then what the descriptor says of it.
type seSparse struct{ vmdk.Format }

func (s seSparse) Create(ctx context.Context, req formats.CreateRequest) error {
	req.Subformat, req.ClusterBytes = "vmfsSparse", 0
	if err := s.Format.Create(ctx, req); err != nil {
		return err
	}
	size := req.SizeBytes
	if size == 0 {
		size = req.Parent.Layer.Codec.Geometry().SizeBytes
	}
	name := strings.TrimSuffix(req.Name, ".vmdk") + "-delta.vmdk"
	err := changeFile(req.FS, name, func(f vfs.File) error {
		if err := f.Truncate(0); err != nil {
			return err
		}
		_, err := f.WriteAt(newSELayout(size).extent(), 0)
		return err
	})
	if err != nil {
		return errors.Join(err, req.FS.Remove(req.Name))
	}
	err = changeFile(req.FS, req.Name, func(f vfs.File) error {
		n, err := f.Size()
		if err != nil {
			return err
		}
		text := make([]byte, n)
		if _, err := f.ReadAt(text, 0); err != nil {
			return err
		}
		changed := strings.NewReplacer("\"vmfsSparse\"", "\"seSparse\"", " VMFSSPARSE ", " SESPARSE ").Replace(string(text))
		if err := f.Truncate(int64(len(changed))); err != nil {
			return err
		}
		_, err = f.WriteAt([]byte(changed), 0)
		return err
	})
	if err != nil {
		return errors.Join(err, req.FS.Remove(name))
	}
	return nil
}
