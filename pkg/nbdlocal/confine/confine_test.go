package confine_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/confine"
)

// dirVariable makes a process of this test the one that is confined.
const dirVariable = "IMGDISK_CONFINED_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(dirVariable); dir != "" {
		os.Exit(confined(dir))
	}
	if os.Getenv(ringsVariable) != "" {
		if err := confinedWithRing(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// withCgo says that this test was built with cgo, as for the race detector: then it knows
// not all of its threads, and cannot confine itself.
var withCgo bool

// A confined process does what it has to, and nothing else.
func TestProcess(t *testing.T) {
	if withCgo {
		t.Skip("a program built with cgo cannot confine itself")
	}
	dir := t.TempDir()
	for _, d := range []string{"own", "others", "spent/empty"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"own/image", "own/full", "parent", "others/image", "secret"} {
		if err := os.WriteFile(filepath.Join(dir, f), []byte("contents"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^$")
	cmd.Env = append(os.Environ(), dirVariable+"="+dir)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

// attempt is something that a confined process may do, or not.
type attempt struct {
	name    string
	allowed bool
	needs   int // version of Landlock that denies it; 0: seccomp or capabilities do
	do      func() error
}

// confined confines this process and makes the attempts, on several threads that were
// there before.
func confined(dir string) int {
	var ready, done sync.WaitGroup
	start := make(chan []attempt)
	wrong := make(chan string, 1000)
	const threads = 3
	ready.Add(threads)
	for range threads {
		done.Go(func() {
			runtime.LockOSThread()
			ready.Done()
			for _, a := range <-start {
				err := a.do()
				if a.allowed && err != nil {
					wrong <- fmt.Sprintf("%s: %v", a.name, err)
				}
				if !a.allowed && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
					wrong <- fmt.Sprintf("%s: %v, want it to be denied", a.name, err)
				}
			}
		})
	}
	ready.Wait()
	listener, err := net.Listen("unix", filepath.Join(dir, "own", "socket"))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer listener.Close()
	applied, err := confine.Process(confine.Rules{
		Read:   []string{filepath.Join(dir, "parent"), filepath.Join(dir, "missing")},
		List:   []string{dir},
		Write:  []string{filepath.Join(dir, "own")},
		Remove: []string{filepath.Join(dir, "spent")},
	})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println(applied)
	var list []attempt
	for _, a := range attempts(dir) {
		if a.needs <= applied.LandlockABI && (a.needs > 0 || a.allowed || applied.Seccomp) {
			list = append(list, a)
		}
	}
	for range threads {
		start <- list
	}
	done.Wait()
	close(wrong)
	code := 0
	for w := range wrong {
		fmt.Println(w)
		code = 1
	}
	if err := os.Remove(filepath.Join(dir, "spent", "empty")); err != nil && applied.LandlockABI > 0 {
		fmt.Println(err)
		code = 1
	}
	return code
}

func attempts(dir string) []attempt {
	path := func(name string) string { return filepath.Join(dir, name) }
	read := func(name string) func() error {
		return func() error {
			_, err := os.ReadFile(path(name))
			return err
		}
	}
	return []attempt{
		{name: "change its own file", allowed: true, do: func() error {
			f, err := os.OpenFile(path("own/image"), os.O_RDWR, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteAt([]byte("more"), 4096)
			return errors.Join(err, f.Truncate(8192), f.Sync(), f.Close())
		}},
		{name: "make, rename and remove a file of its own", allowed: true, do: func() error {
			name := fmt.Sprintf("%s.%d", path("own/new"), unix.Gettid())
			return errors.Join(os.WriteFile(name, []byte("x"), 0o600), os.Rename(name, name+"2"), os.Remove(name+"2"))
		}},
		{name: "read what it stands on", allowed: true, do: read("parent")},
		{name: "list names", allowed: true, do: func() error { _, err := os.ReadDir(dir); return err }},
		{name: "wait, collect, start threads", allowed: true, do: func() error {
			time.Sleep(time.Millisecond)
			runtime.GC()
			var many sync.WaitGroup
			for range 8 {
				many.Go(func() { runtime.LockOSThread() })
			}
			many.Wait()
			return nil
		}},
		{name: "read another volume", needs: 1, do: read("others/image")},
		{name: "read a secret", needs: 1, do: read("secret")},
		{name: "read /etc/passwd", needs: 1, do: func() error { _, err := os.ReadFile("/etc/passwd"); return err }},
		{name: "open a device", needs: 1, do: func() error { _, err := os.Open("/dev/null"); return err }},
		{name: "change what it stands on", needs: 1, do: func() error { return os.WriteFile(path("parent"), nil, 0o600) }},
		{name: "cut what it stands on", needs: 3, do: func() error { return os.Truncate(path("parent"), 0) }},
		{name: "remove another volume", needs: 1, do: func() error { return os.Remove(path("others/image")) }},
		{name: "move another volume to itself", needs: 1, do: func() error { return os.Rename(path("others/image"), path("own/stolen")) }},
		{name: "make a file elsewhere", needs: 1, do: func() error { return os.WriteFile(path("others/new"), nil, 0o600) }},
		{name: "make a link to a secret", needs: 1, do: func() error {
			err := os.Symlink(path("secret"), path("own/link"))
			if errors.Is(err, fs.ErrExist) {
				return nil
			}
			return err
		}},
		{name: "make a network socket", do: func() error { _, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0); return err }},
		{name: "make a unix socket", do: func() error { _, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0); return err }},
		{name: "make a netlink socket", do: func() error {
			_, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_GENERIC)
			return err
		}},
		{name: "run a program", do: func() error { return unix.Exec("/proc/self/exe", []string{"x"}, nil) }},
		{name: "start a process", do: func() error { return exec.Command("/proc/self/exe").Run() }},
		{name: "mount", do: func() error { return unix.Mount("none", dir, "tmpfs", 0, "") }},
		{name: "look into another process", do: func() error { return unix.PtraceAttach(os.Getppid()) }},
		{name: "make code", do: func() error {
			_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
			return err
		}},
		{name: "make a namespace", do: func() error { return unix.Unshare(unix.CLONE_NEWUSER) }},
		{name: "load a BPF program", do: func() error {
			_, _, errno := syscall.Syscall(unix.SYS_BPF, 0, 0, 0)
			return errno
		}},
		{name: "use io_uring", do: func() error {
			_, _, errno := syscall.Syscall(unix.SYS_IO_URING_SETUP, 1, 0, 0)
			return errno
		}},
	}
}

// What is in force can be read off the process.
func TestApplied_String(t *testing.T) {
	for applied, want := range map[confine.Applied]string{
		{LandlockABI: 5, Seccomp: true}: "Landlock version 5; seccomp",
		{}:                              "unconfined files: the kernel has no Landlock; unfiltered system calls: the kernel has no seccomp",
	} {
		if got := applied.String(); !strings.EqualFold(got, want) {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
