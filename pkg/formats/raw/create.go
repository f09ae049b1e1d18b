package raw

import (
	"context"
	"errors"
	"fmt"
	"path"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// zeroChunkBytes is how much of a fully preallocated image is written at once.
const zeroChunkBytes = 1 << 20

// Create makes a file of zeroes.
func (Format) Create(ctx context.Context, req formats.CreateRequest) (err error) {
	if err := checkRequest(req); err != nil {
		return fmt.Errorf("raw: create %s: %w", req.Name, err)
	}
	f, err := req.FS.Create(req.Name)
	if err != nil {
		return fmt.Errorf("raw: %w", err)
	}
	err = fill(ctx, f, req)
	err = errors.Join(err, f.Close())
	if err == nil {
		err = syncName(req.FS, req.Name)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("raw: create %s: %w", req.Name, err), req.FS.Remove(req.Name))
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

// fill gives a new file its length, and its space if that is wanted, durably.
func fill(ctx context.Context, f vfs.File, req formats.CreateRequest) error {
	if err := f.Lock(vfs.LockWrite); err != nil {
		return err
	}
	var err error
	switch req.Preallocation {
	case formats.PreallocateFalloc:
		err = f.Allocate(0, req.SizeBytes)
	case formats.PreallocateFull:
		err = writeZeroes(ctx, f, req.SizeBytes)
	default:
		err = f.Truncate(req.SizeBytes)
	}
	if err != nil {
		return err
	}
	return f.Sync()
}

func writeZeroes(ctx context.Context, f vfs.File, n int64) error {
	zeroes := make([]byte, min(n, zeroChunkBytes))
	for off := int64(0); off < n; off += int64(len(zeroes)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := f.WriteAt(zeroes[:min(int64(len(zeroes)), n-off)], off); err != nil {
			return err
		}
	}
	return nil
}

// syncName makes a new file's name durable, where the file system can.
func syncName(fsys vfs.FS, name string) error {
	if err := fsys.SyncDir(path.Dir(name)); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}
