package attach

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// A thread apart has what it was told to keep, and nothing that keeps anything else alive;
// the process has all of its descriptors, during it and after it.
func TestApart(t *testing.T) {
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	defer write.Close()
	kept, gone := int(read.Fd()), int(write.Fd())
	self := fmt.Sprintf("/proc/self/fd/%d", gone)
	var all sync.WaitGroup
	for range 50 { // on all threads there are, the first one too
		all.Go(func() {
			err := apart(func() error {
				var st unix.Stat_t
				if err := unix.Fstat(kept, &st); err != nil {
					return fmt.Errorf("what was to be kept: %w", err)
				}
				if err := unix.Fstat(gone, &st); err != unix.EBADF {
					return fmt.Errorf("what was not to be kept: %v, want %v", err, unix.EBADF)
				}
				if _, err := os.Readlink(self); err != nil {
					return fmt.Errorf("the process's own, meanwhile: %w", err)
				}
				return nil
			}, kept)
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	for _, file := range []*os.File{read, write} {
		if _, err := file.Stat(); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	}
	if _, err := os.Readlink(self); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	want := errors.New("as it was")
	if err := apart(func() error { return want }); err != want {
		t.Errorf("apart returned %v", err)
	}
}
