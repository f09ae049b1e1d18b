package attach

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// apart runs f, which may have to wait for a server in a system call that nothing
// interrupts, on a thread whose table of descriptors is its own and has nothing of the
// process's in it but keep.
//
// If the process is killed meanwhile, and the server with it, that thread stays in the
// kernel until there is another server, or no connection to one. Were its descriptors the
// process's, they would stay, too: the lock that keeps the next process from starting,
// and the connection's own, which keeps it from ending. Nobody would ever come to help.
//
// What f opens is for f to close, and means nothing elsewhere.
func apart(f func() error, keep ...int) error {
	done := make(chan error, 1)
	go func() { done <- onOwnDescriptors(f, keep) }()
	return <-done
}

// onOwnDescriptors is for a goroutine that ends with it: the thread must not be another's.
func onOwnDescriptors(f func() error, keep []int) error {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The first thread can't end, and what /proc/self says of descriptors is about
		// its. While it is locked another goroutine runs on another.
		defer runtime.UnlockOSThread()
		done := make(chan error, 1)
		go func() { done <- onOwnDescriptors(f, keep) }()
		return <-done
	}
	// Never unlocked: the thread ends with the goroutine.
	if err := unix.Unshare(unix.CLONE_FILES); err != nil {
		return fmt.Errorf("get a table of descriptors for one thread: %w", err)
	}
	if err := closeOthers(keep); err != nil {
		return err
	}
	return f()
}

// closeOthers closes this thread's descriptors but those given, and those of the Go
// runtime, which may use them on any thread: they hold nothing that anybody waits for.
func closeOthers(keep []int) error {
	const own = "/proc/thread-self/fd"
	entries, err := os.ReadDir(own)
	if err != nil {
		return fmt.Errorf("list a thread's descriptors: %w", err)
	}
	for _, entry := range entries {
		fd, err := strconv.Atoi(entry.Name())
		if err != nil || fd <= 2 || slices.Contains(keep, fd) {
			continue
		}
		target, err := os.Readlink(filepath.Join(own, entry.Name()))
		if err == nil && !strings.HasPrefix(target, "anon_inode:[event") {
			unix.Close(fd)
		}
	}
	return nil
}
