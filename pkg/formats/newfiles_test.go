package formats_test

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"syscall"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// A file that cannot be filled is empty before it is unlocked: an NFS client would wait for
// what cannot be written. Then it is removed.
func TestMakeFile_Full(t *testing.T) {
	m := vfs.NewMem()
	var done []vfs.OpKind
	full := vfs.Inject(m, func(op vfs.Op) error {
		done = append(done, op.Kind)
		if op.Kind == vfs.OpSync {
			return syscall.ENOSPC
		}
		return nil
	})
	err := formats.MakeFile(t.Context(), full, "disk", func(_ context.Context, f vfs.File) error {
		_, err := f.WriteAt(make([]byte, 4096), 0)
		return err
	})
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%v, want %v", err, syscall.ENOSPC)
	}
	truncated, closed := slices.Index(done, vfs.OpTruncate), slices.Index(done, vfs.OpClose)
	if truncated < slices.Index(done, vfs.OpSync) || truncated > closed {
		t.Errorf("done: %v, want the file truncated after its sync has failed, before it is closed", done)
	}
	if _, err := m.Stat("disk"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file is there: %v", err)
	}
}
