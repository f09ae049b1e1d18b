package formats

import (
	"context"
	"errors"
	"path"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// NewFiles are the files that a Format's Create makes: each is locked before anything is in
// it, and has durable contents when the next is begun. It is used by one goroutine.
type NewFiles struct {
	FS   vfs.FS
	made []string
}

// FillFunc gives a new, empty and locked file its contents. What it writes is made durable
// by its caller, but for what must be durable before something else.
type FillFunc func(ctx context.Context, f vfs.File) error

// Make makes a file. Its name is not durable before Finish.
func (n *NewFiles) Make(ctx context.Context, name string, fill FillFunc) error {
	f, err := n.FS.Create(name)
	if err != nil {
		return err
	}
	n.made = append(n.made, name)
	err = f.Lock(vfs.LockWrite)
	if err == nil {
		err = fill(ctx, f)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		// An NFS client unlocks a file once all of it is written, which on a full server it
		// never is: so there is nothing to be written any more. Whether that works or not,
		// the file is going to be removed.
		_ = f.Truncate(0)
	}
	return errors.Join(err, f.Close())
}

// Finish ends the making of an image: unless err is an error already, it makes the names of
// its files durable. When there is an error it removes what was made, the last file first, and
// returns why.
func (n *NewFiles) Finish(err error) error {
	var dirs []string
	for _, name := range n.made {
		if dir := path.Dir(name); err == nil && !slices.Contains(dirs, dir) {
			dirs, err = append(dirs, dir), SyncNames(n.FS, name)
		}
	}
	if err == nil {
		return nil
	}
	for _, name := range slices.Backward(n.made) {
		err = errors.Join(err, n.FS.Remove(name))
	}
	return err
}

// MakeFile makes an image of one file. On an error nothing is left of it.
func MakeFile(ctx context.Context, fsys vfs.FS, name string, fill FillFunc) error {
	files := NewFiles{FS: fsys}
	return files.Finish(files.Make(ctx, name, fill))
}

// SyncNames makes the names in a file's directory durable, where the file system can.
func SyncNames(fsys vfs.FS, name string) error {
	if err := fsys.SyncDir(path.Dir(name)); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}

// zeroChunkBytes is how many zeroes are written at once.
const zeroChunkBytes = 1 << 20

// Reserve takes the space of a range of a new file's data as p asks: PreallocateFalloc
// allocates it, PreallocateFull writes zeroes, and the others do nothing. The file grows where
// the range ends after it.
func (p Preallocation) Reserve(ctx context.Context, f vfs.File, off, n int64) error {
	switch p {
	case PreallocateFalloc:
		return f.Allocate(off, n)
	case PreallocateFull:
		return writeZeroes(ctx, f, off, n)
	}
	return nil
}

func writeZeroes(ctx context.Context, f vfs.File, off, n int64) error {
	zeroes := make([]byte, min(n, zeroChunkBytes))
	for end := off + n; off < end; off += int64(len(zeroes)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := f.WriteAt(zeroes[:min(int64(len(zeroes)), end-off)], off); err != nil {
			return err
		}
	}
	return nil
}
