package supervisor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// inheritedLockEnv tells a process that Ensure started that it has inherited the state
// directory's lock, and as which descriptor.
const (
	inheritedLockEnv = "IMGDISK_SUPERVISOR_LOCK_FD"
	inheritedLockFD  = 3 // exec.Cmd's first ExtraFiles
)

func lockPath(stateDir string) string { return filepath.Join(stateDir, "supervisor.lock") }

// lockSupervisor takes the lock that says that a supervisor runs for a state directory,
// is starting or is ending; block.ErrLocked if one does.
//
// The lock is an open file description's. Ensure takes it and the supervisor that it
// starts inherits it: from before its first instruction to its end there is no moment
// at which a supervisor is not seen, so one that nobody waits for any more can still be
// found and stopped.
func lockSupervisor(stateDir string) (*os.File, error) {
	path := lockPath(stateDir)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	if err := takeLock(f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// takeLock takes the lock, which f's open file description may have already.
func takeLock(f *os.File) error {
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
	if errors.Is(err, unix.EAGAIN) {
		err = block.ErrLocked
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return nil
}

// inheritedLock returns the lock that this process was started with, nil if it was not.
func inheritedLock(stateDir string) (*os.File, error) {
	if os.Getenv(inheritedLockEnv) != strconv.Itoa(inheritedLockFD) {
		return nil, nil
	}
	if err := os.Unsetenv(inheritedLockEnv); err != nil { // it is not the servers'
		return nil, err
	}
	unix.CloseOnExec(inheritedLockFD)
	f := os.NewFile(inheritedLockFD, lockPath(stateDir))
	inherited, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("inherited lock: %w", err)
	}
	named, err := os.Stat(lockPath(stateDir))
	if err == nil && !os.SameFile(inherited, named) {
		err = fmt.Errorf("it is not %s: %w", lockPath(stateDir), block.ErrInvalid)
	}
	if err == nil {
		err = takeLock(f)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("inherited lock: %w", err)
	}
	return f, nil
}

// isLocked says whether a supervisor runs for a state directory, or is starting or
// ending. It does not get in its way.
func isLocked(stateDir string) bool {
	f, err := os.Open(lockPath(stateDir))
	if err != nil {
		return false
	}
	defer f.Close()
	lock := unix.Flock_t{Type: unix.F_WRLCK}
	return unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock) == nil && lock.Type != unix.F_UNLCK
}
