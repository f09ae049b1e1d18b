package vmdk

import (
	"context"
	"errors"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// minReclaimBytes is how much free space a small image must hold at least to be worth
// looking for.
const minReclaimBytes = 64 << 20

// reclaim finds the grains that nothing refers to, for reuse. The format has no map of
// them, and finding them means reading all tables, so it is done only when there must be
// many: without it, a disk that is discarded and rewritten between one opening and the
// next would sooner or later reach the end of what entries can say. A damaged image's
// grains are left alone: what looks free there may be what a bad entry has lost.
func (s *sparse) reclaim() error {
	if !s.crowded() {
		return nil
	}
	k := checker{ctx: context.Background(), sparse: s, result: new(engine.CheckResult), step: func() {}}
	if err := k.scan(); errors.Is(err, block.ErrUnsupported) {
		return nil // the file is too long to be looked through; it is written at its end
	} else if err != nil {
		return err
	}
	if k.result.Corruptions > 0 {
		return nil
	}
	k.eachFree(func(start, end int64) {
		start, end = s.wholeGrains(start), end>>s.grainShift<<s.grainShift
		if start < end {
			s.space.Free(start, end-start, false)
		}
	})
	return nil
}

// crowded reports whether the file is much longer than all the guest's grains together, or
// nearly as long as it can become.
func (s *sparse) crowded() bool {
	guest := s.wholeGrains(s.guestEnd - s.guestOff)
	return s.fileEnd > int64(s.dataStart)*sectorBytes+guest+max(guest/4, minReclaimBytes) ||
		s.fileEnd > maxFileSectors*sectorBytes/16*15
}
