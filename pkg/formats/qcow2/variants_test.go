package qcow2_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/qcow2"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// snapshotted creates images all of whose clusters an internal snapshot shares, tables as
// well: whatever is written first is copied.
type snapshotted struct{ qcow2.Format }

func (s snapshotted) Create(ctx context.Context, req formats.CreateRequest) error {
	if req.Parent != nil {
		return s.Format.Create(ctx, req)
	}
	if req.SizeBytes > 256<<10 {
		return fmt.Errorf("%d bytes with a snapshot: %w: one refcount block has no room for it", req.SizeBytes, block.ErrUnsupported)
	}
	req.Preallocation = formats.PreallocateMetadata
	if err := s.Format.Create(ctx, req); err != nil {
		return err
	}
	f, err := req.FS.Open(req.Name, vfs.ReadWrite)
	if err == nil {
		err = errors.Join(addSnapshot(f), f.Close())
	}
	if err != nil {
		return errors.Join(err, req.FS.Remove(req.Name))
	}
	return nil
}

// addSnapshot gives an image with 16-bit refcounts in one block a snapshot of everything.
// Meanwhile there is no header.
func addSnapshot(f vfs.File) error {
	size, err := f.Size()
	if err != nil {
		return err
	}
	p := make([]byte, size)
	if _, err := f.ReadAt(p, 0); err != nil {
		return err
	}
	be := binary.BigEndian
	cluster := uint64(1) << be.Uint32(p[20:])
	l1, entries := be.Uint64(p[40:]), uint64(be.Uint32(p[36:]))
	block := be.Uint64(p[be.Uint64(p[48:]):])
	addRef := func(off uint64) { be.PutUint16(p[block+off/cluster*2:], be.Uint16(p[block+off/cluster*2:])+1) }
	const offset = 1<<56 - 1<<9
	for i := range entries {
		p[l1+8*i] &= 0x7f
		l2 := be.Uint64(p[l1+8*i:]) & offset
		addRef(l2)
		for j := range cluster / 8 {
			if e := be.Uint64(p[l2+8*j:]); e != 0 {
				p[l2+8*j] &= 0x7f
				addRef(e & offset)
			}
		}
	}
	l1Copy := uint64(len(p))
	p = append(p, make([]byte, 2*cluster)...)
	copy(p[l1Copy:], p[l1:l1+entries*8])
	table := l1Copy + cluster
	be.PutUint64(p[table:], l1Copy)
	be.PutUint32(p[table+8:], uint32(entries))
	be.PutUint16(p[table+12:], 1) // id
	be.PutUint16(p[table+14:], 4) // name
	be.PutUint32(p[table+36:], 16)
	be.PutUint64(p[table+48:], be.Uint64(p[24:])) // the disk's size
	copy(p[table+56:], "1kept")
	addRef(l1Copy)
	addRef(table)
	be.PutUint32(p[60:], 1)
	be.PutUint64(p[64:], table)
	for _, part := range []struct {
		p   []byte
		off int64
	}{{make([]byte, 512), 0}, {p[512:], 512}, {p[:512], 0}} {
		if _, err := f.WriteAt(part.p, part.off); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
	return nil
}
