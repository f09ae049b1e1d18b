package formats

import (
	"cmp"
	"context"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Measurement is how much space an image takes.
type Measurement struct {
	RequiredBytes       int64 // with the data that there is
	FullyAllocatedBytes int64 // when all of it has been written
}

// Measure says how long the files of an image will be that is made as req says, as far as
// it has a size, a subformat and options. src is what is going to be converted, nil for an
// empty image; its allocation counts, its contents are not looked at. Compression is not
// taken into account.
func Measure(ctx context.Context, to Format, req CreateRequest, src block.Device) (Measurement, error) {
	if req.SizeBytes == 0 && src != nil {
		req.SizeBytes = src.Info().SizeBytes
	}
	req.SizeBytes = RoundSize(to, req.SizeBytes)
	req.Name = cmp.Or(req.Name, "image") // it is not made, but its length may count
	cluster := cmp.Or(req.ClusterBytes, to.Options().DefaultClusterBytes, sparseUnitBytes)
	var data int64
	if src != nil {
		var err error
		if data, err = dataBytes(ctx, src, cluster); err != nil {
			return Measurement{}, err
		}
	}
	var m Measurement
	var err error
	if m.RequiredBytes, err = to.Measure(req, data); err == nil {
		m.FullyAllocatedBytes, err = to.Measure(req, (req.SizeBytes+cluster-1)/cluster*cluster)
	}
	return m, err
}

// dataBytes returns how many bytes the clusters have together that hold data.
func dataBytes(ctx context.Context, src block.Device, cluster int64) (int64, error) {
	size := src.Info().SizeBytes
	var total, counted int64 // counted: clusters below this guest offset
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		extent, err := src.Map(off, size-off)
		if err == nil && extent.Len <= 0 {
			err = fmt.Errorf("an extent of %d bytes: %w", extent.Len, block.ErrCorrupt)
		}
		if err != nil {
			return 0, fmt.Errorf("map guest offset %d: %w", off, err)
		}
		off += extent.Len
		if extent.State == block.Data {
			start := max(counted, extent.Off/cluster*cluster)
			counted = (off + cluster - 1) / cluster * cluster
			total += max(0, counted-start)
		}
	}
	return total, nil
}
