package formattest

import (
	"fmt"
	"path"
	"runtime"
	"strings"
	"sync"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// tracker is a file system that knows which files are open, and by whom they were
// opened: what is still open when a test ends, or a failed call returns, is a leak, and
// so is the lock it holds.
type tracker struct {
	vfs.FS

	mu   sync.Mutex
	open map[*trackedFile][]uintptr // the callers of the call that opened it
	// beforeWrite, if set, sees every write before it is done.
	beforeWrite func(name string, p []byte, off int64)
}

func track(fsys vfs.FS) *tracker {
	return &tracker{FS: fsys, open: map[*trackedFile][]uintptr{}}
}

func (t *tracker) Open(name string, mode vfs.Mode) (vfs.File, error) {
	return t.opened(t.FS.Open(name, mode))
}

func (t *tracker) Create(name string) (vfs.File, error) {
	return t.opened(t.FS.Create(name))
}

func (t *tracker) opened(f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	tracked := &trackedFile{File: f, t: t}
	callers := make([]uintptr, 8)
	t.open[tracked] = callers[:runtime.Callers(3, callers)]
	return tracked, nil
}

// leaks describes the files that are open, "" if there are none.
func (t *tracker) leaks() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var b strings.Builder
	for f, callers := range t.open {
		fmt.Fprintf(&b, "%s is still open; it was opened by\n%s", f.Name(), showCallers(callers))
	}
	return b.String()
}

func showCallers(callers []uintptr) string {
	var b strings.Builder
	frames := runtime.CallersFrames(callers)
	for {
		frame, more := frames.Next()
		fmt.Fprintf(&b, "    %s:%d\n", path.Base(frame.Function), frame.Line)
		if !more {
			return b.String()
		}
	}
}

type trackedFile struct {
	vfs.File
	t *tracker
}

func (f *trackedFile) WriteAt(p []byte, off int64) (int, error) {
	if f.t.beforeWrite != nil {
		f.t.beforeWrite(f.Name(), p, off)
	}
	return f.File.WriteAt(p, off)
}

func (f *trackedFile) Close() error {
	f.t.mu.Lock()
	delete(f.t.open, f)
	f.t.mu.Unlock()
	return f.File.Close()
}
