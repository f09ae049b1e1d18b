package nbdlocal

import (
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// mappedDevice has clusters, and takes its time to say where they are.
type mappedDevice struct {
	block.Device
	takes time.Duration
	asked int
}

func (d *mappedDevice) Info() block.Info {
	return block.Info{SizeBytes: 1 << 30, ClusterBytes: 64 << 10}
}

func (d *mappedDevice) Map(off, n int64) (block.Extent, error) {
	d.asked++
	time.Sleep(d.takes)
	return block.Extent{Off: off, Len: n, State: block.Zero, FileOff: -1}, nil
}

// TestHoles_SlowAnswers: a device that takes longer to say what it holds than to read it
// is seldom asked.
func TestHoles_SlowAnswers(t *testing.T) {
	const reads = 10 * answerPause
	dev := &mappedDevice{takes: 2 * slowAnswer}
	var h holes
	for range reads {
		h.cover(dev, 0, 1<<20)
	}
	if dev.asked == 0 || dev.asked > 2*reads/answerPause {
		t.Errorf("asked %d times before %d reads, want about %d", dev.asked, reads, reads/answerPause)
	}
}

// TestHoles_FoundAgain: one slow answer does not keep holes from being found for good.
func TestHoles_FoundAgain(t *testing.T) {
	dev := &mappedDevice{takes: 2 * slowAnswer}
	var h holes
	h.cover(dev, 0, 1<<20)
	dev.takes = 0
	for range 100 * answerPause {
		if h.cover(dev, 0, 1<<20) {
			return
		}
	}
	t.Error("no hole was found any more")
}
