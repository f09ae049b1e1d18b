package attachtest

import (
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// fileDevice is a plain file as a block.Device. All writes are synchronous system
// calls: a dead process has none in flight.
type fileDevice struct {
	file *os.File
	cfg  serverConfig
}

func openFileDevice(cfg serverConfig) (*fileDevice, error) {
	f, err := os.OpenFile(cfg.Path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return &fileDevice{file: f, cfg: cfg}, nil
}

// check makes the device as slow as asked, and returns errors for bad ranges.
func (d *fileDevice) check(off, n int64) error {
	if d.cfg.DelayMillis > 0 {
		time.Sleep(time.Duration(d.cfg.DelayMillis) * time.Millisecond)
	}
	for d.cfg.StallFile != "" && off >= d.cfg.StallAt && unix.Access(d.cfg.StallFile, unix.F_OK) == nil {
		time.Sleep(time.Millisecond)
	}
	return block.CheckRange(off, n, d.Info().SizeBytes)
}

func (d *fileDevice) ReadAt(p []byte, off int64) (int, error) {
	if err := d.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	n, err := d.file.ReadAt(p, off)
	if err == io.EOF { // truncated behind our back
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (d *fileDevice) checkWrite(off, n int64) error {
	switch err := d.check(off, n); {
	case err != nil:
		return err
	case d.cfg.ReadOnly:
		return fmt.Errorf("write to %s: %w", d.cfg.Path, block.ErrReadOnly)
	case d.cfg.FullAt > 0 && off+n > d.cfg.FullAt:
		return fmt.Errorf("write to %s: %w", d.cfg.Path, block.ErrNoSpace)
	}
	return nil
}

func (d *fileDevice) WriteAt(p []byte, off int64) (int, error) {
	if err := d.checkWrite(off, int64(len(p))); err != nil {
		return 0, err
	}
	return d.file.WriteAt(p, off)
}

func (d *fileDevice) WriteZeroes(off, n int64, flags block.ZeroFlags) error {
	if err := d.checkWrite(off, n); err != nil {
		return err
	}
	mode := uint32(unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE)
	if flags&block.ZeroKeepAllocated != 0 {
		return d.writeZeroes(off, n)
	}
	return unix.Fallocate(int(d.file.Fd()), mode, off, n)
}

func (d *fileDevice) writeZeroes(off, n int64) error {
	zeroes := make([]byte, 1<<20)
	for n > 0 {
		k, err := d.file.WriteAt(zeroes[:min(n, int64(len(zeroes)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}

func (d *fileDevice) Discard(off, n int64) error { return d.WriteZeroes(off, n, 0) }

func (d *fileDevice) Flush() error { return unix.Fdatasync(int(d.file.Fd())) }

func (d *fileDevice) Map(off, n int64) (block.Extent, error) {
	return block.Extent{Off: off, Len: n, State: block.Data, File: d.cfg.Path, FileOff: off}, nil
}

func (d *fileDevice) Info() block.Info {
	info := block.Info{LogicalBlockBytes: 512, ClusterBytes: clusterBytes, ReadOnly: d.cfg.ReadOnly, CanDiscard: true, CanZero: true}
	if fi, err := d.file.Stat(); err == nil {
		info.SizeBytes = fi.Size()
	}
	return info
}

func (d *fileDevice) Close() error { return d.file.Close() }
