package nbdlocal

import (
	"sync/atomic"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// holes decides whether a device is asked, before a large read, if there is anything to
// read. For images that looks into a table. But where blocks have their places for good,
// holes are the file system's affair, and some look for the end of the data page by page,
// which takes longer than reading. That is found out by asking, and tried again rarely. It
// is shared by all connections of a device and safe for concurrent use.
type holes struct {
	pause atomic.Int64 // large reads for which not to ask
}

const (
	// slowAnswer is a good deal more than a table takes, and less than a large read.
	slowAnswer = 100 * time.Microsecond
	// answerPause is for how many large reads a device that took longer is not asked.
	answerPause = 1000
)

// cover reports whether all of a range is known to be zeroes. A device without clusters is
// not asked: it is a flat file.
func (h *holes) cover(dev block.Device, off, n int64) bool {
	if dev.Info().ClusterBytes == 0 || h.pause.Load() > 0 && h.pause.Add(-1) > 0 {
		return false
	}
	start := clock()
	e, err := dev.Map(off, n)
	if clock()-start > slowAnswer {
		h.pause.Store(answerPause)
	}
	return err == nil && e.State != block.Data && e.Off <= off && e.Off+e.Len >= off+n
}
