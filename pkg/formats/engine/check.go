package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Check examines the tables of an image that nobody uses: it was opened and is in no
// Disk. With repair it also fixes what it can without touching good data, durably; the
// image must have been opened for writing, and should be opened anew afterwards. What a
// guest sees does not change, so neither do the image's identifiers.
func Check(ctx context.Context, l *Layer, repair bool, progress func(done, total int64)) (CheckResult, error) {
	if !repair {
		return l.Codec.Check(ctx, nil, progress)
	}
	if !l.Writable || l.Codec.Geometry().ReadOnly {
		return CheckResult{}, fmt.Errorf("repair %s: %w", l.Name, block.ErrReadOnly)
	}
	c := bareCommit(l)
	result, err := l.Codec.Check(ctx, c, progress)
	return result, errors.Join(err, c.Sync())
}
