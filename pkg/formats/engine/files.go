package engine

import (
	"errors"
	"sync/atomic"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// AddFile adds an open file to the layer, which owns it from now on, and returns its
// index. It is for a Codec's Resize of images that consist of several files.
func (l *Layer) AddFile(f vfs.File) int {
	l.setFiles(append(l.Files[:len(l.Files):len(l.Files)], f))
	l.Tables.reserve = append(l.Tables.reserve, true)
	return len(l.Files) - 1
}

// DropFiles closes the files from number n on, which the image does not consist of any
// more. It is for a Codec's Resize, after the change is durable.
func (l *Layer) DropFiles(n int) error {
	dropped := l.Files[n:]
	l.setFiles(l.Files[:n:n])
	l.Tables.reserve = l.Tables.reserve[:n]
	l.Tables.Forget()
	var errs []error
	for _, f := range dropped {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// setFiles changes which files there are, with what is kept for each.
func (l *Layer) setFiles(files []vfs.File) {
	unsynced := make([]atomic.Bool, len(files))
	for i := range min(len(files), len(l.unsynced)) {
		unsynced[i].Store(l.unsynced[i].Load())
	}
	l.Files, l.Tables.files, l.unsynced = files, files, unsynced
}
