package confine

import (
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// Rules say what a process may still do with the file system. Paths that do not exist are
// left out. What is open stays open, and can be read and written as it was.
type Rules struct {
	// Read lists files, and directories whose files and names can be read.
	Read []string
	// List lists directories of which names alone can be read, and those below them.
	List []string
	// Write lists directories in which files can be made, changed, and removed.
	Write []string
	// Remove lists directories of which empty directories can be removed.
	Remove []string
	// Rings leaves the process the io_uring instances that it has made before. It can make
	// no others. The filter of system calls does not see what a ring is asked to do: those
	// instances should be limited to operations that need no watching.
	Rings bool
}

// Applied says what is in force.
type Applied struct {
	// LandlockABI is the version of Landlock that the kernel has; 0: the kernel has
	// none, and the file system is open to the process as before.
	LandlockABI int
	// Seccomp says that system calls are filtered.
	Seccomp bool
}

// String says in words what is in force.
func (a Applied) String() string {
	files, calls := "unconfined files: the kernel has no Landlock", "unfiltered system calls: the kernel has no seccomp"
	if a.LandlockABI > 0 {
		files = fmt.Sprintf("Landlock version %d", a.LandlockABI)
	}
	if a.Seccomp {
		calls = "seccomp"
	}
	return files + "; " + calls
}

// keptCapabilities let the process reach files of the store that belong to somebody else:
// what Landlock allows, whoever owns it.
const keptCapabilities = 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER

// Process confines this process. What the kernel does not have is left out, as Applied
// tells; what it has and refuses is an error, after which the process should end: it may
// be confined in part. It cannot be undone, and a second call can only take away more.
func Process(rules Rules) (Applied, error) {
	var applied Applied
	if err := onAllThreads("forbid new privileges", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		return applied, err
	}
	abi, err := restrictFiles(rules)
	if err != nil {
		return applied, err
	}
	applied.LandlockABI = abi
	if err := dropCapabilities(); err != nil {
		return applied, err
	}
	applied.Seccomp, err = filterCalls(rules.Rings)
	return applied, err
}

// ErrUnsupported says that this program cannot confine itself: it was built with cgo, and
// so does not know all of its threads.
var ErrUnsupported = errors.New("not possible in a program built with cgo: build it with CGO_ENABLED=0")

// onAllThreads makes a system call that is about the calling thread for every thread.
func onAllThreads(what string, call, a1, a2, a3 uintptr) error {
	_, _, errno := syscall.AllThreadsSyscall(call, a1, a2, a3)
	switch {
	case errno == syscall.ENOTSUP:
		return fmt.Errorf("confine: %w", ErrUnsupported)
	case errno != 0:
		return fmt.Errorf("confine: %s: %w", what, errno)
	}
	return nil
}
