package qcow

import (
	"context"
	"errors"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// minReclaimBytes is how much free space a small image must hold at least to be worth looking
// for.
const minReclaimBytes = 64 << 20

// reclaim finds the clusters that nothing refers to, for reuse. The format has no map of them,
// and finding them means reading all tables, so it is done only when there must be many. A
// damaged image's clusters are left alone: what looks free there may be what a bad entry has
// lost.
func (m *image) reclaim() error {
	if !m.crowded() {
		return nil
	}
	k := newChecker(context.Background(), m, nil, nil)
	if err := k.scan(); err != nil {
		if errors.Is(err, block.ErrUnsupported) {
			return nil // it would take too much memory
		}
		return err
	}
	if k.damaged {
		return nil
	}
	k.eachFree(func(free span) { m.space.Free(free.start, free.end-free.start, false) })
	return nil
}

// crowded reports whether the file is much longer than all the guest's clusters together.
func (m *image) crowded() bool {
	guest := m.clusters() << m.clusterShift
	tables := int64(len(m.l1)) * (m.wholeClusters(m.tableBytes()) + entryBytes)
	return m.fileEnd > guest+tables+max(guest/4, minReclaimBytes)
}
