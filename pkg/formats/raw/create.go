package raw

import (
	"context"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// zeroChunkBytes is how much of a fully preallocated image is written at once.

// Create makes a file of zeroes.
func (Format) Create(ctx context.Context, req formats.CreateRequest) error {
	err := checkRequest(req)
	if err == nil {
		err = formats.MakeFile(ctx, req.FS, req.Name, func(ctx context.Context, f vfs.File) error { return fill(ctx, f, req) })
	}
	if err != nil {
		return fmt.Errorf("raw: create %s: %w", req.Name, err)
	}
	return nil
}

func checkRequest(req formats.CreateRequest) error {
	bad := func(field string, value any, want string) error {
		return fmt.Errorf("%w: %s %v: %s", block.ErrInvalid, field, value, want)
	}
	switch {
	case req.SizeBytes <= 0 || req.SizeBytes > maxSizeBytes || req.SizeBytes%sectorBytes != 0:
		return bad("size", req.SizeBytes, fmt.Sprintf("want a multiple of %d from %d to %d", sectorBytes, sectorBytes, int64(maxSizeBytes)))
	case req.Subformat != "":
		return bad("subformat", req.Subformat, "raw images have none")
	case req.ClusterBytes != 0:
		return bad("cluster size", req.ClusterBytes, "raw images have no clusters")
	case req.Parent != nil:
		return bad("parent", req.Parent.Name, "a raw image cannot stand on another")
	}
	for name := range req.Extra {
		return bad("option", name, "raw images have no options of their own")
	}
	switch req.Preallocation {
	case "", formats.PreallocateOff, formats.PreallocateFalloc, formats.PreallocateFull:
		return nil
	}
	return bad("preallocation", req.Preallocation, "want off, falloc or full")
}

// fill gives a new file its length, and its space if that is wanted.
func fill(ctx context.Context, f vfs.File, req formats.CreateRequest) error {
	if err := f.Truncate(req.SizeBytes); err != nil {
		return err
	}
	return req.Preallocation.Reserve(ctx, f, 0, req.SizeBytes)
}
