package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Expand grows a volume to at least sizeBytes, live if it is attached, and returns its
// record once that is done. A volume that is large enough is left as it is. A size that,
// rounded up to what the format can do, exceeds limitBytes (0: no limit) is
// ErrOutOfRange. When ctx ends first the wish stays; a failure takes it back.
func (s *Store) Expand(ctx context.Context, name string, sizeBytes, limitBytes int64) (Record, error) {
	if err := checkVolumeName(name); err != nil {
		return Record{}, err
	}
	rec, err := s.wishSize(ctx, name, sizeBytes, limitBytes)
	for pause := wishPause(0); err == nil && rec.SizeBytes < sizeBytes; {
		rec, err = s.advanceExpansion(ctx, name)
		if err != nil || rec.SizeBytes >= sizeBytes {
			break
		}
		if rec.WantSizeBytes < sizeBytes {
			err = fmt.Errorf("the wish was taken back meanwhile: %w", block.ErrBusy)
			break
		}
		if sleepErr := s.awaitHolder(ctx, rec, &pause); sleepErr != nil {
			err = fmt.Errorf("wait for the node that has the volume to do it: %w", sleepErr)
		}
	}
	if err != nil {
		return Record{}, fmt.Errorf("expand volume %s to %d bytes: %w", name, sizeBytes, err)
	}
	return rec, nil
}

// wishSize records the wish to grow.
func (s *Store) wishSize(ctx context.Context, name string, sizeBytes, limitBytes int64) (Record, error) {
	return s.update(ctx, name, func(rec *Record) error {
		if err := rec.exists(); err != nil {
			return err
		}
		if sizeBytes <= rec.SizeBytes {
			if limitBytes > 0 && rec.SizeBytes > limitBytes {
				return fmt.Errorf("%w: it has %d bytes already, more than the limit of %d", block.ErrOutOfRange, rec.SizeBytes, limitBytes)
			}
			return nil
		}
		format, err := formats.Lookup(rec.top().Format)
		if err != nil {
			return err
		}
		size, err := roundSize(format, sizeBytes, limitBytes)
		if err != nil {
			return err
		}
		rec.GrowProblem = nil // wished anew, tried anew
		if size > rec.WantSizeBytes {
			rec.WantSizeBytes = size
			rec.Merging = nil
		}
		return nil
	})
}

// advanceExpansion looks how far a wish is, and carries it out itself when nobody has the
// volume open.
func (s *Store) advanceExpansion(ctx context.Context, name string) (Record, error) {
	var failure error
	rec, err := s.update(ctx, name, func(rec *Record) error {
		switch {
		case rec.WantSizeBytes <= rec.SizeBytes:
			return nil
		case rec.GrowProblem != nil:
			failure = rec.GrowProblem.err()
		case rec.serving() != "":
			return nil
		default:
			failure = s.growOffline(ctx, rec)
		}
		switch {
		case errors.Is(failure, block.ErrLocked) && len(rec.Attachments) > 0 && rec.Attachments[0].ReadOnly:
			failure = fmt.Errorf("%w: node %s reads it", block.ErrBusy, rec.nodes())
			rec.forgetGrowth()
		case errors.Is(failure, block.ErrLocked), ctx.Err() != nil:
			failure = nil // somebody has it open: he will see the wish
		case failure != nil:
			rec.forgetGrowth()
		}
		return nil
	})
	return rec, errors.Join(err, failure)
}

func (r *Record) forgetGrowth() { r.WantSizeBytes, r.GrowProblem = 0, nil }

// grown notes a new size.
func (r *Record) grown(size int64) {
	r.SizeBytes = size
	r.forgetGrowth()
}

// growOffline grows the top layer of a volume that nobody has open.
func (s *Store) growOffline(ctx context.Context, rec *Record) error {
	if err := s.settleRelink(rec); err != nil {
		return err
	}
	img, err := openChain(ctx, s.fs, rec.Layers, vfs.ReadWrite, nil)
	if err != nil {
		return err
	}
	size, err := growImage(img, rec.WantSizeBytes)
	if err = errors.Join(err, img.Close()); err != nil {
		return err
	}
	rec.grown(size)
	return nil
}

// growImage grows an open image and returns its size. An earlier try may have done it
// before it was killed.
func growImage(img *formats.Image, want int64) (int64, error) {
	if have := img.Info().SizeBytes; have < want {
		if err := img.Resize(want); err != nil {
			return 0, err
		}
	}
	return img.Info().SizeBytes, nil
}
